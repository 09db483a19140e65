"""What each rank of test_reduce_amax runs: in a module of its own, since a spawned process imports it by name."""

import torch
from runtime.layers import make_layer
from runtime.lora_steps import losses_of_four_steps

from surogate_formats.recipe import Recipe

LAYERS = 3


def one_step(rank, reduce_amax):
    """The scales after a step in which rank r sees inputs of 1 + 3 r."""
    from surogate_load.model_recipe import set_recipe
    from surogate_load.recipes.delayed import delayed_scales

    layers = [make_layer("fp8-tensor", (32, 32), bias=False, seed=seed)[0] for seed in range(LAYERS)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(32, 1))
    set_recipe(model, Recipe("fp8-hybrid", reduce_amax=reduce_amax), emulate=True)
    model.train()
    x = torch.full((2, 32), float(1 + 3 * rank), requires_grad=True)
    model(x).sum().backward()
    torch.optim.SGD(model[-1].parameters(), lr=0.0).step()
    return torch.cat([scale.scale for scale in delayed_scales(model)])


def worker(rank, rendezvous, results):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    reduced = []
    original = dist.all_reduce
    dist.all_reduce = lambda tensor, **arguments: (reduced.append(tensor.numel()), original(tensor, **arguments))
    found = {on: one_step(rank, on) for on in (True, False)}
    torch.save({**found, "reduced": reduced}, f"{results}/{rank}")
    dist.destroy_process_group()


def adapted(path, recipe):
    import peft

    from surogate_load import load_model

    model = load_model(path, dtype=torch.float32, recipe=recipe, emulate=True)
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, settings).train()


def ddp_worker(rank, rendezvous, results, path, recipe, ids):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from surogate_load.recipes.delayed import delayed_scales

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model = adapted(path, recipe)
    wrapped = DistributedDataParallel(model)
    losses = losses_of_four_steps(wrapped, ids[rank::2])
    synced = [name for name, _ in model.named_parameters() if name not in wrapped.parameters_to_ignore]
    synced += [name for name, _ in model.named_buffers() if name not in wrapped.parameters_to_ignore]
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    scales = [scale.history for scale in delayed_scales(model)]
    torch.save({"losses": losses, "trained": trained, "scales": scales, "synced": synced}, f"{results}/{rank}")
    dist.destroy_process_group()
