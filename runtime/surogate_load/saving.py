"""Makes what `save_pretrained` writes of a packed model an artifact again: the manifest follows the packed tensors.

transformers gives a quantizer no say after the files are written, so `save_pretrained` itself is wrapped.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

from surogate_formats.checkpoint import Checkpoint, TensorInfo
from surogate_formats.checkpoint.index import INDEX
from surogate_formats.checkpoint.reader import CONFIG
from surogate_formats.dtypes import BITS
from surogate_formats.layouts.surogate import SurogateLayout
from surogate_formats.manifest import MANIFEST_NAME, Manifest, TensorRecord
from surogate_load.errors import UnrecordedSaveError

_LOG = logging.getLogger("surogate_load")

CHANGED = "changed since the artifact was made"
ADDED = "added since the artifact was made"

_WRITTEN = (CONFIG, "generation_config.json", INDEX)


@dataclass(frozen=True)
class Origin:
    """Where a packed model was loaded from.

    Attributes:
        directory: of its files.
        manifest: what stood there; None if nothing did.
        packed: names of the packed tensors in the model.
    """

    directory: Path
    manifest: Manifest | None
    packed: frozenset[str]


def record_saves() -> None:
    """Has `save_pretrained` of packed models write a manifest; a second call does nothing."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.save_pretrained
    if getattr(original, "asks_surogate", False):
        return

    @wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        origin = getattr(getattr(self, "hf_quantizer", None), "origin", None)
        if not isinstance(origin, Origin) or getattr(self, "_hf_peft_config_loaded", False):
            return original(self, save_directory, *args, **kwargs)
        given = inspect.signature(original).bind(self, save_directory, *args, **kwargs).arguments
        return _save(origin, self, Path(save_directory), given, lambda: original(self, save_directory, *args, **kwargs))

    save_pretrained.asks_surogate = True  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained


def _save(origin: Origin, model: Any, directory: Path, given: dict[str, Any], write: Callable[[], Any]) -> Any:
    """Takes an old manifest away first and gives the new one last: a directory with a manifest is complete."""
    _check(origin, model, directory, given)
    main = given.get("is_main_process", True)
    if main:
        (directory / MANIFEST_NAME).unlink(missing_ok=True)
    done = write()
    if main and origin.manifest is None and model.hf_quantizer.layout.name == SurogateLayout.name:
        _LOG.warning(
            "%s: saved without %s, since %s has none: from_pretrained loads it, surogate_load.load_model doesn't",
            directory,
            MANIFEST_NAME,
            origin.directory,
        )
    elif main and origin.manifest is not None:
        _write(directory / MANIFEST_NAME, renewed(origin.manifest, directory).to_json())
    return done


def _check(origin: Origin, model: Any, directory: Path, given: dict[str, Any]) -> None:
    """Refuses, before a byte is written, what would be no artifact."""
    for keyword in ("push_to_hub", "distributed_checkpoint", "variant"):
        if given.get(keyword):
            raise UnrecordedSaveError(
                f"save_pretrained({keyword}=...) writes a packed model without {MANIFEST_NAME}: "
                "save to a directory without it, then upload that (hf upload REPO DIR)"
            )
    if directory.resolve() == origin.directory.resolve():
        raise UnrecordedSaveError(f"{directory}: the model was loaded from there; save to another directory")
    if any(getattr(module, "byte_rows", None) for module in model.modules()):
        raise UnrecordedSaveError(
            f"a base that ranks divide between them isn't saved: it stands in {origin.directory}; "
            "surogate_load.save_adapter(model, DIR) saves the adapter"
        )
    missing = sorted(origin.packed - model.state_dict().keys())
    if missing:
        raise UnrecordedSaveError(
            f"{missing[0]} is no longer in the model under this name, so it can't be saved as an artifact: "
            "save adapters with PeftModel.save_pretrained, the base after PeftModel.unload()"
        )


def renewed(manifest: Manifest, directory: Path) -> Manifest:
    """The manifest of what `save_pretrained` has just written: a record is the given one if its tensors are.

    Kept tensors that have changed (another dtype, training) or were added are recorded as such. Of the files beside
    the weights, those that `save_pretrained` writes itself are recorded.

    Raises:
        UnrecordedSaveError: a packed tensor is missing or has changed: the manifest's figures would be wrong.
    """
    with Checkpoint.open(directory) as saved:
        infos = {name: entry.info for name, entry in saved.tensors.items()}
        hashes = {name: _sha256(saved, name) for name in infos}
    records = dict(_records(manifest, infos, hashes, directory))
    known = {name for record in records.values() for name in record.stored}
    for name in sorted(infos.keys() - known):
        records[name] = _kept(ADDED, infos[name], hashes[name])
    written = [name for name in _WRITTEN if (directory / name).is_file()]
    sidecars = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in written}
    return replace(manifest, sidecars=sidecars, tensors=records)


def _records(
    manifest: Manifest, infos: dict[str, TensorInfo], hashes: dict[str, str], directory: Path
) -> Iterator[tuple[str, TensorRecord]]:
    for name, record in manifest.tensors.items():
        if all(hashes.get(stored) == digest for stored, digest in record.stored.items()):
            yield name, record
        elif record.decision == "quantize":
            raise UnrecordedSaveError(
                f"{directory}: the packed {name} isn't what was loaded, so no {MANIFEST_NAME} was written"
            )
        elif name in infos:  # else the model ties it to another
            reason = record.reason if record.reason.endswith(CHANGED) else f"{record.reason}; {CHANGED}"
            yield name, _kept(reason, infos[name], hashes[name])


def _kept(reason: str, info: TensorInfo, digest: str) -> TensorRecord:
    return TensorRecord("keep", reason, info.dtype, info.shape, float(BITS[info.dtype]), {info.name: digest})


def _sha256(checkpoint: Checkpoint, name: str) -> str:
    return hashlib.sha256(checkpoint.read(name).reshape(-1).view("u1").data).hexdigest()


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with partial.open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
