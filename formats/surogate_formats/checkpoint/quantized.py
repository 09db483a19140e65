"""Recognize a checkpoint that somebody has quantized already: quantizing it again would be silently wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from surogate_formats.checkpoint.errors import shown
from surogate_formats.checkpoint.tensor_info import TensorInfo

_UNNAMED = "an unnamed method"
_MODELOPT_FILE = "hf_quant_config.json"
_BYTES = frozenset({"U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4"})
_WORDS = frozenset({"I32", "U32", "I64"})


class _Trace(NamedTuple):
    """A packed tensor `stem + suffix` of one of `dtypes`, beside which `stem + companion` stands."""

    suffix: str
    dtypes: frozenset[str]
    companion: str
    method: str


_TRACES = (
    _Trace("", _BYTES, "_scale_inv", "fp8"),
    _Trace("", _BYTES, "_scale", "compressed-tensors or modelopt"),
    _Trace("_packed", _BYTES | _WORDS, "_scale", "compressed-tensors"),
    _Trace("", _BYTES, ".absmax", "bitsandbytes"),
    _Trace(".weight", _BYTES, ".SCB", "bitsandbytes"),
    _Trace("", _BYTES, "_absmax", "surogate"),
    _Trace(".qweight", _BYTES | _WORDS, ".scales", "gptq or awq"),
    _Trace(".weight", _WORDS, ".scales", "mlx"),
    _Trace("_blocks", _BYTES, "_scales", "mxfp4"),
)
"""How the layouts name a packed weight and its scale, where config.json says nothing."""


def is_quantized(
    config: Mapping[str, Any],
    *,
    files: Collection[str] = (),
    tensors: Mapping[str, TensorInfo] | None = None,
) -> str | None:
    """The method that a checkpoint is quantized by, as one printable line; None if nothing says that it is.

    Args:
        config: Content of `config.json`. A `quantization_config` counts at any depth: multimodal models
            keep it in `text_config`.
        files: Names of the directory's files; ModelOpt writes `hf_quant_config.json`.
        tensors: Every tensor by name; a packed weight beside its scales gives a stripped config away.
    """
    if method := _declared(config):
        return method
    if _MODELOPT_FILE in files:
        return "modelopt"
    return _traced(tensors or {})


def _declared(config: Mapping[str, Any]) -> str | None:
    pending: list[Mapping[str, Any]] = [config]
    while pending:
        section = pending.pop()
        for key, method in (("quantization_config", None), ("compression_config", "compressed-tensors")):
            if declared := section.get(key):
                return _method(declared) or method or _UNNAMED
        pending.extend(value for value in section.values() if isinstance(value, dict))
    return None


def _method(declared: object) -> str | None:
    if not isinstance(declared, dict):
        return None
    method = declared.get("quant_method")
    return shown(method) if isinstance(method, str) else None


def _traced(tensors: Mapping[str, TensorInfo]) -> str | None:
    for name, tensor in tensors.items():
        for trace in _TRACES:
            if name.endswith(trace.suffix) and tensor.dtype in trace.dtypes:
                companion = name.removesuffix(trace.suffix) + trace.companion
                if companion in tensors:
                    return trace.method
    return None
