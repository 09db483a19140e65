"""A training file whose model is on the Hub: quantized once by its commit, or loaded if it is packed."""

import pytest
import torch
from hub.server import TOKEN
from runtime.artifacts import tiny_llama
from runtime.test_cli import write_tokenizer

import surogate_load
from surogate_formats import hub_text
from surogate_load.errors import DifferentArtifactError
from surogate_quantize import make_options, quantize

IDS = torch.arange(8).reshape(1, 8)
YAML = "qlora_bnb: true\nrecipe: bf16\nlora: true\nlora_rank: 4\n"


@pytest.fixture
def dense(our_hub, tmp_path, monkeypatch):
    """A dense model on the Hub, for this process and for the quantizer, which is one of its own."""
    for name, value in {
        "HF_ENDPOINT": our_hub.url,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
        "SUROGATE_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    tiny_llama().save_pretrained(tmp_path / "dense")
    write_tokenizer(tmp_path / "dense")
    our_hub.add_directory("me/dense", tmp_path / "dense")
    return tmp_path / "dense"


def write(folder, model):
    path = folder / "train.yaml"
    path.write_text(f"model: {model}\n{YAML}")
    return path


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_a_dense_model_is_quantized_once_and_by_its_commit(our_hub, dense, tmp_path):
    first = surogate_load.from_config(write(tmp_path, "me/dense"))
    quantize(dense, tmp_path / "packed", make_options("nf4", {}))
    assert torch.equal(logits(first), logits(surogate_load.load_model(tmp_path / "packed")))
    (made,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert made.name.startswith("dense-")
    with surogate_load.open_artifact(made) as artifact:
        manifest = artifact.artifact.manifest
        assert (manifest.source, len(manifest.revision)) == ("me/dense", 40)
    weights = [line for line in our_hub.requests if "model.safetensors" in line]
    surogate_load.from_config(write(tmp_path, "me/dense"), revision=manifest.revision)
    assert [line for line in our_hub.requests if "model.safetensors" in line] == weights


def test_a_private_one_takes_the_token(our_hub, dense, tmp_path):
    our_hub.repos["me/dense"].private = True
    with pytest.raises(hub_text.ModelNotFoundError):
        surogate_load.from_config(write(tmp_path, "me/dense"))
    surogate_load.from_config(write(tmp_path, "me/dense"), token=TOKEN)


def test_a_packed_one_is_loaded_if_it_is_what_the_file_asks_for(our_hub, dense, tmp_path):
    quantize(dense, tmp_path / "packed", make_options("nf4", {}))
    our_hub.add_directory("me/packed", tmp_path / "packed")
    model = surogate_load.from_config(write(tmp_path, "me/packed"))
    assert torch.equal(logits(model), logits(surogate_load.load_model(tmp_path / "packed")))
    assert not (tmp_path / "cache").exists()
    path = write(tmp_path, "me/packed")
    path.write_text(path.read_text() + "skip_quant_last_layers: 1\n")
    with pytest.raises(DifferentArtifactError, match="skip_quant_last_layers"):
        surogate_load.from_config(path)


def test_a_revision_of_a_directory_is_refused(dense, tmp_path):
    with pytest.raises(hub_text.RevisionOfDirectoryError, match="is a local directory"):
        surogate_load.from_config(write(tmp_path, dense), revision="main")
