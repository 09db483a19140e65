"""bitsandbytes' own double quantization and its own checkpoints, beside ours."""

import numpy as np
import pytest
import torch

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.dynamic_absmax import DYNAMIC_MAP
from surogate_formats.format import TensorSpec
from surogate_formats.layouts import LAYOUTS
from surogate_formats.nf4 import NF4, block_absmax

LAYOUT = LAYOUTS["bitsandbytes"]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHAPES = [(64, 256), (3, 128), (1, 128), (515, 384)]


def tensor_of(shape, dtype, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.03)
    values[0, 0] *= 20
    return torch.from_numpy(values).to(DTYPES[dtype])


def theirs(tensor, block, double):
    """The packed codes, and the state as tensors by its keys on disk."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(tensor, blocksize=block, quant_type="nf4", compress_statistics=double)
    arrays = {f"weight.{key}": value.numpy() for key, value in state.as_dict(packed=True).items()}
    return packed, state, {"weight": packed.numpy(), **arrays}


def by_key(arrays):
    return {key: arrays[ending] for key, ending in LAYOUT.suffixes["nf4"].items() if ending in arrays}


def test_the_map_is_that_of_bitsandbytes():
    from bitsandbytes.functional import create_dynamic_map

    assert create_dynamic_map().numpy().tobytes() == DYNAMIC_MAP.tobytes()


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_equal_and_absmax_is_as_near(block, dtype, shape):
    """Its kernel for CPUs finds 8-bit codes in a table with coarse steps, and its mean is rounded otherwise."""
    tensor = tensor_of(shape, dtype)
    packed, state, _ = theirs(tensor, block, True)
    x = tensor.float().numpy()
    parts = NF4(block, "dynamic").quantize(x)
    assert parts["codes"].tobytes() == packed.numpy().tobytes()
    np.testing.assert_allclose(parts["nested_offset"][0], state.offset.item(), rtol=1e-6)
    np.testing.assert_allclose(parts["nested_absmax"], state.state2.absmax.numpy(), rtol=1e-5, atol=1e-7)
    steps = np.abs(parts["absmax"].astype(int) - state.absmax.numpy().astype(int))
    if state.state2.absmax.max() > 1e-6:  # else all blocks have one absmax, whose distance from its mean is rounding
        assert steps.max() <= 1
        assert (steps != 0).mean() <= 0.01
    true = NF4(block, "none").quantize(x)["absmax"]
    peer = {**parts, "absmax": state.absmax.numpy(), "nested_absmax": state.state2.absmax.numpy()}
    ours, others = (np.abs(block_absmax(each) - true).sum() for each in (parts, peer))
    assert ours <= others * 1.001 + 1e-6


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_bitsandbytes_wrote_is_described_and_dequantized_to_the_bit(block, double, dtype, shape):
    from bitsandbytes.functional import dequantize_4bit

    packed, state, arrays = theirs(tensor_of(shape, dtype), block, double)
    stored = by_key(arrays)
    specs = {key: TensorSpec("U8" if array.dtype == np.uint8 else "F32", array.shape) for key, array in stored.items()}
    fmt, found_shape, found_dtype = LAYOUT.describe(specs, stored["quant_state"].tobytes())
    assert (fmt, found_shape, found_dtype) == (NF4(block, "dynamic" if double else "none"), shape, dtype)
    dense = torch.from_numpy(fmt.dequantize(LAYOUT.restore(fmt, stored, shape), shape)).to(DTYPES[dtype])
    assert torch.equal(dense, dequantize_4bit(packed, state))


@pytest.mark.parametrize("double", [True, False])
def test_what_we_wrote_is_dequantized_by_bitsandbytes_to_the_bit(double):
    from bitsandbytes.functional import QuantState, dequantize_4bit

    fmt, tensor = NF4(64, "dynamic" if double else "none"), tensor_of((515, 384), "BF16")
    x = tensor.float().numpy()
    stored = LAYOUT.store(fmt, fmt.quantize(x), x.shape, "BF16")
    tensors = {LAYOUT.suffixes["nf4"][key]: torch.from_numpy(array.copy()) for key, array in stored.items()}
    packed = tensors.pop("weight")
    state = QuantState.from_dict({key.removeprefix("weight."): value for key, value in tensors.items()}, "cpu")
    expected = torch.from_numpy(fmt.dequantize(fmt.quantize(x), x.shape)).bfloat16()
    assert torch.equal(dequantize_4bit(packed, state), expected)


@pytest.mark.parametrize("double", [True, False])
def test_every_weight_of_a_checkpoint_that_transformers_saved_is_described(tiny, tmp_path, double):
    import transformers

    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny("llama"), dtype=torch.bfloat16, quantization_config=settings
    )
    model.save_pretrained(tmp_path / "saved")
    with Checkpoint.open(tmp_path / "saved") as saved:
        fmt, kept = LAYOUT.parse_config(saved.config["quantization_config"])
        ending = LAYOUT.suffixes["nf4"]["quant_state"]
        modules = [name.removesuffix(f".{ending}") for name in saved.tensors if name.endswith(ending)]
        assert len(modules) == 14
        assert not {"lm_head", *kept} & set(modules)
        for module in modules:
            stored = by_key(
                {
                    name.removeprefix(f"{module}."): saved.read(name)
                    for name in saved.tensors
                    if name.startswith(f"{module}.")
                }
            )
            infos = {key: saved.tensors[f"{module}.{LAYOUT.suffixes['nf4'][key]}"].info for key in stored}
            specs = {key: TensorSpec(info.dtype, info.shape) for key, info in infos.items()}
            found, shape, dtype = LAYOUT.describe(specs, stored["quant_state"].tobytes())
            assert (found, dtype) == (fmt, "BF16")
            dense = torch.from_numpy(found.dequantize(LAYOUT.restore(found, stored, shape), shape)).bfloat16()
            weight = model.get_submodule(module).weight
            from bitsandbytes.functional import dequantize_4bit

            assert torch.equal(dense, dequantize_4bit(weight.data, weight.quant_state))
