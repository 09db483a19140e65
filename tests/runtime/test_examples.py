"""The examples, on a tiny model with a real tokenizer."""

import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from runtime.artifacts import tiny_llama, write_artifact
from runtime.experts import ROUTERS, ByExpert, dense_model
from runtime.layers import KINDS

from surogate_load import load_model

EXAMPLES = Path(__file__).parents[2] / "examples"


SIZES = {"vocab_size": 49152, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def text(smollm2_dir, tmp_path_factory):
    """About 600 tokens: two batches for each of two ranks."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((smollm2_dir / "LICENSE").read_text("utf-8")[:3000], "utf-8")
    return path


@pytest.fixture(scope="module")
def base(smollm2_dir, tmp_path_factory):
    """An artifact of a tiny model, with SmolLM2's tokenizer; in float32: the head is most of the work on a CPU."""
    path = write_artifact(tiny_llama(**SIZES, dtype="float32"), tmp_path_factory.mktemp("base"), KINDS["nf4"])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2_dir / name, path / name)
    return path


@pytest.mark.parametrize("name", ["plain_loop", "trainer", "sft"])
def test_an_example_trains_and_saves(base, text, tmp_path, monkeypatch, name):
    if name == "sft" and find_spec("trl") is None:
        pytest.skip("trl needs Python 3.11")
    run_here(name, base, text, tmp_path, monkeypatch)
    assert_trained(base, tmp_path)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_an_example_trains_on_two_ranks(base, text, tmp_path, name):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, EXAMPLES / f"{name}.py", base, text]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert_trained(base, tmp_path)


def test_the_example_of_experts(smollm2_dir, text, tmp_path, monkeypatch):
    model = dense_model("qwen3", torch.float32, **SIZES)
    mixture = write_artifact(ByExpert(model), tmp_path, KINDS["nf4"], keep=ROUTERS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_dir / name, mixture / name)
    run_here("moe", mixture, text, tmp_path, monkeypatch)
    assert_trained(mixture, tmp_path, 6)


def run_here(name, artifact, text, folder, monkeypatch):
    """Runs an example in this process, which has imported what takes a program seconds."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(artifact), str(text)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def assert_trained(base, folder, matrices=14):
    model = peft.PeftModel.from_pretrained(load_model(base), folder / "adapter")
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(trained) == matrices
    assert all(parameter.abs().max() > 0 for parameter in trained)
