"""The experts of one layer, whose frozen weights stay packed, in memory as on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surogate_formats.format import TensorSpec
from surogate_load.divisible import Divisible
from surogate_load.experts.kind import ExpertsKind
from surogate_load.experts.product import ExpertsAdapter, PackedWeight, multiply
from surogate_load.experts.routing import Routing, gather, route, spread
from surogate_load.linear import arithmetic
from surogate_load.placement import Mover, cast_by, move_only
from surogate_load.weight import TORCH_DTYPES

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""What transformers calls the parameters of its fused experts; the packed codes have the same names."""

Adapters = Mapping[str, Sequence[ExpertsAdapter]]
"""Projection to the adapters at work on it."""


@dataclass(frozen=True)
class Projection:
    """How one projection is packed.

    Attributes:
        kind: format, shape, experts and members.
        roles: of each member, what stands on disk after the expert's number: `gate_proj`, `up_proj`.
        left_out: endings of what only some of the experts have beside their weights, which is not in the model.
        tensors: name of each packed parameter, without the projection's, to the ending of its tensors on disk and what
            one of them is; the parts first, in the order of the format. Where a layout stores something else than the
            parts, the endings are empty.
    """

    kind: ExpertsKind
    roles: tuple[str, ...]
    tensors: Mapping[str, tuple[str, TensorSpec]]
    left_out: tuple[str, ...] = ()

    def parameter(self, name: str, part: str) -> str:
        """The name of a packed parameter of the projection called `name`."""
        return f"{name}_{part}" if part else name


