"""What people and programs are shown: tables, progress and JSON, each on its own stream."""

import io
import json

import pytest
from quantizer.checkpoints import LINEARS, llama, write_checkpoint
from rich.console import Console

from surogate_quantize import console, dry_run, make_options, quantize
from surogate_quantize.console import Out
from surogate_quantize.report import plan_tables, progress_line, run_table, size
from surogate_quantize.summary import plan_json, summarize_plan


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("report") / "source")


@pytest.fixture(scope="module")
def made(source):
    return dry_run(source, make_options("nf4", {}, skip_last_layers=1))[0]


@pytest.fixture(scope="module")
def summary(source):
    return quantize(source, source.parent / "out", make_options("nf4", {}))


def text_of(renderable, width=200):
    stream = io.StringIO()
    Console(file=stream, width=width).print(renderable)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_500_000, "1.5 MB"), (5e9, "5.00 GB"), (2e12, "2000.00 GB")],
)
def test_sizes_are_decimal(count, text):
    assert size(count) == text


def test_progress_line():
    line = progress_line(250_000_000, 1_000_000_000, 2.0, "model.layers.3.mlp.up_proj.weight")
    assert line == "250.0 MB of 1.00 GB (25%), 125.0 MB/s, 6 s left, model.layers.3.mlp.up_proj.weight"
    assert "0 s left" in progress_line(10, 10, 0.0, "x")


def test_layers_that_are_treated_alike_share_a_line(made):
    lines = text_of(plan_tables(made, every_tensor=False)).splitlines()
    by_name = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert by_name["model.layers.0.mlp.up_proj.weight"][1:] == ["256x128", "BF16", "nf4", "4.129", "linear"]
    kept = by_name["model.layers.1.mlp.up_proj.weight"]
    assert kept[1:5] == ["256x128", "BF16", "keep", "16.000"]
    assert " ".join(kept[5:]) == "layer 1 of --skip-last-layers 1"
    assert by_name["model.layers.{0-1}.input_layernorm.weight"][1:] == ["128", "BF16", "keep", "16.000", "norm"]
    assert by_name["lm_head.weight"][-1] == "lm_head"


def test_gaps_in_layer_numbers_are_shown(tmp_path):
    tensors = llama()
    for layer in (4, 5, 9):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"]
    write_checkpoint(tmp_path, tensors, config={"model_type": "llama", "num_hidden_layers": 10})
    table = text_of(plan_tables(dry_run(tmp_path, make_options("fp8", {}))[0], every_tensor=False))
    assert "model.layers.{0-1,4-5,9}.mlp.up_proj.weight" in table


def test_every_tensor_has_its_line_when_asked(made):
    lines = text_of(plan_tables(made, every_tensor=True)).splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    assert {tensor.info.name for tensor in made.tensors} <= set(names)


def test_the_sums_under_a_plan(made):
    summary = summarize_plan(made)
    table = text_of(plan_tables(made, every_tensor=False))
    values = sum(tensor.values for tensor in made.tensors)
    assert f"7 weights, {163840 / values:.1%} of {values / 1e6:.1f} M parameters" in table
    assert "7 --skip-last-layers 1; 5 norm; 1 lm_head; 1 embedding" in table
    assert "nf4 (block_size 64, double_quant affine) in layout surogate" in table
    assert summary.kept == {"--skip-last-layers 1": 7, "norm": 5, "lm_head": 1, "embedding": 1}
    assert summary.source_bytes == 2 * values
    assert summary.artifact_bytes == sum(tensor.stored_bytes for tensor in made.tensors)
    # 163840 values: codes, a byte for each of 2560 blocks, 8 for each of 10 groups
    assert summary.bits_per_weight == 8 * (163840 // 2 + 2560 + 8 * 10) / 163840


def test_a_run_shows_what_was_measured(summary):
    table = " ".join(text_of(run_table(summary)).split())
    assert f"relative error {summary.relative_error:.4f} (" in table
    assert f"largest error {summary.worst[1]:.4f} {summary.worst[0]}" in table
    assert summary.worst[0].removesuffix(".weight") in LINEARS
    assert summary.relative_error_by_projection.keys() == {name.rpartition(".")[2] for name in LINEARS}
    assert max(summary.relative_error_by_projection.values()) <= summary.worst[1]
    assert summary.megabytes_per_second == pytest.approx(summary.plan.source_bytes / summary.seconds / 1e6)
    assert summary.peak_rss_bytes is None or summary.peak_rss_bytes > 20e6


def test_results_go_to_stdout_and_all_else_to_stderr(made, summary, capsys):
    for out, expected in (
        (Out(), "relative error"),
        (Out(json_mode=True), '"relative_error"'),
        (Out(quiet=True), f"{summary.out}\n"),
    ):
        out.note("a note")
        out.warning("a warning [1/2]")
        out.summary(summary)
        captured = capsys.readouterr()
        assert expected in captured.out
        assert "Warning: a warning [1/2]" in captured.err
        assert ("a note" in captured.err) == (not out.quiet)
        assert "a note" not in captured.out
    Out(quiet=True).plan(made, ["careful"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Warning: careful" in captured.err


def test_json_of_a_plan_and_of_a_run(made, summary, capsys):
    Out(json_mode=True).plan(made, [])
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads(json.dumps(plan_json(made)))
    assert data["schema_version"] == 1
    assert set(data) == {"schema_version", "plan", "tensors"}
    assert set(data["plan"]) == {
        "format", "layout", "codes", "source_bytes", "artifact_bytes", "values", "quantized_values",
        "quantized_tensors", "bits_per_weight", "model_bits_per_weight", "kept", "shards", "quantized_share",
    }  # fmt: skip
    assert data["tensors"]["lm_head.weight"] == {
        "decision": "keep",
        "reason": "lm_head",
        "dtype": "BF16",
        "shape": [48, 128],
        "bytes": 48 * 128 * 2,
        "bits_per_weight": 16.0,
    }
    Out(json_mode=True).summary(summary)
    data = json.loads(capsys.readouterr().out)
    assert set(data) == {
        "schema_version", "plan", "out", "reused_shards", "device", "relative_error",
        "relative_error_by_projection", "worst", "output_error", "output_error_by_block", "seconds",
        "megabytes_per_second", "peak_rss_bytes", "carried_over", "warnings", "quantized_share",
    }  # fmt: skip
    assert data["quantized_share"] == summary.plan.quantized_share


def test_without_a_terminal_progress_is_a_line_now_and_then(made, capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_EVERY", 0)
    step = Out().watch(made, made.tensors)
    for tensor in made.tensors:
        step(tensor)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == len(made.tensors)
    assert "(100%)" in captured.err.splitlines()[-1]
    monkeypatch.setattr(console, "LINE_EVERY", 1000)
    Out().watch(made, made.tensors)(made.tensors[0])
    for out in (Out(quiet=True), Out(json_mode=True)):
        out.watch(made, made.tensors)(made.tensors[0])
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar_and_it_goes_away(made, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    out = Out()
    step = out.watch(made, made.tensors)
    for tensor in made.tensors:
        step(tensor)
    out.close()
    out.close()
    assert "MB" in stream.getvalue() or "kB" in stream.getvalue()


def test_no_color_is_respected(summary, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    Out().warning("careful")
    assert "\x1b[33m" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    Out().warning("careful")
    Out().summary(summary)
    captured = capsys.readouterr()
    assert "\x1b[3" not in captured.err + captured.out
