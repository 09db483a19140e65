"""Opens a packed checkpoint by its directory, or by its name on the Hub."""

from __future__ import annotations

import logging
from pathlib import Path

from surogate_formats.artifact import Artifact
from surogate_formats.hub_text import HUB_ID, RevisionOfDirectoryError
from surogate_load.hub_download import download

_LOG = logging.getLogger("surogate_load")


def is_on_the_hub(model: str | Path) -> bool:
    """Whether a model is named as on the Hub, and no such directory exists."""
    return not Path(model).exists() and HUB_ID.fullmatch(str(model)) is not None


def local_directory(model: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The directory of a packed checkpoint; one that exists wins over a repository of the same name.

    Args:
        model: a directory, or a repository's name.
        revision: branch, tag or commit of a repository.
        token: for the Hub; None takes HF_TOKEN or the stored login.

    Raises:
        RevisionOfDirectoryError: a revision of a local directory.
        SurogateError: see `hub_download.download`.
    """
    if is_on_the_hub(model):
        return download(str(model), revision, token)
    if revision is not None:
        raise RevisionOfDirectoryError(f"`revision` {revision}: {model} is a local directory; leave it out")
    return Path(model)


def open_local(path: str | Path, revision: str | None = None, token: str | None = None) -> Artifact:
    """Opens what surogate-quantize wrote, or others quantized; see `local_directory`.

    Raises:
        ArtifactError, CheckpointError: it is not complete, not what it claims to be, or nothing that we read.
        SurogateError: see `local_directory`.
    """
    return Artifact.open(local_directory(path, revision, token))


def say_unused(artifact: Artifact) -> None:
    """Warns, in one line, that activations aren't quantized as the makers of a checkpoint meant them to be."""
    if artifact.foreign is not None and artifact.foreign.unused:
        _LOG.warning(
            "%s: weights alone are taken as they are packed; not used here: %s",
            artifact.path,
            ", ".join(artifact.foreign.unused),
        )
