"""Has accelerate, and so transformers' `Trainer`, shard packed models by its own FSDP2 config."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn


def register() -> None:
    """Has accelerate prepare a packed model before it shards it, and fill one without values after; once."""
    from accelerate import accelerator as home  # type: ignore[import-untyped]

    original = getattr(home, "fsdp2_prepare_model", None)
    if original is None or getattr(original, "asks_surogate", False):
        return

    @wraps(original)
    def prepare(accelerator: Any, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

        from surogate_load.parallel.filling_shards import read_shards
        from surogate_load.parallel.preparation import packed_layers, prepare_for_sharding
        from surogate_load.parallel.sharding import let_generate

        if isinstance(model, FSDPModule) or next(packed_layers(model), None) is None:
            prepared: nn.Module = original(accelerator, model)
            return prepared
        plugin = accelerator.state.fsdp_plugin
        prepare_for_sharding(model)
        with _every_rank_has_read(plugin):
            prepared = original(accelerator, model)
        read_shards(prepared, on_cpu=isinstance(plugin.cpu_offload, CPUOffloadPolicy))
        let_generate(prepared)
        return prepared

    prepare.asks_surogate = True  # type: ignore[attr-defined]
    home.fsdp2_prepare_model = prepare
    if hasattr(home.Accelerator, "_prepare_fsdp2"):
        home.Accelerator._prepare_fsdp2 = _with_units(home.Accelerator._prepare_fsdp2)
    home.Accelerator.get_state_dict = _without_packed_base(home.Accelerator.get_state_dict)


def _with_units(original: Callable[..., Any]) -> Callable[..., Any]:
    """Prepares a packed model before accelerate notes the names of its parameters, which it wants to find again."""

    @wraps(original)
    def prepare_fsdp2(self: Any, *args: Any) -> Any:
        from torch.distributed.fsdp import FSDPModule

        from surogate_load.parallel.preparation import packed_layers, prepare_for_sharding

        for model in (each for each in args if isinstance(each, nn.Module) and not isinstance(each, FSDPModule)):
            if next(packed_layers(model), None) is not None:
                prepare_for_sharding(model, _units(model, self.state.fsdp_plugin))
        return original(self, *args)

    return prepare_fsdp2


def _units(model: nn.Module, plugin: Any) -> list[nn.Module]:
    """The decoder layers, if accelerate is to call `fully_shard` on them; else nothing is known of its units."""
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    from surogate_load.step.regional import decoder_layers

    layers = list(decoder_layers(model))
    wanted = plugin.transformer_cls_names_to_wrap or [type(layer).__name__ for layer in layers]
    by_class = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy) is transformer_auto_wrap_policy
    return layers if by_class and {type(layer).__name__ for layer in layers} == set(wanted) else []


def _without_packed_base(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gathers of a sharded packed model what trains: else each checkpoint would gather the whole base on one rank."""

    @wraps(original)
    def get_state_dict(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not any(getattr(module, "byte_rows", None) for module in model.modules()):
            return original(self, model, *args, **kwargs)
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        )

    return get_state_dict


@contextmanager
def _every_rank_has_read(plugin: Any) -> Iterator[None]:
    """Without `cpu_ram_efficient_loading`: transformers reads quantized models on every rank, whatever that says."""
    wanted = plugin.cpu_ram_efficient_loading
    plugin.cpu_ram_efficient_loading = False
    try:
        yield
    finally:
        plugin.cpu_ram_efficient_loading = wanted
