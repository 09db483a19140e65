"""What a recipe is to one layer: how its base weight is multiplied, and the state that needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from surogate_load.placement import FixedDtypeModule
from surogate_load.recipes.product import Operands, PackedLinear
from surogate_load.weight import WeightKind


@dataclass(frozen=True)
class PackedWeight:
    """A layer's weight at the time when it is given a recipe.

    Attributes:
        name: full name of the layer, for messages.
        kind: format and shape (N, K).
        parts: the packed tensors in the order of `kind.specs`.
    """

    name: str
    kind: WeightKind
    parts: tuple[Tensor, ...]


class RecipeLayer(FixedDtypeModule):
    """One layer's arithmetic; scaling state lives in its buffers.

    Attributes:
        waits: the recipe was made for a weight without values (on device `meta`), and must `settle`.
    """

    waits = False

    def settle(self, weight: PackedWeight) -> None:
        """Looks at the weight, which has its values by now, or others than before."""

    def operands(self, kind: WeightKind, parts: tuple[Tensor, ...]) -> Operands:
        """What the layer multiplies with now.

        Args:
            kind: what the parts mean.
            parts: W [N, K], packed.
        """
        raise NotImplementedError

    def multiply(self, x: Tensor, kind: WeightKind, parts: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        """X W^T + bias, differentiable in x and bias.

        Args:
            x: [..., K].
            kind: what the parts mean.
            parts: W [N, K], packed.
            bias: [N] in the dtype of x.

        Returns:
            [..., N] in the dtype of x.
        """
        product, state, tensors = self.operands(kind, parts)
        y: Tensor = PackedLinear.apply(x, bias, product, state, *tensors)  # type: ignore[no-untyped-call]
        return y

    @classmethod
    def unite(cls, layers: Sequence[RecipeLayer], kind: WeightKind) -> bool:
        """Has layers of this class that read the same x keep one scaling state: they can then multiply as one weight.

        Args:
            layers: of one recipe, in the order of their rows in that weight.
            kind: of that weight.

        Returns:
            Whether the recipe allows it.
        """
        return False

    def adapter_linear(self, linear: nn.Linear) -> nn.Linear:
        """The module that multiplies with an adapter matrix: `linear` itself, or one that shares its parameters."""
        return linear
