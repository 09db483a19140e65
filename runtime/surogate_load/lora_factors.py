"""A plain LoRA adapter that PEFT saved, as pairs of matrices, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from surogate_formats.errors import UsageError
from surogate_load.architecture import one_line
from surogate_load.errors import UnreadableAdapterError
from surogate_load.saved_adapter import check_saved

WEIGHTS = "adapter_model.safetensors"
"""PEFT's name of the file with an adapter's tensors."""

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""

_PLAIN = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
    exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora init_lora_weights layers_to_transform
    layers_pattern rank_pattern alpha_pattern megatron_core runtime_config""".split()  # noqa: SIM905  (18 lines else)
)
"""Settings of LoRA with which an adapter is the sum of the base and scale * B A."""


class NotPlainAdapterError(UsageError):
    """An adapter is more, or something else, than products that are added to linears."""


@dataclass(frozen=True)
class LoraFactors:
    """What an adapter adds to a weight: scale * B A.

    Attributes:
        a: float32 [rank, K].
        b: float32 [N, rank].
        scale: lora_alpha / rank, or over its root with rsLoRA.
    """

    a: Tensor
    b: Tensor
    scale: float

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """The outputs [..., N] of a linear with the adapter's product added, in the dtype of its inputs [..., K]."""
        a, b = (factor.to(x.device, x.dtype) for factor in (self.a, self.b))
        return y + (x @ a.T @ b.T * self.scale).to(y.dtype)


def read_factors(folder: str | Path) -> dict[str, LoraFactors]:
    """The factors of a plain LoRA adapter by the full name of the module that they are for.

    Args:
        folder: that PEFT saved.

    Raises:
        UnreadableAdapterError: there is no such adapter.
        NotPlainAdapterError: see the class.
    """
    check_saved(folder)
    config = _plain_config(folder)
    path = Path(folder) / WEIGHTS
    try:
        from safetensors.torch import load_file

        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    except Exception as error:  # safetensors' and the system's own
        raise UnreadableAdapterError(f"{path}: can't be read ({one_line(error)})") from error
    return dict(_paired(tensors, config, folder))


def check_shapes(factors: Mapping[str, LoraFactors], modules: Mapping[str, Sequence[int]], folder: Any) -> None:
    """Raises `UnreadableAdapterError` where a module [N, K] of that name takes no such product."""
    for name, factor in factors.items():
        shape = (factor.b.shape[0], factor.a.shape[1])
        if name in modules and shape != tuple(modules[name]):
            raise UnreadableAdapterError(
                f"{folder}: is no adapter for this model (its product for {name} is {list(shape)}, the weight "
                f"{list(modules[name])})"
            )


def _plain_config(folder: str | Path) -> Any:
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT has no class for a config that it can't read
        raise UnreadableAdapterError(f"{folder}: its adapter_config.json can't be read ({one_line(error)})") from error
    if not isinstance(config, LoraConfig):
        raise NotPlainAdapterError(f"{folder}: is an adapter of type {config.peft_type}; only LoRA is taken here")
    usual = LoraConfig()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in _PLAIN and value and value != getattr(usual, field.name, None):
            raise NotPlainAdapterError(
                f"{folder}: {field.name}={value!r} is more than plain LoRA, which alone is taken"
            )
    return config


def _paired(tensors: dict[str, Tensor], config: Any, folder: str | Path) -> Iterator[tuple[str, LoraFactors]]:
    from peft.utils.other import get_pattern_key

    for name, a in tensors.items():
        if name.endswith(".base_layer.weight"):  # PEFT's copy of a frozen head, beside its adapter
            continue
        module, _, letter = name.removeprefix(PREFIX).rpartition(".lora_")
        if not name.startswith(PREFIX) or letter not in ("A.weight", "B.weight"):
            raise NotPlainAdapterError(f"{folder}: {name} is no matrix of a plain LoRA adapter")
        other = tensors.get(f"{PREFIX}{module}.lora_{'B' if letter[0] == 'A' else 'A'}.weight")
        if other is None:
            raise UnreadableAdapterError(f"{folder}: {name} stands alone, without its other matrix")
        if letter[0] == "B":
            continue
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
        if a.dim() != 2 or other.dim() != 2 or not len(a) == other.shape[1] == rank:
            raise UnreadableAdapterError(
                f"{folder}: the matrices of {module} are {list(a.shape)} and {list(other.shape)}, and its rank {rank}"
            )
        yield module, LoraFactors(a, other, alpha / (rank**0.5 if config.use_rslora else rank))
