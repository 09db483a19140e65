"""Layout surogate in transformers without our package: an error that names it, never a model with random weights."""

import json
import os
import subprocess
import sys

import torch
import transformers

from surogate_load import load_model, open_artifact
from surogate_quantize import make_options, quantize

CODE = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)
print("loaded")
"""


def test_it_fails_and_names_the_package_to_install(tiny, tmp_path):
    """What docs/transformers.md says of it."""
    quantize(tiny("llama"), tmp_path / "packed", make_options("nf4", {}, "surogate"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "packed")],
        env=environment | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "loaded" not in done.stdout
    assert "Unknown quantization type, got surogate-quant" in done.stderr
    assert "MISMATCH" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: ")


def test_artifacts_of_older_versions_are_read(tiny, tmp_path):
    """They declare `surogate`; what is saved of them keeps that."""
    out = tmp_path / "packed"
    quantize(tiny("llama"), out, make_options("nf4", {}, "surogate"))
    with torch.no_grad():
        expected = load_model(out)(torch.arange(9)[None]).logits
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "surogate-quant"
    config["quantization_config"]["quant_method"] = "surogate"
    (out / "config.json").write_text(json.dumps(config))
    with open_artifact(out) as artifact:
        assert artifact.artifact.layout.name == "surogate"
    for model in (load_model(out), transformers.AutoModelForCausalLM.from_pretrained(out)):
        with torch.no_grad():
            assert torch.equal(model(torch.arange(9)[None]).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["quantization_config"] == config["quantization_config"]
