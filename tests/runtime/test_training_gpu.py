"""Training on a GPU: packed models follow dense ones that hold the same weights."""

import peft
import pytest
import torch
from torch import nn

from surogate_load import MicroStep, load_model
from surogate_load.linear import QuantizedLinear
from surogate_load.step.attention import fastest_attention

pytestmark = pytest.mark.gpu

STEPS = 50


def dense(model):
    """The model with plain linears that hold the dequantized weights."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
            plain.bias = layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    return model


def adapted(model):
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return peft.get_peft_model(model, settings, autocast_adapter_dtype=False).train()


def losses_of(model, step):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 64, (2, 64), generator=generator).cuda() for _ in range(4)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for number in range(STEPS):
        losses.append(step(batches[number % len(batches)]).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def plain_step(model):
    def step(ids):
        with fastest_attention():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    return step


@pytest.mark.parametrize(
    ("kind", "recipe", "tolerance"),
    [
        ("nf4", "bf16", 0.05),
        ("fp4", "bf16", 0.05),
        ("fp8-channel", "bf16", 0.05),
        ("fp8-tensor", "fp8-hybrid", 0.15),
        ("nf4", "fp8-hybrid", 0.15),
    ],
)
def test_fifty_captured_steps_follow_the_dense_model(artifact, kind, recipe, tolerance):
    path = artifact(kind)
    reference = adapted(dense(load_model(path, device="cuda", recipe="bf16")))
    expected = losses_of(reference, plain_step(reference))
    model = adapted(load_model(path, device="cuda", recipe=recipe, compile="layers"))
    captured = MicroStep(model)
    found = losses_of(model, lambda ids: captured(input_ids=ids, labels=ids))
    assert expected[-1] < expected[0] - 0.5
    assert found == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(("recipe", "tolerance"), [("bf16", 0.05), ("fp8-hybrid", 0.15)])
def test_reduce_overhead(artifact, recipe, tolerance):
    """torch's own CUDA graphs, a graph each way; fp8's roundings part two runs as they do those of the test above."""
    torch._dynamo.reset()
    path, runs = artifact("fp8-tensor"), []
    for compiled in (False, True):
        model = adapted(load_model(path, device="cuda", recipe=recipe))
        call = torch.compile(model, mode="reduce-overhead") if compiled else model
        runs.append(losses_of(model, plain_step(call)))
    assert runs[1] == pytest.approx(runs[0], abs=tolerance)
