"""Recipe nvfp4: what is multiplied in each direction, what each switch changes, and what the loader says."""

import logging

import numpy as np
import pytest
import torch
from runtime.layers import make_layer, with_recipe

from surogate_formats.nvfp4 import NVFP4
from surogate_formats.recipe import IncompatibleRecipeError, Recipe
from surogate_load.errors import NeedsTwoDimensionalScalesError
from surogate_load.ops.hadamard import hadamard16
from surogate_load.recipes.token_gradient import AdapterLinear, TokenRounding, weight_gradient

FP4_KINDS = ("fp4", "fp4-1d", "fp8-tensor", "fp8-channel", "fp8-block")


def through(fmt, x):
    """A float32 array through a format, in float64."""
    return fmt.dequantize(fmt.quantize(x), x.shape).astype(np.float64)


ACTIVATION = NVFP4(two_d=False, four_over_six=True, global_scale="amax")
PLAIN = NVFP4(two_d=False, four_over_six=False, global_scale="amax")


def make(kind, shape=(48, 32), bias=True, seed=0, **switches):
    layer, dense = make_layer(kind, shape, bias=bias, seed=seed)
    model = with_recipe(layer, Recipe("nvfp4", **switches))
    return model, layer, dense.numpy()


def requantized(dense, **changes):
    return through(NVFP4(**changes), dense)


def forward_weight(kind, dense):
    return dense if kind.startswith("fp4") else requantized(dense)


def outputs(kind, x, **switches):
    """y and dx for a fixed dy of a fresh layer; equal noise in every call."""
    torch.manual_seed(3)
    model, _, _ = make(kind, (96, 128), **switches)
    leaf = x.clone().requires_grad_(True)
    y = model(leaf)
    generator = torch.Generator().manual_seed(1)
    (dx,) = torch.autograd.grad(y, leaf, torch.randn(y.shape, generator=generator))
    return y.detach(), dx


@pytest.mark.parametrize("kind", FP4_KINDS)
def test_forward_multiplies_fp4_activations(kind):
    model, layer, dense = make(kind)
    x = torch.randn(2, 3, 32)
    expected = through(ACTIVATION, x.reshape(6, 32).numpy()) @ forward_weight(kind, dense).astype(np.float64).T
    expected = expected.reshape(2, 3, 48) + layer.bias.detach().numpy()
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FP4_KINDS)
def test_backward_multiplies_fp4_gradients(kind):
    model, _, dense = make(kind, disable_stochastic_rounding=True)
    x, dy = torch.randn(5, 32, requires_grad=True), torch.randn(5, 48)
    model(x).backward(dy)
    weight = forward_weight(kind, dense).astype(np.float64)
    if kind == "fp4-1d":  # its scales don't transpose
        weight = requantized(np.ascontiguousarray(dense.T), two_d=False).T
    expected = through(PLAIN, dy.numpy()) @ weight
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_stochastic_gradients_average_to_the_unrounded():
    model, layer, dense = make("fp4")
    x, dy = torch.randn(4, 32, requires_grad=True), torch.randn(4, 48)
    y = model(x)
    draws = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(100)]
    assert not torch.equal(draws[0], draws[1])
    assert layer.recipe.noise.offset.item() == 100
    exact = dy.numpy() @ dense
    one = np.abs(draws[0].numpy() - exact).mean()
    mean = np.abs(torch.stack(draws).mean(0).numpy() - exact).mean()
    assert mean < 3 * one / 100**0.5


def test_noise_is_saved_and_repeats():
    x = torch.randn(4, 128)
    first, second = outputs("fp4", x)[1], outputs("fp4", x)[1]
    assert torch.equal(first, second)
    model, layer, _ = make("fp4")
    layer.recipe.noise.offset.add_(5)
    other, twin, _ = make("fp4", seed=0)
    other.load_state_dict(model.state_dict())
    assert twin.recipe.noise.offset.item() == 5


