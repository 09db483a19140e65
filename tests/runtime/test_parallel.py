"""Two gloo ranks, under DDP and FSDP2: one rank's training with the same global batch, packed bytes where they belong.

All ranks are started once, and go through `ranks.processes.CHECKS`; the tests look at what they found.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runtime.lora_steps import losses_of_steps
from runtime.ranks.data_parallel import LAYERS
from runtime.ranks.fully_sharded import evaluated_between
from runtime.ranks.models import DDP, EXPERTS, IDS, KINDS, STEPS, adapted, adapted_experts, join
from runtime.ranks.processes import CHECKS, run_ranks
from runtime.ranks.saving import resume
from torch.distributed.fsdp import MixedPrecisionPolicy

from surogate_load import load_model, open_artifact, prepare_for_sharding
from surogate_load.byte_rows import block_bytes, byte_rows
from surogate_load.integer_parameters import let_take_integers
from surogate_load.parallel.flat_weights import flatten

RANKS = 2
CLOSE = 1e-5
"""The order of fp32 sums differs."""


@pytest.fixture(scope="module")
def paths(artifact, expert_artifact):
    experts = {(family, kind): expert_artifact(family, kind) for family, kind in EXPERTS}
    made = {kind: artifact(kind, num_key_value_heads=4) for kind in {**KINDS, **DDP} if kind != "odd"}
    odd = artifact("nf4", num_key_value_heads=4, intermediate_size=131, attention_bias=True, mlp_bias=True)
    made["other scales"] = artifact("fp8-tensor", amax=np.float32(1), num_key_value_heads=4)
    return {**made, **experts, "odd": odd, "one layer": artifact("nf4", num_hidden_layers=1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(paths, folder):
    return run_ranks(RANKS, folder, paths, [check.__name__ for check in CHECKS])


@pytest.fixture(scope="module")
def alone(paths):
    """Losses and adapters of one rank by format and recipe."""

    def train(kind, recipe):
        model = adapted(paths[kind], recipe)
        losses = losses_of_steps(model, IDS, STEPS)
        return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    wanted = {*KINDS.items(), *DDP.items(), ("one layer", "bf16")}
    return {(kind, recipe): train(kind, recipe) for kind, recipe in wanted}


@pytest.mark.parametrize("kind", DDP)
def test_two_ranks_under_ddp_train_as_one(found, alone, kind):
    first, second = (rank[kind] for rank in found["ddp"])
    assert all(torch.equal(parameter, second["trained"][name]) for name, parameter in first["trained"].items())
    assert all(torch.equal(*pair) for pair in zip(first["histories"], second["histories"], strict=True))
    losses, _ = alone[kind, DDP[kind]]
    tolerance = CLOSE if DDP[kind] == "bf16" else 2e-2  # dy of half a batch is another number of fp8 steps
    assert first["losses"] == pytest.approx(losses, rel=tolerance)
    assert not [name for name in first["synced"] if "recipe" in name or "fused" in name]
    assert not [name for name in first["synced"] if name.endswith(("weight_absmax", "_proj.base_layer.weight"))]


def test_reduce_amax_is_one_all_reduce(found):
    first, second = found["reduce_amax"]
    assert first["reduced"] == second["reduced"] == [2 * LAYERS]
    assert first[True].numel() == 2 * LAYERS
    assert torch.equal(first[True], second[True])
    assert not torch.equal(first[False], second[False])
    assert first[True][0].item() == second[True][0].item() == second[False][0].item() == 448 / 4
    assert first[False][0].item() == 448


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_under_fsdp2_train_as_one(found, alone, kind):
    losses, trained = alone[kind, KINDS[kind]]
    exact = KINDS[kind] == "bf16"
    for rank in found["train"]:
        assert rank[kind]["losses"] == pytest.approx(losses, rel=CLOSE if exact else 2e-2)
        assert rank[kind]["trained"].keys() == trained.keys()
        for name, parameter in trained.items() if exact else ():
            torch.testing.assert_close(rank[kind]["trained"][name], parameter, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("kind", ["nf4", "odd", "fp4", "fp8-modelopt", "nf4-none", "fp8-block"])
def test_a_rank_keeps_and_reads_its_half(found, paths, kind):
    divided = (64 * 128 * 2 + 128) * 2  # embedding, head and the last norm
    whole = 4 * 128 * 2  # the layers' norms
    whole += 2 * (5 * 128 + 2 * 131) * 2 if kind == "odd" else 0  # biases
    packed = packed_bytes(paths[kind])
    for rank in found["train"]:
        assert rank[kind]["packed"] == pytest.approx(packed, rel=0.02)  # padding between tensors
        assert rank[kind]["kept"] == pytest.approx(rank[kind]["packed"] / RANKS, rel=0.01)
        assert rank[kind]["read"] == pytest.approx((packed + divided) / RANKS + whole, rel=0.02)


@pytest.mark.parametrize("kind", ["nf4", "odd", "fp4", "fp8-modelopt", "nf4-none", "fp8-block"])
def test_what_is_frozen_in_a_decoder_layer_is_gathered_at_once(found, kind):
    """And q, k, v and gate, up are multiplied as one, as on one rank: not where they have biases."""
    for rank in found["train"]:
        frozen = [name for name in rank[kind]["divided"] if "lora_" not in name]
        assert frozen == ["flat_weights.lines"]
        together = {name.split(".")[-2] for name in rank[kind]["fused"]}
        assert together == (set() if kind == "odd" else {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})


@pytest.mark.parametrize(("kind", "columns"), [("nf4", 128), ("nf4", 96), ("fp4", 48), ("fp8-block", 128)])
def test_no_line_of_a_unit_begins_inside_a_block(kind, columns):
    from runtime.layers import make_layer

    names, rows = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"), (2048, 384, 384, 2048, 160)
    layers = [make_layer(kind, (size, columns), bias=False, seed=seed)[0] for seed, size in enumerate(rows)]
    before = [[part.clone() for part in layer.parts] for layer in layers]
    flat = flatten(torch.nn.ModuleDict(dict(zip(names, layers, strict=True))))
    line = flat.lines.shape[1]
    for layer, parts in zip(layers, before, strict=True):
        start = flat.where(layer.flat.slots[layer.part_names[0]])[0]
        assert start % block_bytes(layer.kind) == line % block_bytes(layer.kind) == 0
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(layer.parts, parts, strict=True)
        )
    taken = [(span.start, span.start + span.size) for span in flat.spans]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(sorted(taken)))
    assert taken and max(end for _, end in taken) <= flat.lines.numel()


def test_what_is_divided_one_by_one_is_said(paths, caplog):
    prepare_for_sharding(load_model(paths["nf4"]))
    assert "divided one by one" in caplog.text
    caplog.clear()
    model = load_model(paths["nf4"])
    prepare_for_sharding(model, model.model.layers)
    prepare_for_sharding(model)  # as accelerate's two hooks do
    assert not caplog.records


def test_compiled_code_passes_over_the_look(paths):
    """Here at its first call, before the views are there."""
    model = load_model(paths["nf4"])
    with torch.no_grad():
        expected = model(IDS).logits
        prepare_for_sharding(model, model.model.layers)
        assert torch.equal(torch.compile(model, backend="eager")(IDS).logits, expected)


def packed_bytes(path):
    with open_artifact(path) as opened:
        return sum(part.nbytes for weight in opened.values() for part in weight.parts().values())


def test_adapters_in_any_use(found, paths):
    """Evaluated before a step and between backward and optimizer; multiplied by us, and by PEFT; switched off."""
    path = paths["one layer"]
    ways = found["adapters"][0]
    assert ways["multiplied with the base"] == 7
    assert ways["evaluated between"] == pytest.approx(evaluated_between(adapted(path, "bf16"), IDS), rel=CLOSE)
    assert ways["dora"] == pytest.approx(losses_of_steps(adapted(path, "bf16", use_dora=True), IDS, STEPS), rel=CLOSE)
    base = adapted(path, "bf16")
    base.disable_adapter_layers()
    with torch.no_grad():
        assert ways["disabled"] == pytest.approx([base(input_ids=IDS, labels=IDS).loss.item()], rel=CLOSE)


def test_two_ranks_generate_what_one_does(found, paths):
    model = adapted(paths["nf4"], "bf16").eval()
    with torch.no_grad():
        alone = model.generate(input_ids=IDS[:1, :6], max_new_tokens=5, do_sample=False).tolist()
    for before, after in found["generated"]:
        assert before == alone
        assert len(after[0]) == len(alone[0])


@pytest.mark.parametrize("name", EXPERTS, ids="-".join)
def test_two_ranks_under_fsdp2_train_experts_as_one(found, paths, name):
    model = adapted_experts(paths[name])
    losses = losses_of_steps(model, IDS, STEPS)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert any("experts" in each for each in trained)
    for rank in found["experts"]:
        assert rank[name]["losses"] == pytest.approx(losses, rel=CLOSE)
        for each, parameter in trained.items():
            torch.testing.assert_close(rank[name]["trained"][each], parameter, rtol=1e-3, atol=2e-4)
        kept, packed = rank[name]["kept"]
        assert kept == pytest.approx(packed / RANKS, rel=0.01)


def test_two_ranks_under_ddp_train_experts_as_one(found, paths):
    losses = losses_of_steps(adapted_experts(paths["qwen3", "nf4"]), IDS, STEPS)
    for rank in found["experts"]:
        assert rank["ddp"] == pytest.approx(losses, rel=CLOSE)


@pytest.mark.parametrize("way", ["kept gathered", "loaded whole", "checkpointed", "offloaded", "accumulated"])
def test_ways_of_calling_it_train_alike(found, alone, way):
    losses, _ = alone["one layer", "bf16"]
    assert found["options"][0][way] == pytest.approx(losses, rel=CLOSE)


def test_torchs_own_fully_shard_on_a_prepared_model(found, alone):
    for losses in found["prepared"][0].values():
        assert losses == pytest.approx(alone["fp4", "bf16"][0], rel=CLOSE)


@pytest.mark.parametrize("kind", ["nf4", "fp8-modelopt"])
def test_a_policy_casts_nothing_packed(found, alone, paths, kind):
    name, parts = found["options"][0][f"bytes {kind}"]
    with open_artifact(paths[kind]) as opened:
        stored = opened[name].parts()
    for part, expected in zip(parts, stored.values(), strict=True):
        assert part.dtype == expected.dtype
        assert torch.equal(part.view(torch.uint8), expected.reshape(part.shape).view(torch.uint8))
    assert found["options"][0][f"policy {kind}"] == pytest.approx(alone[kind, "bf16"][0], rel=1e-2)


def test_a_loaded_state_is_what_is_multiplied(found):
    """Scales of fused layers stand beside what is loaded."""
    one, other, again = found["loaded"][0]
    assert again == pytest.approx(other, rel=1e-6)
    assert abs(one - other) > 1e-4


def test_two_ranks_save_and_one_goes_on(found, paths, folder):
    saved = found["state"][0]
    assert all("lora_" in name for name in saved["saved"])
    join(0, 1, folder)
    try:
        resumed = resume(paths["nf4"], folder)
    finally:
        torch.distributed.destroy_process_group()
    assert resumed["checkpoint"] == pytest.approx(saved["loss"], rel=CLOSE)
    assert resumed["adapter"] == pytest.approx(saved["loss"], rel=CLOSE)


@pytest.mark.parametrize("wrapper", ["fsdp2", "ddp"])
def test_compiled_layers_train_alike(found, alone, wrapper):
    assert found["compiled"][0][wrapper] == pytest.approx(alone["one layer", "bf16"][0], rel=CLOSE)


def test_trainer_under_accelerates_fsdp2_config(found, alone):
    losses, _ = alone["nf4", "bf16"]
    for rank in found["trainer"]:
        assert rank["losses"] == pytest.approx(losses, rel=1e-4)
        assert rank["resumed"] == pytest.approx(losses, rel=1e-4)  # the first from the log
        kept, packed = rank["losses, kept"]
        assert kept == pytest.approx(packed / RANKS, rel=0.01)
        assert "adapter_model.safetensors" in rank["saved"]


def test_trainer_trains_experts_under_accelerates_fsdp2_config(found, paths):
    losses = losses_of_steps(adapted_experts(paths["qwen3", "nf4"]), IDS, STEPS)
    for rank in found["trainer_of_experts"]:
        assert rank["losses"] == pytest.approx(losses, rel=1e-4)
        kept, packed = rank["kept"]
        assert kept == pytest.approx(packed / RANKS, rel=0.01)


def test_recipes_on_two_ranks(found):
    first, second = found["recipes"]
    for key in ("histories", "scales", "multipliers"):
        assert all(torch.equal(*pair) for pair in zip(first[key], second[key], strict=True)), key
    assert all(torch.equal(*pair) for pair in zip(first["multipliers"], first["alone"], strict=True))
    assert any(scale > 0 for scale in first["scales"])
    assert len(set(first["seeds"] + second["seeds"])) == 2 * len(first["seeds"])  # every layer, every rank its own
    for rank in (first, second):
        assert rank["restored"] == rank["seeds"]  # from the file of the first rank


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fsdp1", "use FSDP2, surogate_load.fully_shard(model)"),
        ("unprepared", "surogate_load.prepare_for_sharding(model) before torch's"),
        ("twice", "the model is sharded already"),
        ("outside", "packed weights are spread over ranks"),
        ("trained later", "frozen when fully_shard was called"),
        ("saved", "surogate_load.save_adapter(model, DIR)"),
        ("nothing packed", "the model holds no packed layer"),
        ("nvfp4 on meta", "load the model with device='cpu'"),
        ("biases on meta", "load the model with device='cpu'"),
    ],
)
def test_refused_in_one_line(found, name, says):
    for rank in found["refusals"]:
        assert says in rank[name]
        assert "\n" not in rank[name]


def test_a_rank_that_is_lost(found):
    (said,) = found["kill_one"]
    assert said.startswith("rank 0 of 2: another rank has ended")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("nf4", (48, 128), 48),  # blocks of 64 in rows of 128
        ("nf4", (48, 96), 24),  # two rows hold three blocks
        ("nf4", (47, 96), 1),
        ("fp8-block", (384, 128), 3),
        ("fp8-block", (320, 128), 1),  # an edge tile
        ("fp4", (48, 32), 48),
    ],
)
def test_rows_hold_whole_blocks(kind, shape, expected):
    from runtime.layers import make_layer

    layer, _ = make_layer(kind, shape, bias=False)
    found = byte_rows(layer.kind, {name: layer.get_parameter(name) for name in layer.packed_names})
    assert found[layer.packed_names[0]].rows == expected
    for name, rows in found.items():
        packed = layer.get_parameter(name)
        assert rows.row_bytes % packed.element_size() == 0
        assert torch.equal(
            rows.give(rows.take(packed)).view(torch.uint8), packed.reshape(-1, *packed.shape[1:]).view(torch.uint8)
        )


def test_fsdp_of_torch_2_11_takes_integers():
    """Run on 2.11 itself when it was written; what stands here is 2.11's."""

    class FSDPParam:
        def __init__(self, data):
            self.sharded_param = home.nn.Parameter(data)

        def init_dtype_attrs(self, mp_policy):
            self.param_dtype = mp_policy.param_dtype

    home = SimpleNamespace(nn=torch.nn, FSDPParam=FSDPParam)
    with pytest.raises(RuntimeError, match="floating point"):
        FSDPParam(torch.zeros(2, dtype=torch.uint8))
    let_take_integers(home)
    packed, dense = FSDPParam(torch.zeros(2, dtype=torch.uint8)), FSDPParam(torch.zeros(2))
    assert not packed.sharded_param.requires_grad
    assert dense.sharded_param.requires_grad
    for parameter in (packed, dense):
        parameter.init_dtype_attrs(MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert packed.param_dtype is None
    assert dense.param_dtype == torch.bfloat16
    assert home.nn.Module is torch.nn.Module
