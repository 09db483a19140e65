"""The CUDA kernels on a GPU: bit-equal to the CPU ops, capturable, on the current stream, and quick to launch."""

import re

import numpy as np
import pytest
import torch
from runtime.layers import KINDS as LAYER_KINDS
from runtime.layers import make_layer
from runtime.opcheck import check_op
from runtime.weights import FORMATS, KINDS, make_weight, name_of

from surogate_load.fused.weights import fuse
from surogate_load.kernels import device, load_kernels
from surogate_load.kernels.group import DequantizeGroup
from surogate_load.kernels.source import source
from surogate_load.weight import WeightKind, to_torch

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
RAGGED = [(7, 13), (3, 1), (1, 1), (129, 131), (33, 40), (257, 1000)]
WHOLE = [(19, 48), (1, 16), (130, 144), (64, 1024), (37, 2064)]
KERNEL_FORMATS = [
    *(fmt for fmt in FORMATS if fmt.name != "fp4"),
    *(fmt for fmt in FORMATS if fmt.name == "fp4" and fmt.metric == "mse" and not fmt.two_d),
]
"""The formats whose packed bytes differ in kind; the others differ in how the quantizer chose them."""

SIMPLE = [*FORMATS[:3], FORMATS[6], *FORMATS[-6:]]


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    torch.set_num_threads(1)
    assert load_kernels("cuda")


def quantized(fmt, shape, kind="random"):
    with np.errstate(all="ignore"):
        parts = fmt.quantize(make_weight(kind, shape))
    weight_kind = WeightKind(fmt, shape)
    return weight_kind, [to_torch(parts[name]) for name in weight_kind.specs]


def on_gpu(tensors, offset=0):
    """Copies on the GPU; with an offset, each begins that many bytes past an aligned address where its dtype can."""
    moved = []
    for tensor in tensors:
        start = offset if tensor.dtype.itemsize == 1 else 0
        room = torch.empty(start + tensor.nbytes, dtype=torch.uint8, device="cuda")[start:]
        room.copy_(tensor.reshape(-1).view(torch.uint8))
        moved.append(room.view(tensor.dtype).view(tensor.shape))
    return moved


def bits(tensor):
    return tensor.cpu().view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.dtype.itemsize])


