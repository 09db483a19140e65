"""Opens an artifact by its directory; what looks like a model's name on the Hub gets the command that downloads it."""

from __future__ import annotations

import re
from pathlib import Path

from surogate_formats.artifact import Artifact
from surogate_load.errors import NotDownloadedError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_local(path: str | Path) -> Artifact:
    """Opens a directory that surogate-quantize wrote.

    Raises:
        NotDownloadedError: there is no such directory, but there may be such a repository on the Hub.
        ArtifactError, CheckpointError: it is not complete, or not what it claims to be.
    """
    if not Path(path).exists() and _HUB_ID.fullmatch(str(path)):
        name = Path(path).name
        raise NotDownloadedError(
            f"{path}: no such directory; if it is on the Hub, download it (hf download {path} --local-dir {name}) "
            f"and, unless it is packed already, quantize it (surogate-quantize {name} --format nf4 --out {name}-nf4)"
        )
    return Artifact.open(path)
