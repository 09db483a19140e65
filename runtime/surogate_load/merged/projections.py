"""Finds a model's layers that read the same activations, and has the first of them multiply for all.

The members stay where they are, with their names, adapters and packed tensors, whose codes become views of the merged
ones: nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surogate_formats.errors import UsageError
from surogate_load.linear import QuantizedLinear, arithmetic, has_hooks
from surogate_load.merged.weights import merge
from surogate_load.placement import FixedDtypeModule, Mover
from surogate_load.recipes.layer import RecipeLayer
from surogate_load.recipes.product import Adapter, Placement, multiply_with_adapters
from surogate_load.weight import WeightKind

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that transformers' decoder layers call with the same tensor."""


def merge_projections(model: nn.Module) -> None:
    """Merges every such group of quantized layers; where format or recipe don't allow that, its layers stay alone.

    Groups that were merged under another recipe keep their weight.
    """
    for parent in list(model.modules()):
        for names in GROUPS:
            children = [parent._modules.get(name) for name in names]
            members = [getattr(child, "base_layer", child) for child in children]
            if all(type(member) is QuantizedLinear for member in members):
                _merge(parent, names, members)  # type: ignore[arg-type]


def _merge(parent: nn.Module, names: Sequence[str], members: Sequence[QuantizedLinear]) -> None:
    if any(member.shared_input for member in members):
        members[0].shared_input[0].adopt_recipes()
        return
    alike = {(member.compute_dtype, member.bias is None) for member in members}
    devices = {part.device for member in members for part in member.parts}
    if alike != {(members[0].compute_dtype, True)} or len(devices) > 1 or devices.pop().type == "meta":
        return
    with torch.no_grad():
        merged = merge([member.kind for member in members], [member.parts for member in members])
    if merged is not None and (recipe := _unite(members)) is not None:
        shared = SharedInput(parent, names, members, recipe, *merged)
        for member in members:
            member.shared_input = (shared,)


def _unite(members: Sequence[QuantizedLinear]) -> type[RecipeLayer] | None:
    """The class of the members' recipes, which now have one state, if it allows one product for all."""
    kind, recipes = type(members[0].recipe), [member.recipe for member in members]
    return kind if all(type(recipe) is kind for recipe in recipes) and kind.unite(recipes) else None


