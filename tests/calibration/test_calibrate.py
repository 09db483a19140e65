"""Whole calibrated runs on tiny models: better, legal, resumable, and refused by name where they can't be."""

import json
import shutil

import pytest
import torch
from quantizer.checkpoints import contents
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from make_tiny import make_tiny
from surogate_formats.artifact import STAGING, Artifact
from surogate_load import load_model
from surogate_load.block_runner import NoBlocksError
from surogate_load.verification import verify_against
from surogate_quantize import make_options, quantize
from surogate_quantize.bands import MemoryBudgetError
from surogate_quantize.calibration import store
from surogate_quantize.calibration.block_pass import BlockPass
from surogate_quantize.calibration.text import CalibrationTextError
from surogate_quantize.calibration_options import CalibrationOptionsError
from surogate_quantize.output_errors import DiskFullError

ROWS = torch.randint(3, 90, (24, 600), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("calibrate") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ROWS[:20]))
    return path


def calibrated(source, out, text, name="nf4", parameters=None, layout=None, **others):
    settings = {"codes": "calibrated", "calibration_text": str(text), "calibration_tokens": 4096, **others}
    return quantize(source, out, make_options(name, parameters or {}, layout, **settings))


@pytest.fixture(scope="module")
def divergence(source):
    """KL of a model's predictions from those of the source."""
    ids = ROWS[20:, :256]
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = dense(input_ids=ids).logits.log_softmax(-1)

    def measure(model):
        with torch.no_grad():
            found = model(input_ids=ids).logits.log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    return measure


CASES = [
    ("nf4", {}, None),
    ("nf4", {}, "bitsandbytes"),
    ("fp4", {"two_d": False}, None),
    ("fp4", {}, None),
    ("fp8", {}, None),
    ("fp8", {"scaling": "channel"}, None),
    ("fp8", {"scaling": "block"}, None),
]


@pytest.mark.parametrize(("name", "parameters", "layout"), CASES)
def test_the_same_bytes_say_more(source, text, divergence, tmp_path, name, parameters, layout):
    blocks = {} if (name, layout) == ("nf4", None) else {"skip_last_layers": 1}  # one is as telling, in half the time
    quantize(source, tmp_path / "nearest", make_options(name, parameters, layout, **blocks))
    summary = calibrated(source, tmp_path / "calibrated", text, name, parameters, layout, **blocks)
    with Artifact.open(tmp_path / "calibrated") as artifact:
        artifact.verify()
        verify_against(artifact, source)
    models = {kind: load_model(tmp_path / kind, dtype=torch.float32) for kind in ("nearest", "calibrated")}
    measured = {kind: divergence(model) for kind, model in models.items()}
    assert measured["calibrated"] < 0.8 * measured["nearest"]
    before, after = summary.output_error
    assert after < before
    for kind in ("model.safetensors", "config.json"):
        sizes = [(tmp_path / folder / kind).stat().st_size for folder in ("nearest", "calibrated")]
        assert sizes[0] == sizes[1]
    with Artifact.open(tmp_path / "calibrated") as artifact:
        options = artifact.manifest.options
        recorded = [options[key] for key in ("codes", "calibration_tokens", "calibration_device")]
        assert recorded == ["calibrated", 20 * 256, "cpu"]


class Stopped(KeyboardInterrupt):
    """Comes in the middle of a pass."""


def stop_at(moment):
    def told(said):
        if said == moment:
            raise Stopped

    return told


@pytest.fixture(scope="module")
def interrupted(source, text, tmp_path_factory):
    """(options, the undisturbed artifact, a directory that a stop in the second of two blocks has left)"""
    root = tmp_path_factory.mktemp("interrupted")
    settings = {"calibration_text": str(text), "calibration_tokens": 1024, "adapter_init": 2}
    options = make_options("nf4", {}, codes="calibrated", **settings)
    quantize(source, root / "undisturbed", options)
    with pytest.raises(Stopped) as stopped:
        quantize(source, root / "out", options, told=stop_at("calibrating block 2 of 2"))
    assert stopped.value.args  # the error's line tells how to go on
    return options, root / "undisturbed", root / "out"


