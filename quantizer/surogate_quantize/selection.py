"""Which tensors of a checkpoint are quantized, and why each of the others is not.

Decided from names, shapes, dtypes and `config.json` alone. Quantized are the 2-D weights of linear layers in the
blocks of an encoder or decoder; everything else is kept in the source's dtype, with its reason. Vision and audio
towers in front of a text model are kept; the encoder of a speech recogniser such as Whisper is no tower but half of
the model, and quantized.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surogate_quantize.fused_groups import decision_groups
from surogate_quantize.keep_rules import Facts, Tensors, gather_facts, keep_reason
from surogate_quantize.skip_options import SkipLayersError, SkipOptions, match_patterns, module_name

__all__ = ["Decision", "SkipOptions", "keep_groups_whole", "select"]


@dataclass(frozen=True)
class Decision:
    """What happens to one tensor.

    Attributes:
        quantize: whether its bytes are replaced by packed ones.
        reason: `linear` if so, else a short phrase: `norm`, `router`, `layer 0 of --skip-first-layers 1`.
    """

    quantize: bool
    reason: str


def select(tensors: Tensors, config: Mapping[str, Any], skip: SkipOptions) -> dict[str, Decision]:
    """Decide on every tensor; the order of `tensors` is kept.

    Shapes that a format can't take are not looked at here: the plan knows the format.

    Args:
        tensors: safetensors dtype (`BF16`) and shape of every tensor of the checkpoint.
        config: `config.json`.
        skip: the user's exceptions. Layers are counted in each stack of blocks on its own, so an encoder-decoder model
            skips the first layers of both.

    Raises:
        SkipLayersError: a negative count, or more layers than the deepest stack has.
        InvalidSkipPatternError: a pattern can't be read.
        UnknownSkipPatternError: a pattern matches no tensor.
    """
    facts = gather_facts(tensors, config)
    _check_layers(skip, max(facts.depths.values(), default=0))
    by_pattern = match_patterns(skip.patterns, tensors)
    decisions = {}
    for name in tensors:
        reason = keep_reason(name, facts) or _skip_reason(name, facts, skip, by_pattern)
        decisions[name] = Decision(reason is None, reason or "linear")
    return keep_groups_whole(decisions)


def keep_groups_whole(decisions: Mapping[str, Decision]) -> dict[str, Decision]:
    """Keep every tensor whose fused group holds one that is kept, and say which; see `decision_groups`."""
    groups = decision_groups(decisions)
    kept: dict[str, str] = {}
    for name, decision in decisions.items():
        if not decision.quantize:
            kept.setdefault(groups[name][0], name)
    whole = dict(decisions)
    for name, decision in decisions.items():
        if decision.quantize and (member := kept.get(groups[name][0])):
            whole[name] = Decision(False, f"fused with {module_name(member)} ({decisions[member].reason})")
    return whole


def _check_layers(skip: SkipOptions, depth: int) -> None:
    for option, count in (("first", skip.first_layers), ("last", skip.last_layers)):
        if count < 0:
            raise SkipLayersError(f"`skip_{option}_layers` {count}: must be 0 or more")
    if skip.first_layers + skip.last_layers > depth:
        raise SkipLayersError(
            f"`skip_first_layers` {skip.first_layers} `skip_last_layers` {skip.last_layers}: the model has only"
            f" {depth} layers; skip fewer"
        )


def _skip_reason(name: str, facts: Facts, skip: SkipOptions, by_pattern: Mapping[str, str]) -> str | None:
    """Return which of the user's options keeps a tensor that would be quantized, or None."""
    place = facts.places[name]
    if place.index is not None and place.index < skip.first_layers:
        return f"layer {place.index} of --skip-first-layers {skip.first_layers}"
    if place.index is not None and place.index >= facts.depths[place.stack] - skip.last_layers:
        return f"layer {place.index} of --skip-last-layers {skip.last_layers}"
    return f"matches --skip {by_pattern[name]}" if name in by_pattern else None
