"""Checks of what is refused, and of a rank that is lost."""

import os
import signal

import torch
from runtime.ranks.models import IDS, adapted, adapted_experts, layers_of, mesh, sharded


class NotRefusedError(Exception):
    """What was to be refused was not."""


def refusals(paths, folder):
    """What is refused, each with its line."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.fsdp._dynamo_utils import _annotate_modules_for_dynamo

    import surogate_load
    from surogate_formats.errors import SurogateError

    found = {}

    def expect(name, action):
        try:
            action()
        except SurogateError as error:
            found[name] = str(error)
        else:
            raise NotRefusedError(name)

    path = paths["nf4"]
    # What FSDP1 does first; the rest of it runs on no CPU.
    expect("fsdp1", lambda: _annotate_modules_for_dynamo(adapted(path, "bf16"), set(), True))
    expect("unprepared", lambda: fully_shard(adapted(path, "bf16"), mesh=mesh()))
    model = sharded(path)
    expect("twice", lambda: surogate_load.fully_shard(model, mesh=mesh()))
    expect("outside", lambda: next(iter(layers_of(model).values())).dequantize())
    frozen = sharded(path)
    frozen.get_base_model().model.layers[0].input_layernorm.weight.requires_grad_(True)
    expect("trained later", lambda: frozen(input_ids=IDS, labels=IDS))
    expect("saved", lambda: model.get_base_model().save_pretrained(folder / "base"))
    expect("nothing packed", lambda: surogate_load.fully_shard(torch.nn.Linear(2, 2), mesh=mesh()))
    expect("biases on meta", lambda: adapted_experts(paths["gpt-oss", "fp4"], "meta"))
    expect("nvfp4 on meta", lambda: sharded(paths["fp4"], "nvfp4"))
    return found


def kill_one(paths, folder):
    """The last rank is killed while the others wait for it; gives what they say."""
    import torch.distributed as dist

    from surogate_load.errors import RankLostError
    from surogate_load.parallel.process_group import saying_who_is_lost

    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with saying_who_is_lost(60):
            dist.all_reduce(torch.ones(1))
    except RankLostError as error:
        return str(error)
    raise NotRefusedError("a lost rank")
