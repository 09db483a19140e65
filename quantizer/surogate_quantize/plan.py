"""The plan: what happens to every tensor of a source and where the result stands, from headers and config alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from surogate_formats.checkpoint import Checkpoint, TensorInfo
from surogate_formats.dtype_rules import STORED_AS
from surogate_formats.errors import SurogateError
from surogate_formats.format import TensorSpec
from surogate_formats.layouts import StoredTensor, stored_tensors
from surogate_quantize.fused_experts import takes_apart, with_fused_kept
from surogate_quantize.fused_groups import amax_groups
from surogate_quantize.options import Options
from surogate_quantize.packed_heads import naming_head, with_head
from surogate_quantize.selection import Decision, keep_groups_whole, select
from surogate_quantize.tied_heads import tied_heads


class AlreadyQuantizedError(SurogateError):
    """The source is quantized already; quantizing again would lose accuracy without a word."""


class NothingToQuantizeError(SurogateError):
    """No tensor of the source would be quantized."""


class NameClashError(SurogateError):
    """Two tensors of the artifact would have the same name."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the source.

    Attributes:
        info: its name, dtype and shape.
        decision: quantize it or keep it, and why.
        stored: part name to where it stands in the artifact; a kept tensor has the one part `kept`.
        shard: index of the output shard that holds all of them.
        group: the tensors whose largest magnitude it shares, itself included.
    """

    info: TensorInfo
    decision: Decision
    stored: dict[str, StoredTensor]
    shard: int
    group: tuple[str, ...]

    @property
    def values(self) -> int:
        """Number of values of the source tensor."""
        return int(np.prod(self.info.shape, dtype=np.int64))

    @property
    def stored_bytes(self) -> int:
        """Bytes in the artifact, companions included."""
        return sum(stored.spec.nbytes for stored in self.stored.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a value."""
        return 8 * self.stored_bytes / max(self.values, 1)

    @property
    def module(self) -> str:
        """Full name of the module that owns the tensor."""
        return self.info.name.removesuffix(".weight")


@dataclass(frozen=True)
class Plan:
    """Every tensor of the source in reading order, and the options that decided.

    Attributes:
        options: the request.
        tensors: of the source.
        calibration: what a calibrated pass records in the manifest beside the options, and `estimated_seconds`; None
            where there is none.
    """

    options: Options
    tensors: tuple[PlannedTensor, ...]
    calibration: Mapping[str, Any] | None = None

    @property
    def quantized(self) -> tuple[PlannedTensor, ...]:
        """The tensors that are quantized."""
        return tuple(tensor for tensor in self.tensors if tensor.decision.quantize)

    @property
    def shards(self) -> int:
        """Number of output shards."""
        return 1 + max(tensor.shard for tensor in self.tensors)

    def kept_modules(self) -> list[str]:
        """Full names of the modules that loaders must leave alone: every kept weight of two or more axes.

        A tied head has no tensor of its own, and transformers and vLLM hold the experts of a layer in one module, so
        those modules are listed too.
        """
        kept: dict[str, None] = {}
        names = (tensor.info.name.partition(".experts.") for tensor in self.quantized)
        packed = {path for path, experts, _ in names if experts}
        for tensor in self.tensors:
            if tensor.decision.quantize or len(tensor.info.shape) < 2:
                continue
            if tensor.info.name.endswith(".weight"):
                kept[tensor.module] = None
            path, experts, _ = tensor.info.name.partition(".experts.")
            if experts and not (path in packed and tensor.decision.reason == "bias"):
                kept[f"{path}.experts"] = None
        return [*kept, *tied_heads(tensor.info.name for tensor in self.tensors)]


