"""How kernels are compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


class UncachedKernelsWarning(RuntimeWarning):
    """There is nowhere to keep compiled kernels, so that every process compiles them anew."""


def _compiled(**options: Any) -> Callable[[F], F]:
    """As `njit`, with the result kept on disk where numba finds a place for it."""

    def compile_or_keep(function: F) -> F:
        try:
            return njit(cache=True, **options)(function)  # type: ignore[no-any-return]
        except RuntimeError as error:
            if "cannot cache function" not in str(error):
                raise
            _say_once()
            return njit(**options)(function)  # type: ignore[no-any-return]

    return compile_or_keep


_said: list[str] = []


def _say_once() -> None:
    if not _said:
        _said.append(
            "no writable directory for compiled kernels, so every run compiles them anew, which takes some seconds; "
            "set NUMBA_CACHE_DIR to a directory that may be written to"
        )
        warnings.warn(_said[0], UncachedKernelsWarning, stacklevel=3)


kernel = _compiled(nogil=True, error_model="numpy")
"""A kernel that Python calls: without the GIL, kept on disk, without the check of divisors that breaks up loops."""

inner = _compiled(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""A part of a kernel, which only compiled code can call: that spares the compiler its wrappers."""
