"""Kept tensors whose dtype some readers refuse: what stands for them, and what has no place there."""

import json

import ml_dtypes
import numpy as np
import pytest
from quantizer.checkpoints import CONFIG, llama, payloads, write_checkpoint
from safetensors.numpy import save_file

from surogate_formats.artifact import Artifact
from surogate_formats.errors import ArtifactError, OutOfRangeError
from surogate_quantize import dry_run, kept, make_options, quantize

BIG = 2**31
F32_MAX = float(np.finfo(np.float32).max)


def write(directory, extra):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in llama().items()}
    save_file(tensors | {"model.extra": extra}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("extra", "dtype", "expected"),
    [
        (np.array([[1, -2], [BIG - 1, -BIG]]), "I32", np.array([[1, -2], [BIG - 1, -BIG]], np.int32)),
        (np.array([True, False, True]), "U8", np.array([1, 0, 1], np.uint8)),
        (np.array([0.1, -np.inf, np.nan, F32_MAX]), "F32", np.array([0.1, -np.inf, np.nan, F32_MAX], np.float32)),
        (np.arange(5000), "I32", np.arange(5000, dtype=np.int32)),
        (np.empty((0, 3), np.int64), "I32", np.empty((0, 3), np.int32)),
    ],
    ids=["I64", "BOOL", "F64", "in-pieces", "empty"],
)
@pytest.mark.parametrize("name", ["nf4", "fp4", "fp8"])
def test_no_artifact_holds_a_dtype_that_readers_refuse(tmp_path, monkeypatch, name, extra, dtype, expected):
    monkeypatch.setattr(kept, "COPY_PIECE", 1024)
    source = write(tmp_path / "source", extra)
    (planned,) = (
        tensor for tensor in dry_run(source, make_options(name, {}))[0].tensors if tensor.info.name == "model.extra"
    )
    assert planned.decision.reason == f"dtype {planned.info.dtype}, stored as {dtype}"
    assert planned.stored_bytes == expected.nbytes
    summary = quantize(source, tmp_path / "out", make_options(name, {"two_d": False} if name == "fp4" else {}))
    assert payloads(tmp_path / "out")["model.extra"] == (dtype, expected.shape, expected.tobytes())
    assert bool(summary.warnings) == (dtype == "F32")
    with Artifact.open(tmp_path / "out") as artifact:
        artifact.verify()


@pytest.mark.parametrize("value", [BIG, -BIG - 1, 2 * F32_MAX])
def test_a_value_without_a_place_there_is_refused_by_name(tmp_path, value):
    source = write(tmp_path / "source", np.array([1, value]))
    message = r"model\.safetensors: tensor model\.extra: .* does not fit into (I32|F32)"
    with pytest.raises(OutOfRangeError, match=message):
        quantize(source, tmp_path / "out", make_options("nf4", {}))
    assert not (tmp_path / "out").exists()


def test_an_artifact_whose_kept_tensor_has_another_dtype_is_refused(tmp_path):
    quantize(write_checkpoint(tmp_path / "source"), tmp_path / "out", make_options("fp8", {}))
    path = tmp_path / "out" / "surogate.json"
    manifest = json.loads(path.read_text())
    manifest["tensors"]["model.norm.weight"]["dtype"] = "I64"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight is BF16 \[128\], expected I32 \[128\]"):
        Artifact.open(tmp_path / "out")
