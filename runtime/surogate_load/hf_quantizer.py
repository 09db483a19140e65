"""The plug-in by which transformers loads packed files: linears become `QuantizedLinear` before any weight is read.

Packed tensors are parameters under their names on disk, so transformers fills them as they are: nothing dense is made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from surogate_formats.checkpoint import TensorInfo
from surogate_formats.layouts import Layout, layout_of_config
from surogate_formats.layouts.surogate import METHOD, METHODS
from surogate_formats.packed_weights import ACTIVATION_SCALES, find_packed_weights
from surogate_load.errors import InPlaceDequantizationError, MismatchedModelError, UnsupportedModuleError
from surogate_load.experts.conversion import ExpertsConverter
from surogate_load.experts.module import QuantizedExperts
from surogate_load.experts.plug_in import PackedExperts
from surogate_load.experts.storing import ExpertsStore
from surogate_load.fused.footprint import count_once
from surogate_load.fused.projections import fuse_projections
from surogate_load.linear import QuantizedLinear
from surogate_load.loss.fused_head import fuse_head
from surogate_load.packed_names import packed_modules, stored_name
from surogate_load.reading.hook import read_directly
from surogate_load.reading.places import Places, manifest_beside, read_places, reader
from surogate_load.recoding import as_stored, must_restore, restores, restoring
from surogate_load.saving import Origin, record_saves
from surogate_load.stored_specs import stored_specs
from surogate_load.transformers_readers import watch_readers
from surogate_load.weight import NAMES, WeightKind

OWN_METHODS = (*METHODS, "modelopt")
"""The `quant_method`s of config.json that transformers leaves to this plug-in."""

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
        self._stored_format = self.format
        self._packed: set[str] = set()
        self._stored_names: dict[str, str] = {}
        self._experts = PackedExperts(self.layout, self.format)
        self._dtypes: dict[str, torch.dtype] = {}
        self.origin: Origin | None = None
        self.places: Places = {}

    @property
    def packed_parameters(self) -> Collection[str]:
        """Full names in the model of all packed parameters."""
        return self._packed

    @property
    def stored_names(self) -> dict[str, str]:
        """The name on disk of every packed linear, by its name in the model."""
        return self._stored_names

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

    def _dequantize(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        """Refuses `model.dequantize()`: a dense model is made by the file, not in memory."""
        raise InPlaceDequantizationError(
            "a packed model isn't made dense where it stands: surogate-load dequantize ARTIFACT --out DIR writes one"
        )

    def get_new_dtype(
        self, converter: WeightRenaming | WeightConverter, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Packed tensors keep their dtype whatever the model's."""
        if isinstance(converter, ExpertsConverter):
            return None
        if restores(converter):  # every weight; codes alone have one byte in the model
            return None if dtype is None or dtype.itemsize == 1 else super().get_new_dtype(None, param, dtype)
        if self._packed.intersection(converter.target_patterns):
            return None
        kept: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return kept

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Restores the parts of layouts whose names are no parameter's."""
        return restoring(self.layout, self.format)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Has tensors of packed experts stacked, before any converter of the model's finds them."""
        found: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        return [*self._experts.converters(), *found]

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The artifact's tensors: what `state_dict` holds without the recipe's scaling state."""
        states = {f"{name}.recipe." for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        tensors = model.state_dict()
        owner = {name: name.partition(".recipe.")[0] + ".recipe." for name in tensors}
        packed = {name: tensor for name, tensor in tensors.items() if owner[name] not in states}
        packed = ExpertsStore(self.layout, self.format, self._source_dtypes()).as_stored(model, packed)
        return as_stored(self.layout, self.format, packed, dict(self._layers(model))), {}

    def _source_dtypes(self) -> dict[str, str]:
        """The safetensors dtype of each weight's source by its name on disk."""
        records = self.origin.manifest.tensors if self.origin and self.origin.manifest else {}
        return {name: record.dtype for name, record in records.items()}

    def _layers(self, model: nn.Module) -> Iterator[tuple[str, tuple[QuantizedLinear, str]]]:
        """Every packed layer by name, with the safetensors dtype of its source."""
        dtypes = self._source_dtypes()
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                stored = f"{self._stored_names.get(name, name)}.weight"
                yield name, (layer, dtypes.get(stored, NAMES[layer.compute_dtype]))

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.places = read_places(kwargs["checkpoint_files"])
        infos = {name: info for name, (_, info) in self.places.items()}
        found = find_packed_weights(self.layout, self.format, infos, reader(self.places))
        self.format, self._stored_format = found.format, found.stored or found.format
        _, companion, *_ = self.layout.suffixes[self.format.name].values()
        dtype: torch.dtype = model.config.dtype  # type: ignore[assignment]
        self._experts = PackedExperts(self.layout, self.format)
        self._experts.place(model, infos, companion, self._stored_format, dtype)
        self._packed |= self._experts.parameters
        for stored, module in packed_modules(model, infos, companion, self._experts.weights):
            layer = self._replacement(model, stored, module, dtype, infos)
            parent, _, child = module.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            self._packed.update(f"{module}.{name}" for name in layer.packed_names)
            self._stored_names[module] = stored
        if not self._packed:
            raise MismatchedModelError(
                f"config.json declares {self.format.name} weights, but the files hold none; quantize again"
            )
        self._dtypes = {name: each.dtype for name, each in model.named_parameters() if name not in self._packed}
        self._pass_over_unused(model, infos)
        _untie(model, self._stored_names)
        files = kwargs["checkpoint_files"]
        self.origin = Origin(Path(files[0]).parent, manifest_beside(files), frozenset(self._packed))
        record_saves()
        count_once()
        read_directly()

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.places = {}
        for module in model.modules():
            if isinstance(module, (QuantizedLinear, QuantizedExperts)):
                for name in module.packed_names:
                    module.get_parameter(name).requires_grad_(False)
        self._cast_renamed(model)
        if must_restore(self.layout, self.format):  # saving stores by itself what these restored
            conversions: Any = model._weight_conversions
            model._weight_conversions = [each for each in conversions if not restores(each)]  # type: ignore[assignment]
        fuse_projections(model)
        fuse_head(model)
        return model

    def _cast_renamed(self, model: nn.Module) -> None:
        """Transformers 5.17 leaves kept tensors that it renames, Mixtral's routers, in the dtype of the files."""
        on_disk = stored_name(model)
        for name, parameter in model.named_parameters():
            wanted = self._dtypes.get(name, parameter.dtype)
            if wanted != parameter.dtype and parameter.is_floating_point() and on_disk(name) != name:
                parameter.data = parameter.data.to(wanted)

    def _pass_over_unused(self, model: nn.Module, infos: dict[str, TensorInfo]) -> None:
        """What is said about activations outside of packed weights has no place in the model, and needs none."""
        if any(name.rpartition(".")[2] in ACTIVATION_SCALES for name in infos):
            ignored = set(model._keys_to_ignore_on_load_unexpected or ())  # type: ignore[arg-type]
            ignored |= {rf"\.{ending}$" for ending in ACTIVATION_SCALES}
            model._keys_to_ignore_on_load_unexpected = ignored  # type: ignore[assignment]

    def _replacement(
        self, model: nn.Module, stored: str, module: str, dtype: torch.dtype, infos: dict[str, TensorInfo]
    ) -> QuantizedLinear:
        linear = model.get_submodule(module)
        if type(linear) is not nn.Linear:
            raise UnsupportedModuleError(
                f"{module} is a {type(linear).__name__}, not a torch.nn.Linear: "
                "surogate_load can't train on it; quantize again with --skip for it"
            )
        kind = WeightKind(self.format, (linear.out_features, linear.in_features))
        return QuantizedLinear(
            kind,
            self.layout,
            bias=linear.bias is not None,
            compute_dtype=dtype,
            device="meta",
            stored=stored_specs(self.layout, stored, kind, infos, self._stored_format),
        )


def _untie(model: nn.Module, packed: Collection[str]) -> None:
    """A head that is packed by itself isn't the embedding, whatever its maker's config.json says."""
    tied: Any = model.all_tied_weights_keys
    own = [target for target in tied if target.removesuffix(".weight") in packed]
    for target in own:
        del tied[target]
    if own:
        for config in (model.config, model.config.get_text_config()):  # type: ignore[operator, union-attr]
            config.tie_word_embeddings = False  # type: ignore[union-attr]


def register() -> None:
    """Tells transformers about our `quant_method`s, and watches how it reads the others."""
    for method in OWN_METHODS:
        register_quantization_config(method)(SurogateQuantizationConfig)
        register_quantizer(method)(SurogateQuantizer)
    watch_readers(OWN_METHODS)
