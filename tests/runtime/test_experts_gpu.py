"""Packed experts on CUDA: one launch that skips experts without rows, grouped products, and no wait for the device."""

import gc

import peft
import pytest
import torch
from runtime.experts import FAMILIES, IDS, experts_of

from surogate_load import load_model
from surogate_load.experts.module import DOWN, GATE_UP
from surogate_load.kernels import experts as tables
from surogate_load.ops import experts as ops
from surogate_load.ops.library import PLAIN
from surogate_load.step.micro_step import MicroStep

pytestmark = pytest.mark.gpu

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def with_lora(model, rank=4):
    settings = peft.LoraConfig(r=rank, target_modules=["o_proj"], target_parameters=EXPERTS, init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(model, settings, autocast_adapter_dtype=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "kind", ["nf4", "nf4-dynamic", "fp4", "fp4-modelopt", "fp8-tensor", "fp8-channel", "fp8-block"]
)
def test_one_launch_gives_the_plain_values_of_experts_with_rows(expert_artifact, kind, dtype):
    experts = experts_of(load_model(expert_artifact("qwen3", kind), device="cuda"))
    ends = torch.tensor([3, 3, 8, 8], dtype=torch.int32, device="cuda")
    for name in (GATE_UP, DOWN):
        parts, key = experts.parts(name), experts.projections[name].kind.key
        found = torch.ops.surogate.dequantize_experts(parts, ends, key, dtype)
        backward = torch.ops.surogate.dequantize_experts_for_backward(found, parts, ends, key, dtype)
        expected = PLAIN["dequantize_experts"](parts, ends, key, dtype)
        for expert in (0, 2):
            assert torch.equal(found[expert], expected[expert])
            assert torch.equal(backward[expert], expected[expert])


def test_a_table_goes_with_its_weights_and_no_sooner(expert_artifact, monkeypatch):
    """A captured graph reads it as long as it is replayed."""
    monkeypatch.setattr(tables, "_SWEPT_FROM", 0)
    monkeypatch.setattr(tables, "_tables", {})
    ends = torch.tensor([3, 3, 8, 8], dtype=torch.int32, device="cuda")

    def dequantize(experts, name):
        torch.ops.surogate.dequantize_experts(experts.parts(name), ends, experts.projections[name].kind.key,
                                              torch.bfloat16)  # fmt: skip

    kept, dropped = (experts_of(load_model(expert_artifact("qwen3", "nf4"), device="cuda")) for _ in range(2))
    for experts in (kept, dropped):
        dequantize(experts, DOWN)
    assert len(tables._tables) == 2
    del dropped, experts
    gc.collect()
    dequantize(kept, GATE_UP)
    assert len(tables._tables) == 2


def test_experts_without_rows_are_not_written(expert_artifact):
    experts = experts_of(load_model(expert_artifact("qwen3", "nf4"), device="cuda"))
    parts, key = experts.parts(DOWN), experts.projections[DOWN].kind.key
    torch.cuda.empty_cache()
    poison = torch.full((4, 128, 128), 7.0, dtype=torch.bfloat16, device="cuda")
    address = poison.data_ptr()
    del poison
    ends = torch.tensor([3, 3, 8, 8], dtype=torch.int32, device="cuda")
    found = torch.ops.surogate.dequantize_experts(parts, ends, key, torch.bfloat16)
    if found.data_ptr() != address:
        pytest.skip("the allocator gave other memory")
    assert (found[[1, 3]] == 7).all()


@pytest.mark.parametrize("sizes", [(3, 0, 5, 8), (0, 0, 16, 0), (16, 0, 0, 0)])
def test_grouped_products_are_those_of_the_loop(sizes):
    if not ops.in_one_launch(torch.device("cuda"), torch.bfloat16):
        pytest.skip("no grouped product on this device")
    torch.manual_seed(0)
    ends = torch.tensor(sizes, device="cuda").cumsum(0, dtype=torch.int32)
    x = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4, 32, 64, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(16, 32, device="cuda", dtype=torch.bfloat16)
    for product, left, right in (
        ("grouped_product", x, weight.mT),
        ("grouped_product", dy, weight),
        ("grouped_outer_product", dy, x),
    ):
        found = getattr(torch.ops.surogate, product)(left, right, ends)
        expected = PLAIN[product](left.double().cpu(), right.double().cpu(), ends.cpu())
        torch.testing.assert_close(found.double().cpu(), expected, rtol=2e-2, atol=1e-1)
    outer = torch.ops.surogate.grouped_outer_product(dy, x, ends)
    assert not outer[[size == 0 for size in sizes]].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_that_of_the_cpu(expert_artifact, family):
    results = []
    for device in ("cpu", "cuda"):
        model = with_lora(load_model(expert_artifact(family, "nf4"), device=device, dtype=torch.float32))
        loss = model(IDS.to(device), labels=IDS.to(device)).loss
        loss.backward()
        grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}
        results.append({"loss": loss.detach().cpu(), **grads})
    for name, expected in results[0].items():
        assert torch.norm(results[1][name] - expected) <= 1e-3 * torch.norm(expected) + 1e-7, name


def test_bf16_trains_without_waiting_for_the_device(expert_artifact):
    model = with_lora(load_model(expert_artifact("qwen3", "nf4"), device="cuda"), rank=8)
    experts = experts_of(model)
    if not ops.in_one_launch(torch.device("cuda"), torch.bfloat16):
        pytest.skip("no grouped product on this device")
    wrapped = model.base_model.model.model.layers[0].mlp.experts
    x = torch.randn(32, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    index = torch.randint(0, 4, (32, 2), device="cuda")
    weights = torch.rand(32, 2, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(32, 128, device="cuda", dtype=torch.bfloat16)
    for checked in (False, True):  # the first call makes the tables
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            wrapped(x, index, weights).backward(dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert experts.compute_dtype == torch.bfloat16


def test_the_micro_step_is_captured_with_the_eager_gradients(expert_artifact):
    if not ops.in_one_launch(torch.device("cuda"), torch.bfloat16):
        pytest.skip("no grouped product on this device")
    results = []
    for captured in (False, True):
        model = with_lora(load_model(expert_artifact("qwen3", "nf4"), device="cuda"), rank=8).train()
        ids = IDS.cuda()
        if captured:
            step = MicroStep(model)
            for _ in range(4):
                model.zero_grad()
                step(input_ids=ids, labels=ids)
        else:
            model(input_ids=ids, labels=ids).loss.backward()
        results.append({name: p.grad.float() for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in results[0].items():
        assert torch.norm(results[1][name] - expected) <= 2e-2 * torch.norm(expected) + 1e-6, name


def test_compiled_layers_give_the_eager_loss(expert_artifact):
    ids = IDS.cuda()
    losses = []
    for compile_ in (None, "layers"):
        model = with_lora(load_model(expert_artifact("qwen3", "nf4"), device="cuda", compile=compile_), rank=8).train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-2
