"""What each rank of test_reduce_amax runs: in a module of its own, since a spawned process imports it by name."""

import torch
from runtime.layers import make_layer

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
