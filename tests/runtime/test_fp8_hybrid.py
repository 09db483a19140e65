"""Recipe fp8-hybrid: what is multiplied, and the life of a delayed scale."""

import copy
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from runtime.artifacts import tiny_llama, write_artifact
from runtime.layers import KINDS, make_layer, with_recipe

from surogate_formats.recipe import Recipe
from surogate_load import load_model, prepare_for_sharding
from surogate_load.errors import CopiedModelError
from surogate_load.model_recipe import set_recipe
from surogate_load.recipes.fp8_weight import power_of_two_scale

E4M3 = ml_dtypes.float8_e4m3fn
E5M2 = ml_dtypes.float8_e5m2


def rounded(x, dtype, limit, scale):
    """x through an fp8 type, in float64 after the rounding."""
    return np.clip(x.astype(np.float32) * np.float32(scale), -limit, limit).astype(dtype).astype(np.float64) / scale


def make(kind, recipe=None, **settings):
    layer, dense = make_layer(kind, **settings)
    model = with_recipe(layer, recipe or Recipe("fp8-hybrid"))
    return model, layer, dense


def step(model, *, lr=0.0):
    """Ends a training step: an optimizer that owns the layer's bias."""
    bias = model[0].bias.requires_grad_(True)
    torch.optim.SGD([bias], lr=lr).step()


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_quantized_operands(kind):
    model, layer, dense = make(kind)
    x = torch.randn(6, 32, requires_grad=True)
    dy = torch.randn(6, 48)
    y = model(x)
    y.backward(dy)
    weight = dense.numpy().astype(np.float64)
    if not kind.startswith("fp8"):
        power = layer.recipe.weight.multiplier.item()
        assert math.log2(power).is_integer()
        amax = np.abs(weight).max()
        assert 224 < amax * power <= 448
        weight = rounded(weight, E4M3, 448, power)
    amax_x = x.abs().max().item()
    expected = rounded(x.detach().numpy(), E4M3, 448, np.float32(448) / np.float32(amax_x)) @ weight.T
    np.testing.assert_allclose(y.detach().numpy(), expected + layer.bias.detach().numpy(), rtol=1e-4, atol=1e-4)
    gradient, rows = dy.numpy(), np.ones(48, np.float32)
    if kind == "fp8-channel":
        rows = layer.weight_scale.float().numpy().reshape(-1)
        weight = weight / rows[:, None]
    scaled = gradient * rows
    dx = rounded(scaled, E5M2, 57344, np.float32(57344) / np.abs(scaled).max()) @ weight
    np.testing.assert_allclose(x.grad.numpy(), dx, rtol=1e-4, atol=1e-4 * np.abs(dx).max())
    assert layer.recipe.input.current.item() == amax_x
    assert layer.recipe.gradient.current.item() == np.abs(scaled).max()


def test_fp8_codes_are_operands_as_they_stand():
    """A second rounding of W would move the product: by tensor, channel and tile W is exactly the stored codes."""
    for kind in ("fp8-tensor", "fp8-channel", "fp8-block"):
        model, _, dense = make(kind, bias=False)
        eye = torch.eye(32) * 448
        torch.testing.assert_close(model(eye).t() / 448, dense, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("amax", "scale"), [(448, 1), (449, 0.5), (447, 1), (1, 256), (0, 1), (3e38, 2.0**-120), (1e-40, 2.0**126)]
)
def test_power_of_two_scale(amax, scale):
    assert power_of_two_scale(torch.tensor([float(amax)])).item() == scale
    just_above = torch.tensor([np.nextafter(np.float32(448), np.float32(1000)).item()])
    assert power_of_two_scale(just_above).item() == 0.5


def run(model, magnitude, *, backward=True):
    x = torch.zeros(2, 32, requires_grad=True)
    with torch.no_grad():
        x[0, 0] = magnitude
    y = model(x)
    if backward:
        y.sum().backward()
    return y


def test_first_step_uses_its_own_amax_and_the_next_one_the_recorded():
    model, layer, _ = make("fp8-tensor")
    state = layer.recipe.input
    for magnitude in (3.0, 5.0):
        assert state.scale.item() == 0
        run(model, magnitude)
    step(model)
    assert state.scale.item() == np.float32(448) / np.float32(5)
    assert layer.recipe.gradient.scale.item() == 57344
    assert state.history[-1].item() == 5
    assert state.current.item() == 0
    run(model, 7.0)
    assert state.scale.item() == np.float32(448) / np.float32(5)
    assert state.current.item() == 7


