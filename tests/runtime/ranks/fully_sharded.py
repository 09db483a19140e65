"""Checks under FSDP2."""

import torch
from runtime.lora_steps import losses_of_steps
from runtime.ranks.models import (
    EXPERTS,
    IDS,
    KINDS,
    STEPS,
    adapted,
    adapted_experts,
    is_divided,
    kept_bytes,
    layers_of,
    mean,
    mesh,
    my_share,
    sharded,
)


def train(paths, folder):
    """Losses of steps under FSDP2 by format; adapters after them; what was read and kept."""
    from surogate_formats.checkpoint import Checkpoint

    found, read, original = {}, [], Checkpoint.read_into

    def count(self, name, buffer, offset=0):
        taken = original(self, name, buffer, offset)
        read.append(taken)
        return taken

    Checkpoint.read_into = count
    for kind, recipe in KINDS.items():
        read.clear()
        model = sharded(paths[kind], recipe)
        reading = sum(read)
        held, whole = kept_bytes(model)
        divided = [name for name, p in model.get_base_model().model.layers[0].named_parameters() if is_divided(p)]
        fused = [name for name, layer in layers_of(model).items() if layer.shared_input]
        losses = mean(losses_of_steps(model, my_share(), STEPS))
        trained = {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
        found[kind] = {"losses": losses, "trained": trained, "kept": held, "packed": whole, "read": reading}
        found[kind] |= {"divided": divided, "fused": fused}
    Checkpoint.read_into = original
    return found


def experts(paths, folder):
    """Losses of packed experts under FSDP2, adapters after them, and what was kept; and losses under DDP."""
    from torch.nn.parallel import DistributedDataParallel

    import surogate_load

    wrapped = DistributedDataParallel(adapted_experts(paths["qwen3", "nf4"]))
    found = {"ddp": mean(losses_of_steps(wrapped, my_share(), STEPS))}
    for name, device in EXPERTS.items():
        model = surogate_load.fully_shard(adapted_experts(paths[name], device), mesh=mesh())
        kept = kept_bytes(model)
        losses = mean(losses_of_steps(model, my_share(), STEPS))
        trained = {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
        found[name] = {"losses": losses, "trained": trained, "kept": kept}
    return found


def options(paths, folder):
    """Ways of calling FSDP2, each with the losses of its steps."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    found = {}
    path = paths["one layer"]
    found["kept gathered"] = mean(losses_of_steps(sharded(path, reshard_after_forward=False), my_share(), STEPS))
    found["loaded whole"] = mean(losses_of_steps(sharded(path, device="cpu"), my_share(), STEPS))
    checkpointed = sharded(path)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    found["checkpointed"] = mean(losses_of_steps(checkpointed, my_share(), STEPS))
    offload = sharded(path, offload_policy=CPUOffloadPolicy(pin_memory=False))
    found["offloaded"] = mean(losses_of_steps(offload, my_share(), STEPS))
    found["accumulated"] = mean(accumulated(sharded(path)))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for kind in ("nf4", "fp8-modelopt"):
        model = sharded(paths[kind], mp_policy=policy)
        found[f"policy {kind}"] = mean(losses_of_steps(model, my_share(), STEPS))
        found[f"bytes {kind}"] = gathered_parts(model)
    return found


def adapters(paths, folder):
    """Ways of using adapters."""
    import surogate_load

    path, found = paths["one layer"], {}
    model = sharded(path)
    found["evaluated between"] = mean(evaluated_between(model, my_share()))
    fused = [name for name, module in model.named_modules() if getattr(module, "plain_adapter", lambda: None)()]
    found["multiplied with the base"] = len(fused)
    dora = adapted(path, "bf16", use_dora=True)  # PEFT's own way
    found["dora"] = mean(losses_of_steps(surogate_load.fully_shard(dora, mesh=mesh()), my_share(), STEPS))
    model.disable_adapter_layers()
    rows = my_share()
    with torch.no_grad():
        found["disabled"] = mean([model(input_ids=rows, labels=rows).loss.item()])
    return found


def evaluated_between(model, ids):
    """Losses before each step, without gradients, and after its backward."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def generated(paths, folder):
    """Tokens that a sharded model with an adapter generates, before a step and after it."""
    model = sharded(paths["nf4"]).eval()
    found = [_tokens(model)]
    losses_of_steps(model.train(), my_share(), 1)
    return [*found, _tokens(model.eval())]


def _tokens(model):
    with torch.no_grad():
        return model.generate(input_ids=IDS[:1, :6], max_new_tokens=5, do_sample=False).tolist()


def accumulated(model):
    """Clipped steps, each of two micro-batches of which the second is reduced."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        rows = my_share().split(1)
        for number, row in enumerate(rows):
            model.set_requires_gradient_sync(number == len(rows) - 1)
            loss = model(input_ids=row, labels=row).loss / len(rows)
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
        optimizer.step()
        optimizer.zero_grad()
    return [sum(losses[i : i + len(rows)]) for i in range(0, len(losses), len(rows))]


def gathered_parts(model):
    """The name on disk of the last layer, and its packed parts as products take them."""
    from torch.distributed.fsdp import FSDPModule

    name, layer = list(layers_of(model).items())[-1]
    unit = next(m for n, m in model.named_modules() if isinstance(m, FSDPModule) and n and name.startswith(f"{n}."))
    unit.unshard()
    parts = [part.clone() for part in layer.parts]
    unit.reshard()
    return name.removeprefix("base_model.model.").removesuffix(".base_layer"), parts


def prepared(paths, folder):
    """torch's own fully_shard on a prepared model, with units of the caller's choice."""
    from torch.distributed.fsdp import fully_shard

    import surogate_load

    model = adapted(paths["fp4"], "bf16", "meta")
    surogate_load.prepare_for_sharding(model)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer.mlp, mesh=mesh())
    fully_shard(model, mesh=mesh())
    surogate_load.read_shards(model)
    found = {"losses": mean(losses_of_steps(model, my_share(), STEPS))}
    model = adapted(paths["fp4"], "bf16")
    units = [module for layer in model.get_base_model().model.layers for module in (layer.self_attn, layer.mlp)]
    surogate_load.prepare_for_sharding(model, units)
    for unit in units:
        fully_shard(unit, mesh=mesh())
    fully_shard(model, mesh=mesh())
    surogate_load.read_shards(model)
    return {**found, "losses in units": mean(losses_of_steps(model, my_share(), STEPS))}


def compiled(paths, folder):
    """Layers compiled inside FSDP2's hooks, and under DDP; no graph breaks.

    One rank compiles, to which the others' eager layers are equal: tracing is the dearest that these checks do.
    """
    from torch.nn.parallel import DistributedDataParallel

    import surogate_load
    from surogate_load.step.regional import compile_layers

    found = {}
    for compiling, name in enumerate(("fsdp2", "ddp")):
        model = adapted(paths["one layer"], "bf16")
        if torch.distributed.get_rank() == compiling:
            compile_layers(model, backend="eager")
        wrap = DistributedDataParallel if name == "ddp" else lambda each: surogate_load.fully_shard(each, mesh=mesh())
        found[name] = mean(losses_of_steps(wrap(model), my_share(), STEPS))
    return found


def hsdp(paths, folder):
    """Losses on a mesh of two replicas; of four ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    import surogate_load

    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = surogate_load.fully_shard(adapted(paths["odd"], "bf16", "meta"), mesh=both)
    return mean(losses_of_steps(model, my_share(), STEPS))
