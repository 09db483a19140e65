"""Reading a stranger's checkpoint: headers, index and paths are checked before a byte is trusted."""

from surogate_formats.checkpoint.header import Header, parse_header, read_header
from surogate_formats.checkpoint.quantized import is_quantized
from surogate_formats.checkpoint.reader import Checkpoint, Entry, SourceFile
from surogate_formats.checkpoint.tensor_info import TensorInfo

__all__ = [
    "Checkpoint",
    "Entry",
    "Header",
    "SourceFile",
    "TensorInfo",
    "is_quantized",
    "parse_header",
    "read_header",
]
