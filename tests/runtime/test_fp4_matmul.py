"""NVFP4 on tensor cores without any: layouts by their definitions, and the product with a stand-in for torch's."""

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from runtime.layers import make_layer, with_recipe
from runtime.opcheck import check_op
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import ScalingType, SwizzleType
from torchao.prototype.mx_formats.utils import to_blocked

from surogate_formats.nvfp4 import NVFP4
from surogate_formats.recipe import Recipe
from surogate_formats.rounding import unpack_nibbles
from surogate_formats.tables import E2M1_VALUES
from surogate_load.errors import BackendUnavailableError, UnsupportedDeviceError
from surogate_load.ops.library import PLAIN
from surogate_load.recipes import device as recipe_device
from surogate_load.recipes.device import check_device
from surogate_load.recipes.fp4_matmul import swizzle, transpose_codes
from surogate_load.recipes.layer import PackedWeight
from surogate_load.recipes.notes import Notes
from surogate_load.recipes.nvfp4 import Nvfp4
from surogate_load.weight import WeightKind, to_torch

SUROGATE = torch.ops.surogate
E4M3 = torch.float8_e4m3fn
KINDS = ("fp4", "fp4-1d", "fp8-tensor", "fp8-block")
GRIDS = ((1, 1), (128, 4), (129, 5), (300, 11), (256, 8), (96, 2))


def scales(rows, blocks):
    codes = torch.arange(rows * blocks, dtype=torch.int64) % 127
    return codes.to(torch.uint8).reshape(rows, blocks).view(E4M3)


