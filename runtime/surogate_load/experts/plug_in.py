"""What the plug-in for transformers does about packed experts: places them, and has their tensors stacked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from surogate_formats.checkpoint import TensorInfo
from surogate_formats.format import Format
from surogate_formats.layouts import Layout
from surogate_load.experts.conversion import ExpertsConverter, Sources
from surogate_load.experts.finding import find_experts
from surogate_load.experts.placing import ExpertsReader


class PackedExperts:
    """The packed experts of a model that is being loaded.

    Attributes:
        parameters: full names in the model of their packed parameters.
        weights: full names on disk of their weights, without an ending.
    """

    def __init__(self, layout: Layout, fmt: Format) -> None:
        """None yet; of one format in one layout."""
        self.parameters: set[str] = set()
        self.weights: set[str] = set()
        self._sources = Sources(layout, fmt)

    def place(
        self, model: nn.Module, infos: Mapping[str, TensorInfo], companion: str, stored: Format, dtype: torch.dtype
    ) -> None:
        """Replaces a model's fused experts whose weights the files hold packed.

        Args:
            model: of transformers; its weights are missing.
            infos: every tensor of the files.
            companion: the ending of a tensor that every packed weight has, and no other.
            stored: the format in which the files hold the weights.
            dtype: of the products.

        Raises:
            PackedExpertsError, MismatchedModelError: see `ExpertsReader.build`.
        """
        reader = ExpertsReader(self._sources.layout, self._sources.format, stored, infos)
        for module, found in find_experts(model, infos, companion).items():
            experts = reader.build(model, found, dtype)
            parent, _, child = module.rpartition(".")
            setattr(model.get_submodule(parent), child, experts)
            self._sources.add(found, experts)
            self.parameters.update(f"{module}.{name}" for name in experts.packed_names)
            self.weights.update(found.name(number, role) for role, ns in found.numbers.items() for number in ns)

    def converters(self) -> list[Any]:
        """What has transformers stack their tensors as it loads."""
        return [ExpertsConverter(self._sources)] if self._sources.targets else []
