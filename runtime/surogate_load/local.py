"""Opens a packed checkpoint by its directory; what looks like a name on the Hub gets the command that downloads it."""

from __future__ import annotations

import logging
from pathlib import Path

from surogate_formats.artifact import Artifact
from surogate_formats.hub_text import HUB_ID
from surogate_load.errors import NotDownloadedError

_LOG = logging.getLogger("surogate_load")


def open_local(path: str | Path) -> Artifact:
    """Opens a directory that surogate-quantize wrote, or that others quantized.

    Raises:
        NotDownloadedError: there is no such directory, but there may be such a repository on the Hub.
        ArtifactError, CheckpointError: it is not complete, not what it claims to be, or nothing that we read.
    """
    if not Path(path).exists() and HUB_ID.fullmatch(str(path)):
        name = Path(path).name
        raise NotDownloadedError(
            f"{path}: no such directory; if it is on the Hub, download it (hf download {path} --local-dir {name}) "
            f"and, unless it is packed already, quantize it (surogate-quantize {name} --format nf4 --out {name}-nf4)"
        )
    return Artifact.open(path)


def say_unused(artifact: Artifact) -> None:
    """Warns, in one line, that activations aren't quantized as the makers of a checkpoint meant them to be."""
    if artifact.foreign is not None and artifact.foreign.unused:
        _LOG.warning(
            "%s: weights alone are taken as they are packed; not used here: %s",
            artifact.path,
            ", ".join(artifact.foreign.unused),
        )