def test_too_small_a_delayed_scale_saturates():
    model, _, dense = make("fp8-tensor", bias=False)
    run(model, 2.0)
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0).step()
    assert model[0].recipe.input.scale.item() == 0  # that optimizer owns nothing of this model
    model[0].register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    torch.optim.SGD([model[0].extra], lr=0).step()
    y = run(model, 100.0)
    torch.testing.assert_close(y[0], dense[:, 0] * 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, [448 / 2, 448 / 4, 448 / 4, 448 / 4, 448 / 8]),
        ({"amax_history_len": 2}, [448 / 2, 448 / 4, 448 / 4, 448 / 1, 448 / 8]),
        ({"amax_compute_algo": "most_recent"}, [448 / 2, 448 / 4, 448 / 1, 448 / 1, 448 / 8]),
        ({"margin": 1}, [224 / 2, 224 / 4, 224 / 4, 224 / 4, 224 / 8]),
        ({"amax_history_len": 1}, [448 / 2, 448 / 4, 448 / 1, 448 / 1, 448 / 8]),
    ],
)
def test_window_algorithm_and_margin(settings, scales):
    model, layer, _ = make("fp8-tensor", Recipe("fp8-hybrid", **settings))
    found = []
    for magnitude in (2.0, 4.0, 1.0, 1.0, 8.0):
        run(model, magnitude)
        step(model)
        found.append(layer.recipe.input.scale.item())
    assert found == scales


def test_margin_keeps_headroom_below_the_largest_value():
    """With margin 3 the codes reach 56 of 448, so a value eight times the recorded amax still fits."""
    model, _, dense = make("fp8-tensor", Recipe("fp8-hybrid", margin=3), bias=False)
    run(model, 1.0)
    model[0].register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    torch.optim.SGD([model[0].extra], lr=0).step()
    torch.testing.assert_close(run(model, 8.0)[0], dense[:, 0] * 8, rtol=1e-5, atol=0)


def test_accumulation_takes_the_maximum_and_recomputation_changes_nothing():
    model, layer, _ = make("fp8-tensor")
    for magnitude in (3.0, 5.0, 4.0):
        torch.utils.checkpoint.checkpoint(run, model, magnitude, use_reentrant=False)
    assert layer.recipe.input.current.item() == 5
    step(model)
    assert layer.recipe.input.history.count_nonzero() == 1
    step(model)  # nothing was recorded: no step
    assert layer.recipe.input.history.count_nonzero() == 1
    assert layer.recipe.input.history[-1].item() == 5


def test_evaluation_records_nothing():
    model, layer, _ = make("fp8-tensor")
    run(model, 3.0)
    step(model)
    before = copy.deepcopy(layer.recipe.state_dict())
    model.eval()
    run(model, 100.0)
    model.train()
    with torch.no_grad():
        run(model, 100.0, backward=False)
    assert all(torch.equal(before[name], value) for name, value in layer.recipe.state_dict().items())


def test_evaluation_before_the_first_step_uses_its_own_amax():
    model, layer, dense = make("fp8-tensor", bias=False)
    model.eval()
    torch.testing.assert_close(run(model, 1000.0)[0], dense[:, 0] * 1000, rtol=1e-5, atol=0)
    assert layer.recipe.input.current.item() == 0


def test_zero_and_non_finite_amax_leave_the_scale():
    model, layer, _ = make("fp8-tensor", Recipe("fp8-hybrid", amax_compute_algo="most_recent"))
    for magnitude in (2.0, float("inf"), float("nan"), 0.0):
        run(model, magnitude)
        step(model)
        assert layer.recipe.input.scale.item() == 224
    assert layer.recipe.input.history.isfinite().all()


def test_scale_is_clamped():
    model, layer, _ = make("fp8-tensor")
    run(model, 1e-38)
    step(model)
    assert layer.recipe.input.scale.item() == 2.0**126
    assert run(model, 1e-38).isfinite().all()


def test_state_is_saved_and_restored():
    model, layer, _ = make("fp8-tensor")
    run(model, 3.0)
    step(model)
    run(model, 2.0)
    saved = copy.deepcopy(model.state_dict())
    other, restored, _ = make("fp8-tensor")
    other.load_state_dict(saved)
    for name, value in layer.recipe.state_dict().items():
        assert torch.equal(value, restored.recipe.state_dict()[name])
    assert restored.recipe.input.scale.item() == np.float32(448) / np.float32(3)
    assert torch.equal(run(other, 2.5), run(model, 2.5))


