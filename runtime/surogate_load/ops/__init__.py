"""The ops of `torch.ops.surogate`, registered on import."""

from __future__ import annotations

from surogate_load.kernels import cross_entropy as _cross_entropy  # noqa: F401  (registers its op's CUDA kernel)
from surogate_load.kernels import dequantize as _dequantize  # noqa: F401
from surogate_load.kernels import hadamard as _hadamard  # noqa: F401
from surogate_load.kernels import quantize_fp8 as _quantize_fp8  # noqa: F401
from surogate_load.kernels import quantize_nvfp4 as _quantize_nvfp4  # noqa: F401
from surogate_load.ops import cross_entropy, dequantize, hadamard, products, quantize_fp8, quantize_nvfp4, transpose

__all__ = ["cross_entropy", "dequantize", "hadamard", "products", "quantize_fp8", "quantize_nvfp4", "transpose"]
