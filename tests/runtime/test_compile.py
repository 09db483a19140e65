"""torch.compile: one graph, the eager numbers, and only packed tensors and scaling state saved."""

import peft
import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from runtime.layers import KINDS, make_layer, with_recipe
from torch._dynamo.backends.common import aot_autograd

from surogate_formats.recipe import Recipe

COMBINATIONS = [
    (kind, recipe)
    for kind in KINDS
    for recipe in ("bf16", "fp8-hybrid", "nvfp4")
    if not (kind.startswith("nf4") and recipe == "nvfp4")
]


def compile_and_list(model):
    """The compiled model, and a list that its compilation fills with (shape, dtype) of what the forward saves."""
    torch._dynamo.reset()
    saved = []

    def forward_compiler(graph, _):
        saved.extend(graph.graph.output_node().args[0])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward_compiler,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    return torch.compile(model, backend=backend, fullgraph=True), saved


@pytest.mark.parametrize(("kind", "recipe"), COMBINATIONS)
def test_compiled_layer(kind, recipe):
    layer, _ = make_layer(kind, dtype=torch.bfloat16)
    model = with_recipe(layer, Recipe(recipe))
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    gradients, outputs = [], []
    compiled, saved = compile_and_list(model)
    for callable_ in (model, compiled):
        model.load_state_dict({**model.state_dict(), **fresh(model)})
        leaf = x.clone().requires_grad_(True)
        y = callable_(leaf)
        y.float().square().sum().backward()
        outputs.append(y)
        gradients.append(leaf.grad)
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)
    allowed = {(t.shape, t.dtype) for t in (*layer.parts, *layer.recipe.buffers())}
    allowed.add((torch.Size([48]), torch.float32))  # the scales of fp8 by channel, widened
    output = (torch.Size([4, 48]), torch.bfloat16)
    found = {(node.meta["val"].shape, node.meta["val"].dtype) for node in saved if node is not None}
    assert output in found
    assert found - {output} <= allowed
    assert {(part.shape, part.dtype) for part in layer.parts[:1]} <= found or recipe == "nvfp4"


@pytest.mark.parametrize(("kind", "recipe"), [each for each in COMBINATIONS if each[1] != "nvfp4"])
def test_compiled_adapter_saves_nothing_dense(kind, recipe):
    layer, _ = make_layer(kind, dtype=torch.bfloat16)
    settings = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(settings, with_recipe(layer, Recipe(recipe))).train()
    compiled, saved = compile_and_list(model)
    x = torch.randn(5, 32, dtype=torch.bfloat16, requires_grad=True)
    gradients = []
    for callable_ in (model, compiled):
        model.zero_grad()
        x.grad = None
        callable_(x).float().square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for eager, other in zip(*gradients, strict=True):
        assert torch.equal(eager, other)
    kept = [node.meta["val"] for node in saved if node is not None]
    packed = {(part.shape, part.dtype) for part in layer.parts}
    dense = [value for value in kept if value.numel() >= 48 * 32 and (value.shape, value.dtype) not in packed]
    assert not dense
    assert (torch.Size([5, 32]), torch.bfloat16) in {(value.shape, value.dtype) for value in kept}


def fresh(model):
    """The state of recipes as before the first step."""
    state = model.state_dict()
    return {name: torch.zeros_like(value) for name, value in state.items() if name.endswith(("current", "offset"))}
