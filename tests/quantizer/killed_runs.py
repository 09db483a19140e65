"""Runs of the command that are sent a signal when they ask something of the disk: deterministic, and fast, as all are
forked from `python -m quantizer.killed_runs`.
"""

import os
import signal
import sys
from dataclasses import dataclass

from fork_server import ForkServer, load_kernels, serve
from quantizer.disk_recorder import Recorder

from surogate_quantize import entry


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: its exit status, minus the number of the signal that killed it.
        steps: how many it had asked of the disk; 0 if it was killed.
        stderr: what it said, on stdout, too.
    """

    code: int
    steps: int
    stderr: str

    @property
    def killed(self):
        return self.code == -signal.SIGKILL


class KilledRuns(ForkServer):
    """Starts runs; a context manager."""

    def __init__(self):
        super().__init__("quantizer.killed_runs")

    def run(self, root, *arguments, at=None, number=signal.SIGKILL):
        """Runs `surogate-quantize`; sends it a signal before its step `at`, from 0, below `root`."""
        answer = self.ask(root=str(root), arguments=list(map(str, arguments)), at=at, number=number)
        return Ended(answer["code"], int(answer["note"] or 0), answer["stderr"])


def _run(request, note):
    os.dup2(2, 1)
    sys.argv = ["surogate-quantize", *request["arguments"]]
    seen = 0

    def before(step):
        nonlocal seen
        if seen == request["at"]:
            os.kill(os.getpid(), request["number"])
        seen += 1

    try:
        with Recorder(request["root"], before).recording():
            entry.main()
    finally:
        os.pwrite(note, str(seen).encode(), 0)


if __name__ == "__main__":
    load_kernels()
    serve(_run)
