"""Recipes: the arithmetic of a training step. One module and one row in `RECIPE_LAYERS` each."""

from __future__ import annotations

from collections.abc import Callable

from surogate_formats.recipe import Recipe
from surogate_load.recipes.bf16 import Bf16
from surogate_load.recipes.fp8_hybrid import Fp8Hybrid
from surogate_load.recipes.layer import PackedWeight, RecipeLayer
from surogate_load.recipes.notes import Notes
from surogate_load.recipes.nvfp4 import Nvfp4

__all__ = ["RECIPE_LAYERS", "RecipeLayer"]

Builder = Callable[[PackedWeight, Recipe, Notes, bool], RecipeLayer]

RECIPE_LAYERS: dict[str, Builder] = {
    "bf16": Bf16.build,
    "fp8-hybrid": Fp8Hybrid.build,
    "nvfp4": Nvfp4.build,
}
"""What makes a layer's arithmetic, by the name of the recipe; the last argument asks for its emulation."""
