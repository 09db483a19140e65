"""Which engine `device` gets, what is said where a GPU can't do it, and where weights stand; with a fake for CuPy."""

import contextlib
import ctypes
import json
import sys
import types
import warnings
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from formats.cases import FORMATS as FORMATS_IN_FULL
from formats.cases import name_of
from quantizer.checkpoints import contents, write_checkpoint

from surogate_formats.fp8 import FP8
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_formats.registry import FORMATS
from surogate_quantize import make_options, quantize
from surogate_quantize.cli import main
from surogate_quantize.cuda.engine import CudaEngine
from surogate_quantize.cuda.errors import DeviceFailedError, DeviceMemoryError, NoCudaError
from surogate_quantize.cuda.formats import QUANTIZERS
from surogate_quantize.cuda.memory import Uploads
from surogate_quantize.cuda.source import AMAX, kernel_names
from surogate_quantize.devices import UnknownDeviceError, open_engine
from surogate_quantize.engine import CpuEngine
from surogate_quantize.source import Source

GPU = "cuda:0 Fake GPU"


class FakeRuntimeError(RuntimeError):
    pass


@dataclass
class FakeCupy:
    """What the engine uses of CuPy, with host memory as the device's.

    Of the kernels, only amax does its work, unless `kernels` has others to launch.
    """

    devices: int = 1
    capability: tuple = (9, 0)
    built_for: int = 13
    driver: int = 13
    free: int = 1 << 33
    fails: Exception | None = None
    warns: Warning | None = None
    kernels: Any = None

    def __post_init__(self):
        self.copied, self.compiled, self.launched = [], [], []
        fake = self

        class Pointer:
            def __init__(self, size):
                if size > fake.free:
                    raise modules["cupy.cuda.memory"].OutOfMemoryError(f"Out of memory allocating {size} bytes.")
                self.buffer = ctypes.create_string_buffer(size)
                self.ptr = ctypes.addressof(self.buffer)

            def memset_async(self, value, size, stream):
                ctypes.memset(self.ptr, value, size)

        class Kernel:
            def __init__(self, name):
                self.name, self.kernel = name, self

            def __call__(self, grid, block, arguments, shared, stream):
                fake.launched.append(self.name)
                if fake.kernels:
                    fake.kernels.launch(self.name, grid[0], [argument.ptr for argument in arguments])
                elif self.name.startswith("amax"):
                    raw, count, found = AMAX.unpack(ctypes.string_at(arguments[0].ptr, AMAX.size))
                    words = np.frombuffer(ctypes.string_at(raw, 4 * count), np.uint32)
                    ctypes.memmove(found, np.max(words & 0x7FFFFFFF).tobytes(), 4)

        class Module:
            def __init__(self, code, options):
                fake.compiled.append(code)
                if fake.fails:
                    raise fake.fails

            get_function = staticmethod(Kernel)

        def copy(target, origin, size, kind, stream):
            fake.copied.append(size)
            ctypes.memmove(target, origin, size)

        pool = types.SimpleNamespace(malloc=Pointer, free_bytes=lambda: 0, free_all_blocks=lambda: None)
        pinned = types.SimpleNamespace(malloc=bytearray, free_all_blocks=lambda: None)
        runtime = {
            "CUDARuntimeError": FakeRuntimeError,
            "runtimeGetVersion": lambda: self.built_for * 1000,
            "driverGetVersion": lambda: self.driver * 1000,
            "getDeviceCount": self.count,
            "getDeviceProperties": lambda index: {
                "name": b"Fake GPU",
                "major": self.capability[0],
                "minor": self.capability[1],
            },
            "memGetInfo": lambda: (self.free, self.free),
            "memcpyAsync": copy,
            "memcpyDefault": 4,
        }
        stream = contextlib.nullcontext(types.SimpleNamespace())
        stream.ptr, stream.synchronize = 0, lambda: None
        contents = {
            "cupy": {"RawModule": Module},
            "cupy.cuda": {
                "MemoryPool": lambda: pool,
                "PinnedMemoryPool": lambda: pinned,
                "Stream": lambda non_blocking: stream,
                "Device": lambda index: contextlib.nullcontext(),
            },
            "cupy.cuda.runtime": runtime,
            "cupy.cuda.driver": {"CUDADriverError": type("CUDADriverError", (RuntimeError,), {})},
            "cupy.cuda.memory": {"OutOfMemoryError": type("OutOfMemoryError", (MemoryError,), {})},
            "cupy.cuda.function": {"CPointer": lambda address: types.SimpleNamespace(ptr=address)},
        }
        self.modules = modules = {name: types.ModuleType(name) for name in contents}
        for name, attributes in contents.items():
            vars(modules[name]).update(attributes)
            parent, _, leaf = name.rpartition(".")
            if parent:
                setattr(modules[parent], leaf, modules[name])

    def count(self):
        if self.warns:
            warnings.warn(self.warns, stacklevel=2)
        if self.devices < 0:
            raise FakeRuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return self.devices


@pytest.fixture
def cupy(monkeypatch):
    def install(**changes):
        fake = FakeCupy(**changes)
        for name, module in fake.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return fake

    return install


