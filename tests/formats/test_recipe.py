"""The recipe as data."""

import pytest

from surogate_formats.errors import UsageError
from surogate_formats.recipe import RECIPES, IncompatibleRecipeError, Recipe, check_compatible


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fp8"}, "`name` is 'fp8'; choose one of bf16, fp8-hybrid, nvfp4"),
        ({"name": "fp8_hybrid"}, "`name` is 'fp8_hybrid'"),
        ({"margin": -1}, "margin is -1; it must not be negative"),
        ({"amax_history_len": 0}, "amax_history_len is 0; it must be at least 1"),
        ({"amax_compute_algo": "MAX"}, "choose one of max, most_recent"),
        ({"backend": "triton"}, "choose one of cutlass, cudnn"),
        ({"four_over_six_metric": "MSE"}, "choose one of mse, l1, absmax"),
    ],
)
def test_values_that_a_recipe_does_not_have(arguments, message):
    with pytest.raises(UsageError, match=f"^recipe: .*{message}"):
        Recipe(**arguments)


def test_nf4_under_nvfp4_alone_is_refused():
    for name in ("nf4", "fp4", "fp8"):
        for recipe in map(Recipe, RECIPES):
            if (name, recipe.name) == ("nf4", "nvfp4"):
                with pytest.raises(IncompatibleRecipeError, match="quantized twice; use recipe bf16 or fp8-hybrid"):
                    check_compatible(name, recipe)
            else:
                check_compatible(name, recipe)
