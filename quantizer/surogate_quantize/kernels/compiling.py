"""How kernels are compiled."""

from __future__ import annotations

from numba import njit

kernel = njit(nogil=True, cache=True, error_model="numpy")
"""A kernel that Python calls: without the GIL, kept on disk, without the check of divisors that breaks up loops."""

inner = njit(nogil=True, cache=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""A part of a kernel, which only compiled code can call: that spares the compiler its wrappers."""
