"""Processes of their own that start in milliseconds: forked from one that has the libraries loaded.

That one is a program, `python -m module`, which calls `serve`: a request a line on stdin, an answer a line on stdout.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from quantizer.checkpoints import write_checkpoint

from surogate_quantize import make_options, quantize

ROOT = Path(__file__).resolve().parents[1]


class ForkServer:
    """Runs what a module serves; a context manager."""

    def __init__(self, module):
        self._module = module

    def __enter__(self):
        path = os.pathsep.join(str(ROOT / name) for name in ("formats", "quantizer", "runtime", "tests"))
        self._server = subprocess.Popen(
            [sys.executable, "-m", self._module],
            env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # it forks
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error):
        self._server.communicate()

    def ask(self, **request):
        """`stdout`, `stderr`, `note`, and `code`: the exit status, or minus the number of the signal that killed it."""
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def load_kernels():
    """Quantizes once in every format, so that the forked find all kernels loaded."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nf4", "fp4", "fp8"):
            quantize(write_checkpoint(Path(folder, "source")), Path(folder, name), make_options(name, {}))


def serve(run):
    """Forks for each request a process that calls `run(request, note)`; it may write a note to that descriptor."""
    for line in sys.stdin:
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            child = os.fork()
            if child == 0:
                _become(run, json.loads(line), *(file.fileno() for file in files))
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}
            for name, file in zip(("stdout", "stderr", "note"), files, strict=True):
                file.seek(0)
                answer[name] = file.read().decode()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _become(run, request, out, err, note):
    os.dup2(out, 1)
    os.dup2(err, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        run(request, note)
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
