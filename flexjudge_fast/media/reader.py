"""Reads images, videos, recordings and molecules in threads, ahead of the model that judges them."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flexjudge_fast.errors import (
    EngineStateError,
    FlexJudgeError,
    MediaError,
    RequestTooLargeError,
    UnsupportedMediaError,
)
from flexjudge_fast.media.audio import prepare_audio
from flexjudge_fast.media.audio_pool import AudioDecoder
from flexjudge_fast.media.audio_processor import AudioProcessor
from flexjudge_fast.media.image import load_image, prepare_image
from flexjudge_fast.media.image_file import ImageLimits
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.media.keys import media_key, pixel_digest
from flexjudge_fast.media.molecule import prepare_molecule
from flexjudge_fast.media.molecule_limits import MoleculeLimits
from flexjudge_fast.media.molecule_pool import MoleculeDecoder
from flexjudge_fast.media.molecule_processor import MoleculeProcessor
from flexjudge_fast.media.prepared import AnyMedia, PreparedAudio, PreparedMedia, PreparedMolecule
from flexjudge_fast.media.video import decode_video
from flexjudge_fast.media.video_pool import DecodedVideo, VideoDecoder
from flexjudge_fast.media.video_sampling import FrameBudget
from flexjudge_fast.media.vision_processor import VisionProcessor

_Read = Callable[[MediaItem, MediaOptions], AnyMedia]
_MOST_SECONDS = 1e6  # from one temporal patch to the next
_MOST_THREADS = 4  # each may hold an image of 240 MiB while it is decoded
_MOST_CHEMISTS = 8  # placing a molecule's atoms takes as long as encoding it, and little memory


class TokenBudget:
    """The tokens that a prompt's media may take together.

    A prompt that can never fit is refused before the rest of its media is decoded and held in memory.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._spent = 0
        self._lock = threading.Lock()

    def check(self, item: MediaItem) -> None:
        """Raise RequestTooLargeError if more is spent than there is."""
        if self._spent > self._most:
            raise RequestTooLargeError(
                f"{item.name or item.kind}: the prompt's media take {self._spent:,} tokens without it; "
                f"the context holds {self._most:,}"
            )

    def spend(self, media: AnyMedia) -> None:
        """Count a medium that was read."""
        with self._lock:
            self._spent += media.num_tokens


