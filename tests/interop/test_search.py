"""Weights whose scales were searched for, as the peers' own decoders read them: to the bit, as nearest ones."""

import numpy as np
import pytest
import torch

from surogate_formats.layouts import LAYOUTS
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4


def gaussian(shape):
    values = np.random.default_rng(0).standard_normal(shape) * 0.03
    values[0, 0] *= 20
    return values.astype(np.float32)


def both(fmt, x):
    """The parts with and without the search; they differ."""
    nearest, found = (fmt.quantize(x, search=search) for search in (False, True))
    assert nearest["codes"].tobytes() != found["codes"].tobytes()
    return nearest, found


@pytest.mark.parametrize("double_quant", ["none", "dynamic"])
@pytest.mark.parametrize("block", [64, 128])
def test_bitsandbytes_dequantizes_to_our_values_and_nearer_to_the_weights(double_quant, block):
    from bitsandbytes.functional import QuantState, dequantize_4bit

    layout, fmt, x = LAYOUTS["bitsandbytes"], NF4(block, double_quant), gaussian((515, 384))
    errors = []
    for parts in both(fmt, x):
        stored = layout.store(fmt, parts, x.shape, "F32")
        tensors = {layout.suffixes["nf4"][key]: torch.from_numpy(array.copy()) for key, array in stored.items()}
        packed = tensors.pop("weight")
        state = QuantState.from_dict({key.removeprefix("weight."): value for key, value in tensors.items()}, "cpu")
        values = dequantize_4bit(packed, state).numpy()
        np.testing.assert_array_equal(values, fmt.dequantize(parts, x.shape))
        errors.append(np.linalg.norm(values - x))
    assert errors[1] < 0.96 * errors[0]


@pytest.mark.parametrize("two_d", [True, False])
def test_compressed_tensors_decompresses_to_our_values_and_nearer_to_the_weights(two_d):
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    fmt, x = NVFP4(two_d), gaussian((64, 256))
    errors = []
    for parts in both(fmt, x):
        state = {
            "weight_packed": torch.from_numpy(parts["codes"]),
            "weight_scale": torch.from_numpy(parts["scale"].view(np.uint8)).view(torch.float8_e4m3fn),
            "weight_global_scale": torch.from_numpy(parts["global_scale"]),
        }
        values = NVFP4PackedCompressor.decompress(state, scheme)["weight"].float().numpy()
        np.testing.assert_array_equal(values, fmt.dequantize(parts, x.shape))
        errors.append(np.linalg.norm(values - x))
    assert errors[1] < errors[0]
