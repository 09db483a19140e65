"""Loading and saving layouts whose tensors can't be a module's parameters, since their names hold dots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from surogate_formats.format import Format
from surogate_formats.layouts import Layout, RecodingLayout, stored_arrays
from surogate_load.errors import TransformersTooOldError
from surogate_load.linear import QuantizedLinear
from surogate_load.weight import to_numpy, to_torch

LEAST_TRANSFORMERS = "5.24"
"""The first version in which converters of several tensors whose names begin alike were seen to work; 5.17's don't."""


class Restore(ConversionOps):  # type: ignore[misc]
    """What transformers calls with the stored tensors of a module: its packed parameters, by their full names."""

    def __init__(self, layout: Layout, fmt: Format) -> None:
        """For modules of one format in a `RecodingLayout`."""
        self._layout, self._format = layout, fmt

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: nn.Module, **kwargs: Any
    ) -> dict[str, Any]:
        """See `ConversionOps`. A weight that isn't packed comes alone, and stays what it is."""
        module = full_layer_name.rpartition(".")[0]
        layer = model.get_submodule(module)
        if not isinstance(layer, QuantizedLinear):
            return input_dict
        assert isinstance(self._layout, RecodingLayout)
        keys = {ending: key for key, ending in self._layout.suffixes[self._format.name].items()}
        tensors = {keys[ending]: tensor for ending, (tensor,) in input_dict.items()}
        device = tensors["codes"].device
        found = {key: to_numpy(tensor.cpu()) for key, tensor in tensors.items()}
        parts = self._layout.restore(self._format, found, layer.kind.shape)
        names = zip(layer.kind.specs, layer.part_names, strict=True)
        return {f"{module}.{name}": to_torch(parts[part]).to(device) for part, name in names}


def must_restore(layout: Layout, fmt: Format) -> bool:
    """Whether layers hold the parts that `RecodingLayout.restore` gives, since they can't hold what is stored."""
    return any("." in ending for ending in layout.suffixes[fmt.name].values())


def restoring(layout: Layout, fmt: Format) -> list[WeightConverter]:
    """What has transformers restore packed weights as it loads, where that must be.

    Raises:
        TransformersTooOldError: its converters can't.
    """
    if not must_restore(layout, fmt):
        return []
    if Version(transformers.__version__) < Version(LEAST_TRANSFORMERS):
        raise TransformersTooOldError(
            f"layout {layout.name} needs transformers {LEAST_TRANSFORMERS} or newer, {transformers.__version__} is "
            "installed: update it, or use layout surogate"
        )
    endings = layout.suffixes[fmt.name]
    return [WeightConverter(list(endings.values()), endings["codes"], [Restore(layout, fmt)])]


def restores(converter: Any) -> bool:
    """Whether a converter is one of `restoring`."""
    return any(isinstance(operation, Restore) for operation in getattr(converter, "operations", ()))


def as_stored(
    layout: Layout, fmt: Format, tensors: dict[str, Tensor], layers: Mapping[str, tuple[QuantizedLinear, str]]
) -> dict[str, Tensor]:
    """A model's tensors with those of packed layers as the layout stores them.

    Args:
        layout: if its layers hold what is stored, nothing changes.
        fmt: the format.
        tensors: by their names in the model.
        layers: by the name in the model, with the safetensors dtype of the source.
    """
    if not must_restore(layout, fmt):
        return tensors
    names = {f"{module}.{name}" for module, (layer, _) in layers.items() for name in layer.part_names}
    kept = {name: tensor for name, tensor in tensors.items() if name not in names}
    for module, (layer, dtype) in layers.items():
        parts = {part: to_numpy(tensor.cpu()) for part, tensor in zip(layer.kind.specs, layer.parts, strict=True)}
        for key, array in stored_arrays(layout, fmt, parts, layer.kind.shape, dtype).items():
            owned = array if key in parts else array.copy()  # safetensors takes no table that layers share
            kept[f"{module}.{layout.suffixes[fmt.name][key]}"] = to_torch(owned)
    return kept
