"""LoRA through peft.get_peft_model, unchanged: every format under every recipe learns, saves and reloads."""

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import model as lora_model
from runtime.layers import KINDS
from safetensors.torch import load_file

from surogate_formats.artifact import Artifact
from surogate_formats.recipe import Recipe
from surogate_load import load_model, save_adapter
from surogate_load.errors import (
    DenseInitializationError,
    InPlaceDequantizationError,
    MergeUnsupportedError,
    NoAdapterError,
    UnreadableAdapterError,
)
from surogate_load.model_recipe import set_recipe
from surogate_load.peft_layer import QuantizedLoraLinear, register
from surogate_load.recipes.token_gradient import AdapterLinear

RECIPES = ("bf16", "fp8-hybrid", "nvfp4")
COMBINATIONS = [
    (kind, recipe) for kind in KINDS for recipe in RECIPES if not (kind.startswith("nf4") and recipe == "nvfp4")
]
IDS = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))


def adapted(path, recipe="bf16", config=None, **arguments):
    model = load_model(path, recipe=recipe, emulate=True, **arguments)
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **(config or {})}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def dequantized(path):
    """The dense float32 model that holds the artifact's weights."""
    dense = transformers.AutoModelForCausalLM.from_pretrained(path.parent / "dense", dtype=torch.float32)
    with Artifact.open(path) as opened, torch.no_grad():
        for module in opened.modules:
            dense.get_submodule(module).weight.copy_(torch.from_numpy(opened.dequantize(module)))
    return dense


