"""What the checks of several ranks are made of: packed models with seeded adapters, and each rank's share of data."""

import torch

STEPS = 2


IDS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))


KINDS = {
    "nf4": "bf16",
    "odd": "bf16",
    "fp4": "bf16",
    "fp8-block": "bf16",
    "fp8-modelopt": "bf16",
    "nf4-none": "fp8-hybrid",
}
"""Format to recipe; scales of fp8-modelopt are of shape [], "odd" is nf4 with 131 rows or columns, and biases."""


DDP = {"nf4": "bf16", "fp8-tensor": "fp8-hybrid", "nf4-none": "fp8-hybrid", "fp4": "bf16", "fp8-block": "bf16"}
"""The same under DistributedDataParallel."""


EXPERTS = {("qwen3", "nf4"): "meta", ("mixtral", "fp8-modelopt"): "meta", ("gpt-oss", "fp4"): "cpu"}
"""Family and format to where it is loaded; biases of experts are read whole."""


def join(rank, world, folder):
    """Joins a group of gloo ranks."""
    store = f"file://{folder}/rendezvous-of-{world}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)


def adapted(path, recipe, device="cpu", **settings):
    """A packed model with seeded adapters; on all linears, if settings of PEFT don't say otherwise."""
    import peft

    from surogate_load import load_model

    model = load_model(path, dtype=torch.float32, recipe=recipe, emulate=True, device=device)
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).train()


def adapted_experts(path, device="cpu"):
    """A packed mixture with seeded adapters on its experts."""
    from runtime.test_experts_lora import EXPERTS

    return adapted(path, "bf16", device, target_modules=["o_proj"], target_parameters=EXPERTS)


def sharded(path, recipe="bf16", device="meta", **options):
    """A packed model with seeded adapters, divided between the ranks."""
    import surogate_load

    return surogate_load.fully_shard(adapted(path, recipe, device), mesh=mesh(), **options)


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def my_share():
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return IDS[rank::world]


def mean(values):
    total = torch.tensor(values)
    torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size()).tolist()


def layers_of(model):
    from surogate_load import QuantizedLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def is_divided(parameter):
    return hasattr(parameter, "device_mesh")


def kept_bytes(model):
    """(bytes of packed rows that this rank keeps, bytes of all packed rows)."""
    packed = [module for module in model.modules() if hasattr(module, "packed_names")]
    rows = [layer._parameters[name] for layer in packed for name in layer.packed_names if name in layer._parameters]
    kept = (each.to_local() if hasattr(each, "device_mesh") else each for each in rows)
    return sum(each.nbytes for each in kept), sum(each.numel() for each in rows)
