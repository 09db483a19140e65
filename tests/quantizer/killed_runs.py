"""Runs of the command that are sent a signal when they ask something of the disk: deterministic, and fast, as all are
forked from one process that has the libraries loaded.

As a program it is that process: `python -m quantizer.killed_runs` reads a request a line and answers with a line.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from quantizer.checkpoints import write_checkpoint
from quantizer.disk_recorder import Recorder

from surogate_quantize import entry, make_options, quantize

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: its exit status, minus the number of the signal that killed it.
        steps: how many it had asked of the disk; 0 if it was killed.
        stderr: what it said there.
    """

    code: int
    steps: int
    stderr: str

    @property
    def killed(self):
        return self.code == -signal.SIGKILL


class KilledRuns:
    """Starts runs; a context manager."""

    def __enter__(self):
        path = os.pathsep.join(str(ROOT / name) for name in ("formats", "quantizer", "tests"))
        self._server = subprocess.Popen(
            [sys.executable, "-m", "quantizer.killed_runs"],
            env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # it forks
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error):
        self._server.communicate()

    def run(self, root, *arguments, at=None, number=signal.SIGKILL):
        """Runs `surogate-quantize`; sends it a signal before its step `at`, from 0, below `root`."""
        request = {"root": str(root), "arguments": list(map(str, arguments)), "at": at, "number": number}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))


def _serve():
    with tempfile.TemporaryDirectory() as folder:  # so that the forked find all kernels loaded
        for name in ("nf4", "fp4", "fp8"):
            quantize(write_checkpoint(Path(folder, "source")), Path(folder, name), make_options(name, {}))
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as stderr, tempfile.TemporaryFile() as steps:
            child = os.fork()
            if child == 0:
                _become(request, stderr.fileno(), steps.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            stderr.seek(0)
            steps.seek(0)
            count = steps.read()
            answer = {"code": code, "steps": int(count or 0), "stderr": stderr.read().decode()}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


def _become(request, stderr, steps):
    os.dup2(stderr, 2)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["surogate-quantize", *request["arguments"]]
    seen = 0

    def before(step):
        nonlocal seen
        if seen == request["at"]:
            os.kill(os.getpid(), request["number"])
        seen += 1

    code = 1
    try:
        with Recorder(request["root"], before).recording():
            entry.main()
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        os.pwrite(steps, str(seen).encode(), 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
