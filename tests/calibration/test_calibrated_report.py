"""What a calibrated run says before and after: the plan, the summary, the card; and what it refuses, by name."""

import json
import shlex
import shutil
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from calibration.test_text import Tokenizer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from make_tiny import make_tiny
from surogate_formats.artifact import Artifact
from surogate_formats.checkpoint import Checkpoint
from surogate_formats.codes_in_words import codes_in_words
from surogate_load.block_runner import NoBlocksError, NotFiniteError
from surogate_load.publishing.card import make_card
from surogate_load.publishing.command import command_of
from surogate_load.publishing.plot import error_plot
from surogate_load.publishing.source import SourceCard
from surogate_quantize import make_options, quantize
from surogate_quantize.calibration import calibrate
from surogate_quantize.calibration.text import CalibrationTextError
from surogate_quantize.calibration_options import CalibrationOptions
from surogate_quantize.cli import _options, main
from surogate_quantize.console import Out
from surogate_quantize.output_errors import OtherRunError
from surogate_quantize.run import dry_run

ROWS = torch.randint(3, 90, (6, 256), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Smaller than the usual tiny ones: the solver's time goes by columns."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("report") / "llama"
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ROWS))
    return {"codes": "calibrated", "calibration_text": str(path), "calibration_tokens": 512}


@pytest.fixture(scope="module")
def finished(source, settings, tmp_path_factory):
    """A run's directory and summary, and what it has told."""
    out, told = tmp_path_factory.mktemp("finished") / "out", []
    summary = quantize(source, out, make_options("nf4", {}, **settings), told=told.append, device="cpu")
    return out, summary, told


def test_the_errors_of_each_block_are_the_means_of_what_the_manifest_records(finished, capsys):
    out, summary, told = finished
    with Artifact.open(out) as artifact:
        records = artifact.manifest.tensors
    blocks = defaultdict(list)
    for name, record in records.items():
        if record.decision == "quantize":
            blocks[int(name.split(".")[2])].append((record.nearest_output_error, record.output_error))
    expected = {block: tuple(map(pytest.approx, torch.tensor(pairs).double().mean(0).tolist()))
                for block, pairs in blocks.items()}  # fmt: skip
    assert summary.output_error_by_block == expected
    Out().summary(summary)
    shown = capsys.readouterr().out
    for block, (before, after) in summary.output_error_by_block.items():
        assert f"{block}: {after:.4f} ({before:.4f})" in shown
        assert after < before
    data = json.loads(json.dumps(summary.to_json()))
    assert data["output_error_by_block"]["1"] == list(summary.output_error_by_block[1])
    assert told[0].startswith("codes: calibrated; on 1536 tokens that come from a text (sha256 ")


def test_the_card_has_them_and_says_how_codes_were_chosen(finished):
    out, summary, _ = finished
    with Artifact.open(out) as artifact:
        text = make_card(artifact, "me/packed", None, SourceCard(), plot=True)
        manifest = artifact.manifest
        artifact.manifest = replace(manifest, options={**manifest.options, "adapter_init": 4})
        adapted = make_card(artifact, "me/packed", None, SourceCard(), plot=True)
    assert "| these codes and their adapter |" in adapted
    assert 'load_model("me/packed", adapter="init")' in adapted
    for block, (before, after) in summary.output_error_by_block.items():
        assert f"| {block} | 7 | {before:.4f} | {after:.4f} |" in text
    assert "| nearest codes | these codes |" in text
    assert f"| codes | {codes_in_words(manifest.options)} |" in text
    assert "adapter-init" not in text
    assert f"FILE is the text with the {manifest.options['calibration_text']}." in text
    pytest.importorskip("matplotlib")
    without = {name: replace(record, output_error=None) for name, record in manifest.tensors.items()}
    assert len(error_plot(manifest)) > 1.2 * len(error_plot(replace(manifest, tensors=without)))


@pytest.mark.parametrize("text", ["sha256 00", "written by the model"])
def test_the_command_asks_for_the_same_again(finished, settings, text):
    with Artifact.open(finished[0]) as artifact:
        manifest = artifact.manifest
    options = {**manifest.options, "adapter_init": 8, "adapter_joint": True, "calibration_text": text}
    words = shlex.split(command_of(replace(manifest, options=options)))
    _, asked = _options(None, main.make_context("surogate-quantize", words[1:]).params)
    file = None if text.startswith("written") else "FILE"
    assert asked.calibration == CalibrationOptions(file, 512, adapter_joint=True)
    assert (asked.codes, asked.adapter_init) == ("calibrated", 8)


