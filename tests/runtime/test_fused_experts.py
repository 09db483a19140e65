"""Checkpoints that hold all experts of a layer in one tensor: packed expert by expert, loaded, exported whole again."""

import json
import warnings

import peft
import pytest
import torch
import transformers
from quantizer.checkpoints import payloads
from safetensors.torch import load_file, save_file

from surogate_formats.artifact import Artifact
from surogate_load import dequantize, load_model, merge, open_artifact
from surogate_load.inspection import describe
from surogate_load.verification import verify_against
from surogate_quantize import make_options, quantize

IDS = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(0))
COMMON = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 32,
          "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False}  # fmt: skip
FAMILIES = {
    "gpt_oss": lambda: transformers.GptOssConfig(
        **COMMON, num_local_experts=4, num_experts_per_tok=2, intermediate_size=192
    ),
    "qwen3_5_moe_text": lambda: transformers.Qwen3_5MoeTextConfig(
        **COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=192, shared_expert_intermediate_size=128,
        layer_types=["full_attention"],
    ),
}  # fmt: skip
FUSED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A factory of checkpoints whose experts are fused, as the Hub has them."""

    def make(family):
        folder = tmp_path_factory.getbasetemp() / f"fused-{family}"
        if not folder.exists():
            torch.manual_seed(0)
            config = FAMILIES[family]()
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            for parameter in model.parameters():
                parameter.data.normal_(std=0.1)
            folder.mkdir()
            save_file(
                {name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
            )
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
        return folder

    return make


def dense(path, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


CASES = [("gpt_oss", "nf4", "surogate"), ("gpt_oss", "fp4", "modelopt"), ("gpt_oss", "fp8", "modelopt"),
         ("qwen3_5_moe_text", "nf4", "surogate"), ("qwen3_5_moe_text", "fp4", "modelopt"),
         ("qwen3_5_moe_text", "fp8", "compressed-tensors")]  # fmt: skip


@pytest.mark.parametrize(("family", "name", "layout"), CASES)
def test_what_is_loaded_packed_is_what_the_dense_export_holds(family, name, layout, source, tmp_path):
    options = make_options(name, {}, None if (name, layout) != ("fp8", "modelopt") else layout)
    summary = quantize(source(family), tmp_path / "packed", options)
    assert bool([line for line in summary.warnings if "vLLM leaves them at random" in line]) == (family == "gpt_oss")
    with Artifact.open(tmp_path / "packed") as artifact:
        assert artifact.layout.name == layout
        assert sum(".experts." in module for module in artifact.modules) == 12
        assert verify_against(artifact, source(family)).quantized == len(artifact.modules)
        assert "mlp.experts" not in " ".join(artifact.config["quantization_config"].get("ignore", ()))
        if family == "gpt_oss":
            assert "fused only" in describe(artifact)["loads_in"].get("vLLM", "fused only")
    packed = load_model(tmp_path / "packed", dtype=torch.float32, attn_implementation="eager").eval()
    assert type(packed.model.layers[0].mlp.experts).__name__ == "QuantizedExperts"
    dequantize(tmp_path / "packed", tmp_path / "dense", "float32")
    exported = load_file(tmp_path / "dense" / "model.safetensors")
    assert (FUSED in exported) == (family == "gpt_oss")
    with torch.no_grad():
        torch.testing.assert_close(packed(IDS).logits, dense(tmp_path / "dense", torch.float32)(IDS).logits)


def test_the_export_holds_every_weight_in_its_place(source, tmp_path):
    """Against the source: a wrong order of gate and up, or of in and out, is off by more than rounding."""
    quantize(source("gpt_oss"), tmp_path / "packed", make_options("fp8", {}, "modelopt"))
    dequantize(tmp_path / "packed", tmp_path / "dense")
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "dense", source("gpt_oss")))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert (found[name].float() - tensor.float()).norm() < 0.04 * tensor.float().norm(), name


def test_a_merged_adapter_on_experts_is_exported_fused(source, tmp_path):
    quantize(source("gpt_oss"), tmp_path / "packed", make_options("nf4", {}))
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=targets, init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(load_model(tmp_path / "packed", dtype=torch.float32), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "packed", tmp_path / "adapter", tmp_path / "merged", "float32")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(tmp_path / "merged", torch.float32)(IDS).logits)


def test_transformers_loads_it_where_we_are_imported(source, tmp_path):
    quantize(source("gpt_oss"), tmp_path / "packed", make_options("nf4", {}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    model.save_pretrained(tmp_path / "saved")
    assert payloads(tmp_path / "saved") == payloads(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, load_model(tmp_path / "packed").eval()(IDS).logits)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bands_and_shards_change_no_byte(name, source, tmp_path, monkeypatch):
    quantize(source("gpt_oss"), tmp_path / "whole", make_options(name, {}))
    monkeypatch.setattr("surogate_quantize.run.band_bytes", lambda max_memory: 1 << 12)
    monkeypatch.setattr("surogate_quantize.weight_reader.COPY_PIECE", 1 << 11)
    quantize(source("gpt_oss"), tmp_path / "cut", make_options(name, {}, max_shard_size="100kB"), workers=1)
    assert payloads(tmp_path / "cut") == payloads(tmp_path / "whole")


@pytest.mark.parametrize(("name", "layout"), [("nf4", "bitsandbytes"), ("fp8", None), ("fp4", "compressed-tensors")])
def test_layouts_whose_readers_take_them_whole_keep_them_and_say_so(name, layout, source, tmp_path):
    summary = quantize(source("gpt_oss"), tmp_path / "packed", make_options(name, {}, layout))
    with open_artifact(tmp_path / "packed") as opened:
        record = opened.artifact.manifest.tensors[FUSED]
        assert record.reason == f"fused experts, which readers of layout {opened.artifact.layout.name} take whole"
    assert any(line.startswith("all experts are kept; `layout=") for line in summary.warnings)


def test_a_skipped_expert_keeps_the_layer_fused(source, tmp_path):
    quantize(source("gpt_oss"), tmp_path / "packed", make_options("nf4", {}, skip=("experts.2",)))
    manifest = json.loads((tmp_path / "packed" / "surogate.json").read_text())
    assert manifest["tensors"][FUSED]["decision"] == "keep"
    assert "experts.2" in manifest["tensors"][FUSED]["reason"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(tmp_path / "packed")
    assert type(model.model.layers[0].mlp.experts).__name__ == "GptOssExperts"
