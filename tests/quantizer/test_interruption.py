"""Signals at any moment: one line, the shell's exit status, and nothing left behind that isn't named."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quantizer.checkpoints import write_checkpoint

from surogate_formats.artifact import STAGING
from surogate_quantize import staging as staging_module
from surogate_quantize.interruption import EndedBySignal, one_line_at_the_end
from surogate_quantize.staging import Staging, staged

ROOT = Path(__file__).resolve().parents[2]

SLOW = """
import time
from surogate_quantize import entry, shard
write = shard.ShardWriter.write
def slow_write(*arguments):
    time.sleep(0.1)
    return write(*arguments)
shard.ShardWriter.write = slow_write
entry.main()
"""
"""A run of some seconds."""

AT_IMPORT = """
import os, signal, sys
class Kill:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{name})
sys.meta_path.insert(0, Kill())
from surogate_quantize import entry
entry.main()
"""

ENDS = [("SIGINT", 130, "Interrupted"), ("SIGTERM", 143, "Terminated"), ("SIGHUP", 129, "Hung up")]


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source")


def start(code, *arguments, **keywords):
    path = os.pathsep.join(str(ROOT / folder) for folder in ("formats", "quantizer"))
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **keywords,
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(("name", "code", "word"), ENDS)
def test_midway(source, tmp_path, name, code, word):
    out = tmp_path / "made" / "out"
    process = start(SLOW, source, "--format", "fp8", "--out", out)
    wait_for(out / STAGING / "files" / "model.safetensors.part", process)
    process.send_signal(getattr(signal, name))
    assert process.communicate() == ("", f"{word}; nothing was left behind.\n")
    assert process.returncode == code
    assert not out.parent.exists()


@pytest.mark.parametrize("module", ["surogate_quantize.cli", "numba", "surogate_formats.training_config"])
@pytest.mark.parametrize(("name", "code", "word"), ENDS[:2])
def test_while_modules_are_imported(source, tmp_path, module, name, code, word):
    out = tmp_path / "out"
    (tmp_path / "train.yaml").write_text("qlora_fp8: true\n")
    arguments = (source, "--config", tmp_path / "train.yaml", "--out", out)
    process = start(AT_IMPORT.format(module=module, name=name), *arguments)
    assert process.communicate() == ("", f"{word}; nothing was left behind.\n")
    assert process.returncode == code
    assert not out.exists()


def test_after_the_artifact_is_complete(source, tmp_path):
    out = tmp_path / "out"
    process = start(AT_IMPORT.format(module="rich.table", name="SIGINT"), source, "--format", "fp8", "--out", out)
    assert process.communicate() == ("", f"Interrupted; {out} is complete.\n")
    assert process.returncode == 130
    assert (out / "surogate.json").exists()


def test_what_nohup_has_ignored_stays_ignored(source, tmp_path):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = start(SLOW, source, "--format", "fp8", "--out", tmp_path / "out", "-q", preexec_fn=ignore)
    wait_for(tmp_path / "out" / STAGING, process)
    process.send_signal(signal.SIGHUP)
    assert process.communicate() == (f"{tmp_path / 'out'}\n", "")
    assert process.returncode == 0


def test_a_second_signal_does_not_stop_what_takes_the_files_away(tmp_path, monkeypatch):
    remove = staging_module.remove

    def interrupted(entries):
        os.kill(os.getpid(), signal.SIGINT)
        remove(entries)

    monkeypatch.setattr(staging_module, "remove", interrupted)
    with pytest.raises(EndedBySignal), staged(Staging(tmp_path / "out", 1), {}, overwrite=False):
        raise EndedBySignal(signal.SIGTERM)
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_cannot_be_taken_away_is_named(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def refuses(entries):
        raise OSError

    monkeypatch.setattr(staging_module, "remove", refuses)
    with pytest.raises(SystemExit) as ended, one_line_at_the_end(), staged(Staging(out, 1), {}, overwrite=False):
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    assert capsys.readouterr().err == (f"Terminated; {out / STAGING} is left, and a rerun replaces it.\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
