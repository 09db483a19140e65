"""Whole runs with `codes="search"`: what numpy makes of the source, whatever the bands, and nothing else changes."""

import ml_dtypes
import numpy as np
import pytest
from formats.cases import FORMATS, name_of
from quantizer.checkpoints import LINEARS, amax_groups_of, contents, payloads, write_checkpoint

from surogate_formats.artifact import Artifact
from surogate_formats.checkpoint import Checkpoint
from surogate_quantize import bands, make_options, quantize
from surogate_quantize.plan import make_plan

SETTLED = [fmt for fmt in FORMATS if getattr(fmt, "scale_dtype", "float32") == "float32" and fmt.name != "fp4"]
SETTLED += [fmt for fmt in FORMATS if fmt.name == "fp4" and fmt.metric == "mse" and fmt.step == "divide"]
"""Formats by the parameters that a user sets."""

LAYOUTS = [
    ("nf4", {}, "surogate"),
    ("nf4", {"double_quant": "dynamic"}, "bitsandbytes"),
    ("fp4", {"global_scale": "amax"}, "compressed-tensors"),
    ("fp4", {"two_d": False}, "modelopt"),
    ("fp8", {"scaling": "channel"}, "compressed-tensors"),
    ("fp8", {"scaling": "block"}, "hf-fp8"),
]


def make(source, out, name, parameters, layout=None, codes="search", **arguments):
    return quantize(source, out, make_options(name, parameters, layout, codes=codes), device="cpu", **arguments)


def parameters_of(fmt):
    return {key: value for key, value in vars(fmt).items() if key not in ("scale_dtype", "step")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("search") / "source")


@pytest.fixture(scope="module")
def tall(tmp_path_factory):
    """Weights of more rows than a band of 80 KiB holds, the last band ragged."""
    names = [f"model.layers.0.mlp.{leaf}_proj.weight" for leaf in ("gate", "up")]
    values = np.random.default_rng(3)
    tensors = {name: values.standard_normal((1152, 256)).astype(ml_dtypes.bfloat16) for name in names}
    return write_checkpoint(tmp_path_factory.mktemp("tall") / "source", tensors)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_every_weight_is_what_numpy_makes_of_it_and_its_error_is_smaller(source, tmp_path, case):
    name, parameters, layout = case
    for codes in ("nearest", "search"):
        make(source, tmp_path / codes, name, parameters, layout, codes)
    with (
        Checkpoint.open(source) as checkpoint,
        Artifact.open(tmp_path / "search") as found,
        Artifact.open(tmp_path / "nearest") as nearest,
    ):
        found.verify()
        assert sorted(found.modules) == sorted(LINEARS)
        for module, group in amax_groups_of(found.modules).items():
            weights = [checkpoint.read(f"{member}.weight").astype(np.float32) for member in group]
            weight = weights[group.index(module)]
            amax = np.max([np.abs(member).max() for member in weights]) if found.format.shares_amax else None
            for part, array in found.format.quantize(weight, amax, search=True).items():
                assert found.parts(module)[part].tobytes() == array.tobytes(), (module, part)
            record = found.manifest.tensors[f"{module}.weight"]
            missed = (found.dequantize(module) - weight).astype(np.float64)
            error = np.linalg.norm(missed) / np.linalg.norm(weight.astype(np.float64))
            np.testing.assert_allclose(record.relative_error, error, rtol=1e-4)
            assert record.relative_error <= nearest.manifest.tensors[f"{module}.weight"].relative_error


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_only_codes_and_scales_differ_and_the_manifest_says_why(source, tmp_path, case):
    name, parameters, layout = case
    for codes in ("nearest", "search"):
        make(source, tmp_path / codes, name, parameters, layout, codes)
    assert (tmp_path / "nearest/config.json").read_bytes() == (tmp_path / "search/config.json").read_bytes()
    nearest, found = (payloads(tmp_path / codes) for codes in ("nearest", "search"))
    assert {key: value[:2] for key, value in nearest.items()} == {key: value[:2] for key, value in found.items()}
    assert nearest != found
    with Artifact.open(tmp_path / "nearest") as before, Artifact.open(tmp_path / "search") as after:
        assert before.manifest.options | {"codes": "search"} == after.manifest.options
        assert before.manifest.options["codes"] == "nearest"
        assert before.format == after.format
        assert before.manifest.layout == after.manifest.layout


@pytest.mark.parametrize("fmt", SETTLED, ids=name_of)
def test_bands_threads_and_shards_give_the_same_bytes(tall, tmp_path, monkeypatch, fmt):
    make(tall, tmp_path / "whole", fmt.name, parameters_of(fmt), workers=1)
    monkeypatch.setattr(bands, "LARGEST", 80 << 10)
    made = make_plan(Checkpoint.open(tall), make_options(fmt.name, parameters_of(fmt)))
    assert min(len(list(bands.cut_bands(fmt, tensor, 80 << 10))) for tensor in made.quantized) > 5
    make(tall, tmp_path / "bands", fmt.name, parameters_of(fmt), workers=3)
    assert contents(tmp_path / "bands") == contents(tmp_path / "whole")


def test_a_weight_in_the_last_binade_of_its_dtype_is_rounded_to_nearest(tmp_path):
    """Another scale might round its largest value up to what the dtype doesn't hold."""
    name = "model.layers.0.mlp.up_proj.weight"
    values = np.random.default_rng(0).uniform(-1, 1, (128, 256))
    for largest, same in ((65504, True), (32000, False)):
        values[:, 0] = 1
        source = write_checkpoint(tmp_path / f"{largest}", {name: (values * largest).astype(np.float16)}, dtype="F16")
        for codes in ("nearest", "search"):
            make(source, tmp_path / f"{codes}{largest}", "fp8", {"scaling": "block"}, codes=codes)
        nearest, found = (payloads(tmp_path / f"{codes}{largest}") for codes in ("nearest", "search"))
        assert (nearest == found) == same
