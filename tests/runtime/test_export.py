"""Dense checkpoints made of artifacts: what plain transformers and PEFT make of them is what the packed model says."""

import json

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from runtime.layers import KINDS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from surogate_formats.errors import UsageError
from surogate_load import load_model
from surogate_load.cli import main
from surogate_load.errors import (
    ExportExistsError,
    ExportFailedError,
    MergeUnsupportedError,
    UnreadableAdapterError,
)
from surogate_load.export import checkpoint
from surogate_load.export.dense import dequantize
from surogate_load.export.merging import merge
from surogate_load.peft_layer import QuantizedLoraLinear

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def dense(path, **arguments):
    return transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_checkpoint_computes_the_same(artifact, kind, tmp_path):
    path = artifact(kind)
    assert dequantize(path, tmp_path / "dense") == tmp_path / "dense"
    assert torch.equal(logits(dense(tmp_path / "dense")), logits(load_model(path)))
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_another_dtype_is_rounded_once(artifact, tmp_path):
    path = artifact("nf4")
    dequantize(path, tmp_path / "dense", "float32")
    model = dense(tmp_path / "dense", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(logits(model), logits(load_model(path, dtype=torch.float32)))


def test_several_files_and_their_index(artifact, tmp_path, monkeypatch):
    path = artifact("nf4")
    monkeypatch.setattr(checkpoint, "SHARD", 40_000)
    dequantize(path, tmp_path / "dense")
    index = json.loads((tmp_path / "dense/model.safetensors.index.json").read_text())
    sizes = {name: (tmp_path / "dense" / name).stat().st_size for name in set(index["weight_map"].values())}
    assert len(sizes) > 1
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "dense" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert torch.equal(logits(dense(tmp_path / "dense")), logits(load_model(path)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": ["q_proj", "down_proj", "lm_head"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["v_proj", "embed_tokens"]},
    ],
)
@pytest.mark.parametrize("kind", ["nf4", "fp8-channel"])
def test_merging_is_the_adapter_at_work(artifact, kind, settings, tmp_path):
    path = artifact(kind)
    model = adapted(path, tmp_path / "adapter", settings)
    merge(path, tmp_path / "adapter", tmp_path / "merged", "float32")
    torch.testing.assert_close(logits(dense(tmp_path / "merged", dtype="auto")), logits(model), rtol=1e-3, atol=1e-4)
    assert (logits(model) - logits(load_model(path, dtype=torch.float32))).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (peft.LoraConfig(target_modules=["embed_tokens", "q_proj"]), "adapter on model.embed_tokens, which is tied"),
        (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), "another model.embed_tokens"),
        (peft.LoraConfig(target_modules=["q_proj"], bias="all"), "bias='all'"),
        (peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]), "trainable_token_indices"),
        (peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4), "BOFT"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_would_be_merged_wrongly_is_refused(artifact, tmp_path, settings, reason):
    path = artifact("nf4", tie_word_embeddings=True)
    peft.get_peft_model(load_model(path, dtype=torch.float32), settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeUnsupportedError, match=reason):
        merge(path, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_a_tied_model_with_another_head(artifact, tmp_path):
    path = artifact("nf4", tie_word_embeddings=True)
    model = adapted(path, tmp_path / "adapter", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]})
    merge(path, tmp_path / "adapter", tmp_path / "merged", "float32")
    torch.testing.assert_close(logits(dense(tmp_path / "merged", dtype="auto")), logits(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", ["half", "other names"])
def test_an_adapter_that_peft_would_load_in_part(artifact, tmp_path, change):
    path = artifact("nf4")
    adapted(path, tmp_path / "adapter", {})
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    if change == "half":
        tensors = {name: tensor for name, tensor in tensors.items() if "layers.0" in name}
    else:
        tensors = {name.replace("layers", "blocks"): tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    with pytest.raises(UnreadableAdapterError, match="is missing"):
        merge(path, tmp_path / "adapter", tmp_path / "merged")


def adapted(path, where, settings):
    """A packed model with a random adapter, which is saved; and the same adapter on a dense model gives the same."""
    torch.manual_seed(0)
    chosen = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    model = peft.get_peft_model(load_model(path, dtype=torch.float32), peft.LoraConfig(**chosen))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(where)
    return model


def test_a_saved_adapter_is_plain_pefts(artifact, tmp_path):
    path = artifact("nf4")
    model = adapted(path, tmp_path / "adapter", {})
    dequantize(path, tmp_path / "dense", "float32")
    plain = peft.PeftModel.from_pretrained(dense(tmp_path / "dense", dtype="auto"), tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


def test_a_merged_weight_leaves_the_layer_alone(artifact, tmp_path):
    model = adapted(artifact("nf4"), tmp_path / "adapter", {})
    layer = next(module for module in model.modules() if isinstance(module, QuantizedLoraLinear))
    before, base = logits(model), layer.base_layer
    delta = layer.merged_weight() - base.dequantize(torch.float32)
    torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
    assert layer.base_layer is base
    assert not layer.merged
    assert torch.equal(logits(model), before)


def test_what_is_there_is_never_touched(artifact, tmp_path):
    (tmp_path / "dense").mkdir()
    with pytest.raises(ExportExistsError, match="exists already"):
        dequantize(artifact("nf4"), tmp_path / "dense")
    assert not list((tmp_path / "dense").iterdir())


def test_a_failed_export_leaves_nothing(artifact, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ExportFailedError, match="No space left"):
        dequantize(artifact("nf4"), tmp_path / "dense")
    assert not list(tmp_path.iterdir())


def test_errors_of_the_user(artifact, tmp_path):
    path = artifact("nf4")
    with pytest.raises(UsageError, match="float8"):
        dequantize(path, tmp_path / "dense", "float8")
    with pytest.raises(UnreadableAdapterError, match="adapter_config"):
        merge(path, tmp_path, tmp_path / "merged")
    adapted(artifact("nf4", hidden_size=64, intermediate_size=128), tmp_path / "adapter", {})
    with pytest.raises(UnreadableAdapterError, match="no adapter for this model"):
        merge(path, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_commands(artifact, tmp_path):
    path = artifact("nf4")
    adapted(path, tmp_path / "adapter", {})
    for arguments in (["dequantize", path], ["merge", path, tmp_path / "adapter"]):
        out = tmp_path / arguments[0]
        ran = CliRunner().invoke(main, [*map(str, arguments), "--out", str(out)])
        assert (ran.exit_code, ran.stdout) == (0, f"{out}\n")
    for taken, message in ((tmp_path / "merge", "exists already"), (path / "dense", "would stand inside the artifact")):
        again = CliRunner().invoke(main, ["dequantize", str(path), "--out", str(taken)])
        assert (again.exit_code, again.stdout) == (2, "")
        assert again.stderr.splitlines()[-1].startswith(f"Error: {taken}: {message}")
    assert not (path / "dense").exists()


def test_an_adapter_of_another_base_is_said(artifact, tmp_path, caplog):
    adapted(artifact("nf4"), tmp_path / "adapter", {})
    merge(artifact("fp4"), tmp_path / "adapter", tmp_path / "merged")
    assert "was trained on" in caplog.text
