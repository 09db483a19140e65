"""What each rank of test_parallel runs: in a module of its own, since a rank imports it by name."""

import faulthandler
import gc
import os
import shutil
import signal
import warnings
from pathlib import Path

import torch
from runtime.layers import make_layer
from runtime.lora_steps import losses_of_steps

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

LAYERS = 3

IMPORTED = (
    "peft",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
)
"""What takes longer to import than to use."""


class NotRefusedError(Exception):
    """What was to be refused was not."""


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


def state(paths, folder):
    """Saves on these ranks: the adapter by PEFT, everything that trains by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    import surogate_load

    model = sharded(paths["nf4"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step(model, optimizer)
    surogate_load.save_adapter(model, folder / "adapter")
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "checkpoint")
    return {"loss": mean([step(model, optimizer)])[0], "saved": list(weights)}


def resume(path, folder):
    """The loss of the step after `state`, from its checkpoint, and from its adapter alone."""
    import peft
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    import surogate_load

    model = sharded(path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / "checkpoint")
    partly = StateDictOptions(strict=False)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=partly)
    found = {"checkpoint": mean([step(model, optimizer)])[0]}
    base = surogate_load.load_model(path, dtype=torch.float32, device="meta")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train()
    model = surogate_load.fully_shard(model, mesh=mesh())
    rows = my_share()
    return {**found, "adapter": mean([model(input_ids=rows, labels=rows).loss.item()])[0]}


def step(model, optimizer):
    rows = my_share()
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


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
    expect("saved", lambda: model.get_base_model().save_pretrained(folder / "base"))
    expect("nothing packed", lambda: surogate_load.fully_shard(torch.nn.Linear(2, 2), mesh=mesh()))
    expect("biases on meta", lambda: adapted_experts(paths["gpt-oss", "fp4"], "meta"))
    expect("nvfp4 on meta", lambda: sharded(paths["fp4"], "nvfp4"))
    return found


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


def trainer(paths, folder):
    """Losses of transformers' Trainer under accelerate's own FSDP2 config, of a model on meta; and resumed.

    Every step's global batch is all of IDS.
    """
    found = {}
    for name, resumed in (("losses", None), ("resumed", folder / "trained" / "checkpoint-1")):
        model, losses = trained_by_trainer(adapted(paths["nf4"], "bf16", "meta"), folder / "trained", resumed)
        found |= {name: losses, f"{name}, kept": kept_bytes(model)}
    found["saved"] = sorted(file.name for file in (folder / "trained" / "checkpoint-1").iterdir())
    return found


def trainer_of_experts(paths, folder):
    """The same of packed experts, and what was kept of them."""
    model, losses = trained_by_trainer(adapted_experts(paths["qwen3", "nf4"], "meta"), folder / "trained experts")
    return {"losses": losses, "kept": kept_bytes(model)}


def trained_by_trainer(model, directory, resumed=None):
    """The model after steps of Trainer, and their losses."""
    import transformers
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    import surogate_load

    layer = type(model.get_base_model().model.layers[0]).__name__
    args = transformers.TrainingArguments(
        output_dir=directory,
        max_steps=STEPS,
        per_device_train_batch_size=len(IDS) // torch.distributed.get_world_size(),
        learning_rate=1e-2,
        weight_decay=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=1e3,
        logging_steps=1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        fsdp="full_shard",
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": [layer]},
    )
    assert args.device.type == "cpu"  # which accelerate shards nothing on, by itself
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    runs = surogate_load.captured(transformers.Trainer)(model=model, args=args, train_dataset=rows)
    runs.train(resume_from_checkpoint=resumed)
    return runs.model, [entry["loss"] for entry in runs.state.log_history if "loss" in entry]


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


CHECKS = (
    ddp, reduce_amax, train, experts, options, prepared, compiled, state, recipes, refusals, trainer,
    trainer_of_experts, kill_one,
)  # fmt: skip


def hsdp(paths, folder):
    """Losses on a mesh of two replicas; of four ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    import surogate_load

    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = surogate_load.fully_shard(adapted(paths["odd"], "bf16", "meta"), mesh=both)
    return mean(losses_of_steps(model, my_share(), STEPS))


def resumed(paths, folder):
    """See `resume`."""
    return resume(paths["nf4"], folder)


def worker(rank, world, folder, paths, names):
    """Runs checks one after the other; each rank leaves what it found in a file."""
    folder = Path(folder)
    faulthandler.enable()
    gc.freeze()  # what was imported needs no looking through
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    join(rank, world, folder)
    for check in (*CHECKS[:-1], hsdp, resumed, CHECKS[-1]):
        if check.__name__ in names:
            torch.save(check(paths, folder), folder / f"{check.__name__}-{world}-{rank}")
    torch.distributed.destroy_process_group()


def run_ranks(world, folder, paths, names):
    """What each of some checks gave on every rank: `found[check][rank]`; in the last one the last rank is killed.

    Ranks are forked from a process of their own, which has imported what all of them need.
    """
    codes, errors = _ended(world, folder, paths, names)
    if -signal.SIGABRT in codes:  # seen once in some thirty runs, without a word, on a machine that was busy otherwise
        warnings.warn(f"a rank aborted: {codes}, {errors}", stacklevel=2)
        shutil.rmtree(folder)
        folder.mkdir()
        codes, errors = _ended(world, folder, paths, names)
    assert codes[:-1] == [0] * (world - 1), (codes, *errors)
    assert codes[-1] == (-signal.SIGKILL if "kill_one" in names else 0), (codes, *errors)
    files = {name: [folder / f"{name}-{world}-{rank}" for rank in range(world)] for name in names}
    return {name: [torch.load(file) for file in own if file.exists()] for name, own in files.items()}


def _ended(world, folder, paths, names):
    """Exit codes of the ranks, and what those that failed have to say."""
    torch.multiprocessing.set_forkserver_preload(list(IMPORTED))
    arguments = (world, str(folder), paths, names)
    started = torch.multiprocessing.start_processes(worker, arguments, world, join=False, start_method="forkserver")
    for process in started.processes:
        process.join(300)
    errors = [Path(file).read_bytes().decode(errors="replace") for file in started.error_files if Path(file).exists()]
    return [process.exitcode for process in started.processes], errors
