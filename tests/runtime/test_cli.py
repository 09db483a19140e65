"""surogate-load: results on stdout, one line on stderr for what is wrong, exit codes 0, 1 and 2."""

import json
import shutil

import pytest
import torch
import transformers
from click.testing import CliRunner
from runtime.artifacts import write_artifact
from runtime.layers import KINDS
from runtime.test_loading import dense_twin

from surogate_formats.fp8 import FP8
from surogate_formats.layouts import LAYOUTS
from surogate_formats.nvfp4 import NVFP4
from surogate_load.cli import main
from surogate_load.evaluate import evaluate, kl_and_perplexity, reference_logprobs, windows
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
    assert rows["quantized"].startswith("14 weights")
    assert rows["kept"] == ["7 test"]
    assert any("surogate_load" in line for line in rows["loads in"])
    text = run("inspect", artifact(kind)).stdout
    assert rows["bits per weight"] in text


def test_every_format_in_every_layout_has_readers():
    held = {(fmt, layout.name) for layout in LAYOUTS.values() for fmt in layout.suffixes}
    assert held == READERS.keys()
    for changes in (WITH_EXPERTS, NOT_BF16):
        assert all(READERS[key].keys() > remarks.keys() for key, remarks in changes.items())


def test_readers_know_experts_and_dtypes():
    fp8, fp4, layout = FP8("channel", "bfloat16"), NVFP4(), "compressed-tensors"
    assert "vLLM: from SM75" in readers(fp8, layout)
    (vllm,) = (line for line in readers(fp8, layout, experts=True) if line.startswith("vLLM"))
    assert "RuntimeError" in vllm
    assert not any("RuntimeError" in line for line in readers(fp4, layout, experts=True))
    assert any("dtype=bfloat16 only" in line for line in readers(fp4, layout, bf16=False))
    assert any("rounds the scales" in line for line in readers(fp8, layout, bf16=False))
    assert readers(fp8, layout, bf16=True) == readers(fp8, layout)


def test_inspect_looks_for_experts_and_dtypes(artifact, tmp_path):
    lines = json.loads(run("inspect", artifact("fp8-channel", dtype="float16"), "--json").stdout)["loads in"]
    assert any("rounds the scales" in line for line in lines)
    lines = json.loads(run("inspect", artifact("fp8-channel"), "--json").stdout)["loads in"]
    assert not any("rounds the scales" in line or "RuntimeError" in line for line in lines)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    path = write_artifact(transformers.MixtralForCausalLM(config).bfloat16(), tmp_path, KINDS["fp8-channel"])
    lines = json.loads(run("inspect", path, "--json").stdout)["loads in"]
    assert any("RuntimeError" in line for line in lines)


def test_verify(artifact, tmp_path):
    found = run("verify", artifact("nf4"))
    assert (found.exit_code, found.stderr) == (0, "")
    assert "are as they were written" in found.stdout
    for path in artifact("nf4").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    found = run("verify", tmp_path)
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr.startswith("Error: ")
    assert found.stderr.count("\n") == 1


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
    broken = tmp_path / "broken"
    write_tokenizer(broken)
    shutil.copy(bare / "config.json", broken)
    for against, message in (
        (tmp_path / "nowhere", "no such directory"),
        (bare, "its tokenizer can't be loaded"),
        (broken, "its model can't be loaded"),
    ):
        found = run("evaluate", artifact("nf4"), "--against", against, "--text", text, "--context", 16)
        assert (found.exit_code, found.stdout) == (2, ""), repr(found.exception)
        assert found.stderr.startswith(f"Error: {against}: {message}")
        assert found.stderr.count("\n") == 1


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
