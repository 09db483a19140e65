"""Folders beside the output that a killed run has left: a later one takes them away, and none that is in use."""

import signal
import subprocess
import sys
import threading

import pytest
from quantizer.checkpoints import write_checkpoint

from surogate_quantize import output_errors
from surogate_quantize.hub.opening import _folder

HOLDS = """
import sys, time
from pathlib import Path
from surogate_quantize.hub.opening import _folder
with _folder(Path(sys.argv[1])) as folder:
    (folder / "model" / "half").write_text("half")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def killed(tmp_path, environment):
    """The folder of a run that was killed."""
    line = [sys.executable, "-c", HOLDS, str(tmp_path / "out")]
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) as process:
        folder = tmp_path / process.stdout.readline().strip()
        process.send_signal(signal.SIGKILL)
    assert (folder / "model" / "half").exists()
    return folder


def folders(tmp_path):
    return {path for path in tmp_path.iterdir() if path.name.startswith(".out-source-")}


def test_what_a_killed_run_has_left_goes(killed, tmp_path):
    with _folder(tmp_path / "out") as folder:
        assert folders(tmp_path) == {folder}
    assert not folders(tmp_path)


def test_a_run_takes_it_away(hub, killed, quantize, tmp_path):
    hub.add_directory("org/model", write_checkpoint(tmp_path / "local"))
    assert quantize("org/model", "--format", "nf4", "--out", "out", "-q").returncode == 0
    assert not folders(tmp_path)


def test_a_folder_that_a_run_holds_stays(tmp_path, environment):
    line = [sys.executable, "-c", HOLDS, str(tmp_path / "out")]
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) as process:
        held = tmp_path / process.stdout.readline().strip()
        with _folder(tmp_path / "out") as folder:
            assert folders(tmp_path) == {held, folder}
        process.kill()


@pytest.mark.parametrize("what", ["another run's", "a file", "a link"])
def test_what_is_no_leftover_stays(tmp_path, what):
    path = tmp_path / (".other-source-1" if what == "another run's" else ".out-source-1")
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "mine").touch()
    if what == "a link":
        path.symlink_to(target)
    elif what == "a file":
        path.touch()
    else:
        path.mkdir()
    with _folder(tmp_path / "out"):
        pass
    assert path.exists()
    assert (target / "mine").exists()


def test_without_locks_nothing_is_taken_for_a_leftover(killed, tmp_path, monkeypatch):
    monkeypatch.setattr(output_errors, "fcntl", None)
    with _folder(tmp_path / "out") as folder:
        assert folders(tmp_path) == {killed, folder}


def test_many_at_once_take_no_folder_from_each_other(tmp_path):
    """As ranks do: each makes its own beside the same output."""
    start, wrong = threading.Barrier(8), []

    def opens():
        start.wait()
        for _ in range(20):
            with _folder(tmp_path / "out") as folder:
                (folder / "model" / "half").write_text("half")
                if not (folder / "model").is_dir():
                    wrong.append(folder)

    threads = [threading.Thread(target=opens) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not folders(tmp_path)
