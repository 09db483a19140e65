"""A packed checkpoint on the Hub without its tensors: the small files, and the header of each shard."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from surogate_formats.checkpoint.header import PREFIX_SIZE, header_size
from surogate_formats.checkpoint.reader import CONFIG
from surogate_formats.checkpoint.strict_json import parse_object
from surogate_formats.hub_text import hub_errors, named_for
from surogate_formats.layouts.bitsandbytes import BitsandbytesLayout
from surogate_formats.manifest import MANIFEST_NAME
from surogate_load.hub_download import Repository
from surogate_load.local import is_on_the_hub, local_directory

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

FIRST_READ = 1 << 20
"""Bytes of a shard that are asked for at first; most headers fit."""

REQUESTS_AT_ONCE = 8
"""Headers that are asked for at a time."""


@contextmanager
def without_tensors(model: str | Path, revision: str | None = None, token: str | None = None) -> Iterator[Path]:
    """A directory to open a packed checkpoint in whose tensors won't be read.

    A local one is given as it stands. Of a repository, shards are files of the right size with nothing but a header;
    of bitsandbytes' own checkpoints everything is downloaded, since their headers don't tell shapes.

    Raises:
        SurogateError: see `local.local_directory`.
    """
    if not is_on_the_hub(model):
        yield local_directory(model, revision)
        return
    repository = Repository.resolve(str(model), revision, token)
    if repository.offline or _needs_values(repository):
        yield local_directory(model, revision, token)
        return
    with tempfile.TemporaryDirectory(prefix="surogate-headers-") as temporary:
        folder = Path(temporary) / repository.name.rpartition("/")[2]  # what others packed is called as its directory
        folder.mkdir()
        with named_for(str(folder), repository.name):
            _fill(repository, folder)
            yield folder


def _needs_values(repository: Repository) -> bool:
    """Whether headers don't show what is packed; what can't be read at all is for opening to say."""
    config = repository.directory / CONFIG
    if MANIFEST_NAME in repository.sizes or not config.is_file():
        return False
    declared = parse_object(config.read_bytes(), f"{repository.name}/{CONFIG}", strict=False).get("quantization_config")
    return isinstance(declared, dict) and declared.get("quant_method") == BitsandbytesLayout.name


def _fill(repository: Repository, folder: Path) -> None:
    from huggingface_hub import HfFileSystem

    for path in repository.directory.iterdir():
        if path.suffix == ".json":
            shutil.copyfile(path, folder / path.name)
    shards = [shard for shard in repository.shards() if shard in repository.sizes]  # opening names one that is missing
    files = HfFileSystem(token=repository.api.token, skip_instance_cache=True)
    with hub_errors(repository.name), ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        starts = list(pool.map(partial(_start, files, repository), shards))
    for shard, start in zip(shards, starts, strict=True):
        (folder / shard).parent.mkdir(parents=True, exist_ok=True)
        with (folder / shard).open("xb") as writer:
            writer.write(start)
            writer.truncate(repository.sizes[shard])


def _start(files: HfFileSystem, repository: Repository, shard: str) -> bytes:
    size = repository.sizes[shard]
    path = f"{repository.name}@{repository.commit}/{shard}"
    with files.open(path, "rb", block_size=FIRST_READ, cache_type="readahead") as reader:
        prefix = reader.read(min(PREFIX_SIZE, size))
        rest = reader.read(header_size(prefix, size, f"{repository.name}/{shard}") - len(prefix))
        return bytes(prefix + rest)
