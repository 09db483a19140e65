"""A run with layout modelopt: the file of ModelOpt's own, shared scales, and the numbers of compressed-tensors."""

import hashlib
import json

import numpy as np
import pytest
from quantizer.checkpoints import LINEARS, llama, write_checkpoint

from surogate_formats.artifact import Artifact
from surogate_formats.artifact_checks import CorruptArtifactError
from surogate_formats.checkpoint import Checkpoint
from surogate_formats.manifest import MANIFEST_NAME
from surogate_quantize import make_options, quantize

FILE = "hf_quant_config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modelopt")
    write_checkpoint(folder / "source")
    quantize(folder / "source", folder / "plain", make_options("fp4", {}))
    for name in ("fp4", "fp8"):
        quantize(folder / "source", folder / name, make_options(name, {}, layout="modelopt"))
    return folder


@pytest.mark.parametrize("name", ["fp4", "fp8"])
def test_the_file_of_modelopts_own_is_written_and_recorded(made, name):
    data = (made / name / FILE).read_bytes()
    declared = json.loads((made / name / "config.json").read_text())["quantization_config"]
    said = json.loads(data)["quantization"]
    assert (said["quant_algo"], said["exclude_modules"]) == (declared["quant_algo"], declared["ignore"])
    assert "lm_head" in said["exclude_modules"]
    manifest = json.loads((made / name / MANIFEST_NAME).read_text())
    assert manifest["sidecars"][FILE] == hashlib.sha256(data).hexdigest()
    assert not (made / "plain" / FILE).exists()
    with Artifact.open(made / name) as artifact:
        assert sorted(artifact.modules) == sorted(LINEARS)
        assert artifact.verify() == sum(len(record.stored) for record in artifact.manifest.tensors.values())


def test_a_changed_file_is_found(made, tmp_path):
    quantize(made / "source", tmp_path / "out", make_options("fp4", {}, layout="modelopt"))
    (tmp_path / "out" / FILE).write_text("{}")
    with Artifact.open(tmp_path / "out") as artifact, pytest.raises(CorruptArtifactError, match=FILE):
        artifact.verify()


def test_another_layout_replaces_it_and_takes_the_file_away(made, tmp_path):
    quantize(made / "source", tmp_path / "out", make_options("fp4", {}, layout="modelopt"))
    quantize(made / "source", tmp_path / "out", make_options("fp4", {}), overwrite=True)
    assert not (tmp_path / "out" / FILE).exists()


def test_values_and_errors_are_those_of_compressed_tensors(made):
    with Artifact.open(made / "fp4") as ours, Artifact.open(made / "plain") as plain:
        for module in ours.modules:
            assert ours.dequantize(module).tobytes() == plain.dequantize(module).tobytes()
            records = [each.manifest.tensors[f"{module}.weight"] for each in (ours, plain)]
            assert records[0].relative_error == records[1].relative_error


@pytest.mark.parametrize(("name", "scale"), [("fp4", "weight_scale_2"), ("fp8", "weight_scale")])
def test_fused_groups_share_one_scale_and_it_is_a_scalar(made, name, scale):
    with Checkpoint.open(made / name) as tensors:
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            found = [tensors.read(f"model.layers.1.{member}.{scale}") for member in group]
            assert {(each.shape, each.dtype) for each in found} == {((), np.dtype(np.float32))}
            assert len({each.tobytes() for each in found}) == 1


def test_fp8_is_written_with_a_warning(made, tmp_path):
    summary = quantize(made / "source", tmp_path / "out", make_options("fp8", {}, layout="modelopt"))
    assert any("which nobody calibrated" in line for line in summary.warnings)


def test_experts_get_it_where_no_layout_was_asked_for(tmp_path):
    weight = llama()["model.layers.0.mlp.up_proj.weight"]
    experts = {
        f"model.layers.0.mlp.experts.{index}.{leaf}_proj.weight": weight if leaf != "down" else weight.T * 2
        for index in range(2)
        for leaf in ("gate", "up", "down")
    }
    source = write_checkpoint(
        tmp_path / "source", llama() | {key: np.ascontiguousarray(experts[key]) for key in experts}
    )
    for layout, parameters, expected in (
        (None, {}, "modelopt"),
        ("compressed-tensors", {}, "compressed-tensors"),
        (None, {"global_scale": "amax"}, "compressed-tensors"),  # modelopt doesn't store it
    ):
        out = tmp_path / f"{layout}-{len(parameters)}"
        quantize(source, out, make_options("fp4", parameters, layout))
        with Artifact.open(out) as artifact:
            assert (artifact.layout.name, artifact.manifest.layout) == (expected, expected)
            assert artifact.verify() > 0
    with Checkpoint.open(tmp_path / "None-0") as tensors:
        scales = {
            leaf: {
                tensors.read(f"model.layers.0.mlp.experts.{index}.{member}_proj.weight_scale_2").tobytes()
                for index in range(2)
                for member in leaf.split()
            }
            for leaf in ("gate up", "down")
        }
    assert {leaf: len(found) for leaf, found in scales.items()} == {"gate up": 1, "down": 1}
    assert scales["gate up"] != scales["down"]
