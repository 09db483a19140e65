"""An artifact and an adapter as one dense checkpoint: PEFT merges each layer over its dequantized float32 weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from surogate_formats.artifact import Artifact
from surogate_formats.dtypes import FLOATS
from surogate_load.architecture import one_line
from surogate_load.errors import MergeUnsupportedError
from surogate_load.experts.module import QuantizedExperts
from surogate_load.experts.peft_layer import QuantizedLoraExperts
from surogate_load.export.adapters import check_mergeable
from surogate_load.export.checkpoint import DenseTensor, whole_directory, write_checkpoint
from surogate_load.export.dense import check_dtype, dense_config, dense_tensors, sidecars
from surogate_load.export.fusing import fuse_experts
from surogate_load.loading import load_model
from surogate_load.local import open_local
from surogate_load.packed_names import stored_name
from surogate_load.peft_layer import QuantizedLoraLinear
from surogate_load.saved_adapter import check_saved, with_adapter
from surogate_load.weight import TORCH_DTYPES, to_numpy

_PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""


Watch = Callable[[str, Tensor], None]
"""Told the full name and the float32 values of each tensor that the adapter changes, before they are rounded."""


def merge(
    artifact: str | Path, adapter: str | Path, out: str | Path, dtype: str | None = None, *, watch: Watch | None = None
) -> Path:
    """Writes a dense checkpoint of an artifact's model with an adapter merged in.

    The sum is made in float32 and rounded once. LoRA with rsLoRA, DoRA and modules_to_save is merged; what else an
    adapter can hold is refused, not left out. The packed model and a file's worth of dense tensors are in memory.

    Args:
        artifact: directory of the artifact, or its name on the Hub.
        adapter: directory that `PeftModel.save_pretrained` wrote.
        out: a directory that doesn't exist yet.
        dtype: as in `dequantize`.
        watch: for measures.

    Returns:
        `out`.

    Raises:
        UnreadableAdapterError: there is no such adapter, or it isn't this model's.
        MergeUnsupportedError: it changes what can't be merged here.
        Everything that `load_model` and `dequantize` raise.
    """
    check_dtype(dtype)
    check_saved(adapter)
    with open_local(artifact) as opened, whole_directory(Path(out)) as directory:
        model = with_adapter(load_model(opened.path, "bf16", dtype=torch.float32), adapter)
        check_mergeable(model, adapter)
        changed = {name: partial(_watched, name, make, watch) for name, make in _changed(model)}
        tensors = [_replaced(tensor, changed) for tensor in dense_tensors(opened, dtype)]
        config = dense_config(opened, dtype)
        added = _added(opened, changed, dtype)
        if added:
            config["tie_word_embeddings"] = False
        write_checkpoint(directory, fuse_experts([*tensors, *added], config), config, sidecars(opened))
    return Path(out)


def _changed(model: Any) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Full name of each tensor that the adapter changes, as the artifact calls it, to what gives it in float32."""
    on_disk = stored_name(model.get_base_model())
    for name, module in model.named_modules():
        plain = name.removeprefix(_PREFIX)
        if isinstance(module, QuantizedLoraLinear):
            yield on_disk(f"{plain}.weight"), module.merged_weight
        elif isinstance(module, QuantizedLoraExperts):
            yield from _merged_experts(module)
        elif isinstance(module, BaseTunerLayer):
            yield from ((on_disk(part), make) for part, make in _merged_in_place(plain, module))
        elif isinstance(module, ModulesToSaveWrapper):
            active = module.modules_to_save[module.active_adapters[0]]
            for part, parameter in active.named_parameters():
                yield on_disk(f"{plain}.{part}"), partial(_float32, parameter)


def _merged_experts(layer: QuantizedLoraExperts) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every expert's weights of one projection, by their names on disk."""
    experts: QuantizedExperts = layer.get_base_layer()
    for number in range(experts.num_experts):
        for member, role in enumerate(experts.projections[layer.parameter_name].roles):
            yield f"{experts.stored}.{number}.{role}.weight", partial(layer.merged_weight, number, member)


def _merged_in_place(name: str, layer: Any) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """A layer that isn't packed; the model is not used again."""
    base = layer.get_base_layer()
    base.to(torch.float32)
    try:
        layer.merge()
    except Exception as error:  # PEFT has no class for what it can't merge
        raise MergeUnsupportedError(f"{name}: PEFT can't merge its adapter ({one_line(error)})") from error
    for part, parameter in base.named_parameters():
        yield f"{name}.{part}", partial(_float32, parameter)


def _watched(name: str, make: Callable[[], Tensor], watch: Watch | None) -> Tensor:
    values = make()
    if watch is not None:
        watch(name, values)
    return values


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().float()


def _replaced(tensor: DenseTensor, changed: Mapping[str, Any]) -> DenseTensor:
    make = changed.get(tensor.name)
    if make is None:
        return tensor
    return DenseTensor(tensor.name, tensor.dtype, tensor.shape, partial(_rounded, make, tensor.dtype))


def _added(artifact: Artifact, changed: Mapping[str, Any], dtype: str | None) -> list[DenseTensor]:
    """Tensors that only the adapter has: a head that was tied to the embeddings and is another one now."""
    chosen = FLOATS.get(dtype or "", "BF16")
    names = sorted(changed.keys() - artifact.manifest.tensors.keys())
    return [DenseTensor(n, chosen, tuple(changed[n]().shape), partial(_rounded, changed[n], chosen)) for n in names]


def _rounded(make: Callable[[], Tensor], dtype: str) -> NDArray[Any]:
    return to_numpy(make().to(TORCH_DTYPES[dtype]))
