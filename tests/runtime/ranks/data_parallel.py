"""Checks under DistributedDataParallel, and of recipes whose scales are shared."""

import torch
from runtime.layers import make_layer
from runtime.lora_steps import losses_of_steps
from runtime.ranks.models import DDP, STEPS, adapted, layers_of, mean, my_share, sharded

LAYERS = 3


def ddp(paths, folder):
    """Losses of steps under DDP by format, adapters and amax after them, and what was synchronized."""
    from torch.nn.parallel import DistributedDataParallel

    from surogate_load.recipes.delayed import delayed_scales

    found = {}
    for kind, recipe in DDP.items():
        model = adapted(paths[kind], recipe)
        wrapped = DistributedDataParallel(model, find_unused_parameters=kind == "nf4")  # as Trainer has it
        losses = mean(losses_of_steps(wrapped, my_share(), STEPS))
        tensors = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        found[kind] = {
            "losses": losses,
            "trained": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
            "histories": [scale.history for scale in delayed_scales(model)],
            "synced": [name for name in tensors if name not in wrapped.parameters_to_ignore],
        }
    return found


def reduce_amax(paths, folder):
    """The scales after a step in which rank r sees inputs of 1 + 3 r, with and without; sizes of the all-reduces."""
    import torch.distributed as dist

    sizes, original = [], dist.all_reduce
    dist.all_reduce = lambda tensor, **arguments: (sizes.append(tensor.numel()), original(tensor, **arguments))
    try:
        found = {on: _scales_after_a_step(dist.get_rank(), on) for on in (True, False)}
    finally:
        dist.all_reduce = original
    return {**found, "reduced": sizes}


def _scales_after_a_step(rank, on):
    from surogate_formats.recipe import Recipe
    from surogate_load.model_recipe import set_recipe
    from surogate_load.recipes.delayed import delayed_scales

    layers = [make_layer("fp8-tensor", (32, 32), bias=False, seed=seed)[0] for seed in range(LAYERS)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(32, 1))
    set_recipe(model, Recipe("fp8-hybrid", reduce_amax=on), emulate=True)
    model.train()
    x = torch.full((2, 32), float(1 + 3 * rank), requires_grad=True)
    model(x).sum().backward()
    torch.optim.SGD(model[-1].parameters(), lr=0.0).step()
    return torch.cat([scale.scale for scale in delayed_scales(model)])


def recipes(paths, folder):
    """Scaling state and seeds under several ranks."""
    from surogate_load.recipes.delayed import delayed_scales
    from surogate_load.recipes.noise import Noise
    from surogate_load.recipes.state_file import load_scaling_state, save_scaling_state

    model = sharded(paths["nf4-none"], "fp8-hybrid")
    one = adapted(paths["nf4-none"], "fp8-hybrid")
    losses_of_steps(model, my_share(), STEPS)
    multipliers = [layer.recipe.weight.multiplier for layer in layers_of(model).values()]
    alone = [layer.recipe.weight.multiplier for layer in layers_of(one).values()]
    noisy = sharded(paths["fp4"], "nvfp4", device="cpu")
    losses = mean(losses_of_steps(noisy, my_share(), 1))
    seeds = [module.seed.item() for module in noisy.modules() if isinstance(module, Noise)]
    if torch.distributed.get_rank() == 0:
        save_scaling_state(noisy, folder)
    torch.distributed.barrier()
    again = sharded(paths["fp4"], "nvfp4", device="cpu")
    load_scaling_state(again, folder)
    return {
        "histories": [scale.history for scale in delayed_scales(model)],
        "scales": [scale.scale for scale in delayed_scales(model)],
        "multipliers": multipliers,
        "alone": alone,
        "losses": losses,
        "seeds": seeds,
        "restored": [module.seed.item() for module in again.modules() if isinstance(module, Noise)],
    }
