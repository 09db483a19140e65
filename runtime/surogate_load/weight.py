"""What packed parts mean: which op dequantizes them, with which arguments; and numpy parts as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from surogate_formats.dtypes import NUMPY
from surogate_formats.format import Format, TensorSpec
from surogate_formats.nvfp4 import NVFP4
from surogate_load import ops  # noqa: F401  (registers torch.ops.surogate)

TORCH_DTYPES = {
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
}
"""The torch dtype of each safetensors dtype that packed tensors have; I8 is for others' zero points of activations."""

NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""The safetensors name of a torch dtype: the inverse of `TORCH_DTYPES`."""

_TORCH_OF_NUMPY = {NUMPY[name]: dtype for name, dtype in TORCH_DTYPES.items()}

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class WeightKind:
    """Everything about a packed weight but its bytes: a static argument of autograd functions.

    Attributes:
        format: the format with its parameters.
        shape: (N, K) = (out_features, in_features).
    """

    format: Format
    shape: tuple[int, int]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Part name to dtype and shape; parts are always passed in this order."""
        return self.format.part_specs(self.shape)

    def dequantize(self, parts: Sequence[Tensor], dtype: torch.dtype, multiplier: Tensor | None = None) -> Tensor:
        """Dense [N, K] in `dtype` (float32, bfloat16, float16 or float8_e4m3fn), rounded once.

        Args:
            parts: in the order of `specs`.
            dtype: of the result.
            multiplier: float32 [1], multiplied in before the rounding.
        """
        op, _, arguments = _KERNELS[_key(self.format)]
        weight: Tensor = op(*arguments(self, parts), dtype, multiplier)
        return weight

    def op_call(self, parts: Sequence[Tensor]) -> tuple[str, Arguments]:
        """The name of the op that dequantizes, and its arguments before dtype and multiplier."""
        op, _, arguments = _KERNELS[_key(self.format)]
        return op._schema.name.partition("::")[2], arguments(self, parts)  # type: ignore[attr-defined]

    def dequantize_for_backward(
        self, gradient: Tensor, parts: Sequence[Tensor], dtype: torch.dtype, multiplier: Tensor | None = None
    ) -> Tensor:
        """The same through the backward's op, which takes the gradient and so can't be moved into the forward."""
        _, op, arguments = _KERNELS[_key(self.format)]
        weight: Tensor = op(gradient, *arguments(self, parts), dtype, multiplier)
        return weight


def _nf4(kind: WeightKind, parts: Sequence[Tensor]) -> Arguments:
    companions = (*parts, None, None)[:4]
    return (*companions, *kind.shape, kind.format.block_size, kind.format.double_quant)  # type: ignore[attr-defined]


def _nvfp4(kind: WeightKind, parts: Sequence[Tensor]) -> Arguments:
    return tuple(parts)


def _fp8(kind: WeightKind, parts: Sequence[Tensor]) -> Arguments:
    return (*parts, kind.format.scaling)  # type: ignore[attr-defined]


def _pair(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    library = torch.ops.surogate
    return getattr(library, name).default, getattr(library, f"{name}_for_backward").default


def _key(fmt: Format) -> tuple[str, str]:
    return fmt.name, fmt.step if isinstance(fmt, NVFP4) else ""


_KERNELS: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., Any], Callable[..., Arguments]]] = {
    ("nf4", ""): (*_pair("dequantize_nf4"), _nf4),
    ("fp4", "divide"): (*_pair("dequantize_nvfp4"), _nvfp4),
    ("fp4", "multiply"): (*_pair("dequantize_nvfp4_multiplied"), _nvfp4),
    ("fp8", ""): (*_pair("dequantize_fp8"), _fp8),
}
"""Format name and step rule to its two ops and the arguments they take before dtype and multiplier."""


def to_torch(array: NDArray[Any]) -> Tensor:
    """A numpy array as a tensor of the same dtype, shape and bytes, sharing memory; ml_dtypes' types included."""
    dtype = _TORCH_OF_NUMPY[array.dtype]
    flat = torch.from_numpy(array.reshape(-1).view("u1"))
    return flat.view(dtype).reshape(array.shape)


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """The inverse of `to_torch`, for a tensor on the CPU."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(NUMPY[NAMES[tensor.dtype]]).reshape(tuple(tensor.shape))


def empty_part(spec: TensorSpec, device: torch.device | str | None) -> Tensor:
    """An uninitialised tensor for a part."""
    return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device=device)
