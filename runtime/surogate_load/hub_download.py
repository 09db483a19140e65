"""A packed checkpoint on the Hub: the files that a load needs, in the Hub's own cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surogate_formats.artifact import ADAPTER
from surogate_formats.checkpoint.index import INDEX, find_shards
from surogate_formats.checkpoint.reader import CONFIG
from surogate_formats.hub_text import hub_errors, not_cached, quiet_hub
from surogate_formats.layouts.modelopt import SIDECAR
from surogate_formats.manifest import MANIFEST_NAME, Manifest
from surogate_load.architecture import DECLARATIONS
from surogate_load.errors import NotPackedError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_BESIDE = (".json", ".txt", ".jinja", ".model", ".spm", ".tiktoken")
_TEMPLATES = "additional_chat_templates/"
_SNAPSHOTS, _MODELS = "snapshots", "models--"


@dataclass(frozen=True)
class Repository:
    """A model's repository at one commit; `resolve` makes it.

    Attributes:
        api: with the token.
        name: as the user gave it.
        directory: the commit's snapshot in the Hub's cache; what declares the model is there.
        sizes: bytes of every file by its path; offline, of those that the cache has.
        offline: whether nothing but the cache may be asked.
    """

    api: HfApi
    name: str
    directory: Path
    sizes: Mapping[str, int]
    offline: bool

    @classmethod
    def resolve(cls, name: str, revision: str | None, token: str | None, *, packed: bool = True) -> Repository:
        """Asks the Hub, or offline the cache, which commit a revision is, and what is in it.

        Args:
            name: the repository's.
            revision: branch, tag or commit; None takes the default branch.
            token: for the Hub; None takes HF_TOKEN or the stored login.
            packed: whether a model must be quantized in any way.

        Raises:
            NotPackedError: it isn't.
            SurogateError: see `surogate_formats.hub_text`.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        api, offline = HfApi(token=token, library_name="surogate-quant"), False
        with hub_errors(name, revision, lead="no such directory, and "), quiet_hub(bars=sys.stderr.isatty()):
            try:
                files = api.model_info(name, revision=revision, files_metadata=True).siblings or ()
                sizes = {file.rfilename: file.size or 0 for file in files}
                directory = _snapshot(api, name, revision, {CONFIG, INDEX, MANIFEST_NAME, SIDECAR} & sizes.keys())
            except OfflineModeIsEnabled:
                offline, directory = True, _snapshot(api, name, revision, {CONFIG})
                sizes = {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
        repository = cls(api, name, directory, sizes, offline)
        if packed and not repository.is_packed:
            raise NotPackedError(
                f"{name}: is on the Hub, and not packed: surogate-quantize {name} --format nf4 --out "
                f"{name.rpartition('/')[2]}-nf4 makes an artifact of it (a dense checkpoint is for transformers)"
            )
        return repository

    @property
    def is_packed(self) -> bool:
        """Whether the model is quantized in any way, or has no config.json: opening it says then what is wrong."""
        declared = MANIFEST_NAME in self.sizes or SIDECAR in self.sizes
        return declared or CONFIG not in self.sizes or _declares(self.directory / CONFIG)

    @property
    def commit(self) -> str:
        """The commit's full hash."""
        return self.directory.name

    def shards(self) -> tuple[str, ...]:
        """Paths of the safetensors files that are the checkpoint.

        Raises:
            CheckpointError: there are none, or the index can't be right.
        """
        index = self.directory / INDEX
        names = [name for name in self.sizes if "/" not in name]
        return find_shards(names, index.read_bytes() if index.is_file() else None, self.name).names

    def small_files(self) -> set[str]:
        """What stands beside the weights, with neither weights nor code in it, and what the manifest records."""
        manifest = Manifest.beside(self.directory / MANIFEST_NAME)
        return {*filter(_goes_along, self.sizes), *(manifest.sidecars if manifest else ())}

    def download(self, files: Collection[str]) -> Path:
        """Gets files into the cache; offline, sees that they are there. Returns the snapshot's directory.

        Raises:
            SurogateError: see `surogate_formats.hub_text`.
        """
        if self.offline:
            for file in files:
                if not (self.directory / file).is_file():
                    raise not_cached(self.name, file)
            return self.directory
        with hub_errors(self.name), quiet_hub(bars=sys.stderr.isatty()):
            return _snapshot(self.api, self.name, self.commit, files)

    def whole(self) -> Path:
        """The snapshot's directory, with all that a load of a packed model needs in it; see `download`."""
        return self.download({*self.shards(), *(() if self.offline else self.small_files())})


def download(name: str, revision: str | None, token: str | None) -> Path:
    """The directory of a repository's snapshot in the Hub's cache, with all that a load needs in it.

    Of pickles and code nothing is fetched. Offline, the cache is what there is.

    Raises:
        CheckpointError, SurogateError: see `Repository`.
    """
    return Repository.resolve(name, revision, token).whole()


def repository_of(directory: Path) -> str | None:
    """The repository of a snapshot in the Hub's cache; None for any other directory."""
    name = directory.parent.parent.name
    if directory.parent.name != _SNAPSHOTS or not name.startswith(_MODELS):
        return None
    return name.removeprefix(_MODELS).replace("--", "/")


def _snapshot(api: HfApi, name: str, revision: str | None, files: Collection[str]) -> Path:
    """Downloads files by their names; those that aren't there are passed over."""
    patterns = [escape(file) for file in sorted(files)]
    return Path(api.snapshot_download(name, revision=revision, allow_patterns=patterns))


def _goes_along(name: str) -> bool:
    if name.startswith(_TEMPLATES):
        return name.endswith(".jinja")
    if name.startswith(f"{ADAPTER}/"):
        return name.endswith((".json", ".safetensors"))
    return "/" not in name and name.endswith(_BESIDE)


def _declares(path: Path) -> bool:
    try:
        config: Any = json.loads(path.read_bytes())
    except ValueError:
        return True  # opening it says what is wrong
    return not isinstance(config, dict) or any(config.get(key) for key in DECLARATIONS)
