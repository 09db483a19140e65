"""CUDA kernels, compiled on the user's machine through CuPy; without CuPy the plain-torch ops serve the GPU too."""

from __future__ import annotations

from surogate_load.kernels.device import load_kernels

__all__ = ["load_kernels"]
