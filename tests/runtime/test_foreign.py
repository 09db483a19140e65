"""Checkpoints that others packed: their own values bit for bit, LoRA on them, and one line for what can't be read."""

import json
import logging
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from runtime.artifacts import is_block_linear, tiny_llama
from runtime.foreign import KINDS, UNUSED, write_foreign
from runtime.lora_steps import losses_of_four_steps
from safetensors.torch import load_file

from surogate_formats.artifact import IncompleteArtifactError, NoRecordedHashesError
from surogate_formats.errors import ArtifactError
from surogate_formats.layouts import UnreadableConfigError
from surogate_formats.packed_weights import UnreadableWeightError, UnscaledWeightError
from surogate_load import load_model, open_artifact
from surogate_load.cli import main
from surogate_load.experts.module import QuantizedExperts
from surogate_load.linear import QuantizedLinear

every_kind = pytest.mark.parametrize("kind", KINDS)
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = write_foreign(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return make


def dense_twin(checkpoint):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path.parent / "dense", dtype="auto")
    with torch.no_grad():
        for module, weight in checkpoint.weights.items():
            model.get_submodule(module).weight.copy_(weight)
    return model


def same_bits(one, other):
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


@every_kind
def test_values_are_the_makers_own_bit_for_bit(foreign, kind):
    checkpoint = foreign(kind)
    with open_artifact(checkpoint.path) as opened:
        assert sorted(opened) == sorted(checkpoint.weights)
        for module, weight in checkpoint.weights.items():
            assert same_bits(opened[module].dequantize(), weight), module
            assert same_bits(torch.from_numpy(opened.artifact.dequantize(module)), weight), module


@every_kind
def test_load_model_keeps_it_packed_and_names_once_what_it_passes_over(foreign, kind, caplog):
    checkpoint = foreign(kind)
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        model = load_model(checkpoint.path)
    warned = [record.getMessage() for record in caplog.records if record.name == "surogate_load"]
    line = f"{checkpoint.path}: weights alone are taken as they are packed; not used here: {UNUSED.get(kind)}"
    assert warned == ([line] if kind in UNUSED else [])
    layers = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert sorted(layers) == sorted(checkpoint.weights)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense_twin(checkpoint)(IDS).logits)
    state, stored = model.state_dict(), load_file(checkpoint.path / "model.safetensors")
    for name in state.keys() | stored.keys():
        assert (state[name].dtype, state[name].shape) == (stored[name].dtype, stored[name].shape), name
        assert torch.equal(state[name].reshape(-1).view(torch.uint8), stored[name].reshape(-1).view(torch.uint8)), name


@every_kind
def test_lora_trains_on_it(foreign, kind):
    checkpoint = foreign(kind)
    torch.manual_seed(0)
    model = peft.get_peft_model(load_model(checkpoint.path), peft.LoraConfig(r=4, target_modules="all-linear"))
    losses = losses_of_four_steps(model, IDS)
    assert losses[-1] < losses[0] - 0.1
    base = model.get_base_model().get_submodule(UP).base_layer
    assert torch.equal(base.dequantize(torch.float32), checkpoint.weights[UP])


@pytest.mark.parametrize("kind", ["ct-nvfp4", "modelopt-nvfp4", "ct-fp8-tensor", "modelopt-fp8", "hf-fp8"])
def test_the_other_recipes_train_on_it(foreign, kind):
    for recipe in ("fp8-hybrid", "nvfp4"):
        model = load_model(foreign(kind).path, recipe=recipe, emulate=True)
        model = peft.get_peft_model(model.train(), peft.LoraConfig(r=4, target_modules="all-linear"))
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("modelopt")])
def test_from_pretrained_gives_the_packed_model_of_modelopt(foreign, kind, tmp_path):
    path = foreign(kind).path
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert type(model.get_submodule(UP)) is QuantizedLinear
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, load_model(path)(IDS).logits)
    model.save_pretrained(tmp_path / "saved")
    saved, stored = (load_file(each / "model.safetensors") for each in (tmp_path / "saved", path))
    assert saved.keys() == stored.keys()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, load_model(tmp_path / "saved")(IDS).logits)


