"""The cache of from_config: processes that start together make one entry; one that is killed leaves none to load."""

import os
import signal
import subprocess
import sys
import time

import pytest
from runtime.artifacts import tiny_llama
from runtime.test_loading import python_path

from surogate_formats.artifact import IncompleteArtifactError
from surogate_formats.training_config import load_training_config
from surogate_load import load_model, open_artifact
from surogate_load.quantized_cache import cache_key, quantized_once

YAML = "qlora_bnb: true\nrecipe: bf16\n"

ASK = (
    "import sys, logging; from pathlib import Path; logging.basicConfig(level=logging.WARNING); "
    "from surogate_formats.training_config import load_training_config; "
    "from surogate_load.quantized_cache import quantized_once; path = Path(sys.argv[1]); "
    "print(quantized_once(path, Path(sys.argv[2]), load_training_config(path)))"
)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """(training file, source, the entry that they make)."""
    monkeypatch.setenv("SUROGATE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "tiny"
    tiny_llama(num_hidden_layers=1).save_pretrained(source)
    path = tmp_path / "train.yaml"
    path.write_text(YAML)
    return path, source, tmp_path / "cache" / cache_key(source, load_training_config(path))


def start(path, source, **environment):
    command = [sys.executable, "-c", ASK, str(path), str(source)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**python_path(), **environment},
        start_new_session=True,
    )


def entries(out):
    return [entry for entry in out.parent.iterdir() if entry.is_dir()]


def test_two_processes_at_once_make_one_entry(asked):
    path, source, out = asked
    runs = [start(path, source) for _ in range(2)]
    found = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], found
    assert [stdout.strip() for stdout, _ in found] == [str(out), str(out)]
    assert sum("quantizing" in stderr for _, stderr in found) == 1
    assert sum("using the quantized base" in stderr for _, stderr in found) == 1
    assert entries(out) == [out]
    with open_artifact(out) as opened:
        assert opened.verify() > 7


def stall(folder):
    """A PYTHONPATH entry that has the quantizer say where it stands, and stop, before it publishes what it made."""
    (folder / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if 'surogate_quantize' in ' '.join(sys.orig_argv):\n"
        "    def replaced(event, arguments):\n"
        "        if event == 'os.rename' and str(arguments[1]).endswith('/config.json'):\n"
        f"            open({str(folder / 'stalled')!r}, 'w').close()\n"
        "            time.sleep(300)\n"
        "    sys.addaudithook(replaced)\n"
    )
    return {"PYTHONPATH": os.pathsep.join((str(folder), *sys.path))}


def test_a_killed_process_leaves_nothing_to_load_and_the_next_one_starts_anew(asked, tmp_path):
    path, source, out = asked
    hook = tmp_path / "hook"
    hook.mkdir()
    run = start(path, source, **stall(hook))
    deadline = time.monotonic() + 120
    while not (hook / "stalled").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)  # with the quantizer that it started
    _, stderr = run.communicate(timeout=60)
    assert (hook / "stalled").exists(), stderr
    assert list(out.glob("*.safetensors"))  # it was all but done
    with pytest.raises(IncompleteArtifactError):
        load_model(out)
    made = quantized_once(path, source, load_training_config(path))
    assert made == out
    with open_artifact(out) as opened:
        assert opened.verify() > 7
    assert not (out / ".surogate-staging").exists()
