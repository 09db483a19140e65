"""Layers that read the same activations, multiplied as one: the same weights, numbers and gradients as alone."""

import copy
import gc
import weakref

import numpy as np
import peft
import pytest
import torch
import transformers
from runtime.layers import KINDS
from runtime.weights import make_weight

from surogate_formats.errors import UsageError
from surogate_formats.layouts import settle
from surogate_formats.recipe import Recipe
from surogate_load import load_model, set_recipe
from surogate_load.fused import groups
from surogate_load.fused.weights import fuse
from surogate_load.linear import QuantizedLinear
from surogate_load.recipes.delayed import delayed_scales
from surogate_load.weight import WeightKind, to_torch

IDS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))

SHARED = np.float32(0.2)
"""A magnitude that no weight of these models has: the amax of every fused group."""


def packed(kind, shapes, *, global_amax=None):
    fmt, _ = settle(KINDS[kind].name, vars(KINDS[kind]))
    kinds, parts = [], []
    for seed, shape in enumerate(shapes):
        weight = make_weight("random", shape, seed) * np.float32(0.1)
        weight[0, 0] = 0.75  # one amax, as a fused group has
        kinds.append(WeightKind(fmt, shape))
        parts.append(tuple(to_torch(part) for part in fmt.quantize(weight).values()))
    return kinds, parts


@pytest.mark.parametrize("kind", KINDS)
def test_fused_weights_dequantize_alike(kind):
    kinds, parts = packed(kind, [(128, 128), (256, 128), (128, 128)])
    fused_kind, fused_parts = fuse(kinds, parts)
    shapes = {part: spec.shape for part, spec in fused_kind.specs.items()}
    if "nested_offset" in shapes:  # one a weight before
        shapes["nested_offset"] = shapes["nested_absmax"]
    assert [tuple(part.shape) for part in fused_parts] == list(shapes.values())
    dense = fused_kind.dequantize(fused_parts, torch.float32)
    assert torch.equal(dense, torch.cat([k.dequantize(p, torch.float32) for k, p in zip(kinds, parts, strict=True)]))


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("nf4", [(64, 64), (64, 64)]),  # ends within a group of 256 blocks
        ("nf4-none", [(3, 32), (64, 32)]),  # ends within a block
        ("fp8-block", [(64, 128), (128, 128)]),  # ends within a tile
        ("nf4", [(128, 128), (128, 256)]),
    ],
)
def test_what_has_no_packed_form_stays_alone(kind, shapes):
    assert fuse(*packed(kind, shapes)) is None


def test_different_global_scales_stay_alone():
    kinds, parts = packed("fp4", [(32, 32), (32, 32)])
    parts[1] = (*parts[1][:2], parts[1][2] * 2)
    assert fuse(kinds, parts) is None


def test_a_shared_fp8_scale_stays_one_scale():
    kinds, parts = packed("fp8-tensor", [(32, 32), (48, 32)])
    kind, (codes, scale) = fuse(kinds, parts)
    assert kind.format.scaling == "tensor"
    assert codes.shape == (80, 32)
    assert torch.equal(scale, parts[0][1].float())
    assert scale.data_ptr() != parts[0][1].data_ptr()
    parts[1] = (parts[1][0], parts[1][1] * 2)
    kind, (_, scales) = fuse(kinds, parts)
    assert kind.format.scaling == "channel"
    assert torch.equal(scales[[0, -1], 0], torch.cat([scale.float() for _, scale in parts]))


@pytest.mark.parametrize("kind", ["fp4", "fp8-tensor"])
def test_a_scale_that_one_member_alone_has(artifact, kind):
    model = load_model(artifact(kind, SHARED))
    attention, reference = (copy.deepcopy(model).model.layers[0].self_attn for _ in range(2))
    state = attention.q_proj.state_dict()
    name = next(name for name in state if name.endswith(("global_scale", "weight_scale")) and state[name].numel() == 1)
    changed = {**state, name: state[name] * 2}
    attention.q_proj.load_state_dict(changed)
    x = torch.randn(1, 4, 128, dtype=torch.bfloat16)
    for member in ("q_proj", "v_proj"):
        wanted = getattr(reference, member)
        if member == "q_proj":
            wanted.load_state_dict(changed)
        assert torch.equal(inside(attention, member, x), wanted(x))
    with pytest.raises(UsageError, match="different scales"):
        model.load_state_dict({**model.state_dict(), f"model.layers.0.self_attn.q_proj.{name}": changed[name]})


def inside(parent, member, x):
    """What a member gives where its parent's forward calls it."""
    group = getattr(parent, member).shared_input[0]
    group._begin()
    try:
        return getattr(parent, member)(x)
    finally:
        group._end()