def test_importing_the_package_is_all_that_transformers_needs(foreign):
    code = (
        "import sys, surogate_load, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(foreign('modelopt-fp8').path)!r})\n"
        f"assert type(model.get_submodule({UP!r})).__name__ == 'QuantizedLinear'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@every_kind
def test_inspect(foreign, kind):
    checkpoint = foreign(kind)
    found = CliRunner().invoke(main, ["inspect", str(checkpoint.path), "--json", "--modules"])
    assert found.exit_code == 0, found.stderr
    rows = json.loads(found.stdout)
    assert rows["quantized_weights"] == len(checkpoint.weights) == len(rows["modules"])
    assert rows["tool_version"] is None
    assert rows["relative_error"] is None
    assert ", ".join(rows["not_used"]) == UNUSED.get(kind, "")
    assert rows["loads_in"]["surogate_load"] == "stays packed, trains LoRA"
    assert 4 <= rows["bits_per_quantized_weight"] < 9
    assert "two_d" not in rows["parameters"]
    text = CliRunner().invoke(main, ["inspect", str(checkpoint.path)]).stdout
    assert "others (no surogate.json" in text


def test_inspect_knows_who_reads_what_we_never_write(foreign):
    def found(kind):
        return json.loads(CliRunner().invoke(main, ["inspect", str(foreign(kind).path), "--json"]).stdout)["loads_in"]

    assert "vLLM" not in found("hf-tensor")
    assert "dynamic activations" in found("ct-fp8-block")["vLLM"]
    assert "stored scales" in found("modelopt-fp8")["vLLM"]
    assert "without an error" in found("modelopt-fp8")["transformers"]


def test_verify_says_that_nothing_is_recorded(foreign):
    path = foreign("ct-nvfp4").path
    with open_artifact(path) as opened, pytest.raises(NoRecordedHashesError, match="no hashes are recorded"):
        opened.verify()
    found = CliRunner().invoke(main, ["verify", str(path)])
    assert (found.exit_code, found.stdout, found.stderr.count("\n")) == (1, "", 1)


def test_modelopts_own_file_declares_it_where_config_does_not(tmp_path):
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    checkpoint = write_foreign(tmp_path, "modelopt-nvfp4", edit=lambda _, config: config.pop("quantization_config"))
    (checkpoint.path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    with torch.no_grad():
        assert torch.equal(load_model(checkpoint.path)(IDS).logits, dense_twin(checkpoint)(IDS).logits)


def test_a_packed_head_and_scales_of_the_cache_outside_of_packed_layers(tmp_path):
    def add(tensors, config):
        tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([1.0])

    def packs(name, shape):
        return is_block_linear(name, shape) or name == "lm_head.weight"

    checkpoint = write_foreign(tmp_path, "ct-fp8-channel", packs=packs, edit=add)
    model = load_model(checkpoint.path)
    assert type(model.lm_head) is QuantizedLinear
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense_twin(checkpoint)(IDS).logits)
    assert model(input_ids=IDS, labels=IDS).loss.isfinite()


def replaced(kind, **changes):
    def edit(tensors, config):
        config["quantization_config"].update(changes)

    return kind, edit


def without(kind, suffix):
    return kind, lambda tensors, config: tensors.pop(f"{UP}.{suffix}")


def changed(kind, suffix, change):
    def edit(tensors, config):
        tensors[f"{UP}.{suffix}"] = change(tensors.get(f"{UP}.{suffix}"))

    return kind, edit


def group(**changes):
    def edit(tensors, config):
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)

    return edit


