"""Which packed weights a checkpoint's files hold, from their headers: nobody's list of modules is believed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from surogate_formats.checkpoint import TensorInfo
from surogate_formats.checkpoint.errors import shown
from surogate_formats.errors import ArtifactError
from surogate_formats.format import Format, Shape, TensorSpec
from surogate_formats.fp8 import FP8
from surogate_formats.layouts import Layout, UnreadableConfigError
from surogate_formats.nvfp4 import NVFP4

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

FOUND_BY_HEADERS = frozenset({FP8.name, NVFP4.name})
"""Formats whose codes show the shape of the weight."""

_FEW_BITS = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"})
_INTEGERS = frozenset({"U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})
_SCALE_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


class UnscaledWeightError(ArtifactError):
    """A tensor of few bits stands without its scale: what its values are, nobody can tell."""


class UnreadableWeightError(ArtifactError):
    """A packed weight has a part of another dtype or shape than its format's, or one whose meaning isn't known."""


@dataclass(frozen=True)
class PackedWeights:
    """Packed weights, all of one format.

    Attributes:
        format: as the config declares it, with what the headers alone say.
        modules: full name of each module to its weight's shape [N, K].
        unused: endings of the tensors that say how activations or the KV cache are quantized, sorted.
    """

    format: Format
    modules: dict[str, Shape]
    unused: tuple[str, ...]


def find_packed_weights(layout: Layout, declared: Format, infos: Mapping[str, TensorInfo]) -> PackedWeights:
    """Finds every packed weight, checks its parts, and sees that no tensor of few bits is left over.

    Args:
        layout: how the parts are named.
        declared: the format that the config declares; FP8 or NVFP4.
        infos: every tensor of the checkpoint by name.

    Raises:
        UnscaledWeightError: a weight lacks a part, or a tensor of few bits belongs to no weight.
        UnreadableWeightError: a part isn't what the format stores, or one of the weight's tensors has no known meaning.
        UnreadableConfigError: the format's weights don't say what their shape is.
    """
    if declared.name not in FOUND_BY_HEADERS:
        raise UnreadableConfigError(f"{declared.name} in layout {layout.name} can't be read without a manifest")
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
            _check_part(name, infos.get(name), spec, f"{module}.{suffixes['codes']}")
            used.add(name)
    return PackedWeights(fmt, modules, tuple(sorted(set(_unused(infos, used, modules)))))


def fits(found: TensorInfo, spec: TensorSpec) -> bool:
    """Whether a tensor is of a spec's dtype and shape; a single value may be of shape [] or [1]."""
    single = found.shape in ((), (1,)) and spec.shape in ((), (1,))
    return found.dtype == spec.dtype and (found.shape == spec.shape or single)


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


def _check_part(name: str, found: TensorInfo | None, spec: TensorSpec, codes: str) -> None:
    if found is None:
        raise UnscaledWeightError(
            f"{shown(codes)} has no {shown(name)}, without which its values are unknown; download the checkpoint again"
        )
    if not fits(found, spec):
        raise UnreadableWeightError(
            f"{shown(name)} is {found.dtype} {list(found.shape)}, "
            f"expected {spec.dtype} {list(spec.shape)}: is it packed as config.json says?"
        )


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
