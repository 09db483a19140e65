"""The ops of `torch.ops.surogate`, registered on import."""

from __future__ import annotations

from surogate_load.kernels import dequantize as _cuda  # noqa: F401  (registers its ops' CUDA kernels)
from surogate_load.ops import add_product, dequantize, hadamard, quantize_fp8, quantize_nvfp4

__all__ = ["add_product", "dequantize", "hadamard", "quantize_fp8", "quantize_nvfp4"]
