"""The blocks of a model: which one a tensor belongs to, and how many its stack has."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from surogate_quantize.layer_rules import BLOCK_CONTAINERS, SUBTREES, TOWERS

_ROLES: Final = {
    "encoder": ("encoder_layers", "num_encoder_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
_DEPTHS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_INDEX: Final = re.compile("[0-9]{1,6}")
_TEXT_CONFIG: Final = re.compile(r"\w*(?:text|llm|language|thinker|encoder|decoder|global|patcher)\w*")
_OTHER_MODALITY: Final = re.compile(r"\w*(?:vision|visual|audio|image|video|speech|timestamp)\w*")


@dataclass(frozen=True)
class Place:
    """Where a tensor stands.

    Attributes:
        stack: name of the list of blocks (`model.layers`), or of the owning module where that is in no block.
        index: number of the outermost block that holds the tensor, or None.
        inner: components of the owning module's name inside the block, or all of them.
    """

    stack: str
    index: int | None
    inner: tuple[str, ...]


def find_place(tensor: str) -> Place:
    """Read the outermost numbered block from a tensor's name; embeddings, heads and the like have none."""
    *path, _ = tensor.split(".")
    for i, (container, index) in enumerate(pairwise(path)):
        if container in BLOCK_CONTAINERS and _INDEX.fullmatch(index):
            return Place(".".join(path[: i + 1]), int(index), tuple(path[i + 2 :]))
    return Place(".".join(path), None, tuple(path))


def subtree(place: Place, config: Mapping[str, Any]) -> str | None:
    """Return which part of a multimodal model (or MTP head) a tensor belongs to, or None for the text model."""
    tower = TOWERS.get(str(config.get("model_type")))
    if tower and f"{place.stack}.".startswith(f"{tower[0]}."):
        return tower[1]
    return SUBTREES.reason(place.stack.split("."))


def stack_depths(places: Iterable[Place], config: Mapping[str, Any]) -> dict[str, int]:
    """Count the blocks of every stack of encoder or decoder blocks; towers and MTP heads are left out.

    The config's count wins where the file holds more blocks than that: those beyond it are MTP heads. An
    encoder-decoder model has two stacks, each with its own count.
    """
    present: dict[str, int] = {}
    for place in places:
        if place.index is not None:
            present[place.stack] = max(present.get(place.stack, 0), place.index + 1)
    text = {stack: n for stack, n in present.items() if subtree(Place(stack, 0, ()), config) is None}
    return {stack: _depth(stack, count, config) for stack, count in text.items()}


def _depth(stack: str, present: int, config: Mapping[str, Any]) -> int:
    """Return how many of the blocks present in a stack are no MTP heads."""
    roles = (role for part in stack.split(".") for role in _ROLES if part.endswith(role))
    role = next(roles, None)
    keys = (*_ROLES[role], *_DEPTHS) if role else (*_DEPTHS, *_ROLES["decoder"])
    stated = [depth for part in _text_configs(config, role) for key in keys if (depth := part.get(key))]
    depths = [depth for depth in stated if isinstance(depth, int)]
    return present if present in depths else min(present, next(iter(depths), present))


def _text_configs(config: Mapping[str, Any], role: str | None) -> Iterator[Mapping[str, Any]]:
    """Yield the configs that may state a depth, the most specific first; none of towers."""
    nested = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    for key in sorted(nested, key=lambda key: role is None or role not in key):
        if _TEXT_CONFIG.fullmatch(key) and not _OTHER_MODALITY.fullmatch(key):
            yield from _text_configs(nested[key], role)
    yield config
