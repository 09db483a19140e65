"""Artifacts compared with their sources: errors are recomputed, kept tensors are equal, the odd one is named."""

import json

import numpy as np
import pytest
from runtime.artifacts import tiny_llama, write_artifact
from runtime.layers import KINDS
from safetensors.numpy import load_file, save_file

from surogate_formats.artifact import Artifact
from surogate_load.verification import DifferentSourceError, NotTheSourceError, verify_against

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def made(tmp_path):
    """(artifact, source), with the errors recorded."""
    path = write_artifact(tiny_llama(), tmp_path, KINDS["nf4"])
    source = load_file(tmp_path / "dense/model.safetensors")
    manifest = json.loads((path / "surogate.json").read_text())
    with Artifact.open(path) as artifact:
        for name, record in manifest["tensors"].items():
            if record["decision"] == "quantize":
                wanted = source[name].astype(np.float64)
                missed = artifact.dequantize(name.removesuffix(".weight")) - wanted
                record["relative_error"] = float(np.linalg.norm(missed) / np.linalg.norm(wanted))
    (path / "surogate.json").write_text(json.dumps(manifest))
    return path, tmp_path / "dense"


def change(source, name, function):
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = function(tensors[name])
    save_file(tensors, path, {"format": "pt"})


def compare(made):
    with Artifact.open(made[0]) as artifact:
        return verify_against(artifact, made[1])


def test_errors_are_recomputed(made):
    found = compare(made)
    assert found.quantized == 14
    assert found.kept == 7
    assert 0.05 < found.least <= found.largest < 0.12


def test_a_weight_of_another_model_is_named(made):
    change(made[1], NAME, lambda weight: (weight.astype(np.float32) * 1.01).astype(weight.dtype))
    with pytest.raises(DifferentSourceError, match=rf": {NAME}: its relative error is"):
        compare(made)


def test_a_kept_tensor_that_differs_is_named(made):
    change(made[1], "model.norm.weight", lambda norm: (norm.astype(np.float32) * 2).astype(norm.dtype))
    with pytest.raises(DifferentSourceError, match=r": model\.norm\.weight: was kept"):
        compare(made)


def test_another_checkpoint_is_refused(made, tmp_path):
    change(made[1], NAME, lambda weight: weight[:64])
    with pytest.raises(NotTheSourceError, match=rf"{NAME} is \[64, 128\], not \[256, 128\]"):
        compare(made)
