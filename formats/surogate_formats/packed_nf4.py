"""bitsandbytes' NF4 weights without a manifest: headers tell the format, each weight's quantization state its shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from surogate_formats.checkpoint import TensorInfo
from surogate_formats.checkpoint.errors import shown
from surogate_formats.errors import ArtifactError
from surogate_formats.format import Format, Shape, TensorSpec
from surogate_formats.layouts import DescribingLayout
from surogate_formats.layouts.quant_state import is_rounded, read_state
from surogate_formats.nf4 import NF4
from surogate_formats.weight_parts import STATE, UnreadableWeightError, UnscaledWeightError

Read = Callable[[str], bytes]
"""Gives the bytes of a tensor by its name."""

MAX_STATE = 1 << 16
"""Bytes of a quantization state that are read; bitsandbytes writes some 200."""

_ANY_STATE = ".quant_state.bitsandbytes__"
_ONE_FORMAT = "checkpoints of one format alone are read"


def format_of_headers(infos: Mapping[str, TensorInfo]) -> NF4:
    """Block size and double quantization of the packed weights, as the sizes of their parts tell.

    Raises:
        UnreadableWeightError: the weights aren't all of one format, or one is packed by another type than NF4.
    """
    found: dict[NF4, str] = {}
    for name in infos:
        if _ANY_STATE in name and not name.endswith(STATE):
            raise UnreadableWeightError(f"{shown(name)}: of bitsandbytes' types nf4 alone is read")
        module = name.removesuffix(f".{STATE}")
        if module != name:
            fmt = _format_of_sizes(module, infos)
            if fmt is not None:
                found.setdefault(fmt, module)
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise UnreadableWeightError(f"{shown(second)} is {_words(other)}, {shown(first)} {_words(one)}: {_ONE_FORMAT}")
    return next(iter(found), NF4(double_quant="none"))


def as_restored(fmt: NF4, infos: Mapping[str, TensorInfo], read: Read) -> NF4:
    """The format of the parts that weights of this one become: another if the absmax of one is nested in bfloat16.

    The states must be those that `describe_weights` has read.
    """
    rounded = any(is_rounded(read_state(read(name))) for name in infos if name.endswith(f".{STATE}"))
    return replace(fmt, double_quant="none") if rounded else fmt


def describe_weights(
    layout: DescribingLayout, fmt: NF4, infos: Mapping[str, TensorInfo], read: Read
) -> Iterator[tuple[str, Shape, str]]:
    """Module, shape [N, K] and safetensors dtype of the source of every packed weight.

    Raises:
        UnscaledWeightError: a weight lacks a part.
        UnreadableWeightError: a part isn't what its quantization state says, or the state isn't one of `fmt`.
    """
    keys = layout.suffixes[fmt.name]
    for name in infos:
        module = name.removesuffix(f".{STATE}")
        if module == name:
            continue
        here = {key: infos[f"{module}.{ending}"] for key, ending in keys.items() if f"{module}.{ending}" in infos}
        for key in ("codes", "absmax", "quant_map", *(("nested_quant_map",) if "nested_absmax" in here else ())):
            if key not in here:
                raise UnscaledWeightError(
                    f"{shown(module)} has no {shown(f'{module}.{keys[key]}')}, without which its values are unknown; "
                    "download the checkpoint again"
                )
        specs = {key: TensorSpec(info.dtype, info.shape) for key, info in here.items()}
        if here["quant_state"].dtype != "U8" or here["quant_state"].nbytes > MAX_STATE:
            raise UnreadableWeightError(f"{shown(name)} is no quantization state of bitsandbytes")
        try:
            described, shape, dtype = layout.describe(specs, read(name))
            for key in here.keys() & {"quant_map", "nested_quant_map"}:
                layout.check_map(key, np.frombuffer(read(here[key].name), np.float32))
        except ArtifactError as error:
            raise UnreadableWeightError(f"{shown(module)}: {error}") from error
        if described != fmt:
            raise UnreadableWeightError(
                f"{shown(module)} is {_words(described)}, the others {_words(fmt)}: {_ONE_FORMAT}"
            )
        yield module, shape, dtype


def _format_of_sizes(module: str, infos: Mapping[str, TensorInfo]) -> NF4 | None:
    """None where the weight lets both block sizes be, or fits none: its state says so later."""
    codes, absmax = infos.get(f"{module}.weight"), infos.get(f"{module}.weight.absmax")
    if codes is None or absmax is None:
        return None
    nested = "dynamic" if f"{module}.weight.nested_absmax" in infos else "none"
    values = 2 * codes.nbytes
    fitting = [size for size in (64, 128) if absmax.shape == (-(-values // size),)]
    return NF4(fitting[0], nested) if len(fitting) == 1 else None  # type: ignore[arg-type]


def _words(fmt: Format) -> str:
    assert isinstance(fmt, NF4)
    return f"in blocks of {fmt.block_size} with{'' if fmt.double_quant == 'dynamic' else 'out'} double quantization"
