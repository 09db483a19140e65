"""What an attack is, and how each command that reads a stranger's files is run on one."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from surogate_formats.artifact import Artifact
from surogate_formats.checkpoint import Checkpoint
from surogate_formats.errors import SurogateError
from surogate_formats.training_config import load_training_config
from surogate_load.verification import verify_against
from surogate_quantize.sidecars import find_sidecars


class Attack(NamedTuple):
    """How the files are made in an empty directory, which command reads them, its error and what that names."""

    make: Callable[[Path], object]
    command: str
    error: type[SurogateError]
    names: str = ""


def checkpoint(directory: Path) -> None:
    Checkpoint.open(directory).close()


def opened(directory: Path) -> None:
    Artifact.open(directory).close()


def verify(directory: Path) -> None:
    with Artifact.open(directory) as artifact:
        artifact.verify()


def against(directory: Path) -> None:
    with Artifact.open(directory) as artifact:
        verify_against(artifact, directory / "source")


def training_file(directory: Path) -> None:
    load_training_config(directory / "train.yaml")


def sidecars(directory: Path) -> None:
    find_sidecars(directory)


COMMANDS: dict[str, Callable[[Path], None]] = {
    "quantize": checkpoint,
    "open": opened,
    "verify": verify,
    "verify --against": against,
    "--config": training_file,
    "carry over": sidecars,
}
"""What reads the files."""
