"""Everything that can be wrong with a request: its own error class, one line, an exit code, and nothing left behind."""

import errno
import json
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from quantizer.checkpoints import CONFIG, contents, llama, write_checkpoint

from surogate_formats.checkpoint import errors as checkpoint_errors
from surogate_formats.errors import NonFiniteWeightError, OutOfRangeError, UsageError
from surogate_formats.layouts import LayoutRefusesError
from surogate_quantize import make_options, output, quantize
from surogate_quantize.cli import main
from surogate_quantize.options import BadSizeError
from surogate_quantize.plan import AlreadyQuantizedError, NameClashError, NothingToQuantizeError
from surogate_quantize.skip_options import InvalidSkipPatternError, SkipLayersError, UnknownSkipPatternError

UP = "model.layers.0.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


def cli(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def assert_refused(result, code, message):
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert message in result.stderr
    assert "`" not in result.stderr


def rewrite_header(path, edit):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def nothing(source):
    shutil.rmtree(source)


def a_file(source):
    nothing(source)
    source.write_text("weights")


def empty(source):
    nothing(source)
    source.mkdir()


def only_a_pickle(source):
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def no_weights(source):
    (source / "model.safetensors").unlink()


def no_config(source):
    (source / "config.json").unlink()


def broken_config(source):
    (source / "config.json").write_text("{")


def truncated(source):
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 5)


def trailing(source):
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"x")


def lying_shape(source):
    rewrite_header(source / "model.safetensors", lambda header: header[UP].update(shape=[256, 129]))


def overlapping(source):
    rewrite_header(source / "model.safetensors", lambda header: header[UP].update(data_offsets=[0, 2 * 256 * 128]))


def unknown_dtype(source):
    rewrite_header(source / "model.safetensors", lambda header: header[UP].update(dtype="BF17"))


def git_lfs_pointer(source):
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def missing_shard(source):
    nothing(source)
    write_checkpoint(source, shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()


def shard_outside(source):
    nothing(source)
    write_checkpoint(source, shards=2)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"][UP] = "../model-00001-of-00002.safetensors"
    (source / INDEX).write_text(json.dumps(index))


def misplaced_tensor(source):
    nothing(source)
    write_checkpoint(source, shards=2)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.nothing.weight"] = "model-00001-of-00002.safetensors"
    (source / INDEX).write_text(json.dumps(index))


def weight_with(value, place=(200, 77)):
    def edit(source):
        tensors = llama()
        tensors[UP][place] = value
        nothing(source)
        write_checkpoint(source, tensors)

    return edit


def declared_quantized(source):
    (source / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "awq"}}))


def quantized_by_us(source):
    out = source.parent / "artifact"
    quantize(source, out, make_options("nf4", {}))
    nothing(source)
    out.rename(source)
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))


def largest_half(source):
    tensors = llama()
    tensors[UP][0, 0] = 65504
    nothing(source)
    write_checkpoint(source, tensors, dtype="F16")


def gpt2(source):
    nothing(source)
    tensors = {"wte.weight": np.ones((8, 16), np.float32)}
    for leaf, shape in (
        ("attn.c_attn", (16, 48)),
        ("attn.c_proj", (16, 16)),
        ("mlp.c_fc", (16, 64)),
        ("mlp.c_proj", (64, 16)),
    ):
        tensors[f"h.0.{leaf}.weight"] = np.ones(shape, np.float32)
    write_checkpoint(source, tensors, config={"model_type": "gpt2", "n_layer": 1})


def clashing_names(source):
    nothing(source)
    write_checkpoint(source, llama() | {f"{UP}_absmax": np.ones(3, np.float32)})