class SharedInput:
    """One weight for several layers, used where they are called one after the other with the same tensor.

    The first call computes for all; the others find their result, if their argument is the very same tensor.
    """

    def __init__(
        self,
        parent: nn.Module,
        names: Sequence[str],
        members: Sequence[QuantizedLinear],
        recipe: type[RecipeLayer],
        kind: WeightKind,
        parts: tuple[Tensor, ...],
    ) -> None:
        """Makes the members' codes views of the merged ones."""
        self._parent, self._names, self._members = parent, tuple(names), tuple(members)
        self._kind = kind
        self._sizes = [member.out_features for member in members]
        self._weight = _MergedWeight(members, parts)
        parent.add_module(f"merged_{names[0]}", self._weight)
        for member in members:
            member.register_load_state_dict_post_hook(self._weight.refresh)  # type: ignore[no-untyped-call]
        self._recipe: type[RecipeLayer] | None = recipe
        self._x: Tensor | None = None
        self._state: tuple[bool, int] = (False, 0)
        self._results: dict[str, Tensor] = {}

    def adopt_recipes(self) -> None:
        """Takes over the recipes that the members have been given since."""
        self._recipe = _unite(self._members)

    def take(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The result of one of the parent's children; None if the group can't be multiplied as one now."""
        name = next((name for name in self._names if self._parent._modules[name] is layer), None)
        if name is None:
            return None
        state = _state(x)
        if self._x is not x or self._state != state or name not in self._results:
            results = self._multiply(x)
            if results is None:
                return None
            self._x, self._state, self._results = x, state, results
        result = self._results.pop(name)
        if not self._results:
            self._x = None
        return result

    def _multiply(self, x: Tensor) -> dict[str, Tensor] | None:
        adapters = list(self._adapters())
        if len(adapters) < len(self._names):
            return None
        present = [(index, adapter) for index, adapter in enumerate(adapters) if adapter.lora_a is not None]
        if len({adapter.scaling for _, adapter in present}) > 1:
            return None
        if not torch.compiler.is_compiling():
            self._weight.link()
        layer = self._members[0]
        device, dtype, autocast = arithmetic(x, layer.compute_dtype)
        with torch.autocast(device, enabled=False):
            operands = layer.recipe.operands(self._kind, self._weight.parts)
            if present:
                cast = [Adapter(a.lora_a.to(dtype), a.lora_b.to(dtype), a.scaling) for _, a in present]
                y = multiply_with_adapters(x.to(dtype), None, cast, self._placement(present), operands)
            else:
                y = layer.recipe.multiply(x.to(dtype), self._kind, self._weight.parts, None)
        y = y if autocast else y.to(x.dtype)
        return dict(zip(self._names, torch.split(y, self._sizes, dim=-1), strict=True))

    def _adapters(self) -> Iterator[Any]:
        """Each member's adapter, `_NO_ADAPTER`, or nothing where more than a plain one is at work."""
        for name, member in zip(self._names, self._members, strict=True):
            child = self._parent._modules[name]
            if type(member.recipe) is not self._recipe or has_hooks(member):
                return
            if child is member:
                yield _NO_ADAPTER
            elif (adapter := getattr(child, "plain_adapter", None)) is not None:
                found = adapter()
                if found is None:
                    return
                yield found
            else:
                return

    def _placement(self, present: Sequence[tuple[int, Adapter]]) -> Placement:
        ends = [sum(self._sizes[: index + 1]) for index in range(len(self._sizes))]
        rows = tuple((ends[index] - self._sizes[index], ends[index]) for index, _ in present)
        return Placement(ends[-1], rows, tuple(a.lora_a.shape[0] for _, a in present), present[0][1].scaling)


def _state(x: Tensor) -> tuple[bool, int]:
    """What makes the same tensor another argument: whether gradients are wanted, and changes in place.

    Compiled code sees the latter as another tensor; tensors of inference mode don't count theirs.
    """
    counted = not torch.compiler.is_compiling() and not x.is_inference()
    return torch.is_grad_enabled(), x._version if counted else 0


class _NoAdapter:
    lora_a = lora_b = None
    scaling = 0.0


_NO_ADAPTER = _NoAdapter()


class _MergedWeight(FixedDtypeModule):
    """The merged packed tensors; derived from the members', so not saved."""

    def __init__(self, members: Sequence[QuantizedLinear], parts: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._members = (tuple(members),)  # in a tuple: they are children elsewhere
        for index, part in enumerate(parts):
            self.register_buffer(f"part_{index}", part, persistent=False)
        self.link()

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers.values())  # type: ignore[arg-type]

    def link(self) -> None:
        """Makes the members' tensors views of the merged ones, but for scales that are stored otherwise there.

        Copies of a model are not: copying makes every parameter a tensor of its own.
        """
        for number, merged in enumerate(self.parts):
            members = [member.parts[number] for member in self._members[0]]
            if sum(member.shape[0] for member in members) != merged.shape[0] or merged[0].shape != members[0][0].shape:
                continue
            for member, view in zip(members, torch.split(merged, [len(member) for member in members]), strict=True):
                if member.data_ptr() != view.data_ptr():
                    member.data = view

    def refresh(self, *_: Any) -> None:
        """Takes over what the members hold, after a state was loaded into them."""
        members = self._members[0]
        with torch.no_grad():
            merged = merge([member.kind for member in members], [member.parts for member in members])
        if merged is None:
            raise UsageError("the loaded weights of one group have different global scales; load the artifact anew")
        for old, part in zip(self.parts, merged[1], strict=True):
            old.copy_(part)  # where it stands: a captured graph knows addresses
        self.link()

    def _apply(self, fn: Mover, recurse: bool = True) -> _MergedWeight:
        super()._apply(fn, recurse)
        self.link()
        return self
