"""What becomes of a tensor by its safetensors dtype; names alone, so that a plan needs no numpy."""

from __future__ import annotations

QUANTIZABLE = frozenset({"F32", "F16", "BF16"})
"""Source dtypes that widen to fp32 exactly and so can be quantized."""

STORED_AS = {"I64": "I32", "BOOL": "U8", "F64": "F32", "F8_E8M0": "U8"}
"""Dtypes that an artifact holds nowhere, since readers exist that refuse the whole file for one such tensor, and what
stands for each: integers that fit, the same bytes, the nearest float32, the same bits. Loaders cast to the model's own
dtype."""