BAD_SOURCES = [
    (nothing, checkpoint_errors.CheckpointNotFoundError, "no such directory; check the path"),
    (a_file, checkpoint_errors.CheckpointIsAFileError, "not a directory; give the directory that holds it"),
    (empty, checkpoint_errors.EmptyCheckpointError, "empty; download the model into it"),
    (only_a_pickle, checkpoint_errors.PickledWeightsError, "a pickle runs code when loaded; convert it"),
    (no_weights, checkpoint_errors.NoWeightsError, "no .safetensors file"),
    (no_config, checkpoint_errors.MissingConfigError, "config.json: missing"),
    (broken_config, checkpoint_errors.JsonSyntaxError, "config.json: not JSON"),
    (truncated, checkpoint_errors.TruncatedFileError, "model.safetensors: truncated: header promises"),
    (trailing, checkpoint_errors.TrailingBytesError, "model.safetensors: 1 bytes after the last tensor"),
    (lying_shape, checkpoint_errors.SizeMismatchError, f"tensor '{UP}': 'BF16' of shape '[256, 129]' needs"),
    (overlapping, checkpoint_errors.OverlapError, "overlaps the tensor before it"),
    (unknown_dtype, checkpoint_errors.UnknownDtypeError, "unknown dtype 'BF17'"),
    (git_lfs_pointer, checkpoint_errors.GitLfsPointerError, "run git lfs pull"),
    (missing_shard, checkpoint_errors.MissingShardError, "model-00002-of-00003.safetensors: missing"),
    (shard_outside, checkpoint_errors.UnsafeShardNameError, "'../model-00001-of-00002.safetensors' is not a plain"),
    (misplaced_tensor, checkpoint_errors.MisplacedTensorError, "places tensor 'model.nothing.weight' in"),
    (weight_with(np.nan), NonFiniteWeightError, f"model.safetensors: tensor {UP}: [200, 77] is nan; repair the source"),
    (
        weight_with(np.inf),
        NonFiniteWeightError,
        f"{UP}: [200, 77] is inf; repair the source, or leave it out with --skip",
    ),
    (weight_with(-np.inf, (0, 0)), NonFiniteWeightError, f"{UP}: [0, 0] is -inf"),
    (declared_quantized, AlreadyQuantizedError, "already quantized (awq); start from the unquantized checkpoint"),
    (quantized_by_us, AlreadyQuantizedError, "already quantized (surogate)"),
    (gpt2, NothingToQuantizeError, "4 Conv1D weight is stored [in, out]"),
    (clashing_names, NameClashError, f"{UP}_absmax: both"),
]


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "models" / "source")


@pytest.fixture
def out(tmp_path):
    """An output two levels below what exists, so that every directory that was made must go again."""
    return tmp_path / "made" / "out"


@pytest.mark.parametrize(
    ("spoil", "error", "message"), BAD_SOURCES, ids=[f"{row[0].__name__}-{i}" for i, row in enumerate(BAD_SOURCES)]
)
def test_bad_sources(source, out, spoil, error, message):
    spoil(source)
    with pytest.raises(error) as caught:
        quantize(source, out, make_options("nf4", {}))
    assert type(caught.value) is error
    assert not issubclass(error, UsageError)
    assert_refused(cli(source, "--format", "nf4", "--out", out), 1, message)
    assert not out.parent.exists()


@pytest.mark.parametrize(("name", "parameters"), [("fp8", {}), ("fp8", {"scaling": "channel"})], ids=str)
def test_a_value_that_overflows_its_dtype(source, out, name, parameters):
    largest_half(source)
    with pytest.raises(OutOfRangeError):
        quantize(source, out, make_options(name, parameters))
    assert not out.parent.exists()
    arguments = [f"--{key}={value}" for key, value in parameters.items()]
    result = cli(source, "--format", name, *arguments, "--out", out)
    assert_refused(result, 1, f"tensor {UP}: its largest magnitude 65504.0 dequantizes to no finite F16 value")
    assert not out.parent.exists()


BAD_REQUESTS = [
    (("--skip", "nothing_like_it"), UnknownSkipPatternError, 2, "--skip nothing_like_it: matches no tensor"),
    (("--skip", "layers..mlp"), InvalidSkipPatternError, 2, "empty component"),
    (("--skip", "re:("), InvalidSkipPatternError, 2, "not a regular expression"),
    (("--skip-first-layers", "3"), SkipLayersError, 2, "the model has only 2 layers"),
    (
        ("--skip-first-layers", "2"),
        NothingToQuantizeError,
        1,
        "nothing to quantize; all tensors are kept: 14 --skip-first",
    ),
    (("--max-shard-size", "much"), BadSizeError, 2, "size 'much': write a number and a unit"),
    (("--layout", "hf-fp8"), LayoutRefusesError, 2, "layout hf-fp8: it doesn't store nf4; use surogate"),
    (
        ("--scaling", "tensor"),
        UsageError,
        2,
        "nf4 has no parameter --scaling; it has --block-size, --double-quant/--no-double-quant\n",
    ),
    (("--1d",), UsageError, 2, "nf4 has no parameter --2d/--1d; it has"),
    (("--block-size", "32"), UsageError, 2, "nf4: --block-size is 32; choose one of 64, 128"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "code", "message"),
    BAD_REQUESTS,
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_requests(source, out, arguments, error, code, message, monkeypatch):
    assert_refused(cli(source, "--format", "nf4", "--out", out, *arguments), code, message)
    assert not out.parent.exists()
    monkeypatch.setenv("SUROGATE_DEBUG", "1")
    with pytest.raises(error) as caught:
        cli(source, "--format", "nf4", "--out", out, *arguments)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp8", "--scaling", "block", "--layout", "compressed-tensors"), "use --layout hf-fp8"),
        (("fp8", "--layout", "hf-fp8"), "use --layout compressed-tensors"),
        (("fp4", "--layout", "surogate"), "it doesn't store fp4; use compressed-tensors"),
        (
            ("fp4", "--block-size", "64"),
            "fp4 has no parameter --block-size; it has --2d/--1d, --four-over-six/--no-four-over-six, ",
        ),
        (("fp8", "--no-double-quant"), "fp8 has no parameter --double-quant/--no-double-quant; it has --scaling\n"),
        (("fp8", "--double-quant"), "fp8 has no parameter --double-quant/--no-double-quant; it has --scaling\n"),
        (("fp8", "--layout", "bitsandbytes"), "layout bitsandbytes: it doesn't store fp8; use compressed"),
    ],
)
def test_refused_pairs(source, out, arguments, message):
    assert_refused(cli(source, "--out", out, "--format", *arguments), 2, message)
    assert not out.parent.exists()


