"""QuantizedLinear under recipe bf16: exact, differentiable, and never dense between forward and backward."""

import copy
import io

import pytest
import torch
from runtime.layers import KINDS, make_layer

from surogate_load.linear import QuantizedLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.parametrize("kind", KINDS)


def packed_bytes(layer):
    return [part.detach().reshape(-1).view(torch.uint8).clone() for part in layer.parts]


def assert_same_bytes(found, expected):
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_products_are_those_of_the_dense_layer(kind):
    for dtype in DTYPES:
        layer, dense = make_layer(kind, dtype=dtype)
        reference = torch.nn.Linear(32, 48).to(dtype)
        reference.load_state_dict({"weight": dense, "bias": layer.bias})
        x = torch.randn(2, 5, 32, dtype=dtype)
        assert torch.equal(layer(x), reference(x))
        assert torch.equal(layer.dequantize(), dense.to(dtype))
        assert layer.dequantize(torch.float32).dtype == torch.float32


def test_gradients_are_those_of_float64(kind):
    layer, dense = make_layer(kind)
    x = torch.randn(7, 32, requires_grad=True)
    target = torch.randn(7, 48)
    layer.bias.requires_grad_(True)
    (layer(x) * target).sum().backward()
    torch.testing.assert_close(x.grad.double(), target.double() @ dense.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad.double(), target.double().sum(0), rtol=1e-5, atol=1e-5)
    assert all(part.grad is None and not part.requires_grad for part in layer.parts)


def test_casts_leave_packed_tensors_alone(kind):
    layer, _ = make_layer(kind)
    before, dtypes = packed_bytes(layer), [part.dtype for part in layer.parts]
    names = list(layer.state_dict())
    for cast, dtype in (
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.float(), torch.float32),
        (lambda m: m.type(torch.bfloat16), torch.bfloat16),
        (lambda m: m.cpu(), torch.bfloat16),
    ):
        cast(layer)
        assert layer.compute_dtype == layer.bias.dtype == dtype
        assert [part.dtype for part in layer.parts] == dtypes
        assert_same_bytes(packed_bytes(layer), before)
        assert layer(torch.randn(2, 32, dtype=dtype)).dtype == dtype
    assert list(layer.state_dict()) == names


def test_a_failed_move_changes_nothing(kind):
    layer, dense = make_layer(kind)
    names, bias = list(layer.state_dict()), layer.bias
    for moves in range(len(layer.parts) + 2):  # the parts, compute_dtype, and the bias last
        left = [None] * moves

        def move(tensor, left=left):
            if not left:
                raise MemoryError
            left.pop()
            return tensor.half() if tensor.is_floating_point() else tensor.clone()

        with pytest.raises(MemoryError):
            layer._apply(move)
        assert not left
        assert list(layer.state_dict()) == names
        assert (layer.bias is bias, layer.compute_dtype) == (True, torch.float32)
        assert torch.equal(layer.dequantize(), dense)


def test_state_dict_round_trip(kind):
    layer, dense = make_layer(kind)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other, _ = make_layer(kind, seed=5)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(other.dequantize(torch.float32), dense)
    assert_same_bytes(packed_bytes(other), packed_bytes(layer))
    assert set(layer.state_dict()) == {"bias", *layer.part_names}


def test_copies_and_empty_layers(kind):
    layer, dense = make_layer(kind)
    assert torch.equal(copy.deepcopy(layer).dequantize(torch.float32), dense)
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.dequantize(torch.float32), dense)


def test_what_libraries_look_for(kind):
    layer, _ = make_layer(kind)
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.in_features, layer.out_features) == (32, 48)
    assert layer.weight is layer.parts[0]
    assert layer.weight.device.type == "cpu"
    assert layer.W_q is layer.weight
    assert "compute_dtype=torch.float32" in repr(layer)


def test_autocast_and_foreign_inputs(kind):
    layer, dense = make_layer(kind, bias=False)
    x = torch.randn(3, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert torch.equal(y, torch.nn.functional.linear(x, dense))
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    half = layer.to(torch.bfloat16)
    assert half(x).dtype == torch.float32  # norms kept in float32 feed a bfloat16 base
    assert torch.equal(half(x), half(x.bfloat16()).float())


def test_eager_saves_packed_tensors_only(kind):
    layer, _ = make_layer(kind)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(4, 32, requires_grad=True)).sum().backward()
    assert {tensor.data_ptr() for tensor in saved} == {part.data_ptr() for part in layer.parts}


def test_every_format_makes_a_layer_without_data(kind):
    layer, _ = make_layer(kind)
    meta = QuantizedLinear(layer.kind, SimpleLayout(layer), device="meta")
    assert [part.shape for part in meta.parts] == [part.shape for part in layer.parts]
    assert all(part.is_meta for part in meta.parts)


class SimpleLayout:
    """The names of an existing layer."""

    def __init__(self, layer):
        fmt = layer.kind.format
        self.suffixes = {fmt.name: dict(zip(layer.kind.specs, layer.part_names, strict=True))}
