"""Calibrated codes of mixtures of experts: each expert solved for its own tokens, whatever the family calls it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from make_tiny import make_tiny
from surogate_formats.artifact import Artifact
from surogate_load import load_model
from surogate_load.block_runner import NoBlocksError
from surogate_load.verification import verify_against
from surogate_quantize import make_options, quantize
from surogate_quantize.calibration.block_pass import BlockPass
from surogate_quantize.calibration.inputs import Sums

ROWS = torch.randint(3, 90, (24, 600), generator=torch.Generator().manual_seed(0))
FAMILIES = ("qwen3-moe", "mixtral", "qwen2-moe")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ROWS[:20]))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return {family: make_tiny(family, folder / family) for family in FAMILIES}


def made(source, out, text, name="nf4", parameters=None, **others):
    settings = {"codes": "calibrated", "calibration_text": str(text), "calibration_tokens": 4096, **others}
    summary = quantize(source, out, make_options(name, parameters or {}, **settings))
    with Artifact.open(out) as artifact:
        artifact.verify()
        verify_against(artifact, source)
    return summary


def divergence(source, out, **loading):
    ids = ROWS[20:, :256]
    with torch.no_grad():
        expected, found = (
            model(input_ids=ids).logits.log_softmax(-1)
            for model in (
                AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
                load_model(out, dtype=torch.float32, **loading),
            )
        )
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "name", "parameters"),
    [
        ("qwen3-moe", "nf4", {}),
        ("qwen3-moe", "fp4", {"two_d": False}),
        ("mixtral", "fp8", {"scaling": "channel"}),
        ("qwen2-moe", "nf4", {}),
    ],
)
def test_the_same_bytes_say_more(sources, text, tmp_path, family, name, parameters):
    source = sources[family]
    quantize(source, tmp_path / "nearest", make_options(name, parameters))
    summary = made(source, tmp_path / "calibrated", text, name, parameters)
    before, after = summary.output_error
    assert after < before
    with Artifact.open(tmp_path / "calibrated") as artifact:
        records = artifact.manifest.tensors
    experts = [record for tensor, record in records.items() if ".experts." in tensor and record.reason != "router"]
    assert len(experts) == 24
    better = [record.output_error < record.nearest_output_error for record in experts if record.output_error]
    assert len(better) == 24
    assert sum(better) > 20
    assert divergence(source, tmp_path / "calibrated") < 0.85 * divergence(source, tmp_path / "nearest")


def test_an_interrupted_pass_and_one_that_keeps_nothing_give_the_same_bytes(sources, text, tmp_path, monkeypatch):
    source, settings = sources["qwen3-moe"], {"calibration_tokens": 512}
    made(source, tmp_path / "once", text, **settings)

    def stop(said):
        if said == "calibrating block 2 of 2":
            raise KeyboardInterrupt

    options = make_options("nf4", {}, codes="calibrated", calibration_text=str(text), **settings)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "again", options, told=stop)
    monkeypatch.setattr(BlockPass, "_keeps_inputs", False)  # as on a GPU
    said = quantize(source, tmp_path / "again", options).warnings
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("once", "again")]
    assert files[0] == files[1]
    assert any("experts were given fewer tokens" in line for line in said), "the first block's, too: they are kept"


def test_experts_that_the_text_starves_are_said_and_still_solved(sources, text, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"input_ids": [5] * 600}) + "\n")
    said = made(sources["qwen3-moe"], tmp_path / "out", one, calibration_tokens=256).warnings
    (line,) = [line for line in said if "experts were given" in line]
    assert "the fewest, 0, model.layers." in line
    with Artifact.open(tmp_path / "out") as artifact:
        assert all(torch.isfinite(torch.from_numpy(artifact.dequantize(module))).all() for module in artifact.modules)


def test_missing_tokens_are_so_many_times_the_mean_of_all():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    few, everyone = Sums("few"), Sums("all")
    few.add(x[:3], x[:3] + 1)
    everyone.add(x, x + 1)
    few.hold_out(x, x)
    few.fill(everyone, 8)
    expected = (x[:3].T @ x[:3] + 5 / 50 * x.T @ x).double() / 8
    expected += 0.01 * expected.diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(few.inputs().hessian, expected, rtol=1e-6, atol=1e-6)
    enough = Sums("enough")
    enough.add(x, x)
    enough.hold_out(x, x)
    enough.fill(few, 8)
    assert enough.tokens == 50


@pytest.mark.parametrize("codes", ["nearest", "calibrated"])
def test_the_adapter_is_of_what_is_no_expert(sources, text, tmp_path, codes):
    source, out = sources["qwen3-moe"], tmp_path / "out"
    made(source, out, text, codes=codes, adapter_init=8)
    adapted = load_model(out, dtype=torch.float32, adapter="init")
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(names) == 16
    assert not any("expert" in name for name in names)
    assert divergence(source, out, adapter="init") < divergence(source, out)


def test_fused_experts_on_disk_are_refused_by_name(text, tmp_path):
    source = make_tiny("gpt-oss", tmp_path / "gpt-oss")
    with pytest.raises(NoBlocksError, match=r"GptOssForCausalLM: model.layers.0.mlp.experts.0.* tensors of its own"):
        made(source, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()
    made(source, tmp_path / "kept", text, skip=["experts"], calibration_tokens=256)
