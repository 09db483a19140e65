"""The two commands as processes of their own, forked from `python -m hub.forked_commands`."""

import os
import subprocess
import sys
from importlib import import_module

from fork_server import ForkServer, load_kernels, serve

COMMANDS = {"surogate_quantize": "surogate_quantize.entry", "surogate_load": "surogate_load.cli"}


class ForkedCommands(ForkServer):
    """Runs commands; a context manager."""

    def __init__(self):
        super().__init__("hub.forked_commands")

    def run(self, package, arguments, environment, folder):
        """What `subprocess.run` would give for `python -m package arguments` in a folder."""
        words = list(map(str, arguments))
        answer = self.ask(package=package, arguments=words, environment=environment, folder=str(folder))
        return subprocess.CompletedProcess([package, *words], answer["code"], answer["stdout"], answer["stderr"])


def _run(request, _):
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = [request["package"].replace("_", "-"), *request["arguments"]]
    import_module(COMMANDS[request["package"]]).main()


if __name__ == "__main__":
    import torch  # noqa: F401  (the commands that load want it)

    load_kernels()
    assert "huggingface_hub" not in sys.modules, "it reads the environment when it is imported"
    serve(_run)
