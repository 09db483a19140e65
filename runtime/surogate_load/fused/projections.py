"""Finds a model's layers that read the same activations, and has the first of them multiply for all.

The members stay where they are, with their names, adapters and packed tensors, whose codes become views of the fused
ones: nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surogate_formats.errors import UsageError
from surogate_load.divisible import fused_in_flat
from surogate_load.fused.groups import groups_of
from surogate_load.fused.weights import fuse
from surogate_load.linear import QuantizedLinear, arithmetic, has_hooks
from surogate_load.placement import FixedDtypeModule, Mover
from surogate_load.recipes.layer import RecipeLayer
from surogate_load.recipes.product import Adapter, Placement, multiply_with_adapters
from surogate_load.weight import WeightKind


def fuse_projections(model: nn.Module) -> None:
    """Fuses every such group of quantized layers; where format or recipe don't allow that, its layers stay alone.

    Groups that were fused under another recipe keep their weight.
    """
    for parent, names, members in groups_of(model):
        _fuse(parent, names, members)


def split_projections(model: nn.Module) -> None:
    """Has every fused group multiply one by one again; scaling state that its members share stays shared."""
    groups = {id(shared): shared for module in model.modules() for shared in getattr(module, "shared_input", ())}
    for shared in groups.values():
        shared.split()


def shared_bytes(model: nn.Module) -> int:
    """Bytes of fused packed tensors that are their members', too."""
    return sum(module.shared_bytes for module in model.modules() if isinstance(module, _FusedWeight))


def _fuse(parent: nn.Module, names: Sequence[str], members: Sequence[QuantizedLinear]) -> None:
    if any(member.shared_input for member in members):
        members[0].shared_input[0].adopt_recipes()
        return
    if any(member.divided for member in members):
        return
    alike = {(member.compute_dtype, member.bias is None) for member in members}
    devices = {part.device for member in members for part in member.parts}
    if alike != {(members[0].compute_dtype, True)} or len(devices) > 1 or devices.pop().type == "meta":
        return
    with torch.no_grad():
        fused = fuse([member.kind for member in members], [member.parts for member in members])
    if fused is not None and (recipe := _unite(members, fused[0])) is not None:
        shared = SharedInput(parent, names, members, recipe, *fused)
        for member in members:
            member.shared_input = (shared,)


def _unite(members: Sequence[QuantizedLinear], weight: WeightKind) -> type[RecipeLayer] | None:
    """The class of the members' recipes, which now have one state, if it allows one product for all."""
    kind, recipes = type(members[0].recipe), [member.recipe for member in members]
    return kind if all(type(recipe) is kind for recipe in recipes) and kind.unite(recipes, weight) else None