def test_codes_in_words():
    assert codes_in_words({}) == "nearest to the weights"
    assert codes_in_words({"codes": "search"}).startswith("searched")
    told = {
        "codes": "calibrated", "adapter_init": 4, "adapter_joint": True, "calibration_text": "written by the model",
        "calibration_tokens": 99, "calibration_device": "cpu", "calibration_threads": 1, "calibration_torch": "2",
        "calibration_transformers": "5",
    }  # fmt: skip
    assert codes_in_words(told) == (
        "calibrated, with an adapter of rank 4 that starts from what is left of the error (both chosen together: "
        "without the adapter the codes are worse); on 99 tokens that the model wrote itself, run on cpu with 1 thread "
        "(torch 2, transformers 5)"
    )


def test_a_dry_run_says_it_before_and_reads_no_weight(source, settings, finished, monkeypatch, tmp_path, capsys):
    def refuse(*_):
        raise AssertionError("a weight is read")

    monkeypatch.setattr(Checkpoint, "read_into", refuse)
    plan, _ = dry_run(source, make_options("nf4", {}, **settings), tmp_path / "out", device="cpu")
    with Artifact.open(finished[0]) as artifact:
        recorded = artifact.manifest.options
    seconds = plan.calibration["estimated_seconds"]
    assert 0 <= seconds < 600
    assert recorded.items() >= plan.calibration.items() - {("estimated_seconds", seconds)}
    Out().plan(plan, [])
    assert f"codes            {codes_in_words(recorded)}; about " in capsys.readouterr().out
    more = dry_run(source, make_options("nf4", {}, **settings, adapter_init=64), device="cpu")[0]
    assert more.calibration["estimated_seconds"] >= seconds


def test_a_dry_run_refuses_what_the_run_would(source, settings, tmp_path):
    with pytest.raises(NoBlocksError, match=r"GptOssForCausalLM: .* nor of an expert with tensors of its own"):
        dry_run(make_tiny("gpt-oss", tmp_path / "fused"), make_options("nf4", {}, **settings), device="cpu")
    incomplete = tmp_path / "incomplete"
    shutil.copytree(source, incomplete)
    tensors = load_file(incomplete / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, incomplete / "model.safetensors", {"format": "pt"})
    with pytest.raises(NoBlocksError, match=r"model\.layers\.1\.input_layernorm\.weight isn't in the checkpoint"):
        dry_run(incomplete, make_options("nf4", {}, **settings), device="cpu")
    with pytest.raises(CalibrationTextError, match=r"none\.txt: can't be read"):
        dry_run(source, make_options("nf4", {}, codes="calibrated", calibration_text="none.txt"), device="cpu")


class Stopped(KeyboardInterrupt):
    """Comes in the middle of a pass."""


def test_a_dry_run_knows_an_unfinished_run(source, settings, tmp_path):
    def stop(said):
        if said == "calibrating block 2 of 2":
            raise Stopped

    options = make_options("nf4", {}, **settings)
    with pytest.raises(Stopped):
        quantize(source, tmp_path / "out", options, told=stop, device="cpu")
    dry_run(source, options, tmp_path / "out", device="cpu")
    text = tmp_path / "ids.jsonl"
    text.write_text(json.dumps({"input_ids": [7] * 1536}))
    other = make_options("nf4", {}, **{**settings, "calibration_text": str(text)})
    with pytest.raises(OtherRunError, match="calibration_text"):
        dry_run(source, other, tmp_path / "out", device="cpu")


def damaged(source, folder, name, row=None, value=float("nan")):
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row if row is not None else 0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("model.layers.1.post_attention_layernorm.weight", None, float("nan"), r"model\.layers\.1\b"),
        ("model.layers.0.input_layernorm.weight", None, float("inf"), r"model\.layers\.0\b"),
        ("model.embed_tokens.weight", int(ROWS[-1, 7]), float("nan"), "what goes into its blocks"),
    ],
    ids=["norm", "infinity", "embedding"],
)
def test_activations_that_are_not_finite_are_refused_by_the_block(
    source, settings, tmp_path, name, row, value, message
):
    broken = damaged(source, tmp_path / "broken", name, row, value)
    with pytest.raises(NotFiniteError, match=message) as raised:
        quantize(broken, tmp_path / "out", make_options("nf4", {}, **settings), device="cpu")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out" / "surogate.json").exists()


def test_a_model_that_can_not_write_is_refused_by_the_block(source, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "load_tokenizer", lambda directory: Tokenizer(1))
    options = make_options("nf4", {}, codes="calibrated", calibration_tokens=512)
    broken = damaged(source, tmp_path / "broken", "model.layers.1.input_layernorm.weight")
    with pytest.raises(NotFiniteError, match=r"LlamaForCausalLM: model\.layers\.1 gives a NaN"):
        quantize(broken, tmp_path / "out", options, device="cpu")
    now_and_then = damaged(source, tmp_path / "row", "model.embed_tokens.weight", slice(3, 90))
    with pytest.raises(CalibrationTextError, match=r"row: the model can't write its calibration text .*give `calib"):
        quantize(now_and_then, tmp_path / "other", options, device="cpu")
