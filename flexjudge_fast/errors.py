"""Every error that flexjudge_fast raises on purpose. Catch `FlexJudgeError` to catch them all."""


class FlexJudgeError(Exception):
    """Base of all errors of this package. The message names the culprit: the file, the tensor, the field."""


class InvalidArgumentError(FlexJudgeError, ValueError):
    """An argument of a call is out of range or of the wrong type; the message names it."""


class CheckpointError(FlexJudgeError):
    """A checkpoint is missing, truncated, corrupt or inconsistent; the message names the file or tensor."""


class UnsupportedCheckpointError(CheckpointError):
    """A checkpoint is sound but asks for something this version cannot compute exactly."""


class PromptError(FlexJudgeError):
    """A template, a chat message or a text cannot be turned into token ids."""


class UnsupportedMediaError(FlexJudgeError):
    """A medium was given that the loaded model cannot read."""


class RequestTooLargeError(FlexJudgeError):
    """A request can never fit the context length or the KV cache; the message gives the numbers."""


class NumericalError(FlexJudgeError):
    """The model produced NaN or infinite logits for a request."""


class EngineStateError(FlexJudgeError):
    """The engine is used in a way it cannot serve: closed, or carried over a process fork."""


class MediaError(FlexJudgeError):
    """A medium cannot be read: broken, over a limit, or of a kind that is not read; the message names it."""


class KernelBundleError(FlexJudgeError):
    """A folder of compiled kernels is broken, or made for another GPU, Triton or version of the kernels."""
