"""Checkpoints that others quantized, in the terms of our own artifacts: there is no manifest, so the headers speak."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.checkpoint.directory import Directory
from surogate_formats.checkpoint.errors import shown
from surogate_formats.checkpoint.files import unreadable
from surogate_formats.checkpoint.reader import MAX_CONFIG_SIZE
from surogate_formats.checkpoint.strict_json import parse_object
from surogate_formats.dtypes import BITS, FLOATS
from surogate_formats.errors import ArtifactError
from surogate_formats.format import Format, Parts, Shape, to_dict
from surogate_formats.layouts import DescribingLayout, Layout, UnreadableConfigError, layout_of_config
from surogate_formats.layouts.modelopt import SIDECAR
from surogate_formats.manifest import Manifest, TensorRecord
from surogate_formats.packed_weights import ACTIVATION_SCALES, PackedWeights, find_packed_weights
from surogate_formats.recipe import Recipe
from surogate_formats.weight_parts import UnreadableWeightError

PACKED = "packed by its maker"
KEPT = "kept by its maker"
UNUSED = "scales of activations, not used here"

NO_HASH = ""
"""Stands for the hash of a tensor that nobody recorded."""


@dataclass(frozen=True)
class Foreign:
    """A checkpoint that others quantized.

    Attributes:
        config: its `quantization_config`; where ModelOpt's own file alone declares one, what that says.
        layout: how its parts are named.
        packed: its packed weights.
        unused: what it declares about activations and the KV cache, which nobody here follows.
        manifest: as much of one as the headers tell: there are no hashes and no errors in it.
    """

    config: dict[str, Any]
    layout: Layout
    packed: PackedWeights
    unused: tuple[str, ...]
    manifest: Manifest

    def parts(self, checkpoint: Checkpoint, module: str) -> Parts:
        """The parts of a packed weight, in the format's own shapes.

        Raises:
            UnreadableWeightError: their values are none that the layout holds.
        """
        fmt, shape, suffixes = self.packed.format, self.packed.modules[module], self.layout.suffixes
        keys = _stored_keys(self.layout, self.packed.stored or fmt, shape)
        stored = {key: checkpoint.read(f"{module}.{suffixes[fmt.name][key]}") for key in keys}
        if not isinstance(self.layout, DescribingLayout):
            return {part: stored[part].reshape(spec.shape) for part, spec in fmt.part_specs(shape).items()}
        try:
            return self.layout.restore(fmt, stored, shape)
        except ArtifactError as error:
            raise UnreadableWeightError(f"{shown(checkpoint.directory)}: {shown(module)}: {error}") from error


def declared_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint, or what stands for one; None if nothing declares it quantized.

    Raises:
        CheckpointError: the file that should declare it can't be read.
    """
    for key in ("quantization_config", "compression_config"):
        declared = checkpoint.config.get(key)
        if isinstance(declared, dict) and declared:
            return declared
    with Directory(checkpoint.directory) as directory:
        if SIDECAR not in directory.names:
            return None
        try:
            data = directory.read(SIDECAR, MAX_CONFIG_SIZE)
        except FileNotFoundError as error:  # a link to nothing
            raise unreadable(directory.show(SIDECAR), error) from None
        found = parse_object(data, directory.show(SIDECAR), strict=False)
    inner = found.get("quantization")
    return {"quant_method": "modelopt", **(inner if isinstance(inner, dict) else found)}


def read_foreign(checkpoint: Checkpoint, config: dict[str, Any]) -> Foreign:
    """What a checkpoint without a manifest holds.

    Args:
        checkpoint: open.
        config: what `declared_config` gave.

    Raises:
        UnreadableConfigError: it is quantized in a way that we don't read; the message names it.
        UnscaledWeightError, UnreadableWeightError: see `find_packed_weights`.
    """
    layout = layout_of_config(config)
    declared, _ = layout.parse_config(config)
    infos = {name: entry.info for name, entry in checkpoint.tensors.items()}
    packed = find_packed_weights(layout, declared, infos, lambda name: checkpoint.read(name).tobytes())
    if not packed.modules:
        raise UnreadableConfigError(
            f"quantization_config declares {declared.name} in layout {layout.name}, and no tensor is such a weight"
        )
    unused = (*_declared_unused(config), *packed.unused)
    return Foreign(config, layout, packed, unused, _manifest(checkpoint, layout, packed))


def _declared_unused(config: Mapping[str, Any]) -> Iterator[str]:
    groups = config.get("config_groups")
    entries = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    for key in ("input_activations", "output_activations"):
        if any(group.get(key) for group in entries):
            yield key
    for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
        if config.get(key):
            yield key
    if config.get("activation_scheme") == "static":
        yield "activation_scheme static"


def _manifest(checkpoint: Checkpoint, layout: Layout, packed: PackedWeights) -> Manifest:
    return Manifest(
        tool_version="",
        source=shown(checkpoint.directory.resolve().name),
        files=checkpoint.files,
        format=to_dict(packed.format),
        layout=layout.name,
        options={},
        recipe=asdict(Recipe()),
        lora={},
        sidecars={},
        tensors=dict(_records(checkpoint, layout, packed)),
    )


def _records(checkpoint: Checkpoint, layout: Layout, packed: PackedWeights) -> Iterator[tuple[str, TensorRecord]]:
    suffixes = layout.suffixes[packed.format.name]
    dtype = FLOATS.get(str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")), "BF16")
    parts: set[str] = set()
    for module, shape in packed.modules.items():
        names = [f"{module}.{suffixes[part]}" for part in _stored_keys(layout, packed.stored or packed.format, shape)]
        bits = 8 * sum(checkpoint.tensors[name].info.nbytes for name in names) / max(shape[0] * shape[1], 1)
        source = packed.dtypes.get(module, dtype)
        yield f"{module}.weight", TensorRecord("quantize", PACKED, source, shape, bits, dict.fromkeys(names, NO_HASH))
        parts.update(names)
    for name, entry in checkpoint.tensors.items():
        if name not in parts:
            reason = UNUSED if name.rpartition(".")[2] in ACTIVATION_SCALES else KEPT
            info = entry.info
            yield name, TensorRecord("keep", reason, info.dtype, info.shape, float(BITS[info.dtype]), {name: NO_HASH})


def _stored_keys(layout: Layout, fmt: Format, shape: Shape) -> Iterable[str]:
    """The parts; in a layout that describes its weights, what they are restored from."""
    return layout.stored_specs(fmt, shape) if isinstance(layout, DescribingLayout) else fmt.part_specs(shape)
