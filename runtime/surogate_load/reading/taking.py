"""Which parameters of a model are what stands in its files, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from surogate_formats.checkpoint import TensorInfo
from surogate_load.experts.module import QuantizedExperts
from surogate_load.weight import TORCH_DTYPES

Taken = Mapping[str, tuple[str, ...]]
"""Full name of a parameter to the stored tensors that fill it, one after the other."""


def taken(model: Any, infos: Mapping[str, TensorInfo], config: Any) -> Taken:
    """Those parameters; the others are transformers' to cast, convert, or to miss.

    Args:
        model: of transformers, on the meta device.
        infos: the stored tensors.
        config: transformers' `LoadStateDictConfig`: its mapping says what is renamed and converted.
    """
    found = dict(_experts(model, infos))
    stacked = {tensor for tensors in found.values() for tensor in tensors}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mapping = config.weight_mapping or ()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    packed = config.hf_quantizer.packed_parameters
    for tensor, info in infos.items():
        if tensor in stacked:
            continue
        name, converted = rename_source_key(tensor, renamings, converters, model.base_model_prefix, parameters)
        parameter = parameters.get(name)
        castable = name not in packed and config.dtype_plan
        if (
            converted is None
            and parameter is not None
            and name not in found
            and not castable
            and _same(info, parameter)
        ):
            found[name] = (tensor,)
    return found


def _experts(model: nn.Module, infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for module, experts in model.named_modules():
        if isinstance(experts, QuantizedExperts):
            for name, tensors in experts.stored_tensors():
                if all(tensor in infos for tensor in tensors):
                    yield f"{module}.{name}", tensors


def _same(info: TensorInfo, parameter: nn.Parameter) -> bool:
    return info.shape == tuple(parameter.shape) and TORCH_DTYPES.get(info.dtype) == parameter.dtype
