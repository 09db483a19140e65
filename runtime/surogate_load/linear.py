"""A linear layer whose frozen weight stays packed, in memory as on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surogate_formats.format import Format, TensorSpec
from surogate_formats.layouts import Layout
from surogate_load.divisible import Divisible
from surogate_load.placement import Mover, cast_by, move_only
from surogate_load.recipes.bf16 import Bf16
from surogate_load.recipes.layer import PackedWeight, RecipeLayer
from surogate_load.recipes.product import Adapter, Placement, multiply_with_adapters
from surogate_load.weight import WeightKind, empty_part


class QuantizedLinear(Divisible, nn.Linear):
    """y = x W^T + b with W [N, K] packed; differentiable in x and b, W is frozen.

    The packed tensors are frozen parameters under the artifact's own names (`weight`, `weight_absmax`, ...; underscores
    for dots), so `state_dict` holds the artifact's bytes. `.to(dtype)`, `.half()` and `.float()` change the bias and
    `compute_dtype`, never a packed tensor. Where the layout has no tensor called `weight`, that attribute gives the
    codes: libraries read its device.

    Attributes:
        kind: the format and the shape (N, K).
        part_names: names of the parts among the packed tensors, in the order of `kind.specs`.
        packed_names: names of all packed tensors, the parts first. The others are what the layout stores beside them,
            or what a checkpoint says about activations: carried along, not used.
        compute_dtype: the dtype that base products take and give; PEFT makes adapters in it.
        recipe: how the layer multiplies, and its scaling state.
        shared_input: the `fused.projections.SharedInput` of which the layer is a member; empty if it is alone.
        byte_rows, flat: see `Divisible`.
    """

    def __init__(
        self,
        kind: WeightKind,
        layout: Layout,
        *,
        bias: bool = False,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        stored: Mapping[str, TensorSpec] | None = None,
    ) -> None:
        """Makes the layer with uninitialised packed tensors.

        Args:
            kind: format and shape.
            layout: names the parts.
            bias: whether there is one.
            compute_dtype: see the class.
            device: of all tensors.
            stored: packed tensors by name, as they stand on disk, where they aren't just the parts: a single value may
                be of shape [], and there may be others.
        """
        nn.Module.__init__(self)
        self.kind = kind
        self.out_features, self.in_features = kind.shape
        self.compute_dtype = compute_dtype
        suffixes = layout.suffixes[kind.format.name]
        self.part_names = tuple(suffixes.get(part, f"weight_{part}").replace(".", "_") for part in kind.specs)
        specs = dict(zip(self.part_names, kind.specs.values(), strict=True)) | dict(stored or {})
        self.packed_names = tuple(specs)
        for name, spec in specs.items():
            self.register_parameter(name, nn.Parameter(empty_part(spec, device), requires_grad=False))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=compute_dtype, device=device))
        else:
            self.register_parameter("bias", None)
        self.recipe: RecipeLayer = Bf16()
        self.shared_input: tuple[Any, ...] = ()
        self.byte_rows = {}
        self._unsettled = False

    @classmethod
    def from_parts(
        cls,
        fmt: Format,
        layout: Layout,
        parts: Mapping[str, Tensor],
        shape: tuple[int, int],
        *,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> QuantizedLinear:
        """A layer around existing packed tensors (part name to tensor), which it doesn't copy."""
        kind = WeightKind(fmt, shape)
        layer = cls(kind, layout, bias=bias is not None, compute_dtype=compute_dtype, device="meta")
        for part, name in zip(kind.specs, layer.part_names, strict=True):
            setattr(layer, name, nn.Parameter(parts[part], requires_grad=False))
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(compute_dtype))
        return layer

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The parts in the format's order; the codes come first."""
        if self.byte_rows:
            return tuple(map(self.from_rows, self.part_names))
        found: list[Tensor] = [self._parameters[name] for name in self.part_names]  # type: ignore[misc]
        return tuple(part if part.dim() else part.view(1) for part in found)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [N, K], by default in `compute_dtype`."""
        return self.kind.dequantize(self.parts, dtype or self.compute_dtype)

    @property
    def packed_values(self) -> int:
        """N * K, which is what W counts as a parameter."""
        return self.in_features * self.out_features

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The codes. PEFT takes the weight of a module with this attribute from `dequantize()`, which DoRA needs.

        PEFT moves adapters to where this is: of a layer on device `meta`, whose values come later, to the CPU.
        """
        codes: Tensor = self.weight
        return torch.empty(0, dtype=codes.dtype) if codes.is_meta else codes

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], multiplied in `compute_dtype` (under autocast in its dtype) as the recipe says."""
        shared = self.shared_input[0].take(self, x) if self.shared_input else None
        return self.multiply(x) if shared is None else shared

    def multiply(self, x: Tensor, adapter: Adapter | None = None) -> Tensor:
        """`forward`, plus an adapter's product in one autograd function and in the same dtype.

        Args:
            x: [..., K].
            adapter: A [r, K], B [N, r] and scaling.
        """
        if self._unsettled:
            self._settle_if_there()
        device, dtype, autocast = arithmetic(x, self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):  # float32 products inside a recipe are meant to be that
            if adapter is None:
                y = self.recipe.multiply(x.to(dtype), self.kind, self.parts, bias)
            else:
                cast = Adapter(adapter.lora_a.to(dtype), adapter.lora_b.to(dtype), adapter.scaling)
                size = self.out_features
                place = Placement(size, ((0, size),), (cast.lora_a.shape[0],), cast.scaling)
                operands = self.recipe.operands(self.kind, self.parts)
                y = multiply_with_adapters(x.to(dtype), bias, [cast], place, operands)
        return y if autocast else y.to(x.dtype)

    @torch.no_grad()
    def settle(self) -> None:
        """Has the recipe look at the weight, which has its values by now, or others than before."""
        self.recipe.settle(PackedWeight("", self.kind, self.parts))
        if self.shared_input:
            self.shared_input[0].adopt_recipes()

    def reset_parameters(self) -> None:
        """Does nothing: packed weights have no random state."""

    def extra_repr(self) -> str:
        """Shape, format and compute dtype."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.kind.format}, compute_dtype={self.compute_dtype}"
        )

    def __getattr__(self, name: str) -> Any:
        """Gives the codes as `weight` in layouts that call them otherwise; or what they are divided with."""
        if name == "weight" and self.flat:
            return self.flat.weights.lines
        return super().__getattr__(self.part_names[0] if name == "weight" else name)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(prefix + name in state_dict for name in self.packed_names):
            self._unsettled = True
            self._settle_if_there()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle_if_there(self) -> None:
        """What is spread over ranks, or has no values yet, the recipe sees at its first product."""
        codes: Any = self._parameters.get(self.part_names[0])  # none in a `FlatWeights`, which has it settled
        if codes is not None and not hasattr(codes, "device_mesh") and not codes.is_meta:
            self._unsettled = False
            self.settle()

    def _apply(self, fn: Mover, recurse: bool = True) -> QuantizedLinear:
        if self.byte_rows:  # no cast changes bytes
            self.compute_dtype = cast_by(fn, self.compute_dtype)
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        old: dict[str, Tensor] = {name: self._parameters[name] for name in self.packed_names}  # type: ignore[misc]
        packed = {name: nn.Parameter(move_only(part.data, fn), requires_grad=False) for name, part in old.items()}
        compute_dtype = cast_by(fn, self.compute_dtype)
        for name in old:
            del self._parameters[name]
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        except BaseException:
            self._put_first(old)
            raise
        self._put_first(packed)
        self.compute_dtype = compute_dtype
        return self

    def _put_first(self, packed: Mapping[str, Tensor]) -> None:
        others = dict(self._parameters)
        self._parameters.clear()
        self._parameters.update({**packed, **others})  # type: ignore[dict-item]


def arithmetic(x: Tensor, compute_dtype: torch.dtype) -> tuple[str, torch.dtype, bool]:
    """(device type, dtype of a layer's products, whether autocast chose it)."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return device, torch.get_autocast_dtype(device) if autocast else compute_dtype, autocast


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its `forward`."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)
