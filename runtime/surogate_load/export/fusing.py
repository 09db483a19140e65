"""Experts of a dense checkpoint, fused again where the readers of the model know them fused only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.checkpoint.expert_slices import GATE_UP, ROLES, Arrangement, arrangement_of
from surogate_formats.dtypes import NUMPY
from surogate_load.export.checkpoint import DenseTensor

_PART = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<number>0|[1-9][0-9]{0,3})\.(?P<role>gate_proj|up_proj|down_proj)"
    r"\.(?P<kind>weight|bias)"
)

_Parts = dict[tuple[int, str], DenseTensor]
"""Number and role of each expert's weight, or bias."""


def fuse_experts(tensors: Sequence[DenseTensor], config: Mapping[str, Any]) -> list[DenseTensor]:
    """The same tensors, with one for all experts of a layer in the place of the first of theirs.

    Only of models whose readers know no others; what isn't whole stays as it is. A fused tensor is in memory at once.

    Args:
        tensors: of a dense checkpoint.
        config: its config.json.
    """
    arrangement = arrangement_of(config)
    if arrangement is None or arrangement.apart:
        return list(tensors)
    found: dict[str, _Parts] = {}
    places = {tensor.name: match for tensor in tensors if (match := _PART.fullmatch(tensor.name))}
    for tensor in tensors:
        if (match := places.get(tensor.name)) is not None:
            found.setdefault(_fused_name(match), {})[int(match["number"]), match["role"]] = tensor
    fused = {name: _fused(name, parts, arrangement) for name, parts in found.items() if _whole(name, parts)}
    result = {}
    for tensor in tensors:
        match = places.get(tensor.name)
        replaced = fused.get(_fused_name(match), tensor) if match is not None else tensor
        result[replaced.name] = replaced
    return list(result.values())


def _fused_name(match: re.Match[str]) -> str:
    leaf = next(leaf for leaf, roles in ROLES.items() if match["role"] in roles)
    return f"{match['experts']}.{leaf}{'_bias' if match['kind'] == 'bias' else ''}"


def _whole(name: str, parts: _Parts) -> bool:
    """Whether every expert is there with all its roles, alike."""
    experts = 1 + max(number for number, _ in parts)
    roles = ROLES[name.rpartition(".")[2].removesuffix("_bias")]
    alike = len({(tensor.dtype, tensor.shape) for tensor in parts.values()}) == 1
    return alike and len(parts) == experts * len(roles)


def _fused(name: str, parts: _Parts, arrangement: Arrangement) -> DenseTensor:
    first = next(iter(parts.values()))
    members = len(ROLES[GATE_UP]) if f".{GATE_UP}" in name else 1
    rows, *columns = first.shape
    matrix = (rows * members, *columns)
    shape = (len(parts) // members, *(matrix[::-1] if arrangement.transposed else matrix))
    return DenseTensor(name, first.dtype, shape, partial(_filled, shape, first.dtype, parts, arrangement))


def _filled(shape: tuple[int, ...], dtype: str, parts: _Parts, arrangement: Arrangement) -> NDArray[Any]:
    whole = np.empty(shape, NUMPY[dtype])
    for (number, role), tensor in parts.items():
        arrangement.weight_of(whole[number], role)[...] = tensor.make()
    return whole
