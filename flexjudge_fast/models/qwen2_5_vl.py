"""Qwen2.5-VL (Bai et al. 2025): Qwen2.5 with M-RoPE, behind the tower of `vision_tower.py`."""

from flexjudge_fast.models.decoder import Decoder


class Qwen2_5_VLForConditionalGeneration(Decoder):  # noqa: N801 - the name in config.json
    """The language model: Qwen2's biases on q, k and v, three sections of RoPE, media among its inputs."""
