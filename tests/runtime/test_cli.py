"""surogate-load: results on stdout, one line on stderr for what is wrong, exit codes 0, 1 and 2."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
import transformers
from click.testing import CliRunner
from runtime.artifacts import write_artifact
from runtime.layers import KINDS
from runtime.test_loading import dense_twin, python_path

from surogate_formats.artifact import Artifact
from surogate_formats.fp8 import FP8
from surogate_formats.layouts import LAYOUTS
from surogate_formats.nvfp4 import NVFP4
from surogate_load import open_artifact
from surogate_load.cli import main
from surogate_load.divergence import evaluate, kl_and_perplexity, reference_logprobs, windows
from surogate_load.loading import load_model
from surogate_load.readers import NOT_BF16, READERS, WITH_EXPERTS, readers


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.mark.parametrize("kind", KINDS)
def test_inspect(artifact, kind):
    found = run("inspect", artifact(kind), "--json")
    assert found.exit_code == 0, found.stderr
    rows = json.loads(found.stdout)
    assert rows["format"] == KINDS[kind].name
    assert rows["parameters"] == {**asdict(KINDS[kind])}
    with Artifact.open(artifact(kind)) as opened:
        sizes = [entry.info.nbytes for entry in opened.checkpoint.tensors.values()]
        packed = sum(rows_ * columns for rows_, columns in opened.modules.values())
    assert (rows["quantized_weights"], rows["quantized_parameters"], rows["bytes"]) == (14, packed, sum(sizes))
    assert rows["bits_per_parameter"] == 8 * sum(sizes) / rows["parameters_in_all"]
    assert 4 <= rows["bits_per_quantized_weight"] < 9
    assert rows["kept"] == {"test": 7}
    assert rows["loads_in"]["surogate_load"] == "stays packed, trains LoRA"
    assert "modules" not in rows
    text = run("inspect", artifact(kind)).stdout
    assert f"{rows['bits_per_quantized_weight']:.3f} quantized" in text
    assert "14 weights" in text


def test_inspect_lists_the_modules(artifact):
    rows = json.loads(run("inspect", artifact("nf4"), "--modules", "--json").stdout)
    lines = run("inspect", artifact("nf4"), "--modules").stdout.splitlines()
    with open_artifact(artifact("nf4")) as opened:
        assert list(rows["modules"]) == [line.split()[0] for line in lines] == list(opened)
        assert rows["modules"]["model.layers.0.mlp.up_proj"]["shape"] == [256, 128]
    assert "256x128" in lines[0] or any("256x128" in line for line in lines)


def test_every_format_in_every_layout_has_readers():
    held = {(fmt, layout.name) for layout in LAYOUTS.values() for fmt in layout.suffixes}
    assert held == READERS.keys() == WITH_EXPERTS.keys()
    for changes in (WITH_EXPERTS, NOT_BF16):
        assert all(READERS[key].keys() >= remarks.keys() for key, remarks in changes.items())


def test_readers_know_experts_and_dtypes():
    fp8, fp4, layout = FP8("channel", "bfloat16"), NVFP4(), "compressed-tensors"
    assert readers(fp8, layout)["vLLM"] == "from SM75"
    assert "RuntimeError" in readers(fp8, layout, experts=True)["vLLM"]
    assert "wrong" not in str(readers(fp4, layout))
    for bf16 in (True, False):
        experts = readers(fp4, layout, experts=True, bf16=bf16)
        assert "wrongly" in experts["transformers"]
        assert experts["surogate_load"] == "stays packed, trains LoRA"
    assert "dtype=bfloat16 only" in readers(fp4, layout, bf16=False)["transformers"]
    assert "rounds the scales" in readers(fp8, layout, bf16=False)["transformers"]
    assert readers(fp8, layout, bf16=True) == readers(fp8, layout)


def test_inspect_says_where_transformers_needs_us(artifact):
    shown = run("inspect", artifact("nf4")).stdout
    assert "transformers: stays packed, where surogate_load is imported; an error elsewhere" in shown


def test_inspect_looks_for_experts_and_dtypes(artifact, tmp_path):
    def found(path):
        return json.loads(run("inspect", path, "--json").stdout)["loads_in"]

    assert "rounds the scales" in found(artifact("fp8-channel", dtype="float16"))["transformers"]
    assert "rounds the scales" not in found(artifact("fp8-channel"))["transformers"]
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    path = write_artifact(transformers.MixtralForCausalLM(config).bfloat16(), tmp_path, KINDS["fp8-channel"])
    assert "RuntimeError" in found(path)["vLLM"]
    assert "stays packed" in found(path)["surogate_load"]


def test_verify(artifact, tmp_path):
    found = run("verify", artifact("nf4"))
    assert (found.exit_code, found.stderr) == (0, "")
    assert "are as they were written" in found.stdout
    for path in artifact("nf4").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"of another model")
    found = run("verify", tmp_path)
    assert found.exit_code == 0
    named = "safetensors files that are no part of it: model-00001-of-00002.safetensors"
    assert found.stderr == f"Warning: {tmp_path}: {named}\n"
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    found = run("verify", tmp_path)
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr.startswith("Error: ")
    assert found.stderr.count("\n") == 1


def test_help_is_whole_in_80_columns():
    shown = CliRunner().invoke(main, ["--help"], terminal_width=80)
    commands = shown.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in commands] == sorted(main.commands)
    assert not [line for line in commands if line.endswith("...")]
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for name in main.commands:
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("command", ["surogate-load", "surogate-quantize"])
def test_shell_completion(command, shell):
    module = command.replace("-", "_")
    variable = f"_{module.upper()}_COMPLETE"

    def ask(instruction, **extra):
        line = [sys.executable, "-m", module]
        environment = {**python_path(), variable: f"{shell}_{instruction}", **extra}
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False).stdout

    assert f"{variable}={shell}_complete" in ask("source")
    words = {"COMP_WORDS": f"{command} --ver", "COMP_CWORD": "--ver" if shell == "fish" else "1"}
    assert "--version" in ask("complete", **words)


def test_what_is_no_artifact(tmp_path):
    found = run("inspect", tmp_path / "nowhere")
    assert found.exit_code == 1
    assert found.stderr.count("\n") == 1
    assert run("inspect").exit_code == 2


def write_tokenizer(folder):
    import string

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: index for index, letter in enumerate(string.ascii_letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_evaluate(artifact, tmp_path):
    write_tokenizer(artifact("fp4").parent / "dense")
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 20)
    arguments = ("evaluate", artifact("fp4"), "--against", artifact("fp4").parent / "dense", "--text", text)
    found = run(*arguments, "--context", 32, "--windows", 2, "--json")
    assert found.exit_code == 0, found.stderr + repr(found.exception)
    rows = json.loads(found.stdout)
    assert rows["tokens"] == 64
    assert 0 < rows["mean KL (nats)"] < 0.5
    short = run(*arguments, "--context", 1000)
    assert (short.exit_code, short.stderr.count("\n")) == (2, 1)
    assert run(*arguments[:-1], tmp_path / "no").exit_code == 2


def test_evaluate_against_what_can_not_be_loaded(artifact, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 20)
    bare = tmp_path / "bare"
    shutil.copytree(artifact("nf4").parent / "dense", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    broken, wrong = tmp_path / "broken", tmp_path / "wrong"
    write_tokenizer(broken)
    shutil.copytree(bare, wrong)
    (wrong / "tokenizer.json").write_text("{}")
    packed = tmp_path / "packed"
    shutil.copytree(artifact("fp8-tensor"), packed)
    write_tokenizer(packed)
    shutil.copy(bare / "config.json", broken)
    for against, message in (
        (tmp_path / "nowhere", "no such directory"),
        (bare, "has no tokenizer; put its files beside config.json"),
        (wrong, "its tokenizer can't be loaded"),
        (broken, "its model can't be loaded"),
        (packed, "is packed; give the dense model that"),
    ):
        found = run("evaluate", artifact("nf4"), "--against", against, "--text", text, "--context", 16)
        assert (found.exit_code, found.stdout) == (2, ""), repr(found.exception)
        assert found.stderr.startswith(f"Error: {against}: {message}")
        assert found.stderr.count("\n") == 1


def test_ctrl_c_is_one_line_and_the_status_that_shells_expect(artifact, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Artifact, "verify", interrupted)
    done = run("verify", artifact("nf4"))
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_prompts_that_no_model_takes(artifact, tmp_path):
    path = tmp_path / "artifact"
    shutil.copytree(artifact("nf4"), path)
    write_tokenizer(path)
    empty = run("generate", path, "")
    assert (empty.exit_code, empty.stderr) == (2, "Error: the prompt has no tokens; write something in it\n")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["z"] = 64
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    foreign = run("generate", path, "xyz")
    assert (foreign.exit_code, foreign.stderr.count("\n")) == (2, 1)
    assert "the text has token 64, and the model knows 64: is the tokenizer its own?" in foreign.stderr


def test_a_seed_decides_what_is_drawn(artifact, tmp_path):
    path = tmp_path / "artifact"
    shutil.copytree(artifact("nf4"), path)
    write_tokenizer(path)
    said = [run("generate", path, "abc", "--temperature", 2, "--seed", seed, "--max-new-tokens", 16).stdout
            for seed in (1, 1, 2)]  # fmt: skip
    assert said[0] == said[1] != said[2]


def test_evaluation_is_the_definition(artifact):
    model, dense = load_model(artifact("fp4")), dense_twin(artifact("fp4"))
    reference = load_model(artifact("fp8-channel"))
    ids = windows(list(range(64)) * 2, 40, 5)
    assert ids.shape == (3, 40)
    p, q = (reference_logprobs(m, ids).double() for m in (reference, model))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    nll = torch.nn.functional.nll_loss(q[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    found = evaluate(model, reference, ids)
    assert found.mean_kl == pytest.approx(kl, rel=1e-4)
    assert found.perplexity == pytest.approx(torch.tensor(nll).exp().item(), rel=1e-4)
    assert (found.mean_kl, found.perplexity) == kl_and_perplexity(model, ids, reference_logprobs(reference, ids))
    assert evaluate(model, dense, ids).mean_kl == 0
