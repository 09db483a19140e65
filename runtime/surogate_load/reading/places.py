"""Where the tensors of a checkpoint stand in its files, whose headers are read once a load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from surogate_formats.artifact import Artifact
from surogate_formats.checkpoint import TensorInfo, read_header
from surogate_formats.manifest import Manifest

Places = Mapping[str, tuple[str, TensorInfo]]
"""Every tensor of safetensors files: name to its file, and where it stands there."""

_opened: ContextVar[Artifact | None] = ContextVar("opened", default=None)


@contextmanager
def being_loaded(artifact: Artifact) -> Iterator[None]:
    """What was read when the artifact was opened needs not be read again by what loads it inside."""
    token = _opened.set(artifact)
    try:
        yield
    finally:
        _opened.reset(token)


def read_places(files: Sequence[str]) -> Places:
    """The tensors of these files; headers alone are read."""
    artifact = _artifact_of(files)
    if artifact is None:
        return {name: (file, info) for file in files for name, info in read_header(Path(file)).tensors.items()}
    paths = {Path(file).name: file for file in files}
    entries = artifact.checkpoint.tensors.items()
    return {name: (paths[entry.file], entry.info) for name, entry in entries if entry.file in paths}


def manifest_beside(files: Sequence[str]) -> Manifest | None:
    """Our manifest beside these files; None where others packed them."""
    artifact = _artifact_of(files)
    if artifact is None:
        return Manifest.beside(Path(files[0]))
    return artifact.manifest if artifact.foreign is None else None


def reader(places: Places) -> Callable[[str], bytes]:
    """Gives the bytes of a tensor by its name."""

    def read(name: str) -> bytes:
        file, info = places[name]
        with Path(file).open("rb") as opened:
            opened.seek(info.start)
            return opened.read(info.nbytes)

    return read


def _artifact_of(files: Sequence[str]) -> Artifact | None:
    artifact = _opened.get()
    here = artifact is not None and all(Path(file).parent == artifact.path for file in files)
    return artifact if here else None
