"""What the peers do to one bfloat16 weight, as functions without arguments, ready to be timed."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Run = Callable[[], object]


def bitsandbytes_nf4(weight: "Tensor") -> Run:
    """NF4 with blocks of 64 and double quantization."""
    from bitsandbytes.functional import quantize_4bit

    return lambda: quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)


def compressed_tensors_nvfp4(weight: "Tensor") -> Run:
    """NVFP4 with one scale a 1x16 block: its observers' minima and maxima, scales, codes and packing."""
    import torch
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)

    def run() -> object:
        low, high = weight.reshape(weight.shape[0], -1, 16).aminmax(dim=-1)
        global_scale = generate_gparam(low.min(), high.max())
        scale, zero = calculate_qparams(low, high, arguments, global_scale)
        state = {
            "weight": weight,
            "weight_scale": scale,
            "weight_global_scale": global_scale,
            "weight_zero_point": zero,
        }
        return NVFP4PackedCompressor.compress(state, scheme)

    return run


def torch_e4m3(weight: "Tensor") -> Run:
    """E4M3 with one scale a tensor, as one writes it in eager torch."""
    import torch

    largest = torch.finfo(torch.float8_e4m3fn).max

    def run() -> object:
        scale = weight.abs().amax().float() / largest
        return (weight.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale

    return run
