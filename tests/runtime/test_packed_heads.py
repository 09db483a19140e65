"""An artifact whose output head is packed, too: loaded, trained on, saved and exported as any packed linear."""

import peft
import pytest
import torch
import transformers
from runtime.artifacts import tiny_llama
from runtime.lora_steps import losses_of_four_steps
from safetensors.torch import load_file

from surogate_formats.recipe import Recipe
from surogate_load import load_model, open_artifact, set_recipe
from surogate_load.export.dense import dequantize
from surogate_load.linear import QuantizedLinear
from surogate_load.loss.fused_head import FusedHead
from surogate_load.recipes.bf16 import Bf16
from surogate_load.recipes.fp8_hybrid import Fp8Hybrid
from surogate_quantize import make_options, quantize

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
KINDS = {
    "nf4": ("nf4", {}, None),
    "fp4": ("fp4", {}, None),
    "fp4-modelopt": ("fp4", {}, "modelopt"),
    "fp8": ("fp8", {}, None),
    "fp8-channel": ("fp8", {"scaling": "channel"}, None),
    "fp8-modelopt": ("fp8", {}, "modelopt"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    """A factory of (artifact, the same dense)."""
    root, made = tmp_path_factory.mktemp("headed"), {}
    tiny_llama().save_pretrained(root / "source")

    def make(kind):
        if kind not in made:
            name, parameters, layout = KINDS[kind]
            options = make_options(name, parameters, layout, quantize_lm_head=True)
            quantize(root / "source", root / kind, options, device="cpu", workers=1)
            made[kind] = root / kind, dequantize(root / kind, root / f"{kind}-dense")
        return made[kind]

    return make


def dense(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype="auto")


@every_kind
def test_it_loads_packed_and_computes_as_the_dense_one(headed, kind):
    path, twin = headed(kind)
    model = load_model(path)
    assert type(model.lm_head) is QuantizedLinear
    assert model.get_output_embeddings() is model.lm_head
    with open_artifact(path) as opened, torch.no_grad():
        assert torch.equal(opened["lm_head"].dequantize(), model.lm_head.dequantize(torch.float32))
        assert torch.equal(model(IDS).logits, dense(twin)(IDS).logits)
        assert torch.equal(
            model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0),
            dense(twin).generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0),
        )


def step(model):
    """The loss of a training step, its logits, and the adapters' gradients."""
    torch.manual_seed(0)
    chosen = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, chosen).train()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return out.loss.item(), out.logits.detach().float(), gradients


@every_kind
def test_a_training_step_takes_the_plain_loss_and_gives_the_dense_models_gradients(headed, kind, monkeypatch, tmp_path):
    path, _ = headed(kind)
    monkeypatch.setattr(FusedHead, "_intercept", None)  # the loss in chunks would read the head's codes as its weight
    model, peer = load_model(path, dtype=torch.float32), dense(dequantize(path, tmp_path / "dense", "float32"))
    assert isinstance(model, FusedHead)
    loss, logits, gradients = step(model)
    expected_loss, expected_logits, expected = step(peer)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected.keys()
    assert not any("lm_head" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_an_adapter_on_the_packed_head_trains(headed, kind):
    torch.manual_seed(0)
    model = load_model(headed(kind)[0])
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head", "up_proj"])).train()
    losses = losses_of_four_steps(model, IDS)
    assert losses[-1] < losses[0] - 0.1


@every_kind
def test_saving_it_writes_the_packed_head_again(headed, kind, tmp_path):
    path, _ = headed(kind)
    load_model(path).save_pretrained(tmp_path / "saved")
    saved, stored = (load_file(where / "model.safetensors") for where in (tmp_path / "saved", path))
    heads = {name for name in stored if name.startswith("lm_head.")}
    assert len(heads) > 1
    for name in heads:
        assert torch.equal(saved[name].view(-1).view(torch.uint8), stored[name].view(-1).view(torch.uint8)), name
    with open_artifact(tmp_path / "saved") as opened:
        assert "lm_head" in opened


@pytest.mark.parametrize("adapted", [False, True])
def test_the_head_multiplies_as_under_bf16(headed, adapted):
    model = load_model(headed("fp8")[0], recipe="fp8-hybrid", emulate=True)
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
        set_recipe(model, Recipe("fp8-hybrid"), emulate=True)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert {type(layer.recipe) for name, layer in layers.items() if "lm_head" in name} == {Bf16}
    assert {type(layer.recipe) for name, layer in layers.items() if "lm_head" not in name} == {Fp8Hybrid}
