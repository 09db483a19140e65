"""`merge --requantize` of a calibrated artifact: its codes are chosen again as they were, or it is said why not."""

import json

import peft
import pytest
import torch
from click.testing import CliRunner
from quantizer.checkpoints import contents

from make_tiny import make_tiny
from surogate_formats.artifact import Artifact
from surogate_load import load_model
from surogate_load.cli import main
from surogate_load.export.merging import merge
from surogate_quantize import make_options, quantize


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(artifact, adapter, text, settings of its calibration)"""
    root = tmp_path_factory.mktemp("requantized")
    rows = torch.randint(3, 90, (3, 600), generator=torch.Generator().manual_seed(0)).tolist()
    text = root / "ids.jsonl"
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in [*rows, *rows, *rows]))
    settings = {"codes": "calibrated", "calibration_text": str(text), "calibration_tokens": 600, "skip_last_layers": 1}
    quantize(make_tiny("llama", root / "llama"), root / "packed", make_options("nf4", {}, None, **settings))
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(load_model(root / "packed"), config).save_pretrained(root / "adapter")
    return root / "packed", root / "adapter", text, settings


def run(made, out, *arguments):
    packed, adapter, *_ = made
    words = ["merge", str(packed), str(adapter), "--out", str(out), *map(str, arguments)]
    return CliRunner().invoke(main, words)


def test_on_the_same_text_as_the_quantizer_would(made, tmp_path, monkeypatch):
    packed, adapter, text, settings = made
    torch.set_num_threads(1)  # with as many as the quantizer's own process: sums depend on it
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = run(made, tmp_path / "again", "--requantize", "--calibration-text", text)
    assert done.exit_code == 0, done.stderr
    assert "calibrated; on " in done.stdout
    merge(packed, adapter, tmp_path / "llama-merged")
    quantize(tmp_path / "llama-merged", tmp_path / "expected", make_options("nf4", {}, None, **settings))
    assert contents(tmp_path / "again") == contents(tmp_path / "expected")


def test_a_text_that_is_not_here_is_asked_for(made, tmp_path):
    done = run(made, tmp_path / "out", "--requantize")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "its codes were calibrated on a file (sha256 " in done.stderr
    assert "give it as --calibration-text, or choose --codes" in done.stderr
    assert not list(tmp_path.iterdir())


def test_other_codes(made, tmp_path):
    done = run(made, tmp_path / "out", "--requantize", "--codes", "search", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["codes"].startswith("searched")
    with Artifact.open(tmp_path / "out") as packed:
        assert packed.manifest.options["codes"] == "search"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requantize", "--codes", "nearest", "--calibration-text", "x.txt"], "codes that are nearest need no text"),
        (["--codes", "nearest"], "choose how --requantize packs; add it"),
        (["--calibration-text", "x.txt"], "choose how --requantize packs; add it"),
    ],
)
def test_options_that_do_nothing_are_refused(made, arguments, message, tmp_path):
    done = run(made, tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
