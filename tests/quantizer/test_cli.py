"""The command line: options, training files, dry runs, output streams, and the command as a process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from quantizer.checkpoints import LINEARS, check_artifact, contents, llama, write_checkpoint

from surogate_formats.artifact import STAGING
from surogate_formats.layouts import LAYOUTS as LAYOUT_CLASSES
from surogate_quantize import make_options, quantize
from surogate_quantize.cli import DEVICES, EXAMPLES, FORMAT_PARAMETERS, LAYOUTS, main
from surogate_quantize.devices import DEVICES as DEVICES_THERE_ARE
from surogate_quantize.flags import as_flags
from surogate_quantize.version import VERSION

ROOT = Path(__file__).resolve().parents[2]

OPTIONS = {
    "--format",
    "--out",
    "--config",
    "--layout",
    "--block-size",
    "--double-quant",
    "--no-double-quant",
    "--scaling",
    "--2d",
    "--1d",
    "--four-over-six",
    "--no-four-over-six",
    "--four-over-six-metric",
    "--global-scale",
    "--skip-first-layers",
    "--skip-last-layers",
    "--skip",
    "--quantize-lm-head",
    "--revision",
    "--token",
    "--keep-source",
    "--hash-source",
    "--max-shard-size",
    "--device",
    "--workers",
    "--max-memory",
    "--codes",
    "--calibrate",
    "--calibration-text",
    "--calibration-tokens",
    "--adapter-init",
    "--adapter-joint",
    "--strict",
    "--overwrite",
    "--dry-run",
    "--push-to-hub",
    "--private",
    "--create-pr",
    "--commit-message",
    "--json",
    "-q",
    "--quiet",
    "-v",
    "--verbose",
    "--version",
    "-h",
    "--help",
}

FP4 = {"two_d": True, "four_over_six": True, "metric": "mse", "global_scale": "pow2", "step": "divide"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "source")


def cli(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def command(*arguments, code=None):
    path = os.pathsep.join(str(ROOT / folder) for folder in ("formats", "quantizer"))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "110"}
    call = [sys.executable, *(["-m", "surogate_quantize"] if code is None else ["-c", code]), *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, env=environment, check=False)


def manifest_of(out):
    return json.loads((out / "surogate.json").read_text())


def test_help_names_every_option_and_every_option_has_a_help_text():
    text = cli("--help").stdout
    assert set(re.findall(r"(?<![\w-])-[\w-]+", text.partition("Examples:")[0])) >= OPTIONS
    declared = {spelling for option in main.params for spelling in (*option.opts, *option.secondary_opts)} - {"model"}
    assert declared | {"-h", "--help"} == OPTIONS
    assert all(getattr(option, "help", "") for option in main.params if option.param_type_name == "option")
    assert max(map(len, text.splitlines())) <= 110
    assert all(line.strip() in text for line in EXAMPLES.split("\b")[1].splitlines())


def test_help_and_errors_of_usage_do_without_numba_and_torch():
    code = (
        "import sys\n"
        "from surogate_quantize.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'numba', 'torch', 'numpy', 'transformers', 'rich', 'safetensors', 'yaml'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)\n"
    )
    for arguments, exit_code in ((("--help",), 0), (("--version",), 0), (("x", "--json", "-q", "--format", "nf4"), 2)):
        result = command(*arguments, code=code)
        assert result.returncode == exit_code
        assert result.stderr.splitlines()[-1] == "[]"


def test_version():
    assert cli("--version").stdout == f"surogate-quantize, version {VERSION}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say what to make: --format nf4, fp4 or fp8, or --config FILE"),
        (("model",), "say what to make"),
        (("--format", "nf4"), "Missing argument 'MODEL' (or a --config that names a model)"),
        (("model", "--format", "nf4"), "Missing option '--out' (or --dry-run)"),
        (("model", "--format", "nf5"), "'nf5' is not one of 'nf4', 'fp4', 'fp8'"),
        (("model", "--format", "nf4", "--json", "--quiet"), "two forms of output; choose one"),
        (("model", "--format", "nf4", "--skip-first-layers", "-1"), "-1 is not in the range x>=0"),
        (("model", "--format", "nf4", "--workers", "0"), "0 is not in the range x>=1"),
        (("model", "--format", "nf4", "--device", "tpu"), "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (("model", "--format", "fp8", "--scaling", "row"), "'row' is not one of 'tensor', 'channel', 'block'"),
        (("model", "--format", "nf4", "--layout", "gguf"), "'gguf' is not one of 'surogate', 'compressed-tensors', "),
        (("model", "--format", "nf4", "--block-size", "big"), "'big' is not a valid integer"),
        (("model", "extra", "--format", "nf4"), "Got unexpected extra argument (extra)"),
        (("model", "--format", "nf4", "--blocksize", "64"), "No such option"),
    ],
)
def test_errors_of_usage_exit_with_2(arguments, message):
    result = cli(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        (("nf4",), {"block_size": 64, "double_quant": "affine"}),
        (("nf4", "--block-size", "128"), {"block_size": 128, "double_quant": "affine"}),
        (("nf4", "--no-double-quant"), {"block_size": 64, "double_quant": "none"}),
        (("nf4", "--double-quant"), {"block_size": 64, "double_quant": "affine"}),
        (("nf4", "--layout", "bitsandbytes"), {"block_size": 64, "double_quant": "dynamic"}),
        (("nf4", "--layout", "bitsandbytes", "--double-quant"), {"block_size": 64, "double_quant": "dynamic"}),
        (("nf4", "--layout", "bitsandbytes", "--no-double-quant"), {"block_size": 64, "double_quant": "none"}),
        (("fp4",), FP4),
        (("fp4", "--1d"), FP4 | {"two_d": False}),
        (("fp4", "--2d", "--no-four-over-six"), FP4 | {"four_over_six": False}),
        (("fp4", "--four-over-six-metric", "absmax"), FP4 | {"metric": "absmax"}),
        (("fp4", "--global-scale", "amax"), FP4 | {"global_scale": "amax"}),
        (("fp8",), {"scaling": "tensor", "scale_dtype": "bfloat16"}),
        (("fp8", "--scaling", "channel"), {"scaling": "channel", "scale_dtype": "bfloat16"}),
        (("fp8", "--scaling", "block"), {"scaling": "block", "scale_dtype": "float32"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_are_the_formats_parameters(source, tmp_path, arguments, parameters):
    result = cli(source, "--format", *arguments, "--out", tmp_path / "out", "-q")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert manifest_of(tmp_path / "out")["format"] == {"name": arguments[0], **parameters}


def test_the_command_line_is_a_thin_call_of_the_function(source, tmp_path):
    quantize(
        source, tmp_path / "function", make_options("fp4", {"two_d": False}, skip_last_layers=1, skip=("*.o_proj",))
    )
    options = [
        "--format",
        "fp4",
        "--1d",
        "--skip-last-layers",
        "1",
        "--skip",
        "*.o_proj",
        "--workers",
        "1",
        "--layout",
        "compressed-tensors",
    ]
    result = cli(source, *options, "--out", tmp_path / "command")
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "command") == contents(tmp_path / "function")
    assert {"format_name", *FORMAT_PARAMETERS} <= {parameter.name for parameter in main.params}


def test_a_run_writes_an_artifact_and_a_table(source, tmp_path):
    result = cli(source, "--format", "nf4", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr == ""
    for word in ("relative error", "bits per weight", "peak memory", str(tmp_path / "out")):
        assert word in result.stdout
    assert check_artifact(source, tmp_path / "out") == sorted(LINEARS)


def test_json_alone_is_on_stdout_and_warnings_on_stderr(source, tmp_path):
    result = cli(source, "--format", "fp4", "--out", tmp_path / "out", "--json")
    data = json.loads(result.stdout)
    assert data["out"] == str(tmp_path / "out")
    assert data["plan"]["quantized_tensors"] == len(LINEARS)
    assert data["warnings"]
    assert result.stderr == "".join(f"Warning: {line}\n" for line in data["warnings"])


@pytest.mark.parametrize("extra", [(), ("--json",), ("-v",), ("-q",), ("--out", "out"), ("--json", "--out", "out")])
def test_a_dry_run_writes_nothing(source, tmp_path, monkeypatch, extra):
    monkeypatch.chdir(tmp_path)
    before = contents(source)
    result = cli(source, "--format", "nf4", "--dry-run", *extra)
    assert result.exit_code == 0
    assert contents(source) == before
    assert not list(tmp_path.iterdir())
    if "-q" in extra:
        assert result.stdout == ""
    elif "--json" in extra:
        assert json.loads(result.stdout)["tensors"].keys() == llama().keys()
    else:
        assert ("model.layers.1.mlp.up_proj.weight" in result.stdout) == ("-v" in extra)
        assert "14 weights, 96.2% of 0.3 M parameters" in result.stdout


def test_a_dry_run_says_what_the_run_then_does(source, tmp_path):
    planned = json.loads(cli(source, "--format", "fp8", "--skip-first-layers", "1", "--dry-run", "--json").stdout)
    done = json.loads(
        cli(source, "--format", "fp8", "--skip-first-layers", "1", "--out", tmp_path / "out", "--json").stdout
    )
    share = planned["plan"].pop("quantized_share")
    assert planned["plan"] == done["plan"]
    assert share == done["quantized_share"]
    for name, record in manifest_of(tmp_path / "out")["tensors"].items():
        for key in ("decision", "reason", "dtype", "shape", "bits_per_weight"):
            assert planned["tensors"][name][key] == record[key]
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0 < size - planned["plan"]["artifact_bytes"] < 10_000


def test_a_training_file_gives_the_format_and_the_model(source, tmp_path, monkeypatch):
    config = tmp_path / "train.yaml"
    config.write_text(
        f"model: {source}\nqlora_bnb: true\nqlora_bnb_block_size: 128\nrecipe: bf16\nlora: true\nlora_rank: 4\n"
        "learning_rate: 1e-4\ndatasets: [a, b]\n"
    )
    result = cli("--config", config, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stderr == f"{config}: not ours, passed over: learning_rate, datasets\n"
    manifest = manifest_of(tmp_path / "out")
    assert manifest["format"] == {"name": "nf4", "block_size": 128, "double_quant": "affine"}
    assert manifest["lora"].items() >= {"enabled": True, "rank": 4, "alpha": 32}.items()
    assert cli("--config", config, "--out", tmp_path / "quiet", "-q").stderr == ""
    strict = cli("--config", config, "--out", tmp_path / "strict", "--strict")
    assert (strict.exit_code, strict.stdout) == (2, "")
    assert strict.stderr == (
        f"Error: {config}: not keys of ours: learning_rate, datasets; leave out --strict to pass over them\n"
    )
    assert not (tmp_path / "strict").exists()


def test_arguments_win_over_the_training_file(source, tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text("model: nowhere/at-all\nqlora_bnb: true\nqlora_bnb_block_size: 128\nskip_quant_first_layers: 1\n")
    out = tmp_path / "out"
    result = cli(source, "--config", config, "--block-size", "64", "--skip-first-layers", "0", "--out", out, "-q")
    assert result.exit_code == 0, result.output
    assert manifest_of(out)["format"]["block_size"] == 64
    assert manifest_of(out)["options"]["skip_first_layers"] == 0
    other = cli(source, "--config", config, "--format", "fp8", "--out", tmp_path / "other")
    assert other.exit_code == 0
    assert other.stderr == f"{config}: asks for nf4; --format fp8 wins\n"
    assert manifest_of(tmp_path / "other")["format"]["name"] == "fp8"
    assert manifest_of(tmp_path / "other")["options"]["skip_first_layers"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qlora_fp8: true\nqlora_fp4: true\n", "fp8 and fp4 are both on; leave one"),
        ("qlora_fb8: true\n", "unknown key 'qlora_fb8'; did you mean 'qlora_fp8'?"),
        ("qlora_fp8: maybe\n", "qlora_fp8 is 'maybe'; expected true or false"),
        ("qlora_bnb: true\nrecipe: nvfp4\n", "recipe nvfp4 can't train on an nf4 base"),
        ("lora: true\n", "no format: give --format nf4, fp4 or fp8"),
        ("- a\n", "not a mapping of keys to values"),
        (None, "No such file or directory"),
    ],
)
def test_a_training_file_that_is_refused(source, tmp_path, text, message):
    config = tmp_path / "train.yaml"
    if text is not None:
        config.write_text(text)
    result = cli(source, "--config", config, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_belong_to_the_checkpoint_are_named(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    (source / "adapter.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    for arguments in (("--dry-run",), ("--out", tmp_path / "out")):
        result = cli(source, "--format", "nf4", *arguments)
        assert result.stderr == "Warning: not part of the checkpoint, left out: adapter.safetensors\n"


def test_as_a_process(source, tmp_path):
    done = command(source, "--format", "nf4", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "written to" in done.stdout
    check_artifact(source, tmp_path / "out")
    failed = command(tmp_path / "none", "--format", "nf4", "--out", tmp_path / "other")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == f"Error: {tmp_path / 'none'}: no such directory; check the path\n"
    usage = command(source, "--format", "nf4", "--out", source)
    assert usage.returncode == 2
    assert "overlaps with the source" in usage.stderr
    assert "Traceback" not in failed.stderr + usage.stderr
    assert not (tmp_path / "other").exists()


def test_the_layouts_and_devices_written_out_for_the_help_are_those_there_are():
    assert set(LAYOUTS) == LAYOUT_CLASSES.keys()
    assert DEVICES == DEVICES_THERE_ARE


@pytest.mark.parametrize(
    ("message", "flags"),
    [
        ("`out` x: is not empty", "--out x: is not empty"),
        ("use `layout='hf-fp8'`", "use --layout hf-fp8"),
        ("`two_d=False`, `two_d=True` or `two_d`", "--1d, --2d or --2d/--1d"),
        ("`overwrite=True` replaces it", "--overwrite replaces it"),
        ("it has `scaling`, `scale_dtype`", "it has --scaling"),
        ("`skip` a.b with a `training` file", "--skip a.b with a --config file"),
        ("/a/`odd`/name `and=so`", "/a/`odd`/name `and=so`"),
    ],
)
def test_parameters_become_flags(message, flags):
    assert as_flags(message, main, {"training": "config"}) == flags


def test_warnings_name_flags_on_stderr_and_in_json(source, tmp_path):
    result = cli(source, "--format", "fp4", "--out", tmp_path / "out", "--json")
    (warning,) = json.loads(result.stdout)["warnings"]
    assert warning.startswith("with --1d the relative error is ")
    assert result.stderr == f"Warning: {warning}\n"


def test_a_dry_run_checks_the_output_as_the_run_would(source, tmp_path):
    out = tmp_path / "out"
    (out / STAGING).mkdir(parents=True)
    run = ("--format", "fp8", "--out", out)
    dry, real = cli(source, *run, "--dry-run", "--out", source), cli(source, *run, "--out", source)
    assert (dry.exit_code, dry.stderr) == (real.exit_code, real.stderr) == (2, dry.stderr)
    assert "overlaps with the source" in dry.stderr
    assert cli(source, *run, "--dry-run").exit_code == 0
    assert [path.name for path in out.iterdir()] == [STAGING]
    assert cli(source, *run).exit_code == 0
    assert "--overwrite to replace an artifact" in cli(source, *run, "--dry-run").stderr


def test_a_verbose_run_prints_the_plan_first(source, tmp_path):
    result = cli(source, "--format", "fp8", "--out", tmp_path / "out", "-v")
    assert "model.layers.1.mlp.up_proj.weight  " in result.stderr
    assert "model.layers.1.mlp.up_proj.weight  " not in result.stdout
    assert "written to" in result.stdout


def test_a_pipe_gets_tables_without_padding_and_without_folds(tmp_path):
    name = f"model.layers.0.{'very_long_' * 30}name.up_proj.weight"
    source = write_checkpoint(tmp_path / "source", llama() | {name: llama()["model.layers.0.mlp.up_proj.weight"]})
    for arguments in (("--dry-run",), ("--dry-run", "-v"), ("--out", tmp_path / "out")):
        done = command(source, "--format", "fp8", *arguments)
        assert done.returncode == 0
        lines = done.stdout.splitlines()
        assert lines == [line.rstrip() for line in lines]
        assert sum(name in line for line in lines) == ("--dry-run" in arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nf4", "--layout", "bitsandbytes"), "transformers doesn't; --skip experts keeps them as they are"),
        (("fp4",), "surogate_load can; vLLM, TensorRT-LLM and Surogate should (not run)"),
        (
            ("fp4", "--global-scale", "amax"),
            "reads fp4 experts in layout compressed-tensors wrongly and without an error",
        ),
        (("fp4", "--layout", "compressed-tensors"), "; surogate_load, vLLM and SGLang read them"),
        (("fp8",), "can; --scaling block gives hf-fp8, which all of them read"),
    ],
)
def test_a_mixture_of_experts_says_who_can_load_it(tmp_path, arguments, message):
    weight = llama()["model.layers.0.mlp.up_proj.weight"]
    experts = {
        f"model.layers.0.mlp.experts.{i}.{leaf}_proj.weight": weight if leaf != "down" else weight.T.copy()
        for i in range(2)
        for leaf in ("gate", "up", "down")
    }
    source = write_checkpoint(tmp_path / "source", llama() | experts)
    result = cli(source, "--format", *arguments, "--dry-run")
    assert result.exit_code == 0
    assert message in result.stderr
    assert message not in cli(source, "--format", *arguments, "--dry-run", "--skip", "experts").stderr


def test_without_a_place_for_compiled_kernels_a_run_warns_and_goes_on(source, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/dev/null/nowhere")
    done = command(source, "--format", "fp8", "--out", tmp_path / "out", "-q")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert done.stderr.startswith("Warning: no writable directory for compiled kernels")
    assert "NUMBA_CACHE_DIR" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    check_artifact(source, tmp_path / "out")


def test_the_distributions_version_is_that_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text
    assert 'version = { attr = "surogate_formats.version.VERSION" }' in text
