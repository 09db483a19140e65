"""Opening an artifact: what it gives, and everything about it that can be wrong."""

import json
import shutil

import numpy as np
import pytest
from quantizer.checkpoints import LINEARS, PROJECTIONS, check_artifact, llama, write_checkpoint
from safetensors.numpy import load_file, save_file

from surogate_formats.artifact import Artifact, IncompleteArtifactError
from surogate_formats.artifact_checks import CorruptArtifactError
from surogate_formats.checkpoint.errors import CheckpointNotFoundError, MissingShardError, TruncatedFileError
from surogate_formats.errors import ArtifactError
from surogate_formats.fp8 import FP8
from surogate_formats.layouts import UnreadableConfigError
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_formats.recipe import Recipe
from surogate_quantize import make_options, quantize

FORMATS = {
    "nf4": NF4(),
    "fp4": NVFP4(two_d=False, metric="l1"),
    "fp8": FP8("tensor", "bfloat16"),
}
PARAMETERS = {"nf4": {}, "fp4": {"two_d": False, "metric": "l1"}, "fp8": {}}
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("artifact") / "source")


@pytest.fixture(scope="module")
def finished(source):
    made = {}
    for name, parameters in PARAMETERS.items():
        made[name] = source.parent / name
        quantize(source, made[name], make_options(name, parameters))
    return made


@pytest.fixture
def artifact_dir(finished, tmp_path):
    """A copy of the nf4 artifact, to be damaged."""
    return shutil.copytree(finished["nf4"], tmp_path / "out")


def edit_json(path, edit):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("name", FORMATS)
def test_what_an_artifact_gives(name, source, finished):
    with Artifact.open(finished[name]) as artifact:
        assert artifact.format == FORMATS[name]
        assert artifact.layout.name == artifact.manifest.layout
        assert artifact.recipe == Recipe()
        assert artifact.modules == {
            module: PROJECTIONS[module.removeprefix("model.layers.").partition(".")[2]] for module in LINEARS
        }
        assert artifact.verify() == sum(len(record.stored) for record in artifact.manifest.tensors.values())
        values = artifact.dequantize(UP)
        assert values.dtype == np.float32
        assert values.shape == (256, 128)
    assert check_artifact(source, finished[name]) == sorted(LINEARS)


def test_modules_that_are_not_quantized_are_refused_by_name(finished):
    with Artifact.open(finished["nf4"]) as artifact:
        for name in ("lm_head", f"{UP}.weight", "nothing"):
            with pytest.raises(ArtifactError, match=f"no quantized module '{name}'"):
                artifact.dequantize(name)


def test_a_directory_without_a_manifest_is_unfinished(artifact_dir, source):
    (artifact_dir / "surogate.json").unlink()
    for directory in (artifact_dir, source):
        with pytest.raises(IncompleteArtifactError, match=r"no surogate\.json, so this is no finished artifact"):
            Artifact.open(directory)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointNotFoundError):
        Artifact.open(tmp_path / "none")


def test_one_changed_byte_is_found_by_verify(artifact_dir):
    path = artifact_dir / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with Artifact.open(artifact_dir) as artifact, pytest.raises(CorruptArtifactError, match="has changed since"):
        artifact.verify()


def test_a_truncated_shard_is_found_at_once(artifact_dir):
    path = artifact_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TruncatedFileError):
        Artifact.open(artifact_dir)


def test_a_missing_shard_is_found_at_once(source, tmp_path):
    quantize(source, tmp_path / "out", make_options("nf4", {}, max_shard_size="100kB"))
    (tmp_path / "out" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MissingShardError, match="model-00002-of-00003"):
        Artifact.open(tmp_path / "out")


@pytest.mark.parametrize("change", ["missing", "extra", "dtype", "shape"])
def test_tensors_that_are_not_what_the_manifest_says(artifact_dir, change):
    path = artifact_dir / "model.safetensors"
    tensors = load_file(path)
    name = f"{UP}.weight_absmax"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["model.extra"] = np.zeros(1, np.float32)
        name = "model.extra"
    elif change == "dtype":
        tensors[name] = tensors[name].view(np.int8)
    else:
        tensors[name] = tensors[name][:-1].copy()
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=f"{name}.*quantize again"):
        Artifact.open(artifact_dir)


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda config: config.pop("quantization_config"), UnreadableConfigError),
        (lambda config: config.update(quantization_config="nf4"), UnreadableConfigError),
        (lambda config: config["quantization_config"].update(layout_version=99), UnreadableConfigError),
        (
            lambda config: config.update(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
            ArtifactError,
        ),
    ],
)
def test_a_config_that_does_not_fit(artifact_dir, edit, error):
    edit_json(artifact_dir / "config.json", edit)
    with pytest.raises(error):
        Artifact.open(artifact_dir)


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest.update(layout="hf-fp8"),
        lambda manifest: manifest["format"].update(name="fp4"),
        lambda manifest: manifest["format"].update(block_size=32),
        lambda manifest: manifest["format"].update(double_quant="none"),
        lambda manifest: manifest["format"].pop("name"),
        lambda manifest: manifest["recipe"].update(name="fast"),
        lambda manifest: manifest["recipe"].update(unknown=1),
        lambda manifest: manifest["tensors"][f"{UP}.weight"].update(shape=[256, 256]),
        lambda manifest: manifest["tensors"][f"{UP}.weight"]["stored"].pop(f"{UP}.weight_absmax"),
        lambda manifest: manifest["tensors"][f"{UP}.weight"].update(shape=["a", "b"]),
        lambda manifest: manifest["tensors"][f"{UP}.weight"].update(shape=[]),
        lambda manifest: manifest["tensors"][f"{UP}.weight"].update(stored=3),
        lambda manifest: manifest["tensors"]["lm_head.weight"].update(decision="quantize"),
        lambda manifest: manifest.update(format=3),
    ],
    ids=range(14),
)
def test_a_manifest_that_does_not_fit(artifact_dir, edit):
    edit_json(artifact_dir / "surogate.json", edit)
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(artifact_dir)
    assert "\n" not in str(caught.value)


def test_a_failed_open_leaves_no_file_open(artifact_dir):
    from pathlib import Path

    descriptors = Path("/dev/fd")
    if not descriptors.is_dir():
        pytest.skip("no /dev/fd on this system")
    before = len(list(descriptors.iterdir()))
    edit_json(artifact_dir / "surogate.json", lambda manifest: manifest.update(layout="hf-fp8"))
    for _ in range(5):
        with pytest.raises(ArtifactError):
            Artifact.open(artifact_dir)
    assert len(list(descriptors.iterdir())) == before


def test_a_tensor_of_another_name_than_weight_may_be_kept(tmp_path):
    tensors = llama() | {"model.layers.0.self_attn.sinks": np.ones((4, 4), np.float32)}
    write_checkpoint(tmp_path / "source", tensors)
    quantize(tmp_path / "source", tmp_path / "out", make_options("nf4", {}))
    assert check_artifact(tmp_path / "source", tmp_path / "out") == sorted(LINEARS)