class MediaReader:
    """Decodes, samples and resizes as the processors say. Videos, sound and molecules are read in other
    processes.

    `sees`, `hears`, `molecules`: of a model that reads such media. `limits`: of molecules.
    """

    def __init__(
        self,
        sees: VisionProcessor | None = None,
        hears: AudioProcessor | None = None,
        molecules: MoleculeProcessor | None = None,
        limits: MoleculeLimits | None = None,
    ) -> None:
        self._sees = sees
        self._hears = hears
        self._molecules = molecules
        most = _MOST_THREADS if molecules is None else _MOST_CHEMISTS
        threads = min(max(2, os.cpu_count() or 1), most)
        self._threads = ThreadPoolExecutor(threads, "flexjudge-media")
        self._videos = VideoDecoder()
        self._sounds = AudioDecoder()
        self._chemistry = MoleculeDecoder(limits, threads)
        self._pil = threading.Lock()

    def submit(self, item: MediaItem, options: MediaOptions, budget: TokenBudget) -> "Future[AnyMedia]":
        """Start to read; the future raises MediaError where it cannot be read.

        budget: of all media of one prompt; what is over it raises RequestTooLargeError.
        """
        ways: dict[str, _Read] = {
            "image": self._image,
            "video": self._video,
            "audio": self._audio,
            "molecule": self._molecule,
        }
        read = ways[item.kind]
        try:
            return self._threads.submit(_named, read, item, options, budget)
        except RuntimeError as error:  # it was shut down
            raise EngineStateError("this engine is closed") from error

    def close(self) -> None:
        """End threads and processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._videos.close()
        self._sounds.close()
        self._chemistry.close()

    def _image(self, item: MediaItem, options: MediaOptions) -> PreparedMedia:
        with self._turn(item):
            return prepare_image(item, self._processor, options, b"")

    def _video(self, item: MediaItem, options: MediaOptions) -> PreparedMedia:
        def load_frame(frame: MediaItem) -> NDArray[np.uint8]:
            with self._turn(frame):
                rgb, _ = load_image(frame, ImageLimits(), options.allow_remote)
                return rgb

        video = decode_video(item, options, _budget(self._processor), self._videos, load_frame)
        if not 0 < video.seconds_per_grid < _MOST_SECONDS:  # NaN too: it comes from the decoding process
            raise MediaError(f"{item.name or 'video'}: {video.seconds_per_grid} seconds between its frames")
        sound = self._audio(item, options) if options.use_audio_in_video else None
        grid = self._processor.grid(*video.frames.shape[:3])
        return PreparedMedia(
            kind="video",
            key=_video_key(video, self._processor),
            frames=video.frames,
            grid=grid,
            num_tokens=self._processor.num_tokens(grid),
            seconds_per_grid=video.seconds_per_grid,
            sound=sound,
        )

    def _audio(self, item: MediaItem, options: MediaOptions) -> PreparedAudio:
        """A recording, or the sound track of a video."""
        if self._hears is None:
            raise UnsupportedMediaError(f"{item.name or item.kind}: the loaded model does not hear")
        return prepare_audio(item, self._hears, b"", self._sounds, options.allow_remote)

    def _molecule(self, item: MediaItem, options: MediaOptions) -> PreparedMolecule:
        if self._molecules is None:
            raise UnsupportedMediaError(f"{item.name or item.kind}: the loaded model reads no molecules")
        return prepare_molecule(item, self._molecules, self._chemistry)

    @property
    def _processor(self) -> VisionProcessor:
        if self._sees is None:
            raise UnsupportedMediaError("the loaded model does not see")
        return self._sees

    def _turn(self, item: MediaItem) -> AbstractContextManager[object]:
        """Pillow decodes an image where it is first used: two threads at once would spoil it."""
        return self._pil if isinstance(item.source, Image.Image) else nullcontext()


def result_of(future: "Future[AnyMedia]") -> AnyMedia:
    """What was read, waited for. EngineStateError: the engine was closed meanwhile."""
    try:
        return future.result()
    except CancelledError as error:
        raise EngineStateError("this engine is closed") from error


def _named(read: _Read, item: MediaItem, options: MediaOptions, budget: TokenBudget) -> AnyMedia:
    """Whatever goes wrong is this medium's error, and nobody else's."""
    try:
        budget.check(item)
        media = read(item, options)
        budget.spend(media)
        return media
    except FlexJudgeError:
        raise
    except Exception as error:
        raise MediaError(f"{item.name or item.kind}: {type(error).__name__}: {error}") from error


def _budget(p: VisionProcessor) -> FrameBudget:
    return FrameBudget(
        factor=p.factor,
        temporal=p.temporal_patch_size,
        min_pixels=p.video_min_pixels,
        max_pixels=p.video_max_pixels,
        total_pixels=p.video_total_pixels,
        min_frames=p.min_frames,
        max_frames=p.max_frames,
        fps=p.fps,
    )


def _video_key(video: DecodedVideo, processor: VisionProcessor) -> bytes:
    """What the decoding process says is not enough: a video may have taken it over. So the frames that came
    from it count, too; and `seconds_per_grid`, from which positions in the prompt are made."""
    return media_key(
        "video",
        mode=video.mode,
        size=video.size,
        pixels=video.digest + pixel_digest(list(video.frames)),
        target=(video.frames.shape[1], video.frames.shape[2]),
        processor=processor,
        salt=b"",
        frame_indices=video.indices,
        times=(*video.times, video.seconds_per_grid),
        fps=video.fps,
    )
