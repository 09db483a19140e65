"""What can be wrong with a checkpoint on disk, one class per cause.

Names, paths and strings in a message come from the checkpoint, so from a stranger: `shown` and `quoted` keep
a message on one line and free of terminal escapes.
"""

from __future__ import annotations

from surogate_formats.errors import CheckpointError

_LONGEST_QUOTE = 80


def shown(path: object) -> str:
    """A path as one printable line: unchanged where it can be, else with escapes."""
    text = str(path)
    return text if text.isprintable() else ascii(text)[1:-1]


def quoted(value: object) -> str:
    """A value from a file in quotes on one printable line, cut to 80 characters."""
    text = str(value)
    text = shown(text[: _LONGEST_QUOTE + 1])
    return f"'{text}'" if len(text) <= _LONGEST_QUOTE else f"'{text[:_LONGEST_QUOTE]}...'"


class CheckpointNotFoundError(CheckpointError):
    """There is nothing at the path that was given."""


class CheckpointIsAFileError(CheckpointError):
    """The path is a file; a checkpoint is the directory that holds it."""


class EmptyCheckpointError(CheckpointError):
    """The directory holds no file at all."""


class NoWeightsError(CheckpointError):
    """The directory holds files, but no weights in safetensors."""


class PickledWeightsError(CheckpointError):
    """The only weights are pickles, which run code of their author's choice when they are loaded."""


class AmbiguousCheckpointError(CheckpointError):
    """`model.safetensors` stands beside an index of other shards; readers disagree on which one counts."""


class MissingConfigError(CheckpointError):
    """There is no `config.json`."""


class NotARegularFileError(CheckpointError):
    """A file of the checkpoint is a directory, a pipe, a socket or a device."""


class UnreadableFileError(CheckpointError):
    """The operating system refuses to open or read a file."""


class TruncatedFileError(CheckpointError):
    """A file is shorter than its own header promises, or has become shorter since."""


class ChangedFileError(CheckpointError):
    """A file was written to while it was read: what was read may be of two versions."""


class GitLfsPointerError(CheckpointError):
    """A weights file is the text stub that git leaves where git-lfs has not fetched the content."""


class JsonTooLargeError(CheckpointError):
    """A JSON text, or a value in it, is larger than any real one."""


class JsonEncodingError(CheckpointError):
    """A JSON text is not UTF-8."""


class JsonSyntaxError(CheckpointError):
    """A text is not JSON."""


class JsonNestingError(CheckpointError):
    """A JSON text is nested deeper than any real one, or than the parser's stack."""


class JsonNumberError(CheckpointError):
    """A JSON text holds NaN, Infinity or a number too long to be one of a checkpoint's."""


class DuplicateKeyError(CheckpointError):
    """A JSON object names one key twice; readers disagree on which one counts."""


class NotAnObjectError(CheckpointError):
    """A JSON text is a list, a string or a number where an object must stand."""


class HeaderTooLargeError(CheckpointError):
    """The first eight bytes promise a header larger than any real one (mostly not a safetensors file), or it is."""


class HeaderPaddingError(CheckpointError):
    """The header does not begin with `{`, or is followed by something other than spaces."""


class MetadataError(CheckpointError):
    """`__metadata__` is not an object of strings."""


class TensorNameError(CheckpointError):
    """A tensor's name is empty, too long, unprintable or a path."""


class TensorEntryError(CheckpointError):
    """A tensor's entry has keys other than exactly dtype, shape and data_offsets."""


class UnknownDtypeError(CheckpointError):
    """A tensor's dtype is none that safetensors names."""


class ShapeError(CheckpointError):
    """A shape is not a list of sizes, or its product is too large to address."""


class OffsetsError(CheckpointError):
    """Offsets are not two ordered, non-negative integers."""


class PartialByteError(CheckpointError):
    """A tensor of 4-bit or 6-bit elements does not fill whole bytes."""


class SizeMismatchError(CheckpointError):
    """A tensor's offsets do not span as many bytes as its shape and dtype need."""


class OverlapError(CheckpointError):
    """Two tensors share bytes."""


class HoleError(CheckpointError):
    """Bytes between two tensors belong to neither."""


class TrailingBytesError(CheckpointError):
    """Bytes after the last tensor belong to none."""


class IndexStructureError(CheckpointError):
    """An index has no `weight_map` from tensor names to file names."""


class UnsafeShardNameError(CheckpointError):
    """A shard's name is not a plain relative path: on some system it could point outside."""


class ShardSuffixError(CheckpointError):
    """A shard's name does not end in `.safetensors`."""


class SymlinkedDirectoryError(CheckpointError):
    """A directory on the way to a shard is a symbolic link."""


class MissingShardError(CheckpointError):
    """A shard that the index or the numbering of the others promises is not there."""


class MisplacedTensorError(CheckpointError):
    """The index places a tensor in a shard that does not hold it."""


class UnlistedTensorError(CheckpointError):
    """A shard holds a tensor that the index does not list."""


class DuplicateTensorError(CheckpointError):
    """Two shards hold a tensor of the same name."""


class NoNumpyTypeError(CheckpointError):
    """A tensor's dtype has no numpy type: its elements are not whole bytes."""