EVERY_SWITCH = {
    "disable_rht": ({"disable_rht": True}, (), ()),
    "disable_stochastic_rounding": ({"disable_stochastic_rounding": True}, (), ("fp4", "fp4-1d", "fp8-tensor")),
    "disable_2d_quantization": ({"disable_2d_quantization": True}, ("fp8-tensor",), ("fp8-tensor",)),
    "four_over_six": ({"four_over_six": False}, ("fp4", "fp4-1d", "fp8-tensor"), ("fp4-1d", "fp8-tensor")),
    "metric": ({"four_over_six_metric": "l1"}, ("fp4", "fp4-1d", "fp8-tensor"), ("fp4-1d", "fp8-tensor")),
    "backend": ({"backend": "cudnn"}, ("fp4", "fp8-tensor"), ("fp8-tensor",)),
    "margin": ({"margin": 2, "amax_history_len": 3, "amax_compute_algo": "most_recent"}, (), ()),
}
"""Switch to the kinds whose forward, and whose gradient of x, it changes."""


@pytest.mark.parametrize(
    ("switch", "kind"),
    [
        (switch, kind)
        for switch in EVERY_SWITCH
        for kind in ("fp4", "fp4-1d", "fp8-tensor")
        if (switch, kind) != ("backend", "fp4-1d")  # refused, see below
    ],
)
def test_a_switch_changes_what_it_says_and_nothing_else(switch, kind):
    settings, forward, backward = EVERY_SWITCH[switch]
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(9))
    (y, dx), (changed_y, changed_dx) = outputs(kind, x), outputs(kind, x, **settings)
    assert torch.equal(y, changed_y) == (kind not in forward)
    assert torch.equal(dx, changed_dx) == (kind not in backward)


def test_cudnn_has_no_four_over_six():
    x = torch.randn(16, 128)
    for kind in ("fp4", "fp8-tensor"):
        without = outputs(kind, x, four_over_six=False)
        assert all(map(torch.equal, outputs(kind, x, backend="cudnn"), without))


def test_cudnn_needs_tile_scales():
    for kind, switches in (("fp4-1d", {}), ("fp8-tensor", {"disable_2d_quantization": True})):
        with pytest.raises(NeedsTwoDimensionalScalesError, match=r"16x16.*--2d"):
            make(kind, backend="cudnn", **switches)


def test_nf4_is_refused():
    with pytest.raises(IncompatibleRecipeError, match="quantized twice"):
        make("nf4")


@pytest.mark.parametrize("kind", ["fp4", "fp8-tensor"])
def test_a_row_count_that_16_does_not_divide_gives_a_dense_gradient(kind, caplog):
    with caplog.at_level(logging.WARNING):
        model, _, dense = make(kind, (24, 32))
    assert "N is not a multiple of 16: the base's dgrad is multiplied in bf16" in caplog.text
    x, dy = torch.randn(5, 32, requires_grad=True), torch.randn(5, 24)
    model(x).backward(dy)
    np.testing.assert_allclose(x.grad.numpy(), dy.numpy() @ forward_weight(kind, dense), rtol=1e-4, atol=1e-5)


def test_a_column_count_that_16_does_not_divide_leaves_the_base_dense(caplog):
    with caplog.at_level(logging.WARNING):
        model, layer, dense = make("fp8-tensor", (32, 24))
    assert "K is not a multiple of 16" in caplog.text
    x, dy = torch.randn(5, 24, requires_grad=True), torch.randn(5, 32)
    y = model(x)
    y.backward(dy)
    torch.testing.assert_close(y, x @ torch.from_numpy(dense).t() + layer.bias)
    torch.testing.assert_close(x.grad, dy @ torch.from_numpy(dense))


def test_the_loader_says_what_requantizing_costs(caplog):
    with caplog.at_level(logging.WARNING):
        _, layer, dense = make("fp8-tensor")
        error = np.linalg.norm(requantized(dense) - dense) / np.linalg.norm(dense)
        assert f"W is quantized to NVFP4 (16x16 scales); 0.0 MiB more, relative weight error {error:.4f}" in caplog.text
        caplog.clear()
        make("fp4-1d")
        assert "1x16 scales don't transpose" in caplog.text
        caplog.clear()
        make("fp4")
        assert not caplog.text
    extra = [name for name in layer.state_dict() if "weights" in name]
    assert not extra  # derived from the artifact, so not saved


