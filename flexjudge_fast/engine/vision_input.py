"""How media enter a vision-language model's prompt: placeholder ids and M-RoPE positions."""

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.media.prepared import MediaRun, PreparedMedia
from flexjudge_fast.models.mrope import GridRun, mrope_positions
from flexjudge_fast.models.vision_config import VisionConfig
from flexjudge_fast.prompts.segments import Placeholder, Prompt


class VisionInput:
    """The conventions of the model that `config` describes."""

    def __init__(self, config: VisionConfig) -> None:
        self.config = config
        self._pads = {"image": config.image_token_id, "video": config.video_token_id}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of media that the model reads."""
        return tuple(self._pads)

    @property
    def pad_ids(self) -> frozenset[int]:
        return frozenset(self._pads.values())

    def placeholder(self, media: PreparedMedia) -> Placeholder:
        config = self.config
        pad = self._pads[media.kind]
        return Placeholder(config.vision_start_token_id, pad, config.vision_end_token_id, media)

    def positions(self, prompt: Prompt) -> NDArray[np.int64]:
        """int64 [3, num_tokens]."""
        return mrope_positions(len(prompt), [self._grid_run(run) for run in prompt.media])

    def _grid_run(self, run: MediaRun) -> GridRun:
        time, height, width = run.media.grid
        merge = self.config.merge_size
        is_video = run.media.kind == "video"
        step = self.config.tokens_per_second * run.media.seconds_per_grid if is_video else 1.0
        return GridRun(run.start, (time, height // merge, width // merge), step)
