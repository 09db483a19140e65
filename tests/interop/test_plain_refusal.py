"""Layout surogate in transformers without our package: an error, never a model with random weights."""

import os
import subprocess
import sys

from surogate_quantize import make_options, quantize

CODE = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)
print("loaded")
"""


def test_it_fails_and_names_what_it_does_not_know(tiny, tmp_path):
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
    assert "Unknown quantization type, got surogate" in done.stderr
    assert "MISMATCH" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: ")
