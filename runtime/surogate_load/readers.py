"""Who else loads an artifact, by format and layout; run and read in vLLM 0.32, SGLang 0.5.23 and transformers 5.24."""

from __future__ import annotations

from surogate_formats.format import Format

_OWN = "surogate_load: stays packed, trains LoRA"
_VLLM = "vLLM"
_SGLANG = "SGLang"
_TRANSFORMERS = "transformers"
_DENSE = "dense from the first forward on"

READERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("nf4", "surogate"): (_OWN,),
    ("fp4", "compressed-tensors"): (
        _OWN,
        f"{_TRANSFORMERS}: {_DENSE}; experts silently wrong",
        f"{_VLLM}: from SM75",
        _SGLANG,
    ),
    ("fp8", "compressed-tensors"): (_OWN, f"{_TRANSFORMERS}: {_DENSE}", f"{_VLLM}: from SM75", _SGLANG),
    ("fp8", "hf-fp8"): (_OWN, f"{_TRANSFORMERS}: dense below SM89", _VLLM, _SGLANG, "Surogate"),
}
"""Format and layout to one line a reader."""


def readers(fmt: Format, layout: str) -> tuple[str, ...]:
    """Who loads this format in this layout, one line each."""
    return READERS[fmt.name, layout]
