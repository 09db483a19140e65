"""Every error that a user can cause, one class per cause.

A message is one line: what is wrong, where (file, tensor), what to do next. The command line prints it as it stands and
exits with 1; a class derived from `UsageError` exits with 2.
"""


class SurogateError(Exception):
    """Base of every error that this project raises on purpose."""


class UsageError(SurogateError):
    """The request contradicts itself or names what does not exist; nothing was read or written."""


class CheckpointError(SurogateError):
    """A checkpoint on disk is not what it claims to be."""


class ArtifactError(SurogateError):
    """A quantized artifact is incomplete, or disagrees with its own manifest or config."""


class NonFiniteWeightError(SurogateError):
    """A source weight holds a NaN or an infinity."""


class OutOfRangeError(SurogateError):
    """A scale or a dequantized value would not be finite in the declared dtype."""
