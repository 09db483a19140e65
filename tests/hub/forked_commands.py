"""The two commands as processes of their own that start in milliseconds: forked from one that has the libraries loaded.

As a program it is that process: `python -m hub.forked_commands` reads a request a line and answers with a line.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from quantizer.checkpoints import write_checkpoint

from surogate_quantize import make_options, quantize

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = {"surogate_quantize": "surogate_quantize.entry", "surogate_load": "surogate_load.cli"}


class ForkedCommands:
    """Runs commands; a context manager."""

    def __enter__(self):
        path = os.pathsep.join(str(ROOT / name) for name in ("formats", "quantizer", "runtime", "tests"))
        self._server = subprocess.Popen(
            [sys.executable, "-m", "hub.forked_commands"],
            env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # it forks
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error):
        self._server.communicate()

    def run(self, package, arguments, environment, folder):
        """What `subprocess.run` would give for `python -m package arguments` in a folder."""
        words = list(map(str, arguments))
        request = {"package": package, "arguments": words, "environment": environment, "folder": str(folder)}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return subprocess.CompletedProcess([package, *words], **answer)


def _serve():
    import torch  # noqa: F401  (the commands that load want it)

    with tempfile.TemporaryDirectory() as folder:  # so that the forked find all kernels loaded
        for name in ("nf4", "fp4", "fp8"):
            quantize(write_checkpoint(Path(folder, "source")), Path(folder, name), make_options(name, {}))
    assert "huggingface_hub" not in sys.modules, "it reads the environment when it is imported"
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                _become(request, out.fileno(), err.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            err.seek(0)
            answer = {"returncode": code, "stdout": out.read().decode(), "stderr": err.read().decode()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _become(request, out, err):
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [request["package"].replace("_", "-"), *request["arguments"]]
    code = 1
    try:
        import_module(COMMANDS[request["package"]]).main()
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