def alone(path, monkeypatch, **arguments):
    with monkeypatch.context() as patch:
        patch.setattr(groups, "GROUPS", ())
        return load_model(path, **arguments)


def adapt(model, **settings):
    torch.manual_seed(1)
    chosen = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    return peft.get_peft_model(model, peft.LoraConfig(**chosen)).train()


def step(model):
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def count_products(monkeypatch):
    """A list that gets the rows of each base weight that is multiplied in a forward."""
    rows, original = [], WeightKind.dequantize
    monkeypatch.setattr(
        WeightKind, "dequantize", lambda self, *rest: rows.append(self.shape[0]) or original(self, *rest)
    )
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("settings", "products"),
    [
        ({}, 4),
        ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, 4),
        ({"target_modules": ["down_proj"]}, 4),
        ({"rank_pattern": {"k_proj": 2, "up_proj": 8}, "alpha_pattern": {"k_proj": 8, "up_proj": 32}}, 4),
        ({"alpha_pattern": {"k_proj": 32}}, 6),
        ({"lora_dropout": 0.5}, 7),
        ({"use_dora": True}, None),
    ],
)
def test_one_product_for_each_group(artifact, monkeypatch, kind, settings, products):
    path = artifact(kind, num_hidden_layers=1, num_key_value_heads=4)
    model, reference = load_model(path, dtype=torch.float32), alone(path, monkeypatch, dtype=torch.float32)
    model, reference = adapt(model, **settings), adapt(reference, **settings)
    torch.manual_seed(2)
    wanted, expected = step(reference)
    rows = count_products(monkeypatch)
    torch.manual_seed(2)
    found, gradients = step(model)
    assert products is None or len(rows) == products
    torch.testing.assert_close(found, wanted)
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)


