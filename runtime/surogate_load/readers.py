"""Who else loads an artifact, by format and layout; run and read in vLLM 0.32, SGLang 0.5.23 and transformers 5.24."""

from __future__ import annotations

from surogate_formats.format import Format

_DENSE = "dense from the first forward on"
_OWN = {"surogate_load": "stays packed, trains LoRA"}
_NOT_THESE = {
    "surogate_load": "not yet: packed experts that transformers merges are refused; --skip experts leaves them"
}

READERS: dict[tuple[str, str], dict[str, str]] = {
    ("nf4", "surogate"): _OWN,
    ("fp4", "compressed-tensors"): {**_OWN, "transformers": _DENSE, "vLLM": "from SM75", "SGLang": ""},
    ("fp8", "compressed-tensors"): {**_OWN, "transformers": _DENSE, "vLLM": "from SM75", "SGLang": ""},
    ("fp8", "hf-fp8"): {**_OWN, "transformers": "dense below SM89", "vLLM": "", "SGLang": "", "Surogate": ""},
}
"""Format and layout to each reader and a remark."""

NOT_BF16: dict[tuple[str, str], dict[str, str]] = {
    ("fp4", "compressed-tensors"): {
        "transformers": f"with dtype=bfloat16 only (else RuntimeError at the first forward), {_DENSE}"
    },
    ("fp8", "compressed-tensors"): {"transformers": f"{_DENSE}; rounds the scales to the model's dtype"},
}
"""Remarks that replace those of `READERS` where the source isn't in bfloat16."""

WITH_EXPERTS: dict[tuple[str, str], dict[str, str]] = {
    ("nf4", "surogate"): _NOT_THESE,
    ("fp4", "compressed-tensors"): {
        **_NOT_THESE,
        "transformers": "reads the experts wrongly, without an error; refused where surogate_load is imported",
    },
    ("fp8", "compressed-tensors"): {
        **_NOT_THESE,
        "vLLM": "not these experts (weight-only FP8 experts: RuntimeError)",
    },
    ("fp8", "hf-fp8"): _NOT_THESE,
}
"""Remarks that replace both where experts are quantized."""


def readers(fmt: Format, layout: str, *, experts: bool = False, bf16: bool = True) -> dict[str, str]:
    """Who loads this format in this layout: each reader with a remark, which may be empty.

    Args:
        fmt: the format.
        layout: the layout's name.
        experts: whether experts of a mixture are quantized.
        bf16: whether every quantized weight was bfloat16 in the source.
    """
    key = fmt.name, layout
    return {
        **READERS[key],
        **({} if bf16 else NOT_BF16.get(key, {})),
        **(WITH_EXPERTS.get(key, {}) if experts else {}),
    }
