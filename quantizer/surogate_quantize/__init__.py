"""Quantizes a Hugging Face checkpoint into an artifact: offline, once, in bounded memory.

from surogate_quantize import make_options, quantize
quantize("SmolLM2-135M", "SmolLM2-135M-nf4", make_options("nf4", {}))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surogate_quantize.options import Options, make_options
    from surogate_quantize.run import dry_run, quantize

__all__ = ["Options", "dry_run", "make_options", "quantize"]

_HOMES = {
    "Options": "surogate_quantize.options",
    "make_options": "surogate_quantize.options",
    "dry_run": "surogate_quantize.run",
    "quantize": "surogate_quantize.run",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `surogate-quantize --help` need not wait for numba."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
