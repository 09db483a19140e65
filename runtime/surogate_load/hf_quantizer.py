"""The plug-in by which transformers loads artifacts: linears become `QuantizedLinear` before any weight is read.

Packed tensors are parameters under their names on disk, so transformers fills them as they are: nothing dense is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from surogate_formats.checkpoint import TensorInfo
from surogate_formats.format import TensorSpec
from surogate_formats.layouts import Layout, layout_of_config, stored_tensors
from surogate_load.errors import MismatchedModelError, UnsupportedModuleError
from surogate_load.linear import QuantizedLinear
from surogate_load.loss.fused_head import fuse_head
from surogate_load.merged.projections import merge_projections
from surogate_load.packed_names import packed_modules, read_infos
from surogate_load.saving import Origin, record_saves
from surogate_load.transformers_readers import watch_readers
from surogate_load.weight import WeightKind

METHOD = "surogate"

_STORED_AS = "stored_as"


def claim(quantization_config: dict[str, Any]) -> dict[str, Any]:
    """A `quantization_config` of any layout as one that this plug-in loads; saving writes the original again."""
    return {"quant_method": METHOD, _STORED_AS: quantization_config}


class SurogateQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of an artifact, kept as it stands.

    Attributes:
        stored_as: the entry of config.json.
    """

    def __init__(self, **entries: Any) -> None:
        """Takes every key of config.json's entry, or what `claim` made of it."""
        self.quant_method = METHOD
        self.stored_as: dict[str, Any] = entries.get(_STORED_AS, entries)

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json."""
        return dict(self.stored_as)


class SurogateQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the linear layers whose packed tensors the checkpoint's files hold."""

    requires_calibration = True

    def __init__(self, quantization_config: SurogateQuantizationConfig, **kwargs: Any) -> None:
        """Reads format and layout from the config; see `HfQuantizer`."""
        super().__init__(quantization_config, **kwargs)
        self.layout: Layout = layout_of_config(quantization_config.stored_as)
        self.format, _ = self.layout.parse_config(quantization_config.stored_as)
        self._packed: set[str] = set()
        self.origin: Origin | None = None

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the packed tensors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on it."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` traces through the ops."""
        return True

    def get_new_dtype(
        self, converter: WeightRenaming | WeightConverter, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Packed tensors keep their dtype whatever the model's."""
        if self._packed.intersection(converter.target_patterns):
            return None
        kept: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return kept

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The artifact's tensors: what `state_dict` holds without the recipe's scaling state."""
        states = {f"{name}.recipe." for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        tensors = model.state_dict()
        owner = {name: name.partition(".recipe.")[0] + ".recipe." for name in tensors}
        return {name: tensor for name, tensor in tensors.items() if owner[name] not in states}, {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        infos = read_infos(kwargs["checkpoint_files"])
        _, companion, *_ = self.layout.suffixes[self.format.name].values()
        dtype: torch.dtype = model.config.dtype  # type: ignore[assignment]
        for stored, module in packed_modules(model, infos, companion):
            layer = self._replacement(model, module, dtype)
            self._check_stored(stored, layer, infos)
            parent, _, child = module.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            self._packed.update(f"{module}.{name}" for name in layer.part_names)
        if not self._packed:
            raise MismatchedModelError(
                f"config.json declares {self.format.name} weights, but the files hold none; quantize again"
            )
        self.origin = Origin.read(kwargs["checkpoint_files"][0], self._packed)
        record_saves()

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                for part in module.parts:
                    part.requires_grad_(False)
        merge_projections(model)
        fuse_head(model)
        return model

    def _replacement(self, model: nn.Module, module: str, dtype: torch.dtype) -> QuantizedLinear:
        linear = model.get_submodule(module)
        if type(linear) is not nn.Linear:
            raise UnsupportedModuleError(
                f"{module} is a {type(linear).__name__}, not a torch.nn.Linear: "
                "surogate_load can't train on it; quantize again with --skip for it"
            )
        kind = WeightKind(self.format, (linear.out_features, linear.in_features))
        return QuantizedLinear(kind, self.layout, bias=linear.bias is not None, compute_dtype=dtype, device="meta")

    def _check_stored(self, stored: str, layer: QuantizedLinear, infos: dict[str, TensorInfo]) -> None:
        for tensor in stored_tensors(self.layout, self.format, stored, layer.kind.shape).values():
            info = infos.get(tensor.name)
            found = info and TensorSpec(info.dtype, info.shape)
            if found != tensor.spec:
                has = f"is {found.dtype} {list(found.shape)}" if found else "is missing"
                needs = f"{tensor.spec.dtype} {list(tensor.spec.shape)}"
                raise MismatchedModelError(f"{tensor.name} {has}, the model needs {needs}; quantize again")


def register() -> None:
    """Tells transformers about the quant_method `surogate`, and watches how it reads the others."""
    register_quantization_config(METHOD)(SurogateQuantizationConfig)
    register_quantizer(METHOD)(SurogateQuantizer)
    watch_readers(METHOD)
