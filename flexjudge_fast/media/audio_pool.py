"""Decodes sound files in other processes, and checks what those send."""

import socket
from dataclasses import asdict

import numpy as np

from flexjudge_fast.media.audio_limits import AudioLimits
from flexjudge_fast.media.sound import Sound, SoundBuilder
from flexjudge_fast.media.worker_pool import FileSource, WorkerPool
from flexjudge_fast.media.worker_wire import WireError, receive, receive_into

_MOST_BLOCK_BYTES = 1 << 20
_MOST_MODE = 64  # characters


class AudioDecoder(WorkerPool):
    """Decodes untrusted sound in other processes. Safe to use from several threads, and after a fork.

    Args:
        limits: what is refused.
        num_workers: processes at most, each up to `limits.max_memory_bytes`; further threads wait.
    """

    def __init__(self, limits: AudioLimits | None = None, num_workers: int = 2) -> None:
        self.limits = limits or AudioLimits()
        super().__init__("flexjudge_fast.media.audio_decode", self.limits.max_memory_bytes, num_workers)

    def decode(
        self,
        source: FileSource,
        sampling_rate: int,
        limits: AudioLimits | None = None,
        of_video: bool = False,
    ) -> Sound:
        """The first sound track of a sound or video file, mono, at `sampling_rate`.

        Args:
            source: path or bytes.
            limits: of this file, where they differ from the decoder's.
            of_video: it is a video, with whose first frame its sound is to begin: a track that begins later
                follows silence, what is before the frame is cut.

        Raises:
            MediaError: it cannot be read, is broken or over a limit; or decoding it crashed or hung.
            EngineStateError: this decoder is closed.
        """
        limits = limits or self.limits
        reply = _Reply(sampling_rate, limits)
        request = {"limits": asdict(limits), "of_video": of_video}
        self.run(source, limits.check_file, request, reply, limits.timeout)
        assert reply.sound is not None
        return reply.sound


class _Reply:
    """What a worker sends for one sound. It is not believed: whoever took it over may send anything."""

    def __init__(self, sampling_rate: int, limits: AudioLimits) -> None:
        self.sampling_rate, self.limits = sampling_rate, limits
        self.builder: SoundBuilder | None = None
        self.sound: Sound | None = None
        self.error: str | None = None
        self.healthy = False

    @property
    def done(self) -> bool:
        return self.sound is not None

    def take(self, peer: socket.socket, deadline: float) -> None:
        """Reads one message. WireError: nonsense, or the end of the stream. MediaError: over a limit."""
        header, _ = receive(peer, deadline=deadline)
        builder = self.builder
        match header:
            case {"start": {"rate": int(rate), "channels": int(channels), "mode": str(mode)}}:
                if builder is not None or len(mode) > _MOST_MODE:
                    raise WireError("a start that is none")
                self.builder = SoundBuilder(rate, channels, mode, self.sampling_rate, self.limits)
            case {"block": int(size)}:
                if builder is None or not 0 < size <= _MOST_BLOCK_BYTES or size % (4 * builder.channels):
                    raise WireError("a block that does not fit")
                block = np.empty((size // (4 * builder.channels), builder.channels), np.float32)
                receive_into(peer, block.data.cast("B"), deadline)
                builder.add(block)
            case {"end": True}:
                if builder is None:
                    raise WireError("an end before the start")
                self.sound = builder.finish()
            case {"error": str(error), "healthy": bool(healthy)}:
                self.error, self.healthy = error, healthy
            case _:
                raise WireError("a message that is none")