def listened(model):
    """The model with a listener on each base layer, which keeps it from being multiplied with others."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(("kind", "amax"), [*((kind, None) for kind in KINDS), ("fp8-tensor", SHARED)])
def test_one_scaling_state_for_each_group(artifact, kind, amax):
    path = artifact(kind, amax, num_hidden_layers=1, num_key_value_heads=4)
    arguments = {"dtype": torch.float32, "recipe": "fp8-hybrid", "emulate": True}
    models = [adapt(load_model(path, **arguments)), listened(adapt(load_model(path, **arguments)))]
    results = []
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(3):
            losses.append(step(model)[0])
            optimizer.step()
            optimizer.zero_grad()
        scales = [scale.scale for scale in delayed_scales(model)]
        assert len(scales) == 8
        # Alone, each member's amax of dy is another one: only the largest counts, which is that of all together.
        results.append((torch.stack(losses), torch.cat(scales)))
    torch.testing.assert_close(*(losses for losses, _ in results), rtol=2e-3, atol=0)
    torch.testing.assert_close(*(scales for _, scales in results), rtol=5e-2, atol=0)


@pytest.fixture
def within(monkeypatch):
    """Runs something as the forward of an attention, where its projections multiply as one."""

    def run(attention, body):
        monkeypatch.setattr(type(attention), "forward", body)
        return attention()

    return run


def test_recipes_change_after_fusing(artifact, within):
    model = load_model(artifact("fp4", num_key_value_heads=4), dtype=torch.float32)
    x, attention = torch.randn(3, 128), model.model.layers[0].self_attn
    shared = []

    def body(attention):
        attention.q_proj(x)
        shared.append(bool(attention.q_proj.shared_input[0]._results))
        torch.testing.assert_close(attention.k_proj(x), attention.k_proj.multiply(x), rtol=1e-4, atol=1e-5)
        attention.v_proj(x)

    for name in ("fp8-hybrid", "nvfp4", "bf16"):
        set_recipe(model, Recipe(name), emulate=True)
        within(attention, body)
    assert shared == [True, False, True]


def linked(model):
    layer = model.model.layers[0].self_attn
    fused = layer.fused_q_proj.parts[0]
    first = 0
    for member in (layer.q_proj, layer.k_proj, layer.v_proj):
        codes = getattr(member, "base_layer", member).parts[0]
        if codes.data_ptr() != fused[first:].data_ptr():
            return False
        first += codes.shape[0]
    return True


@pytest.mark.parametrize("kind", ["nf4", "fp8-tensor"])
def test_nothing_is_held_twice_and_moves_keep_it_so(artifact, kind):
    model = load_model(artifact(kind, num_key_value_heads=4))
    assert linked(model)
    assert linked(model.to(torch.float32))
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(IDS).logits, model(IDS).logits)
    assert linked(copied)
    assert not any("fused" in name for name in model.state_dict())


@pytest.mark.parametrize("kind", ["nf4", "fp4", "fp8-tensor", "fp8-channel"])
def test_a_loaded_state_is_taken_over(artifact, kind):
    model = load_model(artifact(kind, num_key_value_heads=4))
    other = load_model(artifact(kind, num_key_value_heads=4))
    layer = other.model.layers[0].self_attn.v_proj
    with torch.no_grad():
        layer.parts[0].view(torch.uint8).bitwise_xor_(0x80)
        scale = layer.parts[3] if kind == "nf4" else layer.parts[1]
        scale.copy_((scale.float() * 0.5).to(scale.dtype))
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        x = torch.randn(3, 128, dtype=torch.bfloat16)
        attention = model.model.layers[0].self_attn
        torch.testing.assert_close(attention.v_proj(x), layer.multiply(x))
    assert linked(model)


def test_transformers_own_loading_fuses_too(artifact):
    model = transformers.AutoModelForCausalLM.from_pretrained(artifact("nf4", num_key_value_heads=4))
    assert linked(model)
    assert "logits" not in adapt(model)(input_ids=IDS, labels=IDS)


def test_a_member_called_with_something_else(artifact, within):
    attention = load_model(artifact("nf4", num_key_value_heads=4), dtype=torch.float32).model.layers[0].self_attn
    x, other = torch.randn(3, 128), torch.randn(3, 128)
    expected = {name: getattr(attention, name).multiply(x) for name in ("q_proj", "k_proj", "v_proj")}

    def body(attention):
        torch.testing.assert_close(attention.k_proj(x), expected["k_proj"])
        torch.testing.assert_close(attention.q_proj(other), attention.q_proj.multiply(other))
        torch.testing.assert_close(attention.v_proj(x), expected["v_proj"])
        torch.testing.assert_close(attention.v_proj(x), expected["v_proj"])

    within(attention, body)


def test_the_same_tensor_changed_or_under_another_mode(artifact, within):
    attention = load_model(artifact("nf4", num_key_value_heads=4), dtype=torch.float32).model.layers[0].self_attn

    def body(attention):
        x = torch.randn(3, 128)
        attention.q_proj(x)
        x.mul_(2)
        torch.testing.assert_close(attention.k_proj(x), attention.k_proj.multiply(x))
        x = torch.randn(3, 128, requires_grad=True)
        with torch.no_grad():
            attention.q_proj(x)
        assert attention.k_proj(x).requires_grad
        y = torch.randn(3, 128)
        with torch.inference_mode():
            attention.q_proj(y)
        with torch.no_grad():
            assert not attention.k_proj(y).is_inference()
        with torch.autocast("cpu", torch.bfloat16):
            assert attention.q_proj(y).dtype == torch.bfloat16
        assert attention.k_proj(y).dtype == torch.float32
        with torch.inference_mode():
            y = torch.randn(3, 128)
            torch.testing.assert_close(attention.q_proj(y), attention.q_proj.multiply(y))

    within(attention, body)


@pytest.mark.parametrize("inside", [False, True])
def test_nothing_outlives_the_forward(artifact, within, inside):
    model = adapt(load_model(artifact("nf4", num_key_value_heads=4), dtype=torch.float32))
    attention = model.base_model.model.model.layers[0].self_attn
    held = []

    def body(attention):
        lone = torch.randn(3, 128)
        held.append(weakref.ref(lone))
        attention.q_proj(lone)

    if inside:
        within(attention, body)
    else:
        body(attention)
    gc.collect()
    assert held[0]() is None  # no result of the others keeps it, and the graph, alive
    x = torch.randn(3, 128)
    attention.q_proj(x)
    with torch.no_grad():
        for layer in (attention.k_proj, attention.v_proj):
            layer.lora_B["default"].weight.mul_(2)
        expected = attention.k_proj(x.clone())
    torch.testing.assert_close(attention.k_proj(x), expected)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(attention.v_proj(x), attention.v_proj.base_layer.multiply(x))


def test_a_listener_hears_its_layer(artifact):
    model = load_model(artifact("nf4", num_key_value_heads=4))
    heard = []
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, y: heard.append(y))
    model(IDS)
    assert len(heard) == 1
    assert isinstance(model.model.layers[0].self_attn.k_proj, QuantizedLinear)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "fp8-tensor"])
def test_the_memory_footprint_counts_every_byte_once(artifact, kind):
    model = load_model(artifact(kind, num_key_value_heads=4))
    counted = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.nbytes]
    own = {address for tensor in counted for address in range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)}
    assert model.get_memory_footprint() == len(own)
    assert model.get_memory_footprint() < sum(tensor.nbytes for tensor in counted)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert model.get_memory_footprint(return_buffers=False) == parameters
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert adapted.get_memory_footprint() > len(own)
    alone = copy.deepcopy(model)
    assert alone.get_memory_footprint() == sum(t.nbytes for t in (*alone.parameters(), *alone.buffers()))
