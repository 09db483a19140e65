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

        from surogate_load.parallel.preparation import packed_layers, prepare_for_sharding
        from surogate_load.parallel.shard_reading import read_shards

        if isinstance(model, FSDPModule) or next(packed_layers(model), None) is None:
            prepared: nn.Module = original(accelerator, model)
            return prepared
        plugin = accelerator.state.fsdp_plugin
        prepare_for_sharding(model)
        with _every_rank_has_read(plugin):
            prepared = original(accelerator, model)
        read_shards(prepared, on_cpu=isinstance(plugin.cpu_offload, CPUOffloadPolicy))
        return prepared

    prepare.asks_surogate = True  # type: ignore[attr-defined]
    home.fsdp2_prepare_model = prepare
    home.Accelerator.get_state_dict = _without_packed_base(home.Accelerator.get_state_dict)


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
