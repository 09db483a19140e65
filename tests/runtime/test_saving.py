"""save_pretrained of a packed model: an artifact again, byte for byte, or one line and nothing written."""

import json
import logging

import peft
import pytest
import torch
import transformers
from runtime.artifacts import tiny_llama, write_artifact
from runtime.layers import KINDS
from safetensors.torch import load_file

from surogate_formats.nf4 import NF4
from surogate_load import load_model, open_artifact
from surogate_load.errors import UnrecordedSaveError
from surogate_load.saving import ADDED, CHANGED

IDS = torch.arange(12).reshape(1, 12)
UP = "model.layers.0.mlp.up_proj.weight"


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def manifest_of(path):
    return json.loads((path / "surogate.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_the_artifact_again(artifact, kind, tmp_path):
    path = artifact(kind)
    load_model(path, recipe="fp8-hybrid", emulate=True).save_pretrained(tmp_path)
    found, stored = load_file(tmp_path / "model.safetensors"), load_file(path / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(as_bytes(found[name]), as_bytes(stored[name])) for name in stored)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert {**configs[0], "transformers_version": ""} == {**configs[1], "transformers_version": ""}
    sidecars = manifest_of(tmp_path).pop("sidecars")
    assert sidecars.keys() == {"config.json", "generation_config.json"}
    assert {**manifest_of(tmp_path), "sidecars": {}} == manifest_of(path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_everywhere(artifact, kind, tmp_path):
    model = load_model(artifact(kind))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with open_artifact(tmp_path) as opened, torch.no_grad():
        assert opened.verify() > 14
        expected = model(IDS).logits
        assert torch.equal(load_model(tmp_path)(IDS).logits, expected)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
        again.train()  # bitsandbytes' kernel for inference on CPUs rounds absmax
        torch.testing.assert_close(again(IDS).logits, expected)


def test_what_has_changed_since_is_recorded_as_such(artifact, tmp_path):
    model = load_model(artifact("nf4"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "first")
    records = manifest_of(tmp_path / "first")["tensors"]
    assert records["model.norm.weight"]["reason"].endswith(CHANGED)
    assert records["model.norm.weight"]["dtype"] == "F32"
    assert records[UP] == manifest_of(artifact("nf4"))["tensors"][UP]
    again = load_model(tmp_path / "first")
    assert again.dtype == torch.float32
    again.save_pretrained(tmp_path / "second")
    assert manifest_of(tmp_path / "second")["tensors"] == records
    again.lm_head.bias = torch.nn.Parameter(torch.zeros(64))
    again.save_pretrained(tmp_path / "third")
    assert manifest_of(tmp_path / "third")["tensors"]["lm_head.bias"]["reason"] == ADDED


def test_a_tied_head_is_not_missed(tmp_path):
    path = write_artifact(tiny_llama(tie_word_embeddings=True), tmp_path, NF4())
    load_model(path).save_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(IDS).logits, load_model(path)(IDS).logits)


def test_an_adapted_base_and_the_folder_it_came_from_are_refused(artifact, tmp_path):
    model = load_model(artifact("fp4"))
    with pytest.raises(UnrecordedSaveError, match="was loaded from there"):
        model.save_pretrained(artifact("fp4"))
    for keyword in ("push_to_hub", "distributed_checkpoint"):
        with pytest.raises(UnrecordedSaveError, match=f"{keyword}=.*without surogate.json"):
            model.save_pretrained(tmp_path / "out", **{keyword: True})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(UnrecordedSaveError, match="no longer in the model under this name"):
        adapted.base_model.model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    adapted.unload().save_pretrained(tmp_path / "out")
    load_model(tmp_path / "out")


def test_a_packed_tensor_that_was_written_over_gets_no_manifest(artifact, tmp_path):
    model = load_model(artifact("nf4"))
    load_model(artifact("nf4")).save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.parts[0].add_(1)
    with pytest.raises(UnrecordedSaveError, match=rf"the packed {UP} isn't what was loaded") as caught:
        model.save_pretrained(tmp_path)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "surogate.json").exists()


def test_without_a_manifest_there_is_none_to_write(artifact, tmp_path, caplog):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((artifact("nf4") / name).read_bytes())
    model = transformers.AutoModelForCausalLM.from_pretrained(bare, dtype="auto")
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        model.save_pretrained(tmp_path / "out")
    assert caplog.messages == [
        f"{tmp_path / 'out'}: saved without surogate.json, since {bare} has none: "
        "from_pretrained loads it, surogate_load.load_model doesn't"
    ]
    assert not (tmp_path / "out" / "surogate.json").exists()


def test_other_models_are_saved_as_ever(tmp_path):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    assert not (tmp_path / "surogate.json").exists()