class SharedInput:
    """One weight for several layers, used where their parent's forward calls them with the same tensor.

    The first call computes for all; the others find their result, if their argument is the very same tensor under the
    same modes. When the forward ends, or the next one begins, what is left is dropped: adapters, weights and tensors
    may change between two forwards, and a result holds the graph. A layer that is called by itself stays alone. (Of
    what an inference tensor holds nobody counts the changes: in a forward they would have to be made in place.)
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
        """Makes the members' codes views of the fused ones."""
        self._parent, self._names, self._members = parent, tuple(names), tuple(members)
        self._kind = kind
        self._sizes = [member.out_features for member in members]
        self._weight = _FusedWeight(members, parts)
        parent.add_module(f"fused_{names[0]}", self._weight)
        self._hooks: list[Any] = []
        if not self._weight.flat:  # whose members' weights are loaded by no name
            loaded = [*((member, self._weight.refresh) for member in members), (parent, self._weight.check)]
            self._hooks += [module.register_load_state_dict_post_hook(hook) for module, hook in loaded]  # type: ignore[no-untyped-call]
        self._recipe: type[RecipeLayer] | None = recipe
        self._x: Tensor | None = None
        self._state: tuple[Any, ...] = ()
        self._results: dict[str, Tensor] = {}
        self._in_forward = False
        self._hooks += [parent.register_forward_pre_hook(self._begin), parent.register_forward_hook(self._end)]

    def adopt_recipes(self) -> None:
        """Takes over the recipes that the members have been given since."""
        self._recipe = _unite(self._members, self._kind)

    def split(self) -> None:
        """Leaves the members alone, each with its view of the fused weight."""
        for hook in self._hooks:
            hook.remove()
        for member in self._members:
            member.shared_input = ()
        del self._parent._modules[f"fused_{self._names[0]}"]

    def take(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The result of one of the parent's children; None if the group can't be multiplied as one now."""
        name = next((name for name in self._names if self._parent._modules[name] is layer), None)
        if name is None or not self._in_forward:
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

    def _begin(self, *_: Any) -> None:
        self._in_forward = True
        self._forget()

    def _end(self, *_: Any) -> None:
        self._in_forward = False
        self._forget()

    def _forget(self) -> None:
        self._x, self._results = None, {}

    def _multiply(self, x: Tensor) -> dict[str, Tensor] | None:
        adapters = list(self._adapters())
        if len(adapters) < len(self._names) or not self._weight.fits:
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


def _state(x: Tensor) -> tuple[Any, ...]:
    """What makes the same tensor another argument: the modes of autograd and autocast, and changes in place.

    Compiled code sees the latter as another tensor, and knows no inference mode; its tensors don't count theirs.
    """
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    modes = torch.is_grad_enabled(), autocast
    if torch.compiler.is_compiling():
        return modes
    return *modes, torch.is_inference_mode_enabled(), 0 if x.is_inference() else x._version


class _NoAdapter:
    lora_a = lora_b = None
    scaling = 0.0


_NO_ADAPTER = _NoAdapter()


class _FusedWeight(FixedDtypeModule):
    """The fused packed tensors; derived from the members', so not saved.

    Attributes:
        fits: whether they are the members' values: not where half of the members were loaded anew.
        flat: where the members' tensors stand, with slots of those of the fused ones that are no others than the
            members', by index; None where members have tensors of their own.
    """

    def __init__(self, members: Sequence[QuantizedLinear], parts: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.fits = True
        self._members = (tuple(members),)  # in a tuple: they are children elsewhere
        self.flat = fused_in_flat(members, parts)
        for index, part in enumerate(parts):
            if not self.flat or index not in self.flat.slots:
                self.register_buffer(f"part_{index}", part, persistent=False)
        self._count = len(parts)
        if self.flat and len(self.flat.slots) < len(parts):
            self.flat.weights.derived.append(self)
        self.link()

    @property
    def parts(self) -> tuple[Tensor, ...]:
        if not self.flat:
            return tuple(self._buffers.values())  # type: ignore[arg-type]
        flat, slots = self.flat.weights, self.flat.slots
        found = (flat.tensor(slots[i]) if i in slots else self._buffers[f"part_{i}"] for i in range(self._count))
        return tuple(found)  # type: ignore[arg-type]

    def link(self) -> None:
        """Makes the members' tensors views of the fused ones, but for scales that are stored otherwise there.

        Copies of a model are not: copying makes every parameter a tensor of its own.
        """
        for member, view in () if self.flat else self._views():
            if member.data_ptr() != view.data_ptr():
                member.data = view

    @property
    def shared_bytes(self) -> int:
        """Bytes of them that the members' tensors are views of."""
        views = () if self.flat else self._views()
        return sum(view.nbytes for member, view in views if member.data_ptr() == view.data_ptr())

    def _views(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each member's tensors, and the part of the fused one with the same bytes."""
        for number, fused in enumerate(self.parts):
            members = [member.parts[number] for member in self._members[0]]
            if sum(member.shape[0] for member in members) != fused.shape[0] or fused[0].shape != members[0][0].shape:
                continue
            yield from zip(members, torch.split(fused, [len(member) for member in members]), strict=True)

    def refresh(self, *_: Any) -> None:
        """Takes over what the members hold, after a state was loaded into one of them."""
        members = self._members[0]
        with torch.no_grad():
            fused = fuse([member.kind for member in members], [member.parts for member in members])
            pairs = list(zip(self.parts, fused[1], strict=True)) if fused else []
            self.fits = bool(pairs) and all(part.numel() in (1, old.numel()) for old, part in pairs)
            for old, part in pairs if self.fits else ():
                old.copy_(part)  # where it stands: a captured graph knows addresses
        if self.fits:
            self.link()

    def check(self, *_: Any) -> None:
        """Raises UsageError where what was loaded into all members can't be one weight as they were."""
        if not self.fits:
            raise UsageError("the loaded weights of one group have different scales; load the artifact anew")

    def _apply(self, fn: Mover, recurse: bool = True) -> _FusedWeight:
        super()._apply(fn, recurse)
        self.link()
        return self
