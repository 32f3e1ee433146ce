"""Qwen2.5-Omni's Thinker (Xu et al. 2025): Qwen2.5-VL that hears; talker and vocoder are never read."""

from flexjudge_fast.models.decoder import Decoder


class Qwen2_5OmniThinkerForConditionalGeneration(Decoder):  # noqa: N801 - the name in config.json
    """The language model, behind the towers of `vision_tower.py` and `audio_tower.py`."""
