"""Where the kernels can't run, the plain-torch ops do, and one line says why."""

import sys
import types
import warnings

import pytest
import torch
from runtime.layers import KINDS
from runtime.weights import make_weight

from surogate_load.kernels import device
from surogate_load.kernels.group import DequantizeGroup
from surogate_load.weight import WeightKind, to_torch


def fake_cupy(monkeypatch, runtime_version):
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(runtimeGetVersion=lambda: runtime_version))
    monkeypatch.setitem(sys.modules, "cupy", cupy)


def test_usable(monkeypatch):
    fake_cupy(monkeypatch, 13020)
    assert device.why_unusable((7, 5), "13.0") is None
    assert device.why_unusable((12, 0), "13.0") is None


def test_old_gpu(monkeypatch):
    fake_cupy(monkeypatch, 12090)
    assert device.why_unusable((7, 0), "12.6") == "the kernels need compute capability 7.5, this device has 7.0"


def test_torch_without_cuda():
    assert device.why_unusable((9, 0), None) == "this torch is not built for CUDA"


def test_no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert device.why_unusable((9, 0), "12.6").endswith(": pip install surogate-quant[cuda12]")


def test_cupy_for_another_cuda(monkeypatch):
    fake_cupy(monkeypatch, 12090)
    assert device.why_unusable((9, 0), "13.0") == (
        "CuPy is built for CUDA 12, torch for CUDA 13: "
        "pip uninstall cupy-cuda12x, then pip install surogate-quant[cuda13]"
    )


def test_said_once(monkeypatch):
    monkeypatch.setattr(device, "_loaded", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.warns(RuntimeWarning, match="cuda:0 dequantizes in plain torch, slowly: .* this device has 6.1"):
        assert device.functions_on(0) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device.functions_on(0) is None


def test_what_fails_to_load_falls_back(monkeypatch):
    def fail():
        raise RuntimeError("CUDA driver version is insufficient\nsecond line")

    monkeypatch.setattr(device, "_loaded", {})
    monkeypatch.setattr(device, "_load", fail)
    monkeypatch.setattr(device, "why_unusable", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: warnings.catch_warnings())
    with pytest.warns(RuntimeWarning, match="RuntimeError: CUDA driver version is insufficient\\)$"):
        assert device.functions_on(0) is None


@pytest.mark.parametrize("fmt", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_group_on_the_cpu(fmt, dtype):
    shapes = [(8, 16), (3, 48), (16, 16)] if fmt.name == "fp4" else [(8, 16), (3, 5), (16, 16)]
    kinds = [WeightKind(fmt, shape) for shape in shapes]
    packed = [[to_torch(part) for part in fmt.quantize(make_weight("random", shape)).values()] for shape in shapes]
    group = DequantizeGroup(kinds, packed, dtype)
    out = group.empty()
    group.into(out)
    for view, kind, parts, offset in zip(group.views(out), kinds, packed, group.offsets, strict=True):
        assert torch.equal(view.view(torch.uint8), kind.dequantize(parts, dtype).view(torch.uint8))
        assert offset * dtype.itemsize % 16 == 0
