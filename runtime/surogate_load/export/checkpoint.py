"""Writes a plain Hugging Face checkpoint tensor by tensor; a directory appears under its name when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from surogate_formats.checkpoint.index import INDEX
from surogate_formats.checkpoint.reader import CONFIG
from surogate_formats.dtypes import BITS
from surogate_formats.manifest import MANIFEST_NAME
from surogate_load.errors import ExportExistsError, ExportFailedError

SHARD = 2 * 10**9
"""Bytes of a file's tensors, about, and so of memory: a file is written at once."""


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of the checkpoint, made when it is written.

    Attributes:
        name: in the checkpoint.
        dtype: safetensors' name.
        shape: of the tensor.
        make: gives its values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * BITS[self.dtype] // 8


def check_absent(out: Path) -> None:
    """Raises `ExportExistsError` if there is something where a directory is to be written, or an artifact around it."""
    if out.exists() or out.is_symlink():
        raise ExportExistsError(f"{out}: exists already; choose another directory")
    if around := next((parent for parent in out.absolute().parents if (parent / MANIFEST_NAME).exists()), None):
        raise ExportExistsError(f"{out}: would stand inside the artifact {around}; choose a directory beside it")


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A folder that is renamed to `out` when the block ends well, and removed when it doesn't.

    Raises:
        ExportExistsError: there is something at `out` already.
        ExportFailedError: the disk refuses.
    """
    check_absent(out)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ExportFailedError(f"{out}: can't be made ({error.strerror or error}); choose another place") from error
    try:
        yield partial
        for path in partial.rglob("*"):
            _sync(path)
        _sync(partial)
        partial.rename(out)
        _sync(out.parent)
    except (OSError, SafetensorError) as error:
        said = error.strerror or error if isinstance(error, OSError) else str(error).partition(": ")[2] or error
        raise ExportFailedError(
            f"{out}: can't be written ({said}); free some space, or choose another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_checkpoint(
    directory: Path, tensors: Sequence[DenseTensor], config: Mapping[str, Any], others: Mapping[str, Path]
) -> None:
    """Writes weights, index, config.json and copies of other files into an empty directory."""
    shards = list(_shards(tensors))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        several = len(shards) > 1
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if several else "model.safetensors"
        save_file({tensor.name: tensor.make() for tensor in shard}, directory / name, {"format": "pt"})
        weight_map.update({tensor.name: name for tensor in shard})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for place, path in others.items():
        (directory / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, directory / place)
    _write_json(directory / CONFIG, config)


def _shards(tensors: Sequence[DenseTensor]) -> Iterator[list[DenseTensor]]:
    shard: list[DenseTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > SHARD:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Waits until the disk has a file, or a directory's entries where directories can be opened (not on Windows)."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
