"""Why a tensor is always kept, whatever the user asks for: the tables of `layer_rules` applied to one checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from surogate_formats.dtype_rules import QUANTIZABLE, STORED_AS
from surogate_quantize import layer_rules as rules
from surogate_quantize.blocks import Place, find_place, stack_depths, subtree

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Facts:
    """What the rules need to know about a checkpoint as a whole.

    Attributes:
        tensors: safetensors dtype and shape of every tensor.
        config: `config.json`.
        places: where each tensor stands.
        depths: number of blocks of every stack, MTP heads not counted.
        model_types: of the config and of every config nested in it.
        conv1d: whether modules named like GPT-2's store their weight as `[in, out]`.
    """

    tensors: Tensors
    config: Mapping[str, Any]
    places: Mapping[str, Place]
    depths: Mapping[str, int]
    model_types: frozenset[str]
    conv1d: bool


def gather_facts(tensors: Tensors, config: Mapping[str, Any]) -> Facts:
    """Read the facts off names, shapes and config."""
    places = {name: find_place(name) for name in tensors}
    model_types = frozenset(_model_types(config))
    wide = any(
        len(shape) == 2 and shape[1] > shape[0]
        for name, (_, shape) in tensors.items()
        if name.endswith((".c_attn.weight", ".c_fc.weight"))
    )
    conv1d = wide or not model_types.isdisjoint(rules.CONV1D_MODEL_TYPES)
    return Facts(tensors, config, places, stack_depths(places.values(), config), model_types, conv1d)


def keep_reason(name: str, facts: Facts) -> str | None:
    """Return why a tensor is always kept, or None if it is the weight of a linear layer in a block."""
    return next((reason for check in _CHECKS if (reason := check(name, facts)) is not None), None)


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key == "model_type" and isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _model_types(value)


def _by_dtype(name: str, facts: Facts) -> str | None:
    dtype = facts.tensors[name][0]
    if dtype in QUANTIZABLE:
        return None
    return f"dtype {dtype}, stored as {STORED_AS[dtype]}" if dtype in STORED_AS else f"dtype {dtype}"


def _by_place(name: str, facts: Facts) -> str | None:
    place = facts.places[name]
    part = subtree(place, facts.config)
    if part is None and place.index is not None and place.index >= facts.depths[place.stack]:
        return "MTP head"
    return part


def _by_name(name: str, facts: Facts) -> str | None:
    place = facts.places[name]
    return (
        rules.PARAMETERS.reason([name.rpartition(".")[2]])
        or (rules.HEADS.reason(place.inner) if place.index is None else None)
        or rules.PATHS.reason(place.inner)
    )


def _by_shape(name: str, facts: Facts) -> str | None:
    shape, inner = facts.tensors[name][1], facts.places[name].inner
    if rules.EXPERTS.search(name) and (len(shape) > 2 or not name.endswith(".weight")):
        return f"fused {len(shape)}-D experts"
    if inner and rules.CONVOLUTION.fullmatch(inner[-1]):
        return "convolution"
    return None if len(shape) == 2 else f"{len(shape)}-D"


def _by_model(name: str, facts: Facts) -> str | None:
    path = name.rpartition(".")[0]
    parent, _, leaf = path.rpartition(".")
    if leaf in {"x_proj", "dt_proj"} and f"{parent}.A_log" in facts.tensors:
        return "SSM parameter"
    if facts.conv1d and leaf in rules.CONV1D_MODULES:
        return "Conv1D weight is stored [in, out]"
    # T5's feed-forward casts its input to the dtype of wo.weight.
    if leaf == "wo" and (f"{parent}.wi.weight" in facts.tensors or f"{parent}.wi_0.weight" in facts.tensors):
        return "kept in fp32 by its model"
    multihead_attention = leaf == "out_proj" and f"{parent}.in_proj_weight" in facts.tensors
    raw = (rules.READ_RAW[kind].search(path) for kind in facts.model_types & rules.READ_RAW.keys())
    return "read as a raw weight by its model" if multihead_attention or any(raw) else None


def _fall_through(name: str, facts: Facts) -> str | None:
    if facts.places[name].index is None:
        return "not in an encoder or decoder block"
    return None if name.endswith(".weight") else "not stored as a module's .weight"


_CHECKS: Final[tuple[Callable[[str, Facts], str | None], ...]] = (
    _by_dtype,
    _by_place,
    _by_name,
    _by_shape,
    _by_model,
    _fall_through,
)