@pytest.mark.parametrize("where", [".", "out", "..", "../.."])
def test_an_output_that_overlaps_the_source(source, where):
    before = contents(source)
    result = cli(source, "--format", "nf4", "--out", source / where)
    assert_refused(result, 2, "overlaps with the source")
    assert contents(source) == before


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_directory_of_somebody_else_is_not_touched(source, out, overwrite):
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    assert_refused(cli(source, "--format", "nf4", "--out", out, *overwrite), 2, f"--out {out}: ")
    assert contents(out) == {"thesis.tex": b"years of work"}


def test_an_artifact_is_replaced_with_overwrite_alone(source, out):
    quantize(source, out, make_options("nf4", {}))
    before = contents(out)
    assert_refused(cli(source, "--format", "fp8", "--out", out), 2, "--overwrite to replace an artifact")
    assert contents(out) == before
    assert cli(source, "--format", "fp8", "--out", out, "--overwrite").exit_code == 0
    assert json.loads((out / "surogate.json").read_text())["format"]["name"] == "fp8"


def test_a_bad_source_leaves_the_artifact_that_was_to_be_replaced(source, out):
    quantize(source, out, make_options("nf4", {}))
    before = contents(out)
    weight_with(np.nan)(source)
    assert cli(source, "--format", "fp8", "--out", out, "--overwrite").exit_code == 1
    assert contents(out) == before


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(source, out, monkeypatch):
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    assert_refused(cli(source, "--format", "nf4", "--out", out), 1, "100.0 kB are free; choose another disk")
    assert not out.parent.exists()


@pytest.mark.parametrize("after", [0, 1, 5, 30])
def test_a_disk_that_fills_up_midway(source, out, monkeypatch, after):
    write, calls = os.pwrite, iter(range(10**6))

    def full(file, data, position):
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    assert_refused(cli(source, "--format", "fp4", "--out", out), 1, f"--out {out}: the disk is full; free some space")
    assert not out.parent.exists()


def test_a_disk_that_fills_up_when_it_is_synced(source, out, monkeypatch):
    def full(file):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(cli(source, "--format", "fp4", "--out", out), 1, "the disk is full")
    assert not out.parent.exists()


@pytest.mark.parametrize("after", [0, 3, 20])
def test_ctrl_c_midway_leaves_nothing(source, out, monkeypatch, after):
    from surogate_quantize import console

    calls = iter(range(10**6))

    def interrupts(self, made, todo):
        def step(tensor):
            if next(calls) == after:
                raise KeyboardInterrupt

        return step

    monkeypatch.setattr(console.Out, "watch", interrupts)
    result = cli(source, "--format", "nf4", "--out", out)
    assert result.exit_code == 130
    assert result.stderr == "Interrupted; nothing was left behind.\n"
    assert not out.parent.exists()


def test_a_failing_run_does_not_leave_files_open(source, out):
    descriptors = Path("/dev/fd")
    if not descriptors.is_dir():
        pytest.skip("no /dev/fd on this system")
    weight_with(np.nan)(source)
    before = len(list(descriptors.iterdir()))
    for _ in range(3):
        with pytest.raises(NonFiniteWeightError):
            quantize(source, out, make_options("nf4", {}))
    assert len(list(descriptors.iterdir())) == before


def test_debugging_gets_the_whole_error(source, out, monkeypatch):
    monkeypatch.setenv("SUROGATE_DEBUG", "1")
    with pytest.raises(SkipLayersError):
        cli(source, "--format", "nf4", "--out", out, "--skip-first-layers", "9")
