"""From the tensors of single experts to stacked parameters, as transformers loads them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from surogate_formats.format import Format
from surogate_formats.layouts import Layout, RecodingLayout
from surogate_load.experts.finding import FoundExperts
from surogate_load.experts.module import GATE_UP, Projection, QuantizedExperts, interleaved
from surogate_load.recoding import must_restore
from surogate_load.weight import to_numpy, to_torch

BIAS = "bias"
"""Ending of the name of an expert's bias on disk."""


class Sources:
    """Which tensors of the files make up which parameters of the model.

    Attributes:
        layout: how the files name parts.
        format: of the weights.
        restores: whether the model holds what the layout restores, and not what is stored.
        targets: name on disk, as transformers renames it, to the first parameter of its projection and the pattern that
            transformers knows it by.
    """

    def __init__(self, layout: Layout, fmt: Format) -> None:
        """None yet."""
        self.layout, self.format = layout, fmt
        self.restores = must_restore(layout, fmt)
        self.targets: dict[str, tuple[str, str]] = {}

    def __deepcopy__(self, memo: Any) -> Sources:
        """Itself: transformers copies a converter for every tensor."""
        return self

    def add(self, found: FoundExperts, experts: QuantizedExperts) -> None:
        """Takes the tensors of one layer."""
        for name, projection in experts.projections.items():
            first = f"{found.module}.{name}"
            for role in projection.roles:
                for suffix in self.suffixes(projection):
                    self._add(found, projection, role, suffix, first, pattern_of(role, suffix))
                if experts.biases_by_expert:
                    self._add(found, projection, role, BIAS, f"{first}_bias", pattern_of(role, BIAS))

    def suffixes(self, projection: Projection) -> Sequence[str]:
        """The endings of the tensors that stand on disk for each weight."""
        if self.restores:
            assert isinstance(self.layout, RecodingLayout)
            keys = self.layout.stored_specs(self.format, projection.kind.shape)
            return [self.layout.suffixes[self.format.name][key] for key in keys]
        return [suffix for suffix, _ in projection.tensors.values()]

    def _add(
        self, found: FoundExperts, projection: Projection, role: str, suffix: str, target: str, pattern: str
    ) -> None:
        for number in range(projection.kind.experts):
            self.targets[f"{found.renamed}.{number}.{role}.{suffix}"] = (target, pattern)


def pattern_of(role: str, suffix: str) -> str:
    """What transformers knows a source by; no regular expression of its own is alike."""
    return f"surogate expert {role} {suffix}"


class Stack(ConversionOps):  # type: ignore[misc]
    """What transformers calls with the tensors of all experts of a projection: its parameters, by their full names."""

    def __init__(self, sources: Sources) -> None:
        """For the experts of one format in one layout."""
        self._sources = sources

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: nn.Module, **kwargs: Any
    ) -> dict[str, Any]:
        """See `ConversionOps`; the tensors of each source come in the order of the experts."""
        module, _, name = full_layer_name.rpartition(".")
        experts = model.get_submodule(module)
        assert isinstance(experts, QuantizedExperts)
        if name.endswith("_bias"):
            return {full_layer_name: self._bias(input_dict, experts, name.removesuffix("_bias"))}
        projection = experts.projections[name]
        stacked = self._restored if self._sources.restores else self._as_stored
        return {f"{module}.{projection.parameter(name, part)}": t for part, t in stacked(input_dict, projection)}

    def _as_stored(self, given: dict[str, Any], projection: Projection) -> Iterator[tuple[str, Tensor]]:
        for part, (suffix, spec) in projection.tensors.items():
            members = [given.pop(pattern_of(role, suffix)) for role in projection.roles]
            yield part, _stack(members).reshape(projection.kind.stacked(spec))

    def _restored(self, given: dict[str, Any], projection: Projection) -> Iterator[tuple[str, Tensor]]:
        layout, fmt, kind = self._sources.layout, self._sources.format, projection.kind
        assert isinstance(layout, RecodingLayout)
        keys = list(layout.stored_specs(fmt, kind.shape))
        suffixes = layout.suffixes[fmt.name]
        device = given[pattern_of(projection.roles[0], suffixes["codes"])][0].device
        restored: dict[str, list[list[Tensor]]] = {part: [[] for _ in projection.roles] for part in kind.weight.specs}
        for member, role in enumerate(projection.roles):
            columns = [given.pop(pattern_of(role, suffixes[key])) for key in keys]
            for tensors in zip(*columns, strict=True):
                found = {key: to_numpy(tensor.cpu()) for key, tensor in zip(keys, tensors, strict=True)}
                for part, array in layout.restore(fmt, found, kind.shape).items():
                    restored[part][member].append(to_torch(array))
        for name, part in zip(projection.tensors, kind.weight.specs, strict=True):
            spec = kind.weight.specs[part]
            yield name, _stack(restored.pop(part)).reshape(kind.stacked(spec)).to(device)

    def _bias(self, given: dict[str, Any], experts: QuantizedExperts, name: str) -> Tensor:
        members = [given[pattern_of(role, BIAS)] for role in experts.projections[name].roles]
        bias = _stack(members).flatten(1)
        own: Tensor = experts.get_parameter(f"{name}_bias")
        return (bias if name != GATE_UP or experts.is_concatenated else interleaved(bias)).to(own.dtype)


def _stack(members: Sequence[Sequence[Tensor]]) -> Tensor:
    """[E, M, ...] of M lists of E tensors."""
    first = members[0][0]
    out = first.new_empty((len(members[0]), len(members), *first.shape))
    for member, tensors in enumerate(members):
        for expert, tensor in enumerate(tensors):
            out[expert, member].copy_(tensor)
    return out


class ExpertsConverter(WeightConverter):  # type: ignore[misc]
    """Collects the tensors of packed experts, which it knows by their full names; goes before every other converter."""

    def __init__(self, sources: Sources) -> None:
        """For all layers of a model."""
        patterns = sorted({pattern for _, pattern in sources.targets.values()})
        super().__init__(patterns, "surogate experts", [Stack(sources)])
        self._sources = sources

    def __deepcopy__(self, memo: Any) -> ExpertsConverter:
        """A converter that has collected nothing: transformers makes one for every tensor, so it must be cheap."""
        made = copy(self)
        made.collected_tensors, made.layer_targets = defaultdict(list), defaultdict(set)
        return made

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The first parameter that a tensor goes into, and what it is there."""
        return self._sources.targets.get(source_key, (source_key, None))