def test_casts_leave_the_state_alone():
    model, layer, _ = make("fp8-tensor")
    run(model, 3.0)
    step(model)
    model.to(torch.bfloat16)
    assert layer.recipe.input.scale.dtype == torch.float32
    assert layer.recipe.input.scale.item() == np.float32(448) / np.float32(3)


def test_autocast_changes_the_dtype_of_x_and_y_only():
    model, _, _ = make("fp8-tensor")
    x = torch.randn(6, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    assert torch.equal(found, model.to(torch.bfloat16)(x.bfloat16()))


def test_two_models_step_apart():
    first, one, _ = make("fp8-tensor")
    second, two, _ = make("fp8-tensor")
    run(first, 2.0)
    run(second, 4.0)
    step(first)
    assert (one.recipe.input.scale.item(), two.recipe.input.scale.item()) == (224, 0)
    assert two.recipe.input.current.item() == 4


def test_a_copy_must_be_given_a_recipe_of_its_own():
    model, _, _ = make("fp8-tensor")
    twin = copy.deepcopy(model)
    twin.eval()
    run(twin, 1.0)
    twin.train()
    with pytest.raises(CopiedModelError, match="set_recipe"):
        run(twin, 1.0)
    set_recipe(twin, Recipe("fp8-hybrid"), emulate=True)
    run(twin, 2.0)
    step(twin)
    assert twin[0].recipe.input.scale.item() == 224


def test_a_wrapper_with_another_recipe_takes_over():
    model, layer, _ = make("fp8-tensor")
    wrapper = torch.nn.Sequential(model)
    set_recipe(wrapper, Recipe("fp8-hybrid", amax_compute_algo="most_recent"), emulate=True)
    found = []
    for magnitude in (4.0, 2.0):
        run(wrapper, magnitude)
        step(model)
        found.append(layer.recipe.input.scale.item())
    assert found == [448 / 4, 448 / 2]
    assert layer.recipe.input.history.count_nonzero() == 2
    set_recipe(wrapper, Recipe(), emulate=True)
    run(wrapper, 1.0)
    step(model)


def test_a_part_with_another_recipe_leaves_the_rest_alone():
    (one, _), (two, _) = make_layer("fp8-tensor"), make_layer("fp8-tensor", (32, 48))
    model = torch.nn.Sequential(torch.nn.Sequential(one), torch.nn.Sequential(two))
    set_recipe(model, Recipe("fp8-hybrid"), emulate=True)
    set_recipe(model[0], Recipe("fp8-hybrid", margin=1, amax_compute_algo="most_recent"), emulate=True)
    for magnitude in (4.0, 2.0):
        run(model, magnitude)
        before = two.recipe.input.current.item()
        step(model[0])
    assert one.recipe.input.scale.item() == 224 / 2
    assert one.recipe.input.history.count_nonzero() == two.recipe.input.history.count_nonzero() == 2
    assert two.recipe.input.history[-1].item() == before
    set_recipe(model[1], Recipe())
    set_recipe(model[0], Recipe())
    step(model[0])


def test_models_are_held_weakly():
    import gc
    import weakref

    model, _, _ = make("fp8-tensor")
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def of_larger_weights(folder, heads):
    larger = tiny_llama(num_key_value_heads=heads)
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            parameter.mul_(37 if "_proj" in name else 1)
    return write_artifact(larger, folder, KINDS["nf4"])


@pytest.mark.parametrize("heads", [2, 4], ids=["alone", "fused"])
def test_a_loaded_state_has_its_own_power_of_two(artifact, tmp_path, heads):
    """Of larger weights, which the former power of two would push beyond 448."""
    paths = artifact("nf4", num_key_value_heads=heads), of_larger_weights(tmp_path, heads)
    model, expected = (load_model(path, recipe="fp8-hybrid", emulate=True) for path in paths)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        model(ids)
        model.load_state_dict(expected.state_dict())
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_so_has_one_that_is_divided_row_by_row(artifact, tmp_path):
    """Here of a model that is prepared for that, on one rank."""
    paths = artifact("nf4", num_key_value_heads=4), of_larger_weights(tmp_path, 4)
    model, expected = (load_model(path, recipe="fp8-hybrid", emulate=True) for path in paths)
    ids = torch.arange(12)[None]
    for each in (model, expected):
        prepare_for_sharding(each)
    with torch.no_grad():
        model(ids)
        model.load_state_dict(expected.state_dict())
        assert torch.equal(model(ids).logits, expected(ids).logits)