def adapter_gradient(rounding, x, dy):
    noise = (torch.tensor([1]), torch.zeros(1, dtype=torch.int64))
    return weight_gradient(dy, x, rounding, noise)


@pytest.mark.parametrize("tokens", [32, 20, 1])
def test_adapter_gradient_contracts_fp4_operands_over_tokens(tokens):
    x, dy = torch.randn(tokens, 24), torch.randn(tokens, 8)
    pad = torch.nn.functional.pad
    operands = [pad(t.t(), (0, -tokens % 16)) for t in (dy, x)]
    plain = [through(PLAIN, t.numpy()) for t in operands]
    rotated = [through(PLAIN, hadamard16(t).numpy()) for t in operands]
    for hadamard, (left, right) in ((False, plain), (True, rotated)):
        found = adapter_gradient(TokenRounding(hadamard=hadamard, stochastic=False), x, dy)
        np.testing.assert_allclose(found.numpy(), left @ right.T, rtol=1e-4, atol=1e-4)


def test_adapter_gradient_is_unbiased_in_the_gradient():
    x, dy = torch.randn(32, 16), torch.randn(32, 4)
    noise = (torch.tensor([1]), torch.zeros(1, dtype=torch.int64))
    rounding = TokenRounding(hadamard=False, stochastic=True)
    draws = torch.stack([weight_gradient(dy, x, rounding, noise) for _ in range(100)])
    expected = dy.t().numpy() @ through(PLAIN, x.t().contiguous().numpy()).T
    deviation = (draws[0].numpy() - expected).std()
    assert np.abs(draws.mean(0).numpy() - expected).max() < 6 * deviation / 100**0.5


def test_hadamard_cancels_in_the_product_and_changes_the_rounding():
    x, dy = torch.randn(64, 32), torch.randn(64, 16)
    torch.testing.assert_close(hadamard16(dy.t()) @ hadamard16(x.t()).t(), dy.t() @ x, rtol=1e-4, atol=1e-4)
    with_it, without = (adapter_gradient(TokenRounding(hadamard=on, stochastic=False), x, dy) for on in (True, False))
    assert not torch.equal(with_it, without)


def test_disable_rht_reaches_the_gradient_of_an_adapter():
    x, dy = torch.randn(32, 32), torch.randn(32, 8)
    plain = torch.nn.Linear(32, 8, bias=False)
    found = []
    for disabled in (False, True):
        _, layer, _ = make("fp4", disable_rht=disabled, disable_stochastic_rounding=True)
        adapter = layer.recipe.adapter_linear(plain)
        found.append(torch.autograd.grad(adapter(x), plain.weight, dy)[0])
        expected = adapter_gradient(TokenRounding(hadamard=not disabled, stochastic=False), x, dy)
        assert torch.equal(found[-1], expected)
    assert not torch.equal(*found)


def test_adapter_linear_is_a_linear_but_for_its_weight_gradient():
    model, layer, _ = make("fp4")
    plain = torch.nn.Linear(32, 8)
    adapter = layer.recipe.adapter_linear(plain)
    assert isinstance(adapter, AdapterLinear)
    assert adapter.weight is plain.weight
    assert set(adapter.state_dict()) == {"weight", "bias"}
    x = torch.randn(6, 32, requires_grad=True)
    dy = torch.randn(6, 8)
    found = torch.autograd.grad(adapter(x), [x, plain.weight, plain.bias], dy)
    expected = torch.autograd.grad(plain(x), [x, plain.weight, plain.bias], dy)
    assert torch.equal(adapter(x), plain(x))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    error = (found[1] - expected[1]).norm() / expected[1].norm()
    assert 0.01 < error < 0.4
    assert type(adapter.plain()) is torch.nn.Linear
    assert adapter.plain().weight is plain.weight
    assert model[0].recipe.noise.offset.item() == 1
