"""Builds packed experts as files hold them, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from surogate_formats.checkpoint import TensorInfo
from surogate_formats.format import Format, TensorSpec
from surogate_formats.layouts import Layout
from surogate_load.errors import MismatchedModelError
from surogate_load.experts.finding import FoundExperts, check_whole
from surogate_load.experts.kind import ExpertsKind
from surogate_load.experts.module import DOWN, GATE_UP, Projection, QuantizedExperts
from surogate_load.stored_specs import stored_specs

Specs = Mapping[str, TensorSpec]
"""Ending of each stored tensor of a weight to what it is."""


class ExpertsReader:
    """Makes `QuantizedExperts` for what files hold."""

    def __init__(self, layout: Layout, fmt: Format, stored: Format, infos: Mapping[str, TensorInfo]) -> None:
        """Of one format in one layout.

        Args:
            layout: names the parts.
            fmt: the format.
            stored: the format in which the files hold it.
            infos: every tensor of the files.
        """
        self._layout, self._format, self._stored, self._infos = layout, fmt, stored, infos

    def build(self, model: nn.Module, found: FoundExperts, dtype: torch.dtype) -> QuantizedExperts:
        """The packed experts of one layer, on the meta device.

        Raises:
            PackedExpertsError: not every expert is packed, or the model's module is none that can be replaced.
            MismatchedModelError: a tensor is missing, or isn't what the other experts have.
        """
        original: Any = model.get_submodule(found.module)
        check_whole(found, original)
        projections = {name: self._projection(found, original, name) for name in (GATE_UP, DOWN)}
        biases = original.has_bias and f"{found.name(0, found.roles[DOWN, 0])}.bias" in self._infos
        return QuantizedExperts(
            original, projections, found.stored, compute_dtype=dtype, device="meta", biases_by_expert=biases
        )

    def _projection(self, found: FoundExperts, original: Any, name: str) -> Projection:
        _, rows, columns = getattr(original, name).shape
        if original.is_transposed:
            rows, columns = columns, rows
        roles = tuple(role for (projection, _), role in sorted(found.roles.items()) if projection == name)
        kind = ExpertsKind(self._format, (rows // len(roles), columns), len(getattr(original, name)), len(roles))
        names = [found.name(number, role) for number in range(kind.experts) for role in roles]
        specs = [stored_specs(self._layout, each, kind.weight, self._infos, self._stored) for each in names]
        if specs[0] is None:
            return Projection(kind, roles, {_name(part): ("", spec) for part, spec in kind.weight.specs.items()})
        return self._alike(kind, roles, dict(zip(names, filter(None, specs), strict=True)))

    def _alike(self, kind: ExpertsKind, roles: tuple[str, ...], specs: Mapping[str, Specs]) -> Projection:
        """The projection of what all experts have; what only some have beside their parts is left out."""
        suffixes = self._layout.suffixes[self._format.name]
        parts = {suffixes[part]: _name(part) for part in kind.weight.specs}
        tensors, left_out = {}, []
        for suffix in dict.fromkeys(suffix for each in specs.values() for suffix in each):
            spec = next(each[suffix] for each in specs.values() if suffix in each)
            odd = next((name for name, each in specs.items() if each.get(suffix) != spec), None)
            if odd is None:
                tensors[parts.get(suffix, suffix)] = (suffix, spec)
            elif suffix in parts:
                raise MismatchedModelError(
                    f"{odd}.{suffix} is not {spec.dtype} {list(spec.shape)} as in other experts; quantize again"
                )
            else:
                left_out.append(suffix)
        return Projection(kind, roles, tensors, tuple(left_out))


def _name(part: str) -> str:
    return "" if part == "codes" else part
