"""How a checkpoint wants sound turned into log-mel frames: its preprocessor configuration, read."""

from dataclasses import dataclass

from flexjudge_fast.weights.processor_config import ProcessorConfig

_RATE = 16000  # Hz; the mel filters end at 8,000 Hz whatever the rate is
# What is done to sound, and what is not; anything else would change the features.
_STEPS = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "dither": 0.0,
}
_MOST = {"feature_size": 1024, "sampling_rate": _RATE, "hop_length": 1 << 12, "n_fft": 1 << 12}
_MOST_SECONDS = 3600


@dataclass(frozen=True)
class AudioProcessor:
    """Names as in WhisperFeatureExtractor.

    Args:
        feature_size: mel bins.
        sampling_rate: samples per second that sound is resampled to.
        hop_length: samples from one frame to the next.
        n_fft: samples of a frame's window.
        chunk_length: seconds of the longest sound.
    """

    feature_size: int = 128
    sampling_rate: int = _RATE
    hop_length: int = 160
    n_fft: int = 400
    chunk_length: int = 300

    @property
    def max_samples(self) -> int:
        """Of the longest sound."""
        return self.chunk_length * self.sampling_rate

    @property
    def min_frames(self) -> int:
        """Of the shortest sound: the least that give a token. Shorter ones are filled up with silence."""
        return 3

    def num_frames(self, num_samples: int) -> int:
        """Frames of so many samples: one for each hop that was begun, and `min_frames` at least."""
        return max(-(-num_samples // self.hop_length), self.min_frames)

    def num_tokens(self, num_frames: int) -> int:
        """Embeddings that the encoder makes of so many frames: a convolution and a pooling halve them."""
        return ((num_frames - 1) // 2 + 1 - 2) // 2 + 1


def read_audio_processor(config: ProcessorConfig) -> AudioProcessor:
    """From a feature extractor's settings; fields of other modalities beside them are ignored.

    Raises:
        UnsupportedCheckpointError: a field asks for something else than this version computes, or is no sound
            value; the message names file and field.
    """
    for name, wanted in _STEPS.items():
        given = config.fields.get(name)
        if given is not None and (given != wanted or isinstance(given, bool) is not isinstance(wanted, bool)):
            raise config.wrong(name, f"{given!r:.50}, only {wanted!r} is supported")
    base = AudioProcessor()
    found = AudioProcessor(
        feature_size=config.count("feature_size", base.feature_size, _MOST["feature_size"]),
        sampling_rate=config.count("sampling_rate", base.sampling_rate, _MOST["sampling_rate"]),
        hop_length=config.count("hop_length", base.hop_length, _MOST["hop_length"]),
        n_fft=config.count("n_fft", base.n_fft, _MOST["n_fft"]),
        chunk_length=config.count("chunk_length", base.chunk_length, _MOST_SECONDS),
    )
    _check(config, found)
    for name, wanted in (
        ("n_samples", found.max_samples),
        ("nb_max_frames", found.max_samples // found.hop_length),
    ):
        if config.count(name, wanted, _MOST_SECONDS * _RATE) != wanted:
            raise config.wrong(name, f"{config.fields[name]}, but {wanted} by the other fields")
    return found


def _check(config: ProcessorConfig, found: AudioProcessor) -> None:
    """Fields that do not go together."""
    if found.sampling_rate != _RATE:
        raise config.wrong("sampling_rate", f"{found.sampling_rate}, only {_RATE} is supported")
    if found.n_fft % 2:
        raise config.wrong("n_fft", f"{found.n_fft} is odd")
    if found.hop_length > found.n_fft // 2:
        raise config.wrong("hop_length", f"{found.hop_length} is more than half of n_fft, {found.n_fft}")
    if found.max_samples % found.hop_length:
        raise config.wrong(
            "hop_length", f"{found.hop_length} does not divide the {found.max_samples} samples"
        )
