"""A recipe as data: the arithmetic of a training step and its switches, as the specification names them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from surogate_formats.errors import UsageError
from surogate_formats.format import check_choice, check_type

RECIPES = ("bf16", "fp8-hybrid", "nvfp4")


class IncompatibleRecipeError(UsageError):
    """A format and a recipe that don't go together."""


@dataclass(frozen=True)
class Recipe:
    """How base linears are multiplied while adapters train; the artifact keeps one as its default.

    Attributes:
        name: `bf16`; `fp8-hybrid`: E4M3 forward with delayed scaling, E5M2 backward; `nvfp4`: FP4 in both directions.
        margin: powers of two of headroom in delayed scales (fp8-hybrid).
        amax_history_len: steps of the amax window (fp8-hybrid).
        amax_compute_algo: the window's `max` or its `most_recent` amax (fp8-hybrid).
        reduce_amax: take the largest amax over the process group (fp8-hybrid).
        disable_rht: no random Hadamard transform before the adapters' dA and dB (nvfp4).
        disable_stochastic_rounding: round gradients to nearest (nvfp4).
        disable_2d_quantization: 1x16 instead of 16x16 scales where a weight is quantized at load (nvfp4).
        backend: `cutlass` or `cudnn`; they differ in numbers (nvfp4).
        four_over_six: choose between two scales a block of the activations (nvfp4).
        four_over_six_metric: the error by which that choice is made: `mse`, `l1` or `absmax` (nvfp4).
    """

    name: Literal["bf16", "fp8-hybrid", "nvfp4"] = "bf16"
    margin: int = 0
    amax_history_len: int = 1024
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    reduce_amax: bool = True
    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False
    backend: Literal["cutlass", "cudnn"] = "cutlass"
    four_over_six: bool = True
    four_over_six_metric: Literal["mse", "l1", "absmax"] = "mse"

    kind: ClassVar[str] = "recipe"

    def __post_init__(self) -> None:
        """Refuses values that the recipe doesn't have."""
        for parameter in fields(self):
            check_type(self.kind, parameter.name, getattr(self, parameter.name), parameter.default)
        check_choice(self.kind, "name", self.name, RECIPES)
        check_choice(self.kind, "amax_compute_algo", self.amax_compute_algo, ("max", "most_recent"))
        check_choice(self.kind, "backend", self.backend, ("cutlass", "cudnn"))
        check_choice(self.kind, "four_over_six_metric", self.four_over_six_metric, ("mse", "l1", "absmax"))
        if self.amax_history_len < 1:
            raise UsageError(f"recipe: amax_history_len is {self.amax_history_len}; it must be at least 1")
        if self.margin < 0:
            raise UsageError(f"recipe: margin is {self.margin}; it must not be negative")


def check_compatible(format_name: str, recipe: Recipe) -> None:
    """Raises `IncompatibleRecipeError` for nf4 under nvfp4: the base would be quantized twice."""
    if (format_name, recipe.name) == ("nf4", "nvfp4"):
        raise IncompatibleRecipeError(
            "recipe nvfp4 can't train on an nf4 base: it would be quantized twice; use recipe bf16 or fp8-hybrid"
        )
