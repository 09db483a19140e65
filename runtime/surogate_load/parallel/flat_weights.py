"""The packed tensors of a unit's layers as one tensor of bytes: FSDP2 divides, gathers and frees one instead of dozens.

Each tensor that is gathered takes the host some 50 microseconds, and a decoder layer has some 30.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn

from surogate_load.byte_rows import ByteRows, block_bytes, byte_rows
from surogate_load.divisible import Divisible, InFlat
from surogate_load.errors import ShardedWeightError
from surogate_load.fused.groups import side_by_side
from surogate_load.linear import QuantizedLinear

ALIGNED = 256
"""Bytes at whose multiples codes begin, as an allocator's tensors do."""

VECTOR = 16
"""Bytes at whose multiples everything else begins: what a thread of a kernel reads at once."""


@dataclass(frozen=True)
class Span:
    """Where the bytes of a layer's packed tensor stand.

    Attributes:
        layer: that has it.
        name: its name there.
        start: first byte.
        size: bytes.
    """

    layer: QuantizedLinear
    name: str
    start: int
    size: int


class FlatWeights(Divisible):
    """Packed tensors of several layers, each of which finds its own by `tensor`.

    Attributes:
        lines: uint8 [lines, bytes], what ranks divide. A line begins where no block of codes is left unfinished; tiles
            of 128x128 alone may end on another rank than they begin: their rows are too far apart for lines.
        spans: what stands where; the rest is padding, zeros.
        derived: what holds values that were made of these, and has to make them anew (`refresh()`) where others are
            loaded.
    """

    packed_names = ("lines",)
    packed_values = 0  # its layers count theirs

    def __init__(self, lines: Tensor, spans: Sequence[Span]) -> None:
        super().__init__()
        self.lines = nn.Parameter(lines, requires_grad=False)
        self.byte_rows = {"lines": ByteRows(lines.dtype, tuple(lines.shape), len(lines))}
        self.spans = tuple(spans)
        self._slots: list[tuple[int, ByteRows]] = []
        self._views: list[Tensor] = []
        self._seen: Tensor | None = None
        self.derived: list[Any] = []  # modules, but no children of this one
        self._loaded = False
        self.register_load_state_dict_post_hook(_note_loading)  # type: ignore[no-untyped-call]

    def slot(self, start: int, rows: ByteRows) -> int:
        """A number by which `tensor` gives what begins at a byte."""
        self._slots.append((start, rows))
        self._seen = None
        return len(self._slots) - 1

    def where(self, slot: int) -> tuple[int, ByteRows]:
        """First byte, dtype and shape of a slot."""
        return self._slots[slot]

    def tensor(self, slot: int) -> Tensor:
        """The packed tensor, sharing memory with the lines.

        Raises:
            ShardedWeightError: they are spread over ranks.
        """
        if not torch.compiler.is_compiling():
            self.look()
        return self._views[slot]

    def look(self) -> None:
        """Makes the views, unless they are there: FSDP2 gathers into the same tensor each time.

        Compiled code takes them as they are, so this has to be called before it.

        Raises:
            ShardedWeightError: see `tensor`.
        """
        lines: Any = self._parameters["lines"]
        if hasattr(lines, "device_mesh"):
            raise ShardedWeightError(
                "packed weights are spread over ranks: call the layer through the model that was sharded, or unshard() "
                "the module that fully_shard was called on"
            )
        if self._seen is None or self._seen.data_ptr() != lines.data_ptr():
            self._seen = flat = lines.detach().view(-1)
            self._views = [rows.give(flat[start : start + rows.nbytes]) for start, rows in self._slots]
        if self._loaded:
            self._loaded = False
            for module in self.derived:
                module.refresh()
            for layer in {id(span.layer): span.layer for span in self.spans}.values():
                layer.settle()


def flatten(unit: nn.Module) -> FlatWeights | None:
    """Has the quantized layers below a unit hold their packed tensors in one, a child of the unit.

    Tensors of layers that read the same activations stand side by side, so that those can be multiplied as one.

    Args:
        unit: that `fully_shard` will be called on; its layers must not be fused.

    Returns:
        The child; None, and nothing is changed, where there is nothing packed, or not on one device.
    """
    layers = [module for module in unit.modules() if isinstance(module, QuantizedLinear) and not module.byte_rows]
    tensors = [layer.get_parameter(name) for layer in layers for name in layer.packed_names]
    if not layers or len({tensor.device for tensor in tensors}) > 1:
        return None
    spans = list(_spans(unit, layers))
    line = lcm(ALIGNED, *(block_bytes(layer.kind) for layer in layers))
    count = -(-max(span.start + span.size for span in spans) // line)
    flat = FlatWeights(torch.zeros(count, line, dtype=torch.uint8, device=tensors[0].device), spans)
    for layer in layers:
        _move(layer, flat, {span.name: span.start for span in spans if span.layer is layer})
    unit.add_module("flat_weights", flat)
    unit.register_forward_pre_hook(_look_first)
    return flat


def _spans(unit: nn.Module, layers: Sequence[QuantizedLinear]) -> Iterator[Span]:
    end = 0
    for run in side_by_side(unit, layers):
        for number, (layer, name) in enumerate(run):
            codes = name == layer.part_names[0]
            apart, adjoining = (ALIGNED, block_bytes(layer.kind)) if codes else (1, 1)
            least = lcm(VECTOR, adjoining) if number else lcm(VECTOR, apart, adjoining)
            end = -(-end // least) * least
            size = layer.get_parameter(name).nbytes
            yield Span(layer, name, end, size)
            end += size


@torch.no_grad()
def _move(layer: QuantizedLinear, flat: FlatWeights, starts: dict[str, int]) -> None:
    found = byte_rows(layer.kind, {name: layer.get_parameter(name) for name in starts})
    lines = flat.lines.view(-1)
    for name, start in starts.items():
        rows, tensor = found[name], layer.get_parameter(name).data
        lines[start : start + rows.nbytes].copy_(rows.take(tensor).view(-1))
        del layer._parameters[name]
    layer.byte_rows = found
    layer.flat = InFlat(flat, {name: flat.slot(start, found[name]) for name, start in starts.items()})


def _note_loading(flat: Any, _: Any) -> None:
    """What was loaded may be spread over ranks: what is derived from it waits until it is gathered."""
    flat._loaded = True


@torch.compiler.disable  # type: ignore[untyped-decorator]  # FSDP2's own hook, before it, isn't compiled either
def _look_first(unit: Any, *_: Any) -> None:
    """FSDP2's own hook, which gathers, goes before it."""
    unit.flat_weights.look()