def make_plan(source: Checkpoint, options: Options) -> Plan:
    """Decides about every tensor; reads nothing but headers and config.

    Raises:
        AlreadyQuantizedError: the source is no plain checkpoint.
        NothingToQuantizeError: every tensor would be kept; the message counts the reasons.
        UsageError: a skip pattern or a number of layers that doesn't fit the model, or a head that can't be quantized.
    """
    method = source.is_quantized()
    if method is not None:
        raise AlreadyQuantizedError(
            f"{source.directory}: already quantized ({method}); start from the unquantized checkpoint"
        )
    options, decisions = _settled(source, options)
    if not any(decision.quantize for decision in decisions.values()):
        reasons = "; ".join(f"{count} {reason}" for reason, count in count_reasons(decisions.values()).items())
        raise NothingToQuantizeError(
            f"{source.directory}: nothing to quantize; all tensors are kept: {reasons}{_way_out(source, options)}"
        )
    if options.quantize_lm_head:
        options = replace(options, layout=naming_head(options.layout, decisions))
    quantized = [name for name, decision in decisions.items() if decision.quantize]
    groups = amax_groups(quantized) if options.format.shares_amax else {}
    tensors = _place(source, options, decisions, groups)
    _check_names(tensors)
    return Plan(options, tuple(tensors))


def _settled(source: Checkpoint, options: Options) -> tuple[Options, dict[str, Decision]]:
    """The decisions, and the options that they are made with: another layout may be the default for experts."""
    with_experts = options.for_experts()
    decisions = _decide(source, with_experts)
    if with_experts is options or any(".experts." in name for name, each in decisions.items() if each.quantize):
        return with_experts, decisions
    return options, _decide(source, options)


def _decide(source: Checkpoint, options: Options) -> dict[str, Decision]:
    fused = takes_apart(source, options.layout)
    infos = [part.info for name, entry in source.tensors.items() for part in fused.get(name, (entry,))]
    tensors = {info.name: (info.dtype, info.shape) for info in infos}
    decisions = select(tensors, source.config, options.skip)

    def refuses(shape: tuple[int, ...]) -> str | None:
        return options.format.keep_reason(shape) or options.layout.keep_reason(options.format, shape)

    for name, decision in decisions.items():
        if decision.quantize and (reason := refuses(tensors[name][1])):
            decisions[name] = Decision(quantize=False, reason=reason)
    if options.quantize_lm_head:
        decisions = with_head(decisions, tensors, source.config, options.skip, refuses)
    return with_fused_kept(keep_groups_whole(decisions), source, options.layout)


def _way_out(source: Checkpoint, options: Options) -> str:
    """What takes the shapes that the layout's readers can't, where they kept a weight."""
    way = options.layout.way_out.get(options.format.name)
    shapes = [entry.info.shape for entry in source.tensors.values() if len(entry.info.shape) == 2]
    kept = any(options.layout.keep_reason(options.format, shape) for shape in shapes)
    return f"; {way}" if way and kept else ""


def count_reasons(decisions: Iterable[Decision]) -> dict[str, int]:
    """How many tensors are kept for each reason, the commonest first; skipped layers count together."""
    kept = (decision.reason for decision in decisions if not decision.quantize)
    return dict(Counter(re.sub(r"^layer \d+ of (--skip)", r"\1", reason) for reason in kept).most_common())


def _place(
    source: Checkpoint, options: Options, decisions: dict[str, Decision], groups: dict[str, tuple[str, ...]]
) -> list[PlannedTensor]:
    """Fills shards in reading order; all companions of a weight stand in one."""
    placed: list[PlannedTensor] = []
    shard, used = 0, 0
    for name, decision in decisions.items():
        info = source.entry(name).info
        if decision.quantize:
            module = name.removesuffix(".weight")
            stored = stored_tensors(options.layout, options.format, module, info.shape)
        else:
            stored = {"kept": StoredTensor(name, TensorSpec(STORED_AS.get(info.dtype, info.dtype), info.shape))}
        tensor = PlannedTensor(info, decision, stored, shard, groups.get(name, (name,)))
        if used and used + tensor.stored_bytes > options.max_shard_size:
            shard, used = shard + 1, 0
            tensor = replace(tensor, shard=shard)
        used += tensor.stored_bytes
        placed.append(tensor)
    return placed


def _check_names(tensors: list[PlannedTensor]) -> None:
    seen: dict[str, str] = {}
    for tensor in tensors:
        for stored in tensor.stored.values():
            if stored.name in seen:
                raise NameClashError(
                    f"{stored.name}: both {seen[stored.name]} and {tensor.info.name} would be stored under this name"
                )
            seen[stored.name] = tensor.info.name
