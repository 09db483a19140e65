"""Where the packed modules of files stand in a transformers model, which renames and merges as it loads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from surogate_formats.checkpoint import TensorInfo
from surogate_load.errors import MismatchedModelError, PackedExpertsError


def packed_modules(
    model: nn.Module, infos: Mapping[str, TensorInfo], companion: str, inside: Collection[str] = ()
) -> Iterator[tuple[str, str]]:
    """(name on disk, name in the model) of every module with packed tensors.

    Args:
        model: a transformers model; its weights may still be missing.
        infos: what the files hold.
        companion: the ending of a tensor that every packed weight has, and no other.
        inside: names on disk of packed weights that have found a place already, in experts.

    Raises:
        PackedExpertsError: transformers merges packed weights into one parameter.
        MismatchedModelError: the model has no such module.
    """
    renamings, converters = transforms_of(model)
    state = model.state_dict()
    for name in infos:
        if not name.endswith(f".{companion}"):
            continue
        stored = name.removesuffix(f".{companion}")
        if stored in inside:
            continue
        weight, merged = rename_source_key(
            f"{stored}.weight", renamings, converters, getattr(model, "base_model_prefix", None), state
        )
        if merged is not None:
            raise PackedExpertsError(
                f"{stored} is packed, but transformers merges it into {weight} in a way that we don't know; "
                f"quantize again with --skip {_skip_pattern(stored)}"
            )
        if weight not in state:
            raise MismatchedModelError(f"the files hold {stored}, which the model hasn't: is config.json its own?")
        yield stored, weight.removesuffix(".weight")


def transforms_of(model: Any) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """What transformers does to the names of a model's checkpoint as it loads it, and what it merges or splits."""
    found = get_model_conversion_mapping(model)
    renamings = [entry for entry in found if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in found if isinstance(entry, WeightConverter)]


def names_in_model(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name in the model to the name on disk, of tensors that transformers renames and merges with no other."""
    renamings, _ = transforms_of(model)
    return {rename_source_key(name, renamings, [])[0]: name for name in names}


def stored_name(model: Any) -> Callable[[str], str]:
    """Gives the name on disk of a tensor of a loaded model that transformers renamed, and merged with no other."""
    used = reversed(getattr(model, "_weight_conversions", None) or ())
    renamings = [entry.reverse_transform() for entry in used if isinstance(entry, WeightRenaming)]
    return lambda name: rename_source_key(name, renamings, [])[0]


def _skip_pattern(module: str) -> str:
    components = module.split(".")
    return "experts" if "experts" in components else components[-1]