def train(model, steps=8, *, rate=1e-2):
    """Losses of a few steps on one batch."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def up_proj(model, layer=0):
    return model.base_model.model.model.layers[layer].mlp.up_proj


@pytest.mark.parametrize(("kind", "recipe"), COMBINATIONS)
def test_every_format_learns_under_every_recipe(artifact, kind, recipe):
    model = adapted(artifact(kind, num_hidden_layers=1), recipe)
    before = [part.clone() for part in up_proj(model).base_layer.parts]
    losses = train(model, 6)
    assert losses[-1] < losses[0] - 0.4
    assert type(up_proj(model)) is QuantizedLoraLinear
    after = up_proj(model).base_layer.parts
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, after, strict=True))
    assert not any("base_layer" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_on_the_dense_model(artifact, kind):
    path = artifact(kind)
    packed = adapted(path, dtype=torch.float32)
    reference = peft.get_peft_model(dequantized(path), peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    peft.set_peft_model_state_dict(reference, peft.get_peft_model_state_dict(packed))
    for model in (packed, reference):
        model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in packed.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["fp8-tensor", "fp4", "nf4"])
def test_adapters_have_the_dtype_that_peft_gives_them(artifact, kind):
    automatic = adapted(artifact(kind))
    assert {p.dtype for p in automatic.parameters() if p.requires_grad} == {torch.float32}
    assert up_proj(automatic).lora_A["default"].weight.unique().numel() > 200  # of 512; through fp8 about 50 remain
    base = load_model(artifact(kind))
    plain = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=False)
    assert {p.dtype for p in plain.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])
def test_an_adapter_reloads_under_plain_peft(artifact, tmp_path, recipe):
    path = artifact("fp4")
    model = adapted(path, recipe, dtype=torch.float32)
    train(model, 3)
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(dequantized(path), tmp_path).eval()
    again = peft.PeftModel.from_pretrained(load_model(path, dtype=torch.float32), tmp_path).eval()
    set_recipe(model, Recipe())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, reloaded(IDS).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_several_adapters_and_none(artifact):
    model = adapted(artifact("nf4"))
    with torch.no_grad():
        base = model(IDS).logits
    train(model, 2)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear"))
    model.eval()
    with torch.no_grad():
        first = model(IDS).logits
        model.set_adapter("second")
        assert torch.equal(model(IDS).logits, base)  # a new adapter adds nothing yet
        model.set_adapter("default")
        assert torch.equal(model(IDS).logits, first)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, base)
    assert not torch.equal(first, base)


def test_a_saved_adapter_is_gone_on_with(artifact, tmp_path):
    model = peft.get_peft_model(
        load_model(artifact("nf4")), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    save_adapter(model, tmp_path / "adapter")
    again = load_model(artifact("nf4"), adapter=tmp_path / "adapter")
    saved = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(torch.equal(parameter, saved[name]) for name, parameter in trained.items())
    with pytest.raises(UnreadableAdapterError, match=r"no adapter_config\.json"):
        load_model(artifact("nf4"), adapter=tmp_path)


def test_what_has_no_adapter_saves_none(artifact, tmp_path):
    with pytest.raises(NoAdapterError, match=r"^LlamaForCausalLM is no PeftModel: there is no adapter to save$"):
        save_adapter(load_model(artifact("nf4")), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_making_it_dense_in_place_is_one_clear_error(artifact):
    with pytest.raises(InPlaceDequantizationError, match=r"surogate-load dequantize ARTIFACT --out DIR writes one$"):
        load_model(artifact("nf4")).dequantize()


def test_dropout_acts_in_training_only(artifact):
    model = adapted(artifact("nf4"), config={"lora_dropout": 0.5, "init_lora_weights": False})
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(IDS).logits, model(IDS).logits)
        model.eval()
        assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_dora_learns(artifact):
    for kind in ("fp4", "fp8-tensor"):
        losses = train(adapted(artifact(kind), config={"use_dora": True}), 5)
        assert losses[-1] < losses[0] - 0.2


def test_merging_is_one_clear_error(artifact):
    model = adapted(artifact("fp8-tensor"))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(MergeUnsupportedError, match="save_pretrained"):
            merge()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "orthogonal"])
def test_what_starts_from_a_dense_base_is_one_clear_error(artifact, start):
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    config.init_lora_weights = start  # set afterwards: LoftQ's config wants scipy first
    for add in (peft.get_peft_model, adapted_twice):
        with pytest.raises(DenseInitializationError, match=f"^init_lora_weights='{start}' is made from a dense base"):
            add(load_model(artifact("fp8-tensor")), config)


def adapted_twice(model, config):
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear")).add_adapter("second", config)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(artifact, recipe, reentrant):
    gradients, states = [], []
    for checkpointing in (False, True):
        model = load_model(artifact("fp4"), recipe=recipe, emulate=True)
        for module in model.modules():
            if hasattr(module, "noise"):
                module.noise.seed.fill_(1)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()  # checkpointing does, and then the first layer has a dgrad too
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        ).train()
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in wrapped.parameters() if p.requires_grad])
        states.append([b.clone() for name, b in wrapped.named_buffers() if name.endswith("current")])
    assert all(gradient is not None for gradient in gradients[1])
    if recipe != "nvfp4":  # there the order of the backward decides which noise a gradient draws
        assert all(map(torch.equal, *gradients))
    assert all(map(torch.equal, *states))
    assert bool(states[0]) == (recipe == "fp8-hybrid")


def test_adapters_under_nvfp4_contract_over_tokens_in_fp4(artifact):
    model = adapted(artifact("fp4"), "nvfp4")
    lora = up_proj(model)
    assert type(lora.lora_A["default"]) is type(lora.lora_B["default"]) is AdapterLinear
    assert not any("noise" in name for name in peft.get_peft_model_state_dict(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    set_recipe(model, Recipe())
    assert type(lora.lora_A["default"]) is torch.nn.Linear
    assert all(map(lambda a, b: a is b, parameters, [p for p in model.parameters() if p.requires_grad]))


def test_dispatch_is_patched_once_and_for_our_layers_only(artifact):
    before = lora_model.dispatch_default
    register()
    assert lora_model.dispatch_default is before
    plain = transformers.AutoModelForCausalLM.from_pretrained(artifact("nf4").parent / "dense")
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert type(up_proj(wrapped)) is peft.tuners.lora.layer.Linear


def test_scales_are_renewed_by_the_optimizer_of_the_adapter(artifact):
    model = adapted(artifact("nf4"), "fp8-hybrid")
    other = adapted(artifact("nf4"), "fp8-hybrid")
    train(model, 2)
    other.train()
    other(input_ids=IDS, labels=IDS).loss.backward()
    state = up_proj(model).base_layer.recipe
    assert state.input.history.count_nonzero() == state.gradient.history.count_nonzero() == 2
    assert state.input.scale.item() > 0
    assert up_proj(other).base_layer.recipe.input.scale.item() == 0


def test_a_wrapped_model_takes_another_recipe(artifact):
    model = adapted(artifact("nf4", num_hidden_layers=1), "fp8-hybrid")
    train(model, 1)
    set_recipe(model, Recipe())
    train(model, 1)
