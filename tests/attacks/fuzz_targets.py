"""What is fuzzed: each target reads bytes as a stranger's file, and may raise a `SurogateError` and nothing else."""

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from attacks.models import Model, ours, parts, safetensors_bytes

from surogate_formats.artifact import Artifact, NoRecordedHashesError
from surogate_formats.artifact_checks import recorded_format, recorded_recipe
from surogate_formats.checkpoint import is_quantized, parse_header
from surogate_formats.checkpoint.index import parse_index
from surogate_formats.checkpoint.strict_json import parse_object
from surogate_formats.dtypes import NAMES
from surogate_formats.errors import SurogateError
from surogate_formats.format import TensorSpec
from surogate_formats.layouts import layout_of_config
from surogate_formats.layouts.bitsandbytes import BitsandbytesLayout
from surogate_formats.manifest import Manifest
from surogate_formats.training_config import load_training_config

SEPARATOR = b"\n\x00\n"
"""Between the files of a directory: config.json, surogate.json (left out if empty), a header, the tensors' bytes."""

BITSANDBYTES = BitsandbytesLayout()
STORED = {key: ours("bitsandbytes").tensors[name] for key, name in parts("bitsandbytes").items()}
STORED["codes"] = ours("bitsandbytes").tensors["m.up.weight"]


def header(data: bytes) -> None:
    """A byte for the size of what follows the header, and the header."""
    text = data[1:]
    head = len(text).to_bytes(8, "little") + text
    parse_header(head, len(head) + sum(data[:1]), "f")


def index(data: bytes) -> None:
    parse_index(data, "f")


def config(data: bytes) -> None:
    found = parse_object(data, "f", strict=False)
    is_quantized(found)
    declared = found.get("quantization_config")
    layout_of_config(declared).parse_config(declared)  # type: ignore[arg-type]


def training_file(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.yaml")
        path.write_bytes(data)
        load_training_config(path)


def manifest(data: bytes) -> None:
    found = Manifest.from_json(data, "f")
    recorded_format(found, "f")
    recorded_recipe(found, "f")


def artifact(data: bytes) -> None:
    texts = [*data.split(SEPARATOR, 3), b"", b"", b"", b""][:4]
    with tempfile.TemporaryDirectory() as folder:
        for name, text in zip(("config.json", "surogate.json"), texts, strict=False):
            if text:
                Path(folder, name).write_bytes(text)
        start = len(texts[2]).to_bytes(8, "little") + texts[2]
        Path(folder, "model.safetensors").write_bytes(start + texts[3])
        with Artifact.open(folder) as opened:
            with suppress(NoRecordedHashesError):
                opened.verify()
            with np.errstate(all="ignore"):
                for module in opened.modules:
                    opened.dequantize(module)


def quant_state(data: bytes) -> None:
    """The state of a weight whose other parts are right."""
    specs = {key: TensorSpec(NAMES[array.dtype], array.shape) for key, array in STORED.items()}
    described, shape, _ = BITSANDBYTES.describe(specs, data)
    BITSANDBYTES.restore(described, {**STORED, "quant_state": np.frombuffer(data, np.uint8)}, shape)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "index": index,
    "config": config,
    "yaml": training_file,
    "manifest": manifest,
    "artifact": artifact,
    "quant_state": quant_state,
}


def run(target: str, data: bytes) -> None:
    """Runs a target on bytes; any other exception than a `SurogateError` of one printable line is the fuzzer's."""
    try:
        TARGETS[target](data)
    except SurogateError as error:
        message = str(error)
        assert message.isprintable(), ascii(message)
        assert 0 < len(message) < 4000, len(message)  # two names of 1024 bytes may be in it


def directory_bytes(model: Model) -> bytes:
    """An artifact as the bytes that `artifact` takes."""
    data = safetensors_bytes(model.tensors)
    size = 8 + int.from_bytes(data[:8], "little")
    texts = [json.dumps(part).encode() if part else b"" for part in (model.config, model.manifest)]
    return SEPARATOR.join([*texts, data[8:size], data[size:]])