class QuantizedExperts(Divisible, nn.Module):
    """transformers' fused experts with packed weights; differentiable in x and the routing weights.

    A packed parameter holds one tensor of every expert's weights, stacked: `gate_up_proj` and `down_proj` are codes,
    `gate_up_proj_absmax` and so on what stands beside them. `.to(dtype)` changes biases and `compute_dtype`, never
    these. Activation, limits and biases are those of the class that it stands for.

    Attributes:
        projections: `gate_up_proj` and `down_proj`, and how they are packed.
        packed_names: names of the packed parameters.
        stored: full name of the experts on disk, before the expert's number.
        biases_by_expert: whether each expert's biases stand on disk by themselves.
        compute_dtype: the dtype of the products.
        is_transposed: as transformers' class says it of its own weights, for PEFT.
        num_experts: how many there are.
        byte_rows: see `Divisible`; a row is an expert.
    """

    def __init__(
        self,
        original: Any,
        projections: Mapping[str, Projection],
        stored: str,
        *,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        biases_by_expert: bool = False,
    ) -> None:
        """Makes the experts with uninitialised packed parameters.

        Args:
            original: transformers' module; its activation and biases are taken over.
            projections: see the class.
            stored: see the class.
            compute_dtype: see the class.
            device: of the packed parameters.
            biases_by_expert: see the class.
        """
        super().__init__()
        self.byte_rows = {}
        self.projections, self.stored, self.biases_by_expert = dict(projections), stored, biases_by_expert
        self.compute_dtype = compute_dtype
        self.num_experts = self.projections[GATE_UP].kind.experts
        self.is_transposed, self.is_concatenated = original.is_transposed, original.is_concatenated
        self.has_bias = original.has_bias
        self._original = (original,)  # in a tuple: its dense parameters are no longer the model's
        self._weights = {name: PackedWeight.of(each.kind) for name, each in self.projections.items()}
        for name, each in self.projections.items():
            for part, (_, spec) in each.tensors.items():
                empty = torch.empty(each.kind.stacked(spec), dtype=TORCH_DTYPES[spec.dtype], device=device)
                self.register_parameter(each.parameter(name, part), nn.Parameter(empty, requires_grad=False))
        self.packed_names = tuple(self._parameters)
        for name in self.projections if self.has_bias else ():
            self.register_parameter(f"{name}_bias", getattr(original, f"{name}_bias"))
        for name in list(original._parameters):
            delattr(original, name)

    def stored_tensors(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each packed parameter's name, and the names on disk of what is stacked in it, expert by expert.

        Nothing of what a layout stores in another form.
        """
        for name, projection in self.projections.items():
            weights = [f"{number}.{role}" for number in range(projection.kind.experts) for role in projection.roles]
            for part, (suffix, _) in projection.tensors.items():
                if suffix:
                    tensors = tuple(f"{self.stored}.{weight}.{suffix}" for weight in weights)
                    yield projection.parameter(name, part), tensors

    @property
    def packed_values(self) -> int:
        """What the packed weights count as parameters."""
        return sum(each.kind.experts * each.kind.rows * each.kind.shape[1] for each in self.projections.values())

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """PEFT moves adapters to where this is: of experts on device `meta`, whose values come later, to the CPU."""
        codes: Tensor = self._parameters[GATE_UP]  # type: ignore[assignment]
        return torch.empty(0, dtype=codes.dtype) if codes.is_meta else codes

    def parts(self, name: str) -> tuple[Tensor, ...]:
        """The stacked parts of a projection, in the order of its format."""
        projection = self.projections[name]
        own = list(projection.tensors)[: len(projection.kind.weight.specs)]
        names = [projection.parameter(name, part) for part in own]
        if self.byte_rows:
            return tuple(map(self.from_rows, names))
        return tuple(self._parameters[each] for each in names)  # type: ignore[misc]

    def dequantize(self, name: str, expert: int, member: int, dtype: torch.dtype | None = None) -> Tensor:
        """One dense weight [N, K], by default in `compute_dtype`.

        Args:
            name: the projection.
            expert: its number.
            member: of `gate_up_proj` 0 for gate, 1 for up; of `down_proj` 0.
            dtype: of the result.
        """
        kind = self.projections[name].kind
        return kind.weight.dequantize(kind.parts_of(self.parts(name), expert, member), dtype or self.compute_dtype)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapters: Adapters | None = None
    ) -> Tensor:
        """Tokens [T, H] to the sum of what their experts make of them, [T, H].

        Args:
            hidden_states: [T, H].
            top_k_index: int64 [T, k], the experts of each token.
            top_k_weights: [T, k].
            adapters: beside the base; every expert's A and B stacked.
        """
        device, dtype, _ = arithmetic(hidden_states, self.compute_dtype)
        routing = route(top_k_index, self.num_experts)
        weights = top_k_weights.reshape(-1).index_select(0, routing.slots)
        with torch.autocast(device, enabled=False):
            x = spread(hidden_states.to(dtype), routing)
            gated = self._original[0]._apply_gate(self._multiply(GATE_UP, x, routing, adapters or {}))
            y = self._multiply(DOWN, gated.to(dtype), routing, adapters or {})
            summed = gather(y * weights[:, None], routing)
        return summed.to(hidden_states.dtype)

    def _multiply(self, name: str, x: Tensor, routing: Routing, adapters: Adapters) -> Tensor:
        adapter = joined(adapters.get(name, ()), x.dtype)
        y = multiply(x, routing.ends, self._weights[name], self.parts(name), adapter)
        if name == GATE_UP and not self.is_concatenated:
            y = interleaved(y)
        if self.has_bias:
            y = y + self.get_parameter(f"{name}_bias").to(y.dtype).index_select(0, routing.experts)
        return y

    def extra_repr(self) -> str:
        """Number, shapes, format and compute dtype."""
        shapes = ", ".join(f"{name}=[{p.kind.rows}, {p.kind.shape[1]}]" for name, p in self.projections.items())
        fmt = self.projections[DOWN].kind.format
        return f"experts={self.num_experts}, {shapes}, format={fmt}, compute_dtype={self.compute_dtype}"

    def _apply(self, fn: Mover, recurse: bool = True) -> QuantizedExperts:
        if self.byte_rows:  # no cast changes bytes
            self.compute_dtype = cast_by(fn, self.compute_dtype)
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        packed = {name: self._parameters[name] for name in self.packed_names}
        moved = {name: nn.Parameter(move_only(part.data, fn), requires_grad=False) for name, part in packed.items()}  # type: ignore[union-attr]
        others = {name: part for name, part in self._parameters.items() if name not in packed}
        compute_dtype = cast_by(fn, self.compute_dtype)
        order = list(self._parameters)
        self._parameters.clear()
        self._parameters.update(others)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            packed, self.compute_dtype = moved, compute_dtype  # type: ignore[assignment]
        finally:
            others = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update({name: {**packed, **others}[name] for name in order})
        return self


def interleaved(y: Tensor) -> Tensor:
    """[..., 2I] of gate and up one after the other to gate_0, up_0, gate_1, ..."""
    gate_up = y.view(*y.shape[:-1], 2, y.shape[-1] // 2)
    return gate_up.transpose(-1, -2).reshape(y.shape)


def joined(adapters: Sequence[ExpertsAdapter], dtype: torch.dtype) -> ExpertsAdapter | None:
    """Several adapters as one, of the sum of their ranks; None if there are none."""
    if len(adapters) < 2:
        return next((ExpertsAdapter(a.to(dtype), b.to(dtype), scaling) for a, b, scaling in adapters), None)
    lora_a = torch.cat([adapter.lora_a.to(dtype) for adapter in adapters], dim=1)
    lora_b = torch.cat([adapter.lora_b.to(dtype) * adapter.scaling for adapter in adapters], dim=2)
    return ExpertsAdapter(lora_a, lora_b, 1.0)