def assert_equal_bits(found, expected):
    assert found.shape == expected.shape
    assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("fmt", KERNEL_FORMATS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_cpu_op_bit_for_bit(fmt, kind):
    gradient = torch.zeros(1, device="cuda")
    for shape in WHOLE + (RAGGED if fmt.name != "fp4" else []):
        weight_kind, parts = quantized(fmt, shape, kind)
        placements = [on_gpu(parts, offset) for offset in (0, 1, 4)]
        for dtype in DTYPES:
            expected = weight_kind.dequantize(parts, dtype)
            for placed in placements:
                assert_equal_bits(weight_kind.dequantize(placed, dtype), expected)
            assert_equal_bits(weight_kind.dequantize_for_backward(gradient, placements[0], dtype), expected)


@pytest.mark.parametrize("fmt", SIMPLE, ids=name_of)
def test_multiplier(fmt):
    weight_kind, parts = quantized(fmt, (37, 2064), "outlier")
    for value in (0.3, 2.0**60, 1e-30):
        multiplier = torch.tensor([value])
        for dtype in DTYPES:
            found = weight_kind.dequantize(on_gpu(parts), dtype, multiplier.cuda())
            assert_equal_bits(found, weight_kind.dequantize(parts, dtype, multiplier))


def assert_every_code_and_scale():
    """All E4M3 codes but NaN under scales of every exponent: exact products, ties, and others, in every dtype."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127]
    scale = torch.cat([torch.exp2(torch.arange(-126.0, 119.0)) * factor for factor in (1, 1.5, 1.0078125, 1.37)])
    codes, scale = codes.repeat(len(scale), 1).view(torch.float8_e4m3fn), scale.reshape(-1, 1)
    for dtype in DTYPES:
        found = torch.ops.surogate.dequantize_fp8(codes.cuda(), scale.cuda(), "channel", dtype, None)
        assert_equal_bits(found, torch.ops.surogate.dequantize_fp8(codes, scale, "channel", dtype, None))


def test_every_code_and_scale():
    assert_every_code_and_scale()


def test_conversions_of_older_gpus(monkeypatch):
    """The integer arithmetic that stands in for conversions that this GPU has."""
    monkeypatch.setattr(device, "source", lambda module: re.sub(r"__CUDA_ARCH__ >= \d+", "0", source(module)))
    monkeypatch.setattr(device, "_loaded", {})
    assert load_kernels("cuda")
    assert_every_code_and_scale()
    for fmt in KERNEL_FORMATS:
        for kind in KINDS:
            weight_kind, parts = quantized(fmt, (64, 1024), kind)
            for dtype in DTYPES:
                found = weight_kind.dequantize(on_gpu(parts), dtype)
                assert_equal_bits(found, weight_kind.dequantize(parts, dtype))


@pytest.mark.parametrize("fmt", [*FORMATS[1:3], FORMATS[6], *FORMATS[-6::2]], ids=name_of)
def test_more_than_two_to_the_31_values(fmt):
    """A weight whose rows repeat: the far end must equal the same rows at the beginning."""
    rows, columns, copies = 4096, 4096, 129
    weight_kind, parts = quantized(fmt, (rows, columns))
    device_parts = on_gpu(parts)
    whole = [repeat_rows(part, name, copies) for name, part in zip(weight_kind.specs, device_parts, strict=True)]
    many = WeightKind(fmt, (rows * copies, columns)).dequantize(whole, torch.bfloat16)
    assert many.numel() > 2**31
    expected = weight_kind.dequantize(device_parts, torch.bfloat16).view(torch.int16)
    for copy in (0, 63, 127, 128):
        assert torch.equal(many[copy * rows : (copy + 1) * rows].view(torch.int16), expected)


def repeat_rows(part, name, copies):
    if part.numel() == 1:
        return part
    as_bytes = part.view(torch.uint8) if part.dtype.itemsize == 1 else part
    return as_bytes.repeat(copies, *(1,) * (part.dim() - 1)).view(part.dtype)


@pytest.mark.parametrize("fmt", SIMPLE, ids=name_of)
def test_opcheck(fmt):
    weight_kind, parts = quantized(fmt, (32, 48))
    name, arguments = weight_kind.op_call(on_gpu(parts))
    arguments = (*arguments, torch.bfloat16, None)
    check_op(getattr(torch.ops.surogate, name).default, arguments)
    gradient = torch.ones(3, 4, device="cuda")
    check_op(getattr(torch.ops.surogate, f"{name}_for_backward").default, (gradient, *arguments))


GROUPS = [*FORMATS[:3], FORMATS[6], FORMATS[-6], FORMATS[-3], FORMATS[-2]]


def make_group(fmt, dtype, shapes):
    members = [quantized(fmt, shape, kind) for shape, kind in zip(shapes, KINDS * 8, strict=False)]
    kinds = [kind for kind, _ in members]
    group = DequantizeGroup(kinds, [on_gpu(parts) for _, parts in members], dtype)
    return group, [kind.dequantize(parts, dtype) for kind, parts in members]


@pytest.mark.parametrize("fmt", GROUPS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_equals_its_members(fmt, dtype):
    shapes = [(64, 1024), (19, 48), (130, 144), (1, 16), (256, 512)] * 8
    shapes += [] if fmt.name == "fp4" else RAGGED
    group, expected = make_group(fmt, dtype, shapes)
    out = group.empty().view(torch.uint8).fill_(0xA5).view(dtype)
    group.into(out)
    for view, dense in zip(group.views(out), expected, strict=True):
        assert_equal_bits(view, dense)


def test_group_of_fused_members_is_one_matrix():
    group, expected = make_group(FORMATS[1], torch.bfloat16, [(64, 256), (16, 256), (16, 256)])
    out = group.empty()
    group.into(out)
    assert_equal_bits(out.view(96, 256), torch.cat(expected))


def test_fused_weights_with_nested_offsets_of_their_own():
    members = [quantized(FORMATS[2], shape) for shape in ((64, 1024), (16, 1024))]
    fused, tensors = fuse([kind for kind, _ in members], [tuple(parts) for _, parts in members])
    for dtype in DTYPES:
        expected = torch.cat([bits(kind.dequantize(parts, dtype)) for kind, parts in members])
        assert torch.equal(bits(fused.dequantize(tensors, dtype)), expected)
        for offset in (0, 1):
            assert torch.equal(bits(fused.dequantize(on_gpu(tensors, offset), dtype)), expected)


def test_group_of_two_formats_is_refused():
    members = [quantized(FORMATS[0], (16, 64)), quantized(FORMATS[6], (16, 64))]
    with pytest.raises(ValueError, match="one format"):
        DequantizeGroup([kind for kind, _ in members], [on_gpu(parts) for _, parts in members], torch.bfloat16)


@pytest.mark.parametrize("fmt", GROUPS, ids=name_of)
def test_capture_and_replay(fmt):
    weight_kind, parts = quantized(fmt, (64, 1024))
    device_parts = on_gpu(parts)
    group, expected = make_group(fmt, torch.bfloat16, [(64, 1024), (32, 512)])
    flat = group.empty()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dense = weight_kind.dequantize(device_parts, torch.bfloat16)
        group.into(flat)
    for tensor in (dense, flat):
        tensor.fill_(-1)
    graph.replay()
    assert_equal_bits(dense, weight_kind.dequantize(parts, torch.bfloat16))
    for view, whole in zip(group.views(flat), expected, strict=True):
        assert_equal_bits(view, whole)


def test_runs_on_the_current_stream():
    """The codes arrive on a side stream, late: a launch on another stream would read what was there before."""
    weight_kind, parts = quantized(FORMATS[1], (1024, 4096))
    source, target = on_gpu(parts), [torch.zeros_like(part) for part in on_gpu(parts)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for to, came in zip(target, source, strict=True):
            to.copy_(came)
        dense = weight_kind.dequantize(target, torch.bfloat16)
    stream.synchronize()
    assert_equal_bits(dense, weight_kind.dequantize(parts, torch.bfloat16))


def test_threads_launch_independently():
    from concurrent.futures import ThreadPoolExecutor

    cases = [
        (kind, on_gpu(parts), kind.dequantize(parts, torch.bfloat16))
        for kind, parts in map(quantized, SIMPLE, [(48, 64)] * len(SIMPLE))
    ]

    def run(index):
        kind, parts, expected = cases[index % len(cases)]
        return torch.equal(bits(kind.dequantize(parts, torch.bfloat16)), bits(expected))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(400)))


def test_no_host_synchronization():
    weight_kind, parts = quantized(FORMATS[1], (64, 1024))
    device_parts = on_gpu(parts)
    weight_kind.dequantize(device_parts, torch.bfloat16)
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            weight_kind.dequantize(device_parts, torch.bfloat16)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_layer_forward_and_backward(kind):
    layer, dense = make_layer(kind, (96, 64), dtype=torch.float32)
    layer.cuda()
    x = torch.randn(5, 64, device="cuda", requires_grad=True)
    target = torch.randn(5, 96, device="cuda")
    y = layer(x)
    (y * target).sum().backward()
    weight = dense.double().cuda()
    torch.testing.assert_close(y.double(), x.double() @ weight.T + layer.bias.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), target.double() @ weight, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.dequantize(torch.float32).cpu(), dense)