def same_but_for_the_name(out, undisturbed):
    one, other = contents(out), contents(undisturbed)
    # The adapter's config holds the artifact's name, and the manifest that file's hash.
    for name in ("surogate.json", "adapter-init/adapter_config.json"):
        one.pop(name), other.pop(name)
    return one == other


@pytest.mark.parametrize("block", [1, 2])
def test_a_pass_that_is_interrupted_goes_on(source, interrupted, tmp_path, block):
    options, undisturbed, stopped = interrupted
    if block == 1:
        with pytest.raises(Stopped) as caught:
            quantize(source, tmp_path / "out", options, told=stop_at("calibrating block 1 of 2"))
        assert not caught.value.args
    else:
        shutil.copytree(stopped, tmp_path / "out")
    said = []
    quantize(source, tmp_path / "out", options, told=said.append)
    again = [line for line in said if line.startswith("calibrating")]
    assert again == [f"calibrating block {n} of 2" for n in range(block, 3)]
    assert same_but_for_the_name(tmp_path / "out", undisturbed)


def test_inputs_that_are_found_anew_are_those_that_were_kept(source, interrupted, tmp_path, monkeypatch):
    """As on a GPU."""
    options, undisturbed, _ = interrupted
    monkeypatch.setattr(BlockPass, "_keeps_inputs", False)
    quantize(source, tmp_path / "out", options)
    assert same_but_for_the_name(tmp_path / "out", undisturbed)


@pytest.mark.parametrize("damage", ["block", "border", "ids"])
def test_what_was_damaged_meanwhile_is_made_again(source, interrupted, tmp_path, damage):
    options, undisturbed, stopped = interrupted
    shutil.copytree(stopped, tmp_path / "out")
    folder = tmp_path / "out" / STAGING / "calibration"
    names = {"block": "block-00000.safetensors", "border": "1.quantized", "ids": "ids.safetensors"}
    path = folder / names[damage]
    data = path.read_bytes()
    path.write_bytes(data[:-100] + bytes(100) if damage == "block" else data[:100])
    quantize(source, tmp_path / "out", options)
    assert same_but_for_the_name(tmp_path / "out", undisturbed)


def test_a_disk_that_is_full_is_said(source, text, tmp_path, monkeypatch):
    def full(*arguments):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(DiskFullError, match="the disk is full"):
        calibrated(source, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_a_budget_that_a_block_does_not_fit_is_refused(source, text, tmp_path):
    settings = {"codes": "calibrated", "calibration_text": str(text)}
    with pytest.raises(MemoryBudgetError, match=r"`max_memory` 400 MiB: calibrating LlamaForCausalLM takes about"):
        quantize(source, tmp_path / "out", make_options("nf4", {}, **settings), max_memory="400MiB")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("codes", "joint"), [("nearest", False), ("calibrated", False), ("calibrated", True)])
def test_an_adapter_starts_from_what_is_left(source, text, divergence, tmp_path, codes, joint):
    out = tmp_path / "out"
    settings = {"calibration_text": str(text), "calibration_tokens": 4096, "adapter_init": 8}
    quantize(source, out, make_options("nf4", {}, codes=codes, adapter_joint=joint, **settings))
    with Artifact.open(out) as artifact:
        artifact.verify()
        verify_against(artifact, source)
        assert artifact.manifest.options["adapter_joint"] is joint
    plain, adapted = load_model(out, dtype=torch.float32), load_model(out, dtype=torch.float32, adapter="init")
    most = {"nearest": 0.8, "calibrated": 0.75 if joint else 1.0}[codes]
    assert divergence(adapted) < most * divergence(plain)
    assert sum(parameter.requires_grad for parameter in adapted.parameters()) == 28
    from peft import PeftModel

    packed = load_model(out, dtype=torch.float32)
    again = PeftModel.from_pretrained(packed, str(out / "adapter-init"), is_trainable=True)
    assert divergence(again) == divergence(adapted)