SCALE = "has no model.layers.0.mlp.up_proj."
REFUSED = {
    "mxfp4": (*replaced("ct-nvfp4", format="mxfp4-pack-quantized"), UnreadableConfigError, "'mxfp4-pack-quantized'"),
    "int4": (*replaced("ct-nvfp4", format="pack-quantized"), UnreadableConfigError, "'pack-quantized'"),
    "int8": ("ct-fp8-channel", group(type="int"), UnreadableConfigError, "type is 'int'"),
    "fp8 by group": ("ct-fp8-channel", group(strategy="group"), UnreadableConfigError, "strategy is 'group'"),
    "other blocks": (
        "ct-fp8-block",
        group(block_structure=[64, 64]),
        UnreadableConfigError,
        r"block_structure is \[64, 64\]",
    ),
    "two schemes": (
        *replaced("ct-nvfp4", config_groups={"a": {}, "b": {}}),
        UnreadableConfigError,
        "must hold exactly one group",
    ),
    "other tiles": (
        *replaced("hf-fp8", weight_block_size=[64, 64]),
        UnreadableConfigError,
        r"weight_block_size is \[64, 64\]",
    ),
    "other algorithm": (
        *replaced("modelopt-nvfp4", quant_algo="MIXED_PRECISION"),
        UnreadableConfigError,
        "quant_algo is 'MIXED_PRECISION'",
    ),
    "gptq": (*replaced("ct-nvfp4", quant_method="gptq"), UnreadableConfigError, "'gptq' can't be read"),
    "declares the other format": (
        *replaced("modelopt-fp8", quant_algo="NVFP4"),
        UnscaledWeightError,
        "is F8_E4M3, and no scale for it is known",
    ),
    "ct fp8 without a scale": (*without("ct-fp8-channel", "weight_scale"), UnscaledWeightError, f"{SCALE}weight_scale"),
    "hf without a scale": (*without("hf-fp8", "weight_scale_inv"), UnscaledWeightError, f"{SCALE}weight_scale_inv"),
    "modelopt fp8 without a scale": (
        *without("modelopt-fp8", "weight_scale"),
        UnscaledWeightError,
        f"{SCALE}weight_scale",
    ),
    "nvfp4 without a global scale": (
        *without("ct-nvfp4", "weight_global_scale"),
        UnscaledWeightError,
        f"{SCALE}weight_global_scale",
    ),
    "modelopt without scale_2": (
        *without("modelopt-nvfp4", "weight_scale_2"),
        UnscaledWeightError,
        f"{SCALE}weight_scale_2",
    ),
    "e5m2": (
        *changed("ct-fp8-channel", "weight", lambda tensor: tensor.float().to(torch.float8_e5m2)),
        UnscaledWeightError,
        r"up_proj\.weight is F8_E5M2, and no scale",
    ),
    "scales in float16": (
        "ct-fp8-tensor",
        lambda tensors, config: tensors.update(
            {name: tensor.half() for name, tensor in tensors.items() if name.endswith("weight_scale")}
        ),
        UnreadableWeightError,
        "is F16; scales are read in F32 or BF16 only",
    ),
    "one scale of another dtype": (
        *changed("ct-fp8-channel", "weight_scale", torch.Tensor.float),
        UnreadableWeightError,
        r"up_proj\.weight_scale is F32 \[256, 1\], expected BF16",
    ),
    "scales of another shape": (
        *changed("hf-fp8", "weight_scale_inv", lambda tensor: tensor.repeat(2, 2)),
        UnreadableWeightError,
        r"weight_scale_inv is F32 \[4, 2\], expected F32 \[2, 1\]",
    ),
    "awq's factors": (
        *changed("modelopt-nvfp4", "pre_quant_scale", lambda _: torch.ones(128)),
        UnreadableWeightError,
        "pre_quant_scale: what it does to its weight isn't known",
    ),
    "fused experts": (
        "ct-fp8-channel",
        lambda tensors, config: tensors.update(
            {"model.layers.0.mlp.experts.weight": torch.zeros(2, 4, 4).to(torch.float8_e4m3fn)}
        ),
        UnreadableWeightError,
        r"is F8_E4M3 \[2, 4, 4\]: packed weights are read as matrices only",
    ),
    "nothing packed": (
        "ct-nvfp4",
        lambda tensors, config: [tensors.pop(name) for name in list(tensors) if ".layers." in name],
        UnreadableConfigError,
        "no tensor is such a weight",
    ),
    "not quantized at all": (
        "hf-fp8",
        lambda tensors, config: config.pop("quantization_config"),
        IncompleteArtifactError,
        "no surogate.json",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_read_is_one_line(case, tmp_path):
    kind, edit, error, message = REFUSED[case]
    path = write_foreign(tmp_path, kind, edit=edit).path
    for opens in (open_artifact, load_model):
        with pytest.raises(error, match=message) as caught:
            opens(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, ArtifactError)


def test_from_pretrained_casts_no_fp8_without_its_scale(tmp_path):
    path = write_foreign(tmp_path, "modelopt-fp8", edit=without("", "weight_scale")[1]).path
    with pytest.raises(UnscaledWeightError, match=r"up_proj\.weight_scale"):
        transformers.AutoModelForCausalLM.from_pretrained(path)


def test_packed_experts_beside_linears_that_are_not(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "source")
    per_expert = load_file(tmp_path / "source" / "model.safetensors")
    model.state_dict = lambda: per_expert
    model.save_pretrained = lambda path: transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(path)

    def packs(name, shape):
        return "experts" in name

    path = write_foreign(tmp_path, "modelopt-nvfp4", model=model, packs=packs).path
    experts = load_model(path).model.layers[0].mlp.experts
    assert type(experts) is QuantizedExperts
    with open_artifact(path) as opened:
        assert len(opened) == 6


def headed(tensors, config):
    config["tie_word_embeddings"] = True
    config["quantization_config"]["ignore"] = []


@pytest.mark.parametrize("kind", ["ct-fp8-channel", "hf-fp8", "modelopt-fp8", "ct-nvfp4"])
def test_a_packed_head_that_is_declared_tied_is_its_own(tmp_path, kind):
    foreign = write_foreign(
        tmp_path,
        kind,
        packs=lambda name, shape: is_block_linear(name, shape) or name == "lm_head.weight",
        model=tiny_llama(num_key_value_heads=4, vocab_size=128),
        edit=headed,
    )
    model = load_model(foreign.path)
    assert type(model.lm_head) is QuantizedLinear
    assert torch.equal(model.lm_head.dequantize(torch.float32), foreign.weights["lm_head"])
    model.tie_weights()
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight.dtype != model.get_input_embeddings().weight.dtype
    embedded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").model.embed_tokens.weight
    assert torch.equal(model.get_input_embeddings().weight, embedded)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float64])
def test_zero_points_of_activations_are_not_in_the_way(tmp_path, dtype):
    def edit(tensors, config):
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name.replace("weight_scale", "input_zero_point")] = torch.zeros(1, dtype=dtype)

    foreign = write_foreign(tmp_path, "ct-w8a8", edit=edit)
    model = load_model(foreign.path)
    for module, weight in foreign.weights.items():
        assert torch.equal(model.get_submodule(module).dequantize(torch.float32), weight)
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert any(name.endswith("input_zero_point") for name in saved) == (dtype == torch.int8)
