"""Manifests that disagree with the files, or are none."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.attack import Attack
from attacks.models import Model, edited, ours

from surogate_formats.artifact import IncompleteArtifactError
from surogate_formats.artifact_checks import ContradictionError, CorruptArtifactError, UnknownParametersError
from surogate_formats.checkpoint.errors import NotARegularFileError, SymlinkedDirectoryError, UnreadableFileError
from surogate_formats.errors import SurogateError
from surogate_formats.manifest import MANIFEST_NAME
from surogate_formats.manifest_reading import OtherSchemaError, UnreadableManifestError

UP = "m.up.weight"
ZEROS = "0" * 64


def change(error: type[SurogateError], edit: Callable[[dict[str, Any]], object], names: str = "", kind: str = "nf4"):
    return Attack(edited(lambda: ours(kind), lambda model: edit(model.manifest)), "open", error, names)


def field(name: str, value: object, error: type[SurogateError] = UnreadableManifestError) -> Attack:
    return change(error, lambda manifest: manifest.update({name: value}), MANIFEST_NAME)


def record(name: str, value: object, error: type[SurogateError] = UnreadableManifestError) -> Attack:
    return change(error, lambda manifest: manifest["tensors"][UP].update({name: value}), "m.up")


def without(name: str) -> Attack:
    return change(UnreadableManifestError, lambda manifest: manifest.pop(name), name)


def text(content: bytes | Callable[[bytes], bytes], error: type[SurogateError] = UnreadableManifestError) -> Attack:
    def make(directory: Path) -> None:
        ours("nf4").write(directory)
        path = directory / MANIFEST_NAME
        path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))

    return Attack(make, "open", error, MANIFEST_NAME)


def file(make_file: Callable[[Path], object], error: type[SurogateError], command: str = "open") -> Attack:
    def make(directory: Path) -> None:
        ours("nf4").write(directory)
        (directory / MANIFEST_NAME).unlink()
        make_file(directory / MANIFEST_NAME)

    return Attack(make, command, error, MANIFEST_NAME)


def sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def sidecar(name: str, make_file: Callable[[Path], object], error: type[SurogateError]) -> Attack:
    def make(directory: Path) -> None:
        model = ours("nf4")
        model.manifest["sidecars"] = {name: ZEROS}
        model.write(directory)
        make_file(directory / name)

    return Attack(make, "verify", error, name)


def extra_record(model: Model) -> None:
    model.manifest["tensors"]["m.more.weight"] = model.manifest["tensors"]["m.norm.weight"] | {
        "stored": {"m.more.weight": ZEROS}
    }


def shared(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["m.norm.weight"]["stored"] = manifest["tensors"][UP]["stored"]


def linked_folder(path: Path) -> None:
    elsewhere = path.parent.parent.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / path.name).touch()
    path.parent.symlink_to("../elsewhere")


MANIFEST_ATTACKS: dict[str, Attack] = {
    # What is no manifest
    "manifest empty": text(b""),
    "manifest a list": text(b"[]"),
    "manifest null": text(b"null"),
    "manifest not UTF-8": text(b'{"schema_version":1,"source":"\xff"}'),
    "manifest in UTF-16": text('{"schema_version":1}'.encode("utf-16")),
    "manifest of 100 000 nested lists": text(b'{"options":' + b"[" * 100_000),
    "manifest of 65 nested lists": text(b'{"options":{"a":' + b"[" * 65 + b"]" * 65 + b"}}"),
    "manifest a million digits": text(b'{"schema_version":1' + b"0" * 10**6 + b"}"),
    "manifest twice": text(lambda data: data + data),
    "manifest names a field twice": text(lambda data: data.replace(b'"layout"', b'"source": "a", "layout"')),
    "manifest names a tensor twice": text(lambda data: data.replace(b'"m.down.weight": {', b'"m.up.weight": {')),
    "manifest NaN": text(lambda data: data.replace(b'"relative_error": 0.1', b'"relative_error": NaN')),
    "manifest 1e999": text(lambda data: data.replace(b'"relative_error": 0.1', b'"relative_error": 1e999')),
    "manifest cut": text(lambda data: data[:-40]),
    "manifest of 1 GB": file(sparse(2**30), UnreadableManifestError),
    "manifest of 300 MB of zeros": file(sparse(300_000_000), UnreadableManifestError),
    "manifest a pipe": file(os.mkfifo, NotARegularFileError),
    "manifest a directory": file(Path.mkdir, NotARegularFileError),
    "manifest a device": file(lambda path: path.symlink_to("/dev/zero"), NotARegularFileError),
    "manifest a link to itself": file(lambda path: path.symlink_to(path.name), UnreadableFileError),
    "manifest a link to nothing": file(lambda path: path.symlink_to("nothing"), UnreadableFileError),
    "manifest missing": file(lambda path: None, IncompleteArtifactError),
    # Fields
    "schema version 2": field("schema_version", 2, OtherSchemaError),
    "schema version true": field("schema_version", True, OtherSchemaError),
    "schema version 1.0": field("schema_version", 1.0, OtherSchemaError),
    "schema version a text": field("schema_version", "1", OtherSchemaError),
    "schema version missing": change(OtherSchemaError, lambda manifest: manifest.pop("schema_version")),
    "a field that nobody knows": field("code", "import os"),
    **{f"{name} missing": without(name) for name in ("files", "format", "layout", "options", "sidecars", "tensors")},
    **{
        f"{name} {'a list' if value == [] else 'a number'}": field(name, value)
        for name in ("tool_version", "source", "revision", "layout", "options", "recipe", "lora", "sidecars", "tensors")
        for value in ([], 7)
    },
    "files an object": field("files", {}),
    "files without sizes": field("files", [{"name": "x", "header_sha256": ZEROS}]),
    "file of a negative size": field("files", [{"name": "x", "size": -1, "header_sha256": ZEROS}]),
    "revision with a terminal escape": field("revision", "\x1b[2J"),
    "options of lists in lists": field("options", {"a": [[1]]}),
    "skipped layers a text": field("options", {"skip_first_layers": "1"}),
    "rank a text": field("lora", {"rank": "16"}),
    "dropout of 2": field("lora", {"dropout": 2}),
    "target modules of numbers": field("lora", {"target_modules": [1]}),
    # Format and recipe
    "format unknown": change(UnknownParametersError, lambda manifest: manifest["format"].update(name="nf3"), "nf3"),
    "format a list": change(UnknownParametersError, lambda manifest: manifest["format"].update(name=["nf4"])),
    "format without a name": change(UnknownParametersError, lambda manifest: manifest["format"].pop("name")),
    "format of another": change(ContradictionError, lambda manifest: manifest.update(format={"name": "fp8"})),
    "block size 32": change(UnknownParametersError, lambda manifest: manifest["format"].update(block_size=32)),
    "block size 64.0": change(UnknownParametersError, lambda manifest: manifest["format"].update(block_size=64.0)),
    "block size of another": change(ContradictionError, lambda manifest: manifest["format"].update(block_size=128)),
    "format with a parameter more": change(UnknownParametersError, lambda manifest: manifest["format"].update(x=1)),
    "format that the layout refuses": change(
        ContradictionError, lambda manifest: manifest["format"].update(double_quant="affine"), kind="bitsandbytes"
    ),
    "layout of another": field("layout", "hf-fp8", ContradictionError),
    "layout unknown": field("layout", "../x", ContradictionError),
    "recipe unknown": change(UnknownParametersError, lambda manifest: manifest["recipe"].update(name="fast"), "fast"),
    "recipe with a parameter more": change(UnknownParametersError, lambda manifest: manifest["recipe"].update(x=1)),
    "margin NaN as a text": change(UnknownParametersError, lambda manifest: manifest["recipe"].update(margin="nan")),
    "margin true": change(UnknownParametersError, lambda manifest: manifest["recipe"].update(margin=True)),
    # Records
    "record a list": change(UnreadableManifestError, lambda manifest: manifest["tensors"].update({UP: []}), UP),
    "record empty": change(UnreadableManifestError, lambda manifest: manifest["tensors"].update({UP: {}}), UP),
    "record with a field more": record("x", 1),
    "decision to run": record("decision", "run"),
    "decision a list": record("decision", []),
    "reason a number": record("reason", 1),
    "recorded dtype unknown": record("dtype", "F31"),
    "recorded dtype of integers": record("dtype", "I64"),
    "recorded shape negative": record("shape", [-128, -128]),
    "recorded shape of 2^62 values a side": record("shape", [2**62, 2**62]),
    "recorded shape of 40 digits": record("shape", [10**39, 1]),
    "recorded shape true": record("shape", [True, 128]),
    "recorded shape of floats": record("shape", [128.0, 128.0]),
    "recorded shape of one side": record("shape", [16384]),
    "recorded shape a number": record("shape", 3),
    "recorded shape of another weight": record("shape", [256, 128], ContradictionError),
    "bits a weight a text": record("bits_per_weight", "4"),
    "bits a weight negative": record("bits_per_weight", -4),
    "error a list": record("relative_error", []),
    "error negative": record("max_error", -1),
    "hash too short": record("stored", {UP: "00"}),
    "hash a number": record("stored", {UP: 0}),
    "stored a list": record("stored", [UP]),
    "stored nothing": record("stored", {}, ContradictionError),
    "tensor extra": Attack(edited(lambda: ours("nf4"), extra_record), "open", ContradictionError, "m.more.weight"),
    "tensor that no record has": change(
        ContradictionError, lambda manifest: manifest["tensors"].pop("m.norm.weight"), "m.norm.weight"
    ),
    "tensor of two records": change(ContradictionError, shared, "m.norm.weight"),
    "kept tensor of another dtype": change(
        ContradictionError, lambda manifest: manifest["tensors"]["m.norm.weight"].update(dtype="I32"), "m.norm.weight"
    ),
    "kept tensor of another shape": change(
        ContradictionError, lambda manifest: manifest["tensors"]["m.norm.weight"].update(shape=[2, 2]), "m.norm.weight"
    ),
    "kept weight called quantized": change(
        UnreadableManifestError,
        lambda manifest: manifest["tensors"]["m.norm.weight"].update(decision="quantize"),
        "m.norm.weight",
    ),
    "quantized weight called kept": record("decision", "keep", ContradictionError),
    # Files beside the weights
    **{
        f"sidecar {json.dumps(name)}": field("sidecars", {name: ZEROS})
        for name in ("../config.json", "/etc/hostname", "a/../../x", "C:x", "a\\..\\x", "", "a//b", "a\nb", "a" * 1025)
    },
    "sidecar's hash a list": field("sidecars", {"config.json": []}),
    "sidecar missing": sidecar("tokenizer.json", lambda path: None, CorruptArtifactError),
    "sidecar changed": sidecar("tokenizer.json", Path.touch, CorruptArtifactError),
    "sidecar a pipe": sidecar("tokenizer.json", os.mkfifo, NotARegularFileError),
    "sidecar a device": sidecar("tokenizer.json", lambda path: path.symlink_to("/dev/zero"), NotARegularFileError),
    "sidecar in a linked folder": sidecar("templates/x.jinja", linked_folder, SymlinkedDirectoryError),
}