def position(row, column, blocks):
    """Where tensor cores look for the scale of a row and a block, from cuBLAS's description of the layout."""
    tiles_across = -(-blocks // 4)
    tile = (row // 128) * tiles_across + column // 4
    row, column = row % 128, column % 4
    return tile * 512 + (row % 32) * 16 + (row // 32) * 4 + column


def unswizzle(flat, rows, blocks):
    flat = flat.view(torch.uint8)
    assert flat.numel() == -(-rows // 128) * -(-blocks // 4) * 512
    found = [[flat[position(r, c, blocks)].item() for c in range(blocks)] for r in range(rows)]
    return torch.tensor(found, dtype=torch.uint8).view(E4M3)


@pytest.mark.parametrize(("rows", "blocks"), GRIDS)
def test_swizzle(rows, blocks):
    scale = scales(rows, blocks)
    found = swizzle(scale)
    assert found.dtype == E4M3
    assert torch.equal(unswizzle(found, rows, blocks).view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(found.view(torch.uint8), to_blocked(scale.view(torch.uint8)))
    assert found.float().sum() == scale.float().sum()  # the padding is 0


def test_swizzle_of_nothing():
    assert swizzle(scales(0, 3)).shape == (0,)


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (32, 64), (48, 32), (6, 130)])
def test_transpose_codes(rows, columns):
    codes = np.random.default_rng(rows).integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    found = transpose_codes(torch.from_numpy(codes))
    assert found.is_contiguous()
    wanted = unpack_nibbles(codes, columns, first_high=False).T
    assert np.array_equal(unpack_nibbles(found.numpy(), rows, first_high=False), wanted)


def packed(rows, columns, seed=0):
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return tuple(to_torch(part) for part in NVFP4().quantize(weight).values())


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (160, 32), (64, 2080)])
def test_transposed_operand_stands_for_the_transpose(rows, columns):
    codes, scale, global_scale = packed(rows, columns)
    transposed, swizzled = SUROGATE.transpose_nvfp4_for_backward(torch.ones(1), codes, scale)
    plain = unswizzle(swizzled, columns, rows // 16)
    dense = WeightKind(NVFP4(), (rows, columns)).dequantize((codes, scale, global_scale), torch.float32)
    found = WeightKind(NVFP4(), (columns, rows)).dequantize((transposed, plain, global_scale), torch.float32)
    assert torch.equal(found, dense.t())


REAL_SCALED_MM = torch.nn.functional.scaled_mm


def meta(value):
    if isinstance(value, list):
        return [meta(each) for each in value]
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def values(matrix, scale):
    """float32 of an FP4 matrix [rows, K] with swizzled block scales."""
    rows, half = matrix.shape
    nibbles = unpack_nibbles(matrix.contiguous().view(torch.uint8).numpy(), 2 * half, first_high=False)
    blocks = torch.from_numpy(E2M1_VALUES[nibbles]).reshape(rows, -1, 16)
    return (blocks * unswizzle(scale, rows, half // 8).float()[..., None]).reshape(rows, -1)


def stand_in(left, right, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b, **options):
    """What torch's block-scaled product computes, summed in float32; torch's own function sees the shapes first."""
    arguments = (left, right, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b)
    shape = REAL_SCALED_MM(*meta(list(arguments)), **options)
    assert recipe_a == recipe_b == [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    assert swizzle_a == swizzle_b == [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    alpha = scale_a[1] * scale_b[1]
    y = (values(left, scale_a[0]) @ values(right.t(), scale_b[0]).t() * alpha).to(options["output_dtype"])
    assert (y.shape, y.dtype) == (shape.shape, shape.dtype)
    return y


@pytest.fixture
def tensor_cores(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", stand_in)


def on_tensor_cores(layer, recipe):
    """The layer as it multiplies on a device that has them, as a model, and what the loader would say."""
    notes = Notes()
    layer.recipe = Nvfp4.build(PackedWeight("up", layer.kind, layer.parts), recipe, notes, emulate=False)
    return torch.nn.Sequential(layer).train(), list(notes.lines())


def step(model, x, dy):
    leaf = x.clone().requires_grad_(True)
    y = model(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


def both(kind, shape, tokens, dtype=torch.float32, **switches):
    """(y, dx) emulated, and with the product that tensor cores have, with the same noise."""
    recipe, results = Recipe("nvfp4", **switches), []
    x, dy = torch.randn(*tokens, shape[1], dtype=dtype), torch.randn(*tokens, shape[0], dtype=dtype)
    for native in (False, True):
        layer, _ = make_layer(kind, shape, dtype=dtype)
        model = on_tensor_cores(layer, recipe)[0] if native else with_recipe(layer, recipe)
        layer.recipe.noise.seed.fill_(3)
        results.append(step(model, x, dy))
    return results


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "tokens"), [((96, 128), (2, 3)), ((160, 32), (1,)), ((32, 64), (130,))])
def test_tensor_cores_compute_what_the_emulation_does(kind, shape, tokens):
    for wanted, found in zip(*both(kind, shape, tokens), strict=True):
        assert (wanted.shape, wanted.dtype) == (found.shape, found.dtype)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    for wanted, found in zip(*both("fp4", (64, 96), (5,), dtype), strict=True):
        assert found.dtype == dtype
        assert (wanted.float() - found.float()).norm() <= 4e-3 * wanted.float().norm()


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize(
    "switches",
    [{"four_over_six": False}, {"four_over_six_metric": "l1"}, {"disable_stochastic_rounding": True}],
)
def test_switches_reach_tensor_cores(switches):
    results = both("fp4", (64, 96), (5,), **switches)
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.usefixtures("tensor_cores")
def test_noise_moves_on():
    layer, _ = make_layer("fp4", (64, 32))
    model, _ = on_tensor_cores(layer, Recipe("nvfp4"))
    x, dy = torch.randn(4, 32), torch.randn(4, 64)
    (first, one), (second, other) = step(model, x, dy), step(model, x, dy)
    assert torch.equal(first, second)
    assert not torch.equal(one, other)
    assert layer.recipe.noise.offset.item() == 2


@pytest.mark.usefixtures("tensor_cores")
def test_adapters_are_added():
    layer, _ = make_layer("fp4", (64, 32))
    on_tensor_cores(layer, Recipe("nvfp4", disable_stochastic_rounding=True))
    product, state, parts = layer.recipe.operands(layer.kind, layer.parts)
    x, dy = torch.randn(4, 32), torch.randn(4, 64)
    pairs = [(torch.randn(4, 8), torch.randn(8, columns)) for columns in (64, 32)]
    for run, argument, pair in ((product.forward, (x, None), pairs[0]), (product.input_gradient, (dy,), pairs[1])):
        alone, together = run(*argument, state, parts), run(*argument, state, parts, pair)
        torch.testing.assert_close(together, alone + pair[0] @ pair[1])


def compile_and_list(model):
    """The compiled model, and a list that its compilation fills with the ops of the forward."""
    torch._dynamo.reset()
    called = []

    def forward_compiler(graph, _):
        called.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward_compiler,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    return torch.compile(model, backend=backend, fullgraph=True), called


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("kind", ["fp4", "fp4-1d", "fp8-tensor"])
def test_compiled(kind):
    layer, _ = make_layer(kind, (64, 32))
    model, _ = on_tensor_cores(layer, Recipe("nvfp4"))
    x, dy, results = torch.randn(4, 32), torch.randn(4, 64), []
    compiled, called = compile_and_list(model)
    for callable_ in (model, compiled):
        layer.recipe.noise.offset.zero_()
        results.append(step(callable_, x, dy))
    assert all(map(torch.equal, *results))
    assert SUROGATE.nvfp4_product.default in called
    assert SUROGATE.transpose_nvfp4_for_backward.default not in called  # else W^T would be kept until the backward


@pytest.mark.parametrize(("shape", "fp4_forward"), [((48, 64), True), ((24, 64), True), ((64, 48), True)])
def test_what_tensor_cores_cant_take_is_emulated(shape, fp4_forward):
    layer, _ = make_layer("fp4", shape)
    model, lines = on_tensor_cores(layer, Recipe("nvfp4"))
    reason = "N or K is not a multiple of 32: the base's FP4 operands are multiplied in float32, slowly"
    assert any(line.startswith(reason) for line in lines) == fp4_forward
    layer.recipe.noise.seed.fill_(3)
    x, dy = torch.randn(4, shape[1]), torch.randn(4, shape[0])
    found = step(model, x, dy)
    other, _ = make_layer("fp4", shape)
    emulated = with_recipe(other, Recipe("nvfp4"))
    other.recipe.noise.seed.fill_(3)
    assert all(map(torch.equal, found, step(emulated, x, dy)))


def test_a_dense_base_is_announced_once():
    layer, _ = make_layer("fp8-tensor", (32, 24))
    _, lines = on_tensor_cores(layer, Recipe("nvfp4"))
    assert [line.partition(":")[0] for line in lines] == ["K is not a multiple of 16"]


@pytest.mark.parametrize("kind", ["fp4", "fp4-1d", "fp8-tensor"])
def test_swizzled_scales_take_half_a_bit_a_weight_and_are_not_saved(kind):
    layer, _ = make_layer(kind, (128, 128))
    on_tensor_cores(layer, Recipe("nvfp4"))
    native = {name: buffer.nbytes for name, buffer in layer.recipe.weights.named_buffers()}
    assert native.pop("swizzled") == 128 * 128 // 16
    with_recipe(other := make_layer(kind, (128, 128))[0], Recipe("nvfp4"))
    assert native == {name: buffer.nbytes for name, buffer in other.recipe.weights.named_buffers()}
    assert not [name for name in layer.state_dict() if "weights" in name]
    layer.to(torch.bfloat16)
    assert layer.recipe.weights.swizzled.dtype == E4M3


@pytest.mark.usefixtures("tensor_cores")
def test_opcheck():
    codes, scale, global_scale = packed(32, 64)
    activation = packed(5, 64, seed=1)
    check_op(SUROGATE.transpose_nvfp4_for_backward.default, (torch.ones(1), codes, scale))
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (*activation, codes, swizzle(scale), global_scale, dtype)
        check_op(SUROGATE.nvfp4_product.default, arguments)


@pytest.mark.parametrize(("tokens", "shape"), [(1, (32, 32)), (0, (32, 64)), (300, (2080, 160))])
def test_torch_accepts_the_arguments(tokens, shape):
    def parts(rows):
        empty = [((rows, shape[1] // 2), torch.uint8), ((rows, shape[1] // 16), E4M3), ((1,), torch.float32)]
        return [torch.empty(size, dtype=dtype, device="meta") for size, dtype in empty]

    codes, scale, global_scale = parts(shape[0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = PLAIN["nvfp4_product"](*parts(tokens), codes, swizzle(scale), global_scale, dtype)
        assert (y.shape, y.dtype) == ((tokens, shape[0]), dtype)


def test_devices_and_backends(monkeypatch):
    cuda, has = torch.device("cuda"), [(10, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has[0])
    for has[0] in ((10, 0), (10, 3), (12, 0)):
        check_device(Recipe("nvfp4"), cuda)
    for installed in (False, True):
        monkeypatch.setattr(recipe_device, "find_spec", lambda name, found=installed: found or None)
        with pytest.raises(BackendUnavailableError, match=r"use backend cutlass or emulate=True") as error:
            check_device(Recipe("nvfp4", backend="cudnn"), cuda)
        assert ("nvidia-cudnn-frontend is not installed" in str(error.value)) != installed
    has[0] = (9, 0)
    for backend in ("cutlass", "cudnn"):
        with pytest.raises(UnsupportedDeviceError, match=r"needs CUDA compute capability 10\.0, cuda has 9\.0"):
            check_device(Recipe("nvfp4", backend=backend), cuda)