def test_the_adapter_of_nearest_codes_is_their_error_in_the_norm_of_the_originals_inputs(source, text, tmp_path):
    settings = {"calibration_text": str(text), "calibration_tokens": 4096, "adapter_init": 8}
    quantize(source, tmp_path / "out", make_options("nf4", {}, **settings))
    name, seen = "model.layers.1.mlp.down_proj", []
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    dense.get_submodule(name).register_forward_pre_hook(lambda module, x: seen.append(x[0].flatten(0, 1).double()))
    with torch.no_grad():  # 16 rows; the four after them are held out
        dense(input_ids=ROWS[:20].flatten()[: 16 * 256].reshape(16, 256))
    hessian = seen[0].T @ seen[0] / len(seen[0])
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    root = torch.linalg.cholesky(hessian)
    with Artifact.open(tmp_path / "out") as artifact:
        missing = dense.get_submodule(name).weight.data - torch.from_numpy(artifact.dequantize(name))
    adapter = load_file(tmp_path / "out" / "adapter-init" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    least = torch.linalg.svdvals(missing.double() @ root)[8:].norm()  # Eckart and Young, 1936
    assert (missing - 2 * b @ a).double().matmul(root).norm() <= 1.0001 * least


def test_what_the_text_may_not_be(source, tmp_path):
    cases = {
        "a.txt": ("hello", "has no tokenizer; give a .jsonl file with `input_ids`"),
        "short.jsonl": ('{"input_ids": [1, 2, 3]}', "has 3 tokens, and a row takes"),
        "one.jsonl": (json.dumps({"input_ids": [5] * 300}), "has one row of 256 tokens"),
        "wrong.jsonl": ('{"ids": [1]}', "line 1: is no object with `text` or `input_ids`"),
        "negative.jsonl": ('{"input_ids": [-1]}', "line 1: is no object"),
        "broken.jsonl": ("{", "can't be read"),
        "large.jsonl": (json.dumps({"input_ids": [10**6] * 600}), "token 1000000 is none of the model's"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(CalibrationTextError, match=message):
            calibrated(source, tmp_path / "out", tmp_path / name)
        assert not (tmp_path / "out").exists()
    with pytest.raises(CalibrationTextError, match="has no tokenizer, so the model can't write the text"):
        quantize(source, tmp_path / "out", make_options("nf4", {}, codes="calibrated"))
    with pytest.raises(CalibrationTextError, match=r"none\.txt: can't be read"):
        calibrated(source, tmp_path / "out", tmp_path / "none.txt")
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_calibrated_are_refused_by_name(text, tmp_path):
    source = make_tiny("bert", tmp_path / "bert")
    with pytest.raises(NoBlocksError, match="BertForMaskedLM"):
        calibrated(source, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"codes": "best"},
        {"calibration_tokens": 5},
        {"calibration_text": "x"},
        {"codes": "calibrated", "calibration_tokens": 0},
        {"adapter_init": 0},
        {"adapter_joint": True, "codes": "calibrated"},
        {"adapter_joint": True, "adapter_init": 8},
    ],
    ids=str,
)
def test_options_that_do_not_go_together(arguments):
    with pytest.raises(CalibrationOptionsError):
        make_options("nf4", {}, **arguments)


def test_an_old_artifact_with_an_adapter_is_replaced(source, text, tmp_path):
    out = tmp_path / "out"
    options = make_options("nf4", {}, calibration_text=str(text), calibration_tokens=2048, adapter_init=2)
    quantize(source, out, options)
    quantize(source, out, make_options("nf4", {}), overwrite=True)
    assert not (out / "adapter-init").exists()
    shutil.rmtree(out)
