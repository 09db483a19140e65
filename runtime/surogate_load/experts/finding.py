"""Which fused experts of a transformers model are packed in files that hold each expert's weights by themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.core_model_loading import WeightRenaming, rename_source_key

from surogate_load.errors import PackedExpertsError
from surogate_load.experts.module import DOWN, GATE_UP
from surogate_load.packed_names import transforms_of

ROLES = {"gate_proj": (GATE_UP, 0), "up_proj": (GATE_UP, 1), "down_proj": (DOWN, 0),
         "w1": (GATE_UP, 0), "w3": (GATE_UP, 1), "w2": (DOWN, 0)}  # fmt: skip
"""What stands on disk after an expert's number, to the projection and the member of it."""

_WEIGHT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>0|[1-9][0-9]{0,5})\.(?P<role>\w+)")

_AGAIN = "quantize again with --skip experts"


@dataclass
class FoundExperts:
    """The experts of one layer.

    Attributes:
        module: full name in the model.
        stored: full name on disk, before the expert's number.
        roles: projection and member to what the files call it.
        numbers: roles to the numbers of the experts whose weights are packed.
        renamed: name on disk as transformers renames it, before it looks for converters.
    """

    module: str
    stored: str
    renamed: str
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    numbers: dict[str, set[int]] = field(default_factory=dict)

    def name(self, number: int, role: str) -> str:
        """The full name on disk of one expert's weight, without an ending."""
        return f"{self.stored}.{number}.{role}"


def find_experts(model: nn.Module, names: Iterable[str], companion: str) -> dict[str, FoundExperts]:
    """Full name in the model to the experts of each layer that has such weights; what the files hold is not checked.

    Args:
        model: a transformers model; its weights may still be missing.
        names: of all tensors of the files.
        companion: the ending of a tensor that every weight of the kind that is looked for has, and no other.
    """
    renamings, _ = transforms_of(model)
    state = {name for name, _ in model.named_parameters()}
    found: dict[str, FoundExperts] = {}
    for name in names:
        match = _WEIGHT.fullmatch(name.removesuffix(f".{companion}"))
        if match is None or not name.endswith(f".{companion}"):
            continue
        stored = match["experts"]
        module, renamed = _fused(model, stored, renamings, state)
        if module is None:
            continue
        experts = found.setdefault(module, FoundExperts(module, stored, renamed))
        place = ROLES.get(match["role"])
        if place is None or stored != experts.stored or experts.roles.setdefault(place, match["role"]) != match["role"]:
            raise PackedExpertsError(
                f"{match[0]} is packed, and is no gate, up or down projection of {module} that we know; {_AGAIN}"
            )
        experts.numbers.setdefault(match["role"], set()).add(int(match["number"]))
    return found


def _fused(
    model: nn.Module, stored: str, renamings: list[WeightRenaming], parameters: set[str]
) -> tuple[str | None, str]:
    """The fused experts of the model for this name on disk, and the name as transformers renames it."""
    renamed, _ = rename_source_key(f"{stored}.0.x", renamings, [])
    renamed = renamed.removesuffix(".0.x")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name in (renamed, prefix + renamed, renamed.removeprefix(prefix)):
        if f"{name}.{GATE_UP}" in parameters and f"{name}.{DOWN}" in parameters:
            return name, renamed
    return None, renamed


def is_known(experts: Any) -> bool:
    """Whether a module of transformers' computes gate, up and down with its experts, and nothing else."""
    known = {GATE_UP, DOWN, *((f"{GATE_UP}_bias", f"{DOWN}_bias") if getattr(experts, "has_bias", False) else ())}
    return (
        all(hasattr(experts, name) for name in ("is_transposed", "is_concatenated", "_apply_gate"))
        and getattr(experts, "has_gate", True)
        and not getattr(experts, "has_post_expert_norm", False)
        and {name for name, _ in experts.named_parameters()} == known
    )


def check_whole(found: FoundExperts, experts: Any) -> None:
    """Raises `PackedExpertsError` where a module of transformers' can't be replaced by packed experts.

    Args:
        found: what the files hold for it.
        experts: the module.
    """
    if not is_known(experts):
        raise PackedExpertsError(
            f"{found.stored} are packed, and {type(experts).__name__} computes with its experts in a way that we don't "
            f"know; {_AGAIN}"
        )
    count = len(getattr(experts, GATE_UP))
    for place in ((GATE_UP, 0), (GATE_UP, 1), (DOWN, 0)):
        role = found.roles.get(place)
        numbers = found.numbers.get(role or "", set())
        if numbers != set(range(count)):
            wrong = min(numbers.symmetric_difference(range(count)))
            what = role or ("gate_proj", "up_proj", "down_proj")[sum(place[1:]) if place[0] == GATE_UP else 2]
            state = "is packed, but the model has no such expert" if wrong >= count else "is not packed, but others are"
            raise PackedExpertsError(f"{found.name(wrong, what)} {state}: experts are taken whole only; {_AGAIN}")