@pytest.fixture
def no_cupy(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cupy", None)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("cuda") / "source")


def weight(shape=(48, 64), seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return Source.of(values, "F32")


def device_of(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_engine(name, NF4()) as engine:
            return engine.device


UNUSABLE = [
    ({"devices": 0}, "there is no GPU: see what nvidia-smi and CUDA_VISIBLE_DEVICES say"),
    ({"devices": -1}, "there is no usable GPU (cudaErrorNoDevice: no CUDA-capable device is detected): see what"),
    ({"capability": (7, 0)}, "the kernels need compute capability 7.5, this GPU has 7.0: take another"),
    (
        {"driver": 12},
        "CuPy is built for CUDA 13, the driver for CUDA 12: pip uninstall cupy-cuda13x, then pip install "
        "'surogate-quant[cuda12]'",
    ),
    (
        {"fails": RuntimeError("libnvrtc.so.13 is missing.\nsecond line")},
        "the kernels can't be compiled or loaded (RuntimeError: libnvrtc.so.13 is missing); use --device cpu",
    ),
]


def test_auto_is_a_gpu_that_works(cupy):
    cupy()
    assert device_of("auto") == device_of("cuda") == GPU
    assert device_of("cpu") == "cpu"
    cupy(driver=14)
    assert device_of("auto") == GPU


def test_auto_without_cupy_is_the_cpu_in_silence(no_cupy):
    assert device_of("auto") == "cpu"


@pytest.mark.parametrize(("changes", "message"), UNUSABLE)
def test_auto_with_a_gpu_that_fails_is_the_cpu_in_silence(cupy, changes, message):
    cupy(**changes)
    assert device_of("auto") == "cpu"


def test_auto_takes_no_gpu_that_comes_with_a_warning(cupy):
    cupy(warns=UserWarning("several CuPy packages are installed"))
    assert device_of("auto") == "cpu"
    with pytest.warns(UserWarning, match="several CuPy packages"), open_engine("cuda", NF4()) as engine:
        assert engine.device == GPU
    cupy(warns=DeprecationWarning("for developers"))
    assert device_of("auto") == GPU


def test_an_unknown_device_is_refused():
    with pytest.raises(UnknownDeviceError, match=r"^`device` is 'gpu'; choose one of auto, cpu, cuda$"):
        open_engine("gpu", NF4())


def refused(source, out):
    result = CliRunner().invoke(main, [str(source), "--format", "nf4", "--device", "cuda", "--out", str(out)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert not out.exists()
    return result.stderr


@pytest.mark.parametrize(("changes", "message"), UNUSABLE)
def test_cuda_that_cannot_be_used_is_an_error_of_one_line(cupy, source, tmp_path, changes, message):
    cupy(**changes)
    line = refused(source, tmp_path / "out")
    assert line.startswith(f"Error: --device cuda: {message}")
    assert line.endswith("use --device cpu\n")
    with pytest.raises(NoCudaError):
        open_engine("cuda", NF4())


def test_cuda_without_cupy_is_an_error_that_says_what_to_install(no_cupy, source, tmp_path):
    line = refused(source, tmp_path / "out")
    assert line.startswith("Error: --device cuda: CuPy can't be imported (")
    assert line.endswith("): pip install 'surogate-quant[cuda13]', or [cuda12]; or use --device cpu\n")


def test_the_summary_names_the_device_and_the_artifact_does_not(no_cupy, source, tmp_path):
    run = [str(source), "--format", "fp8", "--out"]
    table = CliRunner().invoke(main, [*run, str(tmp_path / "auto")])
    assert " MB/s on cpu" in table.stdout
    told = CliRunner().invoke(main, [*run, str(tmp_path / "cpu"), "--device", "cpu", "--json"])
    assert json.loads(told.stdout)["device"] == "cpu"
    assert contents(tmp_path / "auto") == contents(tmp_path / "cpu")
    assert b"device" not in contents(tmp_path / "cpu")["surogate.json"]


def test_kernels_are_compiled_once_and_only_those_that_are_needed(cupy):
    fake = cupy()
    with CudaEngine(FP8()) as engine:
        assert len(fake.compiled) == 2
        for seed in range(2):
            one = weight(seed=seed)
            engine.quantize(NVFP4(), one, engine.amax(one))
    assert len(fake.compiled) == 3
    assert set(fake.launched) == {"amax_F32", "nvfp4_2d_F32"}


def test_a_weight_goes_up_once(cupy):
    fake = cupy()
    with CudaEngine(NF4()) as engine:
        one = weight()
        amax = engine.amax(one)
        assert amax == np.abs(one.raw.view(np.float32)).max()
        engine.quantize(NF4(), one, amax)
        assert fake.copied.count(one.raw.nbytes) == 1
        engine.quantize(NF4(), one, amax)
        assert fake.copied.count(one.raw.nbytes) == 2


def test_a_buffer_that_is_used_again_is_another_weight():
    raw = np.zeros((4, 4), np.uint32)
    uploads, first, second = Uploads(1 << 20), Source(raw, "F32"), Source(raw, "F32")
    uploads.put(first, "first")
    assert uploads.take(second) is None
    assert uploads.take(first) == "first"
    assert uploads.take(first) is None


def test_copies_of_weights_are_held_within_bounds_and_not_beyond_the_weight():
    uploads = Uploads(2 * weight().raw.nbytes)
    held = [weight(seed=seed) for seed in range(3)]
    for number, one in enumerate(held):
        uploads.put(one, number)
    assert [uploads.take(one) for one in held] == [0, 1, None]
    lost = weight()
    uploads.put(lost, "lost")
    uploads.put(held[0], 0)
    del lost
    uploads.put(held[1], 1)
    assert (uploads.take(held[0]), uploads.take(held[1])) == (0, 1)


def same(found, expected):
    (parts, errors), (expected_parts, expected_errors) = found, expected
    assert errors == expected_errors
    assert {part: array.tobytes() for part, array in parts.items()} == {
        part: array.tobytes() for part, array in expected_parts.items()
    }


@pytest.mark.parametrize("fmt", [NF4(), NVFP4(), FP8()], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", [(48, 64), (0, 16)])
def test_what_the_gpu_cannot_hold_goes_to_the_cpu(cupy, fmt, shape):
    fake = cupy(free=20_000)
    one = weight(shape)
    with CudaEngine(fmt, 1) as engine, CpuEngine(1) as cpu:
        same(engine.quantize(fmt, one, engine.amax(one)), cpu.quantize(fmt, one, cpu.amax(one)))
    assert not fake.launched


def test_parameters_that_the_kernels_do_not_know_go_to_the_cpu(cupy):
    fake = cupy()
    one = weight()

    @dataclass(frozen=True)
    class Newer(NF4):
        rounding: str = "other"

    with CudaEngine(NF4(), 1) as engine, CpuEngine(1) as cpu:
        amax = cpu.amax(one)
        same(engine.quantize(Newer(), one, amax), cpu.quantize(Newer(), one, amax))
    assert not fake.launched


LEFT_TO_THE_CPU = [NF4(64, "dynamic"), NF4(128, "dynamic")]


@pytest.mark.parametrize("fmt", FORMATS_IN_FULL, ids=name_of)
def test_the_kernels_know_every_value_but_those_left_to_the_cpu(fmt):
    assert QUANTIZERS[fmt.name].knows(fmt) == (fmt not in LEFT_TO_THE_CPU)


@pytest.mark.parametrize("fmt", LEFT_TO_THE_CPU, ids=name_of)
def test_what_is_left_to_the_cpu_is_quantized_there(cupy, fmt):
    fake = cupy()
    one = weight((48, 64))
    with CudaEngine(fmt, 1) as engine, CpuEngine(1) as cpu:
        amax = cpu.amax(one)
        same(engine.quantize(fmt, one, amax), cpu.quantize(fmt, one, amax))
    assert not fake.launched


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernels_know_every_parameter_of_every_format(name):
    assert {field.name for field in fields(FORMATS[name])} == QUANTIZERS[name].takes.keys()
    assert QUANTIZERS[name].knows(FORMATS[name]())
    assert kernel_names(QUANTIZERS[name].module)


def test_memory_that_runs_out_is_an_error_that_says_what_to_do(cupy, monkeypatch):
    fake = cupy()
    with CudaEngine(NF4()) as engine:
        monkeypatch.setattr(CudaEngine, "_fits", lambda *_: True)
        fake.free = 100
        with pytest.raises(DeviceMemoryError, match=r"^cuda:0 Fake GPU: no memory left \(Out of memory allocating "):
            engine.amax(weight())


def test_an_error_of_the_gpu_is_one_line(cupy):
    fake = cupy()

    def fail(*_):
        raise FakeRuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")

    with CudaEngine(NF4()) as engine:
        fake.modules["cupy.cuda.runtime"].memcpyAsync = fail
        with pytest.raises(DeviceFailedError, match=r"^cuda:0 Fake GPU: cudaErrorIllegalAddress: .*`device='cpu'`$"):
            engine.amax(weight())


def test_an_error_of_the_gpu_does_not_blame_the_weight(cupy, source, tmp_path):
    fake = cupy()

    def fail(*_):
        raise FakeRuntimeError("cudaErrorUnknown: unknown error")

    fake.modules["cupy.cuda.runtime"].memcpyAsync = fail
    line = refused(source, tmp_path / "out")
    assert line == f"Error: {GPU}: cudaErrorUnknown: unknown error; try again, or use --device cpu\n"
    with pytest.raises(DeviceFailedError):
        quantize(source, tmp_path / "out", make_options("nf4", {}), device="auto")


def test_what_is_not_finite_has_its_index(cupy):
    from surogate_formats.errors import NonFiniteWeightError

    cupy()
    values = np.ones((4, 8), np.float32)
    values[2, 3] = values[3, 0] = np.nan
    with CudaEngine(NF4()) as engine, pytest.raises(NonFiniteWeightError, match=r"^\[2, 3\] is nan$"):
        engine.amax(Source.of(values, "F32"))
