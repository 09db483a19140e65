"""The manifest read strictly: it may be a stranger's, and what it says of files decides which are opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surogate_formats.checkpoint import SourceFile
from surogate_formats.checkpoint.errors import quoted, shown
from surogate_formats.checkpoint.json_reader import JsonReader, Read
from surogate_formats.dtype_rules import QUANTIZABLE
from surogate_formats.errors import ArtifactError, CheckpointError
from surogate_formats.manifest_fields import FIELDS, RECORD, REQUIRED

if TYPE_CHECKING:
    from surogate_formats.manifest import TensorRecord

SCHEMA_VERSION = 1


class UnreadableManifestError(ArtifactError):
    """`surogate.json` isn't what surogate-quant writes."""


class OtherSchemaError(ArtifactError):
    """`surogate.json` is of another schema version."""


def read_fields(read: Read, where: str) -> dict[str, Any]:
    """The fields of a manifest, checked, as `Manifest` takes them.

    Args:
        read: gives its bytes.
        where: names the file in errors.

    Raises:
        OtherSchemaError: the schema version isn't `SCHEMA_VERSION`.
        UnreadableManifestError: it is no JSON, or a field is missing, unknown or no value of its own.
    """
    fields: dict[str, Any] = {}
    try:
        reader = JsonReader(read, where)
        for key in reader.members():
            fields[key] = _tensors(reader, where) if key == "tensors" else _field(key, reader.value(), where)
        reader.end()
    except CheckpointError as error:
        raise UnreadableManifestError(f"{shown(error)}, or quantize again") from error
    if "schema_version" not in fields:
        _check_version(None, where)
    missing = next((key for key in (*FIELDS, "tensors") if key not in fields and key != "revision"), None)
    if missing is not None:
        raise _wrong(where, f"{missing} is missing")
    return fields


def _field(key: str, value: Any, where: str) -> Any:
    if key == "schema_version":
        _check_version(value, where)
    if key not in FIELDS:
        raise _wrong(where, f"holds the unknown field {quoted(key)}")
    if not FIELDS[key](value):
        raise _wrong(where, f"{key} is {quoted(value)}")
    if key == "files":
        return tuple(SourceFile(**entry) for entry in value)
    return shown(value) if key == "source" else value


def _check_version(version: object, where: str) -> None:
    if type(version) is not int or version != SCHEMA_VERSION:
        raise OtherSchemaError(
            f"{where}: schema version {quoted(version)}, this version of surogate-quant reads {SCHEMA_VERSION}; "
            "quantize again"
        )


def _tensors(reader: JsonReader, where: str) -> dict[str, TensorRecord]:
    if reader.next() != "{":
        raise _wrong(where, f"tensors is {quoted(reader.value())}")
    return {name: _record(name, reader.value(), where) for name in reader.members()}


def _record(name: str, entry: Any, where: str) -> TensorRecord:
    from surogate_formats.manifest import TensorRecord

    if not isinstance(entry, dict):
        raise _wrong(where, f"tensor {quoted(name)} is {quoted(entry)}")
    for key in (*entry, *REQUIRED):
        if key not in entry or key not in RECORD or not RECORD[key](entry[key]):
            found = quoted(entry[key]) if key in entry else "missing"
            raise _wrong(where, f"tensor {quoted(name)}: {quoted(key)} is {found}")
    if entry["decision"] == "quantize" and not (
        len(entry["shape"]) == 2 and name.endswith(".weight") and entry["dtype"] in QUANTIZABLE
    ):
        found = f"{entry['dtype']} {entry['shape']}"
        raise _wrong(where, f"tensor {quoted(name)}, {found}, is none that is quantized")
    return TensorRecord(**{**entry, "shape": tuple(entry["shape"]), "reason": shown(entry["reason"])})


def _wrong(where: str, problem: str) -> UnreadableManifestError:
    return UnreadableManifestError(f"{where}: not a manifest of surogate-quant: {problem}; quantize again")
