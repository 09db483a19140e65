"""Small artifacts, ours and others', as plain data that an attack changes before it is written."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surogate_formats.dtypes import NAMES
from surogate_formats.format import Format, to_dict
from surogate_formats.fp8 import FP8
from surogate_formats.layouts import LAYOUTS, pack
from surogate_formats.manifest import MANIFEST_NAME, Manifest, TensorRecord
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_formats.recipe import Recipe

MODULES = ("m.down", "m.up")
SHAPE = (128, 128)
MADE: dict[str, tuple[Format, str]] = {
    "nf4": (NF4(), "surogate"),
    "nf4 plain": (NF4(double_quant="none"), "surogate"),
    "bitsandbytes": (NF4(double_quant="dynamic"), "bitsandbytes"),
    "fp4": (NVFP4(), "compressed-tensors"),
    "modelopt fp4": (NVFP4(step="multiply"), "modelopt"),
    "fp8": (FP8("channel", "bfloat16"), "compressed-tensors"),
    "fp8 tiles": (FP8("block"), "hf-fp8"),
    "modelopt fp8": (FP8("tensor"), "modelopt"),
}
"""Format and layout of each artifact."""


@dataclass
class Model:
    """A directory as data: stored arrays by name, config.json, and the manifest, which is None if others made it."""

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    manifest: dict[str, Any] | None

    def rehash(self) -> None:
        """Lets the manifest record the bytes as they are now."""
        assert self.manifest is not None
        for record in self.manifest["tensors"].values():
            record["stored"] = {name: digest(self.tensors[name]) for name in record["stored"]}

    def write(self, directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(self.tensors))
        (directory / "config.json").write_text(json.dumps(self.config))
        if self.manifest is not None:
            (directory / MANIFEST_NAME).write_text(json.dumps(self.manifest, indent=1))


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    header, body = {}, b""
    for name, array in tensors.items():
        data = array.tobytes()
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def dense(largest: np.float32 | None = None) -> dict[str, np.ndarray]:
    """What the artifacts are made of: normal weights, those of one 32 times the other's, or uniform ones."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {"m.norm.weight": np.ones(4, np.float32)}
    for place, module in enumerate(MODULES):
        weight = np.float32(32**place) * rng.standard_normal(SHAPE).astype(np.float32)
        if largest is not None:
            weight = rng.uniform(-1, 1, SHAPE).astype(np.float32) * largest
        tensors[f"{module}.weight"] = weight
    return tensors


def ours(kind: str, largest: np.float32 | None = None) -> Model:
    """An artifact as surogate-quantize would have written it, of weights up to `largest`."""
    fmt, name = MADE[kind]
    layout, source = LAYOUTS[name], dense(largest)
    tensors = {"m.norm.weight": source["m.norm.weight"]}
    records = {"m.norm.weight": TensorRecord("keep", "norm", "F32", (4,), 32.0, {"m.norm.weight": ""})}
    for module in MODULES:
        weight = source[f"{module}.weight"]
        with np.errstate(over="ignore"):
            stored = pack(layout, fmt, module, fmt.quantize(weight), SHAPE, "F32")
        tensors |= stored
        bits = 8 * sum(array.nbytes for array in stored.values()) / weight.size
        records[f"{module}.weight"] = TensorRecord(
            "quantize", "linear", "F32", SHAPE, bits, dict.fromkeys(stored, ""), 0.1, 0.1
        )
    manifest = Manifest(
        tool_version="0",
        source="source",
        files=(),
        format=to_dict(fmt),
        layout=name,
        options={},
        recipe=asdict(Recipe()),
        lora={},
        sidecars={},
        tensors=records,
    )
    config = {"quantization_config": layout.quantization_config(fmt, ["lm_head"])}
    model = Model(tensors, config, json.loads(manifest.to_json()))
    model.rehash()
    return model


def others(kind: str) -> Model:
    """The same without a manifest."""
    model = ours(kind)
    model.manifest = None
    return model


def parts(kind: str) -> dict[str, str]:
    """Keys of what is stored of `m.up` beside its codes, to their names."""
    fmt, name = MADE[kind]
    suffixes, stored = LAYOUTS[name].suffixes[fmt.name], ours(kind).tensors
    return {key: f"m.up.{end}" for key, end in suffixes.items() if key != "codes" and f"m.up.{end}" in stored}


def edited(model: Callable[[], Model], edit: Callable[[Model], object], *, rehash: bool = False) -> Callable:
    """Makes a directory of a model that an edit has changed."""

    def make(directory: Path) -> None:
        made = model()
        edit(made)
        if rehash:
            made.rehash()
        made.write(directory)

    return make
