"""What we make of others' checkpoints is, bit for bit, what their own decoders make of them."""

import pytest
import torch
from runtime.foreign import KINDS, NVFP4_ARGUMENTS, ct_arguments, write_foreign
from safetensors.torch import load_file

from surogate_load import open_artifact


def ct_nvfp4(stored):
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=ct_arguments(**NVFP4_ARGUMENTS))
    return NVFP4PackedCompressor.decompress(stored, scheme)["weight"]


def ct_fp8(strategy, **arguments):
    def decode(stored):
        from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
        from compressed_tensors.quantization import QuantizationScheme

        weights = ct_arguments(num_bits=8, strategy=strategy, **arguments)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        return FloatQuantizationCompressor.decompress(stored, scheme)["weight"]

    return decode


def hf_fp8(stored):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(stored["weight"], stored["weight_scale_inv"], torch.float32)


def modelopt_nvfp4(stored):
    """ModelOpt's own code, where it is installed."""
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    packed = stored["weight"]
    weight = qtensor.NVFP4QTensor((packed.shape[0], 2 * packed.shape[1]), torch.float32, packed)
    scales = {"scale": stored["weight_scale"], "double_scale": stored["weight_scale_2"], "block_sizes": {-1: 16}}
    return weight.dequantize(torch.float32, **scales)


DECODERS = {
    "ct-nvfp4": ct_nvfp4,
    "ct-w4a4": ct_nvfp4,
    "ct-fp8-tensor": ct_fp8("tensor"),
    "ct-fp8-channel": ct_fp8("channel"),
    "ct-w8a8": ct_fp8("channel"),
    "ct-fp8-block": ct_fp8("block", block_structure=[128, 128]),
    "hf-fp8": hf_fp8,
    "hf-fp8-bf16": hf_fp8,
    "hf-tensor": hf_fp8,
    "modelopt-nvfp4": modelopt_nvfp4,
    "modelopt-w4a16": modelopt_nvfp4,
}


@pytest.mark.parametrize("kind", DECODERS)
def test_our_values_are_those_of_their_decoder(kind, tmp_path):
    checkpoint = write_foreign(tmp_path, kind)
    tensors = load_file(checkpoint.path / "model.safetensors")
    with open_artifact(checkpoint.path) as opened:
        for module in checkpoint.weights:
            prefix = f"{module}."
            theirs = DECODERS[kind](
                {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            )
            ours = opened[module].dequantize(theirs.dtype)
            assert torch.equal(ours, theirs), module
            if DECODERS[kind] is not modelopt_nvfp4:  # to which both zeros are +0
                assert torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8)), module


def test_every_kind_is_compared_but_one_that_has_a_formula_only():
    assert KINDS.keys() - DECODERS.keys() == {"modelopt-fp8"}
