"""`merge --requantize`: the artifact that the merged model would have given, and figures that are what they say."""

import json
import re

import peft
import pytest
import torch
from click.testing import CliRunner
from runtime.artifacts import tiny_llama, write_artifact
from safetensors.torch import load_file

from surogate_formats.artifact import Artifact
from surogate_formats.errors import UsageError
from surogate_formats.nf4 import NF4
from surogate_formats.recipe import Recipe
from surogate_formats.training_config import Lora, TrainingConfig
from surogate_load import load_model, open_artifact
from surogate_load.cli import main
from surogate_load.errors import ExportExistsError, QuantizerFailedError, UnreadableAdapterError
from surogate_load.export.merging import merge
from surogate_load.export.requantize import UnrecordedOptionsError, merge_requantized
from surogate_quantize import make_options, quantize

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
TRAINING = TrainingConfig(
    recipe=Recipe("fp8-hybrid", margin=1, amax_history_len=8, disable_2d_quantization=True),
    lora=Lora(enabled=True, rank=4, target_modules=("q_proj", "up_proj")),
)
CASES = {
    "nf4": ("nf4", {}, None, {}),
    "nf4-128": ("nf4", {"block_size": 128, "double_quant": "none"}, None, {}),
    "bitsandbytes": ("nf4", {}, "bitsandbytes", {}),
    "fp4-1d": ("fp4", {"two_d": False, "metric": "l1", "global_scale": "amax"}, None, {}),
    "fp4-modelopt": ("fp4", {"four_over_six": False}, "modelopt", {}),
    "fp8-channel": ("fp8", {"scaling": "channel"}, None, {"skip_first_layers": 1, "skip": ("down_proj",)}),
    "hf-fp8": ("fp8", {"scaling": "block"}, None, {"max_shard_size": 200_000}),
    "searched": ("fp8", {"scaling": "channel"}, None, {"codes": "search"}),
    "head-and-recipe": ("nf4", {}, None, {"quantize_lm_head": True, "training": TRAINING}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A factory of (artifact, its options)."""
    root, done = tmp_path_factory.mktemp("made"), {}
    tiny_llama(num_key_value_heads=4).save_pretrained(root / "source")

    def make(case):
        if case not in done:
            name, parameters, layout, others = CASES[case]
            options = make_options(name, parameters, layout, **others)
            quantize(root / "source", root / case, options, device="cpu", workers=1)
            done[case] = root / case, options
        return done[case]

    return make


def adapt(path, where, scale=1.0, **settings):
    """Saves a random adapter for a packed model."""
    torch.manual_seed(0)
    chosen = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **settings}
    model = peft.get_peft_model(load_model(path, "bf16", dtype=torch.float32), peft.LoraConfig(**chosen))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(scale)
    model.save_pretrained(where)
    return where


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_quantizer_makes_of_the_merged_model(made, case, tmp_path):
    path, options = made(case)
    adapter = adapt(path, tmp_path / "adapter")
    found = merge_requantized(path, adapter, tmp_path / "out")
    merge(path, adapter, tmp_path / "dense")
    quantize(tmp_path / "dense", tmp_path / "expected", options, device="cpu", workers=1)
    with Artifact.open(tmp_path / "out") as out, Artifact.open(tmp_path / "expected") as expected:
        ours, theirs = out.manifest, expected.manifest
        assert ours.tensors == theirs.tensors
        assert out.quantization_config == expected.quantization_config
        for entry in ("format", "layout", "options", "recipe", "lora"):
            assert getattr(ours, entry) == getattr(theirs, entry), entry
        with Artifact.open(path) as before:
            assert before.modules == out.modules
            assert (before.manifest.options, before.manifest.recipe) == (ours.options, ours.recipe)
        assert ours.source == "source-merged"
        assert out.verify()
        assert found.weights == len(out.modules)
        assert found.largest_error == max(out.manifest.tensors[f"{name}.weight"].relative_error for name in out.modules)
    assert {each.name for each in tmp_path.iterdir()} == {"adapter", "out", "dense", "expected"}


@pytest.mark.parametrize("case", ["nf4", "fp4-1d", "fp8-channel"])
def test_the_figures_are_those_of_the_weights(made, case, tmp_path):
    path, _ = made(case)
    adapter = adapt(path, tmp_path / "adapter")
    found = merge_requantized(path, adapter, tmp_path / "out")
    merge(path, adapter, tmp_path / "dense", "float32")
    sums = dict.fromkeys(("change", "before", "lost", "merged"), 0.0)
    with open_artifact(path) as before, open_artifact(tmp_path / "out") as after, torch.no_grad():
        dense = load_file(tmp_path / "dense" / "model.safetensors")
        names = [name for name in before if name.endswith(("q_proj", "up_proj"))]
        for name in names:
            old, new, merged = before[name].dequantize(), after[name].dequantize(), dense[f"{name}.weight"]
            sums["change"] += (merged - old).double().square().sum().item()
            sums["before"] += old.double().square().sum().item()
            sums["lost"] += (new - merged.bfloat16().float()).double().square().sum().item()
            sums["merged"] += merged.bfloat16().double().square().sum().item()
    assert found.adapted == len(names) > 0
    assert found.change == pytest.approx((sums["change"] / sums["before"]) ** 0.5, rel=1e-6)
    assert found.relative_error == pytest.approx((sums["lost"] / sums["merged"]) ** 0.5, rel=1e-5)


def test_a_small_change_is_lost_and_that_is_said(made, tmp_path):
    path, _ = made("nf4")
    adapter = adapt(path, tmp_path / "adapter", scale=1e-3)
    found = merge_requantized(path, adapter, tmp_path / "out")
    assert 0 < found.change < found.relative_error
    text = found.lines()["adapter"]
    assert f"changed 4 of them by {found.change:.5f}" in text
    assert f"cost {found.relative_error:.5f}, {found.relative_error / found.change:.2f} times that" in text
    done = CliRunner().invoke(main, ["merge", str(path), str(adapter), "--out", str(tmp_path / "cli"), "--requantize"])
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Warning: ")]
    assert f"lost {found.relative_error / found.change:.2f} times what the adapter changed" in line
    assert done.exit_code == 0
    large = merge_requantized(path, adapt(path, tmp_path / "large"), tmp_path / "other")
    assert large.change > large.relative_error
    assert large.warning is None


def test_an_adapter_of_what_is_not_packed(made, tmp_path):
    path, _ = made("nf4")
    adapter = adapt(path, tmp_path / "adapter", target_modules=["lm_head"])
    found = merge_requantized(path, adapter, tmp_path / "out")
    assert (found.adapted, found.change, found.relative_error) == (0, None, None)
    assert found.lines()["adapter"] == "changed none of them"


def test_the_result_loads_and_is_near_the_adapter_at_work(made, tmp_path):
    path, _ = made("fp8-channel")
    adapter = adapt(path, tmp_path / "adapter")
    merge_requantized(path, adapter, tmp_path / "out")
    with torch.no_grad():
        peer = peft.PeftModel.from_pretrained(load_model(path, dtype=torch.float32), adapter)(IDS).logits
        ours = load_model(tmp_path / "out", dtype=torch.float32)(IDS).logits
        base = load_model(path, dtype=torch.float32)(IDS).logits
    assert (ours - peer).norm() < 0.1 * (base - peer).norm()


def test_the_command(made, tmp_path):
    path, _ = made("nf4")
    adapter = adapt(path, tmp_path / "adapter")
    arguments = ["merge", str(path), str(adapter), "--requantize", "--out"]
    done = CliRunner().invoke(main, [*arguments, str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [
        "artifact",
        "packed again",
        "codes",
        "errors are",
        "adapter",
    ]
    assert "against the merged weights in bfloat16\n" in done.stdout
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")]).stdout
    assert re.search(r"relative error +\d.* by weight, against source-merged$", shown, re.MULTILINE)
    again = CliRunner().invoke(main, [*arguments, str(tmp_path / "json"), "--json"])
    rows = json.loads(again.stdout)
    assert rows["out"] == str(tmp_path / "json")
    assert (rows["weights"], rows["adapted"]) == (14, 4)
    assert rows["change"] > 0 < rows["relative_error"]
    for one in sorted((tmp_path / "out").iterdir()):
        assert one.read_bytes() == (tmp_path / "json" / one.name).read_bytes(), one.name
    dense = CliRunner().invoke(main, ["merge", str(path), str(adapter), "--out", str(tmp_path / "dense"), "--json"])
    assert json.loads(dense.stdout) == {"out": str(tmp_path / "dense")}


def test_what_fails_leaves_nothing(made, tmp_path, monkeypatch):
    path, _ = made("nf4")
    adapter = adapt(path, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportExistsError, match="exists already"):
        merge_requantized(path, adapter, tmp_path / "out")
    with pytest.raises(UnreadableAdapterError, match="adapter_config"):
        merge_requantized(path, tmp_path, tmp_path / "new")
    with pytest.raises(UsageError, match="float8"):
        merge_requantized(path, adapter, tmp_path / "new", "float8")
    monkeypatch.setattr("surogate_load.local.local_directory", None)  # before anything is opened, or downloaded
    for arguments, message in (
        (["dequantize", "me/model", "--out", tmp_path / "out"], "out: exists already"),
        (["merge", "me/model", adapter, "--out", tmp_path / "out", "--requantize"], "out: exists already"),
        (["merge", "me/model", tmp_path, "--out", tmp_path / "new"], "no adapter_config.json"),
        (["generate", "me/model", "a", "--adapter", tmp_path], "no adapter_config.json"),
    ):
        done = CliRunner().invoke(main, list(map(str, arguments)))
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), repr(done.exception)
        assert message in done.stderr
    assert {each.name for each in tmp_path.iterdir()} == {"adapter", "out"}


def test_the_quantizers_error_is_ours_in_one_line(made, tmp_path, monkeypatch):
    path, _ = made("nf4")
    adapter = adapt(path, tmp_path / "adapter")
    monkeypatch.setattr(
        "surogate_load.export.requantize.quantizer_arguments", lambda _: ["--format", "nf4", "--skip", "x"]
    )
    with pytest.raises(QuantizerFailedError, match="can't be packed again: --skip x: matches no tensor") as caught:
        merge_requantized(path, adapter, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert {each.name for each in tmp_path.iterdir()} == {"adapter"}


def test_what_others_packed_has_no_options_to_repeat(tmp_path):
    path = write_artifact(tiny_llama(), tmp_path, NF4(double_quant="none"), layout="bitsandbytes")
    (path / "surogate.json").unlink()
    adapter = adapt(path, tmp_path / "adapter")
    with pytest.raises(UnrecordedOptionsError, match="options that packed it are unknown"):
        merge_requantized(path, adapter, tmp_path / "out")
