"""The numbers of peers: bitsandbytes' NF4, compressed-tensors' NVFP4, FP8 in transformers and plain torch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from formats.cases import SHAPES, fitting, weights
from hypothesis import given, settings

from surogate_formats.fp8 import FP8
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_formats.rounding import unpack_nibbles
from surogate_formats.tables import NF4_CODEBOOK, NF4_MIDPOINTS

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PEER_NVFP4 = NVFP4(two_d=False, four_over_six=False, global_scale="amax")
PROFILE = settings(max_examples=60, deadline=None)


def gaussian(shape, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 0.03).astype(np.float32)


def test_the_nf4_codebook_is_that_of_bitsandbytes():
    from bitsandbytes.functional import get_4bit_type

    assert NF4_CODEBOOK.tobytes() == get_4bit_type("nf4", device="cpu").numpy().tobytes()


@pytest.mark.parametrize("block", [64, 128])
@PROFILE
@given(weight=weights())
def test_nf4_codes_and_absmax_are_those_of_bitsandbytes(block, weight):
    from bitsandbytes.functional import quantize_4bit

    x = weight.f32
    tensor = torch.from_numpy(x).to(TORCH[weight.dtype])
    packed, state = quantize_4bit(tensor, blocksize=block, quant_type="nf4", compress_statistics=False)
    parts = NF4(block, "none").quantize(x)
    whole = x.size // block
    absmax, codes = parts["absmax"], unpack_nibbles(parts["codes"].reshape(-1), x.size, first_high=True)
    peer_codes = unpack_nibbles(packed.numpy().reshape(-1), x.size, first_high=True)
    assert absmax[:whole].tobytes() == state.absmax.numpy()[:whole].tobytes()
    assert codes[: whole * block].tobytes() == peer_codes[: whole * block].tobytes()
    # Its last, partial block: absmax is at least 1e-38, and values are divided by it, not multiplied by its reciprocal.
    np.testing.assert_array_equal(np.maximum(absmax[whole:], np.float32(1e-38)), state.absmax.numpy()[whole:])
    tail = x.reshape(-1)[whole * block :]
    if tail.size and absmax[-1] >= 1e-38:
        divided = np.searchsorted(NF4_MIDPOINTS, tail / absmax[-1], side="left")
        multiplied = np.searchsorted(NF4_MIDPOINTS, tail * (np.float32(1) / absmax[-1]), side="left")
        assert codes[whole * block :].tolist() == multiplied.tolist()
        assert peer_codes[whole * block :].tolist() == divided.tolist()


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", [(64, 256), (3, 17), (129, 130), (1, 1)], ids=str)
def test_on_ordinary_weights_every_byte_of_nf4_is_bitsandbytes(block, shape):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    x = gaussian(shape)
    packed, state = quantize_4bit(torch.from_numpy(x), blocksize=block, quant_type="nf4", compress_statistics=False)
    fmt = NF4(block, "none")
    parts = fmt.quantize(x)
    assert parts["codes"].tobytes() == packed.numpy().tobytes()
    assert parts["absmax"].tobytes() == state.absmax.numpy().tobytes()
    if shape[1] % block == 0:
        values = dequantize_4bit(packed, state, quant_type="nf4", blocksize=block).numpy()
        np.testing.assert_array_equal(fmt.dequantize(parts, shape), values)


def compressed_tensors(x):
    """Scale, global scale and packed codes by compressed-tensors' own functions, and its scheme."""
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    weight = torch.from_numpy(x)
    global_scale = generate_gparam(weight.min(), weight.max())
    blocks = weight.reshape(x.shape[0], -1, 16)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments, global_scale)
    state = {
        "weight": weight,
        "weight_scale": scale,
        "weight_global_scale": global_scale,
        "weight_zero_point": zero,
    }
    return NVFP4PackedCompressor.compress(state, scheme), scheme


def test_nvfp4_by_the_peers_rule_is_compressed_tensors():
    differing = count = 0
    for seed, shape in enumerate([(256, 512), (64, 1024), (17, 48)]):
        x = gaussian(shape, seed)
        x[0, 0] *= 40
        parts = PEER_NVFP4.quantize(x)
        peer, _ = compressed_tensors(x)
        # torch divides a number by a tensor through the tensor's reciprocal.
        np.testing.assert_allclose(parts["global_scale"], peer["weight_global_scale"].numpy(), rtol=2.0**-23)
        assert parts["scale"].tobytes() == peer["weight_scale"].view(torch.uint8).numpy().tobytes()
        differing += int((parts["codes"] != peer["weight_packed"].numpy()).sum())
        count += parts["codes"].size
    assert differing / count <= 3e-4


@pytest.mark.parametrize("fmt", [NVFP4(), NVFP4(two_d=False), NVFP4(two_d=False, four_over_six=False)], ids=str)
def test_compressed_tensors_decompresses_our_nvfp4_to_our_values(fmt):
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor

    x = gaussian((48, 256))
    x[3, 5] = 2.0
    parts = fmt.quantize(x)
    _, scheme = compressed_tensors(x)
    state = {
        "weight_packed": torch.from_numpy(parts["codes"]),
        "weight_scale": torch.from_numpy(parts["scale"].view(np.uint8)).view(torch.float8_e4m3fn),
        "weight_global_scale": torch.from_numpy(parts["global_scale"]),
    }
    values = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
    np.testing.assert_array_equal(values.float().numpy(), fmt.dequantize(parts, x.shape))


def test_fp8_tiles_are_transformers_but_for_its_two_roundings_of_the_scale():
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    x = gaussian((256, 384))
    x[5, 5] = 3.0
    x[128:, 128:256] = 0
    parts = FP8("block").quantize(x)
    config = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=None)
    quantizer = Fp8Quantize(SimpleNamespace(quantization_config=config))
    peer = quantizer.convert({"p.weight": torch.from_numpy(x)})
    scale = peer["p.weight_scale_inv"].numpy()
    zero = np.zeros((2, 3), bool)
    zero[1, 1] = True
    assert (scale[zero] == parts["scale"][zero]).all()
    np.testing.assert_allclose(scale[~zero], parts["scale"][~zero], rtol=2.0**-22)
    peer_codes = peer["p.weight"].view(torch.uint8).numpy()
    codes = parts["codes"].view(np.uint8)
    neighbours = np.abs(codes.astype(int) - peer_codes) == 1
    assert ((codes == peer_codes) | neighbours).all()
    assert neighbours.mean() < 1e-4


def test_fp8_tiles_by_plain_torch_byte_for_byte():
    x = gaussian((256, 384))
    tiles = torch.from_numpy(x).reshape(2, 128, 3, 128)
    scale = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scale[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn).reshape(256, 384)
    parts = FP8("block").quantize(x)
    assert parts["scale"].tobytes() == scale.numpy().tobytes()
    assert parts["codes"].tobytes() == codes.view(torch.uint8).numpy().tobytes()


@PROFILE
@given(weights())
def test_shapes_that_fit_are_what_the_tests_say(weight):
    """`fitting` must never hand a format what it would keep, or half of these tests would test nothing."""
    for shape in (weight.stored.shape, *SHAPES):
        assert NVFP4().keep_reason(fitting(NVFP4(), shape)) is None
    assert NVFP4().keep_reason(weight.fit(NVFP4()).stored.shape) is None
