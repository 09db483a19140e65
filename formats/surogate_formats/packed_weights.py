"""Which packed weights a checkpoint's files hold, from their headers: nobody's list of modules is believed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from surogate_formats.checkpoint import TensorInfo
from surogate_formats.checkpoint.errors import shown
from surogate_formats.format import Format, Shape
from surogate_formats.fp8 import FP8
from surogate_formats.layouts import DescribingLayout, Layout
from surogate_formats.nf4 import NF4
from surogate_formats.packed_nf4 import Read, as_restored, describe_weights, format_of_headers
from surogate_formats.weight_parts import UnreadableWeightError, UnscaledWeightError, check_part, fits

__all__ = [
    "ACTIVATION_SCALES",
    "PackedWeights",
    "UnreadableWeightError",
    "UnscaledWeightError",
    "find_packed_weights",
    "fits",
]

ACTIVATION_SCALES = frozenset(
    {
        "input_scale",
        "input_global_scale",
        "input_zero_point",
        "output_scale",
        "output_zero_point",
        "activation_scale",
        "k_scale",
        "v_scale",
        "q_scale",
        "kv_scale",
        "k_zero_point",
        "v_zero_point",
    }
)
"""Endings of tensors that say how activations or the KV cache are quantized; no weight's value hangs on them."""

_SCALES = ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "_blocks", "_scales")
_FEW_BITS = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"})
_INTEGERS = frozenset({"U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})
_SCALE_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


@dataclass(frozen=True)
class PackedWeights:
    """Packed weights, all of one format.

    Attributes:
        format: as the config declares it, with what the headers alone say, and bitsandbytes' states.
        modules: full name of each module to its weight's shape [N, K]; empty where the headers alone don't show it.
        unused: endings of the tensors that say how activations or the KV cache are quantized, sorted.
        dtypes: module to the safetensors dtype of its source, where the files tell.
        stored: the format in which the files hold them, where `format` is the one that they are restored to.
    """

    format: Format
    modules: dict[str, Shape]
    unused: tuple[str, ...]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    stored: Format | None = None


def find_packed_weights(
    layout: Layout, declared: Format, infos: Mapping[str, TensorInfo], read: Read | None = None
) -> PackedWeights:
    """Finds every packed weight, checks its parts, and sees that no tensor of few bits is left over.

    Args:
        layout: how the parts are named.
        declared: the format that the config declares.
        infos: every tensor of the checkpoint by name.
        read: reads a tensor; without it NF4's format alone is found, since its shapes stand in no header.

    Raises:
        UnscaledWeightError: a weight lacks a part, or a tensor of few bits belongs to no weight.
        UnreadableWeightError: a part isn't what the format stores, or one of the weight's tensors has no known meaning.
    """
    if isinstance(layout, DescribingLayout):
        return _find_described(layout, infos, read)
    if isinstance(declared, NF4):
        return PackedWeights(declared, {}, ())
    suffixes = layout.suffixes[declared.name]
    modules = dict(_modules(infos, suffixes["codes"], declared))
    fmt = _with_scale_dtype(declared, infos, [f"{module}.{suffixes['scale']}" for module in modules])
    used: set[str] = set()
    for module, shape in modules.items():
        reason = fmt.keep_reason(shape)
        if reason is not None:
            raise UnreadableWeightError(f"{shown(module)}: {reason}, so it is no {fmt.name}")
        for part, spec in fmt.part_specs(shape).items():
            name = f"{module}.{suffixes[part]}"
            check_part(name, infos.get(name), spec, f"{module}.{suffixes['codes']}")
            used.add(name)
    return PackedWeights(fmt, modules, tuple(sorted(set(_unused(infos, used, modules)))))


def _find_described(layout: DescribingLayout, infos: Mapping[str, TensorInfo], read: Read | None) -> PackedWeights:
    fmt = format_of_headers(infos)
    if read is None:
        return PackedWeights(fmt, {}, ())
    found = list(describe_weights(layout, fmt, infos, read))
    modules = {module: shape for module, shape, _ in found}
    endings = [layout.suffixes[fmt.name][key] for key in layout.stored_specs(fmt, (1, 1))]
    used = {f"{module}.{ending}" for module in modules for ending in endings}
    owners = {**modules, **{f"{module}.weight": shape for module, shape in modules.items()}}
    unused = tuple(sorted(set(_unused(infos, used, owners))))
    dtypes = {module: dtype for module, _, dtype in found}
    return PackedWeights(as_restored(fmt, infos, read), modules, unused, dtypes, stored=fmt)


def _modules(infos: Mapping[str, TensorInfo], codes: str, fmt: Format) -> Iterator[tuple[str, Shape]]:
    spec = fmt.part_specs((16, 16))["codes"]
    for name, info in infos.items():
        module, _, suffix = name.rpartition(".")
        if suffix != codes or info.dtype != spec.dtype:
            continue
        if len(info.shape) != 2:
            raise UnreadableWeightError(
                f"{shown(name)} is {info.dtype} {list(info.shape)}: packed weights are read as matrices only, "
                "not as experts in one tensor"
            )
        yield module, (info.shape[0], info.shape[1] * 16 // spec.shape[1])


def _with_scale_dtype(fmt: Format, infos: Mapping[str, TensorInfo], scales: list[str]) -> Format:
    found = [infos[name] for name in scales if name in infos]
    if not isinstance(fmt, FP8) or not found:
        return fmt
    dtype = found[0].dtype
    if dtype not in _SCALE_DTYPES:
        raise UnreadableWeightError(
            f"{shown(found[0].name)} is {dtype}; scales are read in {' or '.join(_SCALE_DTYPES)} only"
        )
    return replace(fmt, scale_dtype=_SCALE_DTYPES[dtype])  # type: ignore[arg-type]


def _unused(infos: Mapping[str, TensorInfo], used: set[str], modules: Mapping[str, Shape]) -> Iterator[str]:
    """Endings of scales of activations; raises for what else a packed weight must not have beside it."""
    for name, info in infos.items():
        module, _, suffix = name.rpartition(".")
        if name in used:
            continue
        if suffix in ACTIVATION_SCALES:
            yield suffix
        elif info.dtype in _FEW_BITS or (info.dtype in _INTEGERS and "weight" in suffix):
            raise UnscaledWeightError(
                f"{shown(name)} is {info.dtype}, and no scale for it is known: it can't be read as a dense weight"
            )
        elif module in modules and suffix != "bias":
            raise UnreadableWeightError(f"{shown(name)}: what it does to its weight isn't known")
    for name in infos.keys() - used:
        module, _, suffix = name.rpartition(".")
        if suffix.endswith(_SCALES) and module not in modules:
            raise UnscaledWeightError(f"{shown(name)} scales no packed weight: what it is of would be read without it")
