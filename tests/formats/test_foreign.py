"""What a checkpoint without our manifest is taken for, and that nothing in its config or headers breaks the reader."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from surogate_formats.artifact import Artifact, IncompleteArtifactError, NoRecordedHashesError
from surogate_formats.errors import ArtifactError, CheckpointError
from surogate_formats.format import to_dict
from surogate_formats.fp8 import FP8
from surogate_formats.layouts import UnreadableConfigError
from surogate_formats.packed_weights import UnreadableWeightError, UnscaledWeightError

FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def fp8(shape=(200, 130), grid=(2, 2), dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        "m.up.weight": rng.standard_normal(shape).astype(np.float32).astype(E4M3),
        "m.up.weight_scale_inv": rng.uniform(0.5, 2, grid).astype(dtype),
        "m.norm.weight": np.ones(8, np.float32),
        "m.positions": np.arange(4),
    }


def nvfp4():
    return {
        "m.up.weight": np.full((4, 8), 0x21, np.uint8),
        "m.up.weight_scale": np.ones((4, 1), E4M3),
        "m.up.weight_scale_2": np.array(1 / 3, np.float32),
    }


def write(directory, tensors, declared=None, **config):
    save_file(tensors, directory / "model.safetensors")
    entry = {} if declared is None else {"quantization_config": declared}
    (directory / "config.json").write_text(json.dumps({"dtype": "float16", **entry, **config}))
    return directory


def test_tiles_at_the_edge_are_clipped_ones_of_128(tmp_path):
    tensors = fp8()
    with Artifact.open(write(tmp_path, tensors, FP8_CONFIG)) as artifact:
        assert artifact.modules == {"m.up": (200, 130)}
        assert artifact.format == FP8("block")
        spread = np.repeat(np.repeat(tensors["m.up.weight_scale_inv"], 128, 0)[:200], 128, 1)[:, :130]
        expected = tensors["m.up.weight"].astype(np.float32) * spread
        assert artifact.dequantize("m.up").tobytes() == expected.tobytes()


def test_what_stands_for_a_manifest(tmp_path):
    with Artifact.open(write(tmp_path, fp8(dtype=ml_dtypes.bfloat16), FP8_CONFIG)) as artifact:
        manifest, foreign = artifact.manifest, artifact.foreign
        assert (manifest.format, manifest.layout) == (to_dict(FP8("block", "bfloat16")), "hf-fp8")
        assert (manifest.source, manifest.tool_version, manifest.sidecars) == (tmp_path.name, "", {})
        record = manifest.tensors["m.up.weight"]
        assert (record.decision, record.dtype, record.shape) == ("quantize", "F16", (200, 130))
        assert record.bits_per_weight == 8 + 16 * 4 / (200 * 130)
        assert record.relative_error is None
        kept = {name: each.reason for name, each in manifest.tensors.items() if each.decision == "keep"}
        assert kept == dict.fromkeys(("m.norm.weight", "m.positions"), "kept by its maker")
        assert foreign.unused == ()
        with pytest.raises(NoRecordedHashesError, match=r"has no surogate\.json") as caught:
            artifact.verify()
        assert "\n" not in str(caught.value)


def test_a_global_scale_that_is_no_power_of_two_multiplies(tmp_path):
    with Artifact.open(write(tmp_path, nvfp4(), MODELOPT)) as artifact:
        third = np.float32(1) * np.float32(1 / 3)
        expected = np.tile(np.array([0.5, 1], np.float32) * third, (4, 8))
        assert artifact.dequantize("m.up").tobytes() == expected.tobytes()


def test_an_older_key_declares_it_too(tmp_path):
    with Artifact.open(write(tmp_path, fp8(), compression_config=FP8_CONFIG)) as artifact:
        assert artifact.layout.name == "hf-fp8"


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda t: t.pop("m.up.weight_scale_inv"), UnscaledWeightError, "m.up.weight has no m.up.weight_scale_inv"),
        (
            lambda t: t.update({"m.down.weight": np.zeros((2, 2), E4M3)}),
            UnscaledWeightError,
            "m.down.weight has no m.down.weight_scale_inv",
        ),
        (
            lambda t: t.update({"cache": np.zeros(2, E4M3)}),
            UnscaledWeightError,
            "cache is F8_E4M3, and no scale for it is known",
        ),
        (
            lambda t: t.update({"m.down.weight": np.zeros((2, 2), np.int8)}),
            UnscaledWeightError,
            "m.down.weight is I8, and no scale for it is known",
        ),
        (
            lambda t: t.update({"m.down.weight_packed": np.zeros((2, 2), np.int32)}),
            UnscaledWeightError,
            "m.down.weight_packed is I32",
        ),
        (
            lambda t: t.update({"m.up.weight_zero_point": np.zeros(2, np.float32)}),
            UnreadableWeightError,
            "weight_zero_point: what it does to its weight isn't known",
        ),
        (
            lambda t: t.update({"m.up.weight_scale_inv": np.zeros((2, 2), np.float16)}),
            UnreadableWeightError,
            "is F16; scales are read in F32 or BF16 only",
        ),
        (
            lambda t: t.update({"m.up.weight_scale_inv": np.zeros((4, 3), np.float32)}),
            UnreadableWeightError,
            r"is F32 \[4, 3\], expected F32 \[2, 2\]",
        ),
    ],
)
def test_weights_that_are_not_whole(tmp_path, edit, error, message):
    tensors = fp8()
    edit(tensors)
    with pytest.raises(error, match=message) as caught:
        Artifact.open(write(tmp_path, tensors, FP8_CONFIG))
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "declared",
    [
        {"quant_method": "awq"},
        {"quant_method": ["fp8"]},
        {"quant_method": "mxfp4", "modules_to_not_convert": []},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {**FP8_CONFIG, "weight_block_size": {}},
        {**FP8_CONFIG, "modules_to_not_convert": {"a": 1}},
        {"quant_method": "compressed-tensors", "quantization_status": "compressed", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "quantization_status": {}, "config_groups": {}},
        {**MODELOPT, "quant_algo": ["NVFP4"]},
        {**MODELOPT, "config_groups": {"a": 1}},
        {**MODELOPT, "ignore": 3},
        {"load_in_8bit": True},
    ],
    ids=str,
)
def test_configs_of_any_other_kind_are_one_line(tmp_path, declared):
    with pytest.raises(UnreadableConfigError, match=r": ") as caught:
        Artifact.open(write(tmp_path, fp8(), declared))
    assert "\n" not in str(caught.value)


OURS = ({"quant_method": "surogate-quant"}, {"quant_method": "surogate"})


@pytest.mark.parametrize("declared", [None, {}, [], "fp8", 3, *OURS], ids=str)
def test_what_nobody_quantized_is_no_artifact(tmp_path, declared):
    with pytest.raises(IncompleteArtifactError, match=r"no surogate\.json"):
        Artifact.open(write(tmp_path, fp8(), declared))


def test_modelopts_file_is_read_as_strictly_as_config(tmp_path):
    write(tmp_path, nvfp4())
    for text, error in (
        ("{", CheckpointError),
        ("[]", CheckpointError),
        ('{"quantization": 3}', ArtifactError),
        ('{"quantization": {"quant_algo": "FP8_PB_WO"}}', UnreadableConfigError),
    ):
        (tmp_path / "hf_quant_config.json").write_text(text)
        with pytest.raises(error) as caught:
            Artifact.open(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4", "group_size": 16}}')
    with Artifact.open(tmp_path) as artifact:
        assert artifact.layout.name == "modelopt"
