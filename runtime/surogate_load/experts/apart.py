"""transformers' fused experts as one linear for each weight, under the names of checkpoints that hold them so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from surogate_load.block_calls import NoBlocksError
from surogate_load.errors import PackedExpertsError
from surogate_load.experts.finding import find_experts, is_known
from surogate_load.experts.module import DOWN, GATE_UP, interleaved


class ExpertsApart(nn.Module):
    """Experts as children `0`, `1`, ..., each with linears for gate, up and down; computes as the class it stands for.

    Attributes:
        count: how many there are.
        roles: what gate, up and down are called.
    """

    def __init__(self, original: Any, roles: tuple[str, str, str]) -> None:
        """Makes the linears on the meta device; the activation is `original`'s, whose parameters are dropped."""
        super().__init__()
        self.roles, self.count = roles, len(getattr(original, GATE_UP))
        self._original = (original,)  # in a tuple: its parameters are none of the model's
        rows, columns = getattr(original, DOWN).shape[1:]
        hidden, inner = (columns, rows) if original.is_transposed else (rows, columns)
        shapes = dict(zip(roles, ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True))
        for number in range(self.count):
            linears = {
                role: nn.Linear(*shape, bias=original.has_bias, device="meta", dtype=getattr(original, DOWN).dtype)
                for role, shape in shapes.items()
            }
            self.add_module(str(number), nn.ModuleDict(linears))
        for name in list(original._parameters):
            delattr(original, name)

    def weights(self, number: int) -> list[Tensor]:
        """The weights of an expert: gate, up, down."""
        return [self.linear(number, role).weight for role in self.roles]

    def linear(self, number: int, role: str) -> nn.Linear:
        """One of an expert's linears."""
        found = self.get_submodule(f"{number}.{role}")
        assert isinstance(found, nn.Linear)
        return found

    def inner(self, number: int, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """What an expert with these weights for gate and up gives to its down projection, of x [tokens, hidden]."""
        linears = [self.linear(number, role) for role in self.roles[:2]]
        both = [nn.functional.linear(x, weight, each.bias) for weight, each in zip((gate, up), linears, strict=True)]
        original, joined = self._original[0], torch.cat(both, dim=-1)
        found: Tensor = original._apply_gate(joined if original.is_concatenated else interleaved(joined))
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [T, hidden] to the sum of what their experts make of them; expert after expert, as transformers."""
        summed = torch.zeros_like(hidden_states)
        for number in range(self.count):
            tokens, choices = torch.where(top_k_index == number)
            if len(tokens) == 0:
                continue
            gate, up, _ = self.weights(number)
            y = self.linear(number, self.roles[2])(self.inner(number, hidden_states[tokens], gate, up))
            summed.index_add_(0, tokens, (y * top_k_weights[tokens, choices, None]).to(summed.dtype))
        return summed


def put_apart(model: nn.Module, names: Iterable[str]) -> None:
    """Replaces the fused experts of a model, which has no weights yet, whose checkpoint holds each expert's by itself.

    Args:
        model: of transformers.
        names: of the checkpoint's tensors.

    Raises:
        NoBlocksError: the experts compute, or are stored, in a way that isn't known.
    """
    try:
        experts = find_experts(model, names, "weight")
    except PackedExpertsError as error:
        raise NoBlocksError(f"{type(model).__name__}: an expert has another weight than gate, up and down") from error
    for module, found in experts.items():
        original: Any = model.get_submodule(module)
        roles = [found.roles.get(place) for place in ((GATE_UP, 0), (GATE_UP, 1), (DOWN, 0))]
        if not is_known(original) or None in roles:
            raise NoBlocksError(
                f"{type(model).__name__}: {type(original).__name__} computes with its experts in a way that isn't "
                "known here; it can't be run block by block"
            )
        parent, _, child = module.rpartition(".")
        setattr(model.get_submodule(parent), child, ExpertsApart(original, tuple(roles)))  # type: ignore[arg-type]
