"""bitsandbytes' quantization state: what it says about a weight in JSON, stored as a tensor of bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from surogate_formats.checkpoint.errors import JsonNumberError, NotAnObjectError, quoted, shown
from surogate_formats.checkpoint.strict_json import parse_object
from surogate_formats.dtypes import FLOATS
from surogate_formats.dynamic_absmax import NESTED_BLOCK
from surogate_formats.errors import ArtifactError, CheckpointError
from surogate_formats.format import Shape
from surogate_formats.nf4 import NF4

_DTYPES = {dtype: name for name, dtype in FLOATS.items()}

_WIDEST = -1.2345678901234567e-308
"""No float has a longer text."""

ROUNDED = "bfloat16"
"""`nested_dtype` of what bitsandbytes packed on CPUs before it took absmax in float32."""

_LONGEST = 2**31 - 1
"""Of a side of a weight: the number of its values fits into 63 bits."""


def state_size(fmt: NF4, shape: Shape) -> int:
    """Bytes of a weight's quantization state, whatever its source and its values."""
    return max(len(_text(fmt, shape, dtype, _WIDEST)) for dtype in _DTYPES)


def state_bytes(fmt: NF4, shape: Shape, dtype: str, offset: float) -> bytes:
    """A quantization state in UTF-8, filled up with blanks to `state_size`.

    Args:
        fmt: block size and double quantization.
        shape: [N, K].
        dtype: the source's safetensors dtype.
        offset: the mean of absmax, which double quantization takes away.
    """
    return _text(fmt, shape, dtype, offset).ljust(state_size(fmt, shape)).encode()


def _text(fmt: NF4, shape: Shape, dtype: str, offset: float) -> str:
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": fmt.block_size,
        "dtype": _DTYPES[dtype],
        "shape": list(shape),
    }
    if fmt.double_quant == "dynamic":
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state)


def read_state(data: bytes) -> dict[str, Any]:
    """Reads a quantization state of NF4 with bitsandbytes' own nesting of absmax, or none.

    Raises:
        ArtifactError: it is something else.
    """
    try:
        state = parse_object(data, "quant_state")
    except NotAnObjectError as error:
        raise ArtifactError(f"its quantization state isn't one of nf4 ({error})") from error
    except JsonNumberError as error:
        raise ArtifactError(f"a number of its quantization state is no finite float32 ({error})") from error
    except CheckpointError as error:
        raise ArtifactError(f"its quantization state is no JSON that we read ({error})") from error
    kind = state.get("quant_type")
    if kind != "nf4":
        raise ArtifactError(f"its quantization state isn't one of nf4 but of {quoted(kind)}")
    nesting = state.get("nested_blocksize", NESTED_BLOCK), state.get("nested_dtype", "float32")
    if nesting not in ((NESTED_BLOCK, "float32"), (NESTED_BLOCK, ROUNDED)):
        raise ArtifactError(
            f"its absmax is nested in blocks of {shown(nesting[0]):.20} {shown(nesting[1]):.20}, "
            f"not {NESTED_BLOCK} float32 or {ROUNDED}: "
            "save it without double quantization, or quantize the source with surogate-quantize"
        )
    return state


def is_rounded(state: Mapping[str, Any]) -> bool:
    """Whether bitsandbytes rounds the absmax of a quantization state to bfloat16 as it restores it."""
    return state.get("nested_dtype") == ROUNDED


def read_shape(state: Mapping[str, Any]) -> Shape | None:
    """The [N, K] of a quantization state; None if it has none."""
    shape = state.get("shape")
    if isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 <= n <= _LONGEST for n in shape):
        return tuple(shape)
    return None


def read_offset(state: Mapping[str, Any]) -> float:
    """The mean of absmax in a quantization state; `ArtifactError` if there is none."""
    offset: Any = state.get("nested_offset")
    if (
        not isinstance(offset, int | float)
        or isinstance(offset, bool)
        or not abs(offset) <= float(np.finfo(np.float32).max)
    ):
        raise ArtifactError("nested_offset of its quantization state is no finite float32")
    return float(offset)
