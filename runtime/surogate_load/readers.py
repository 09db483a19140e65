"""Who else loads an artifact, by format and layout; run and read in vLLM 0.32, SGLang 0.5.23 and transformers 5.24."""

from __future__ import annotations

from surogate_formats.format import Format

_DENSE = "dense from the first forward on"
_OWN = {"surogate_load": "stays packed, trains LoRA"}

_WITH_US = "stays packed, where surogate_load is imported; an error elsewhere"

_UNCALIBRATED = "rounds activations to E4M3 with scale 1, which nobody calibrated"

READERS: dict[tuple[str, str], dict[str, str]] = {
    ("nf4", "surogate"): {**_OWN, "transformers": _WITH_US},
    ("nf4", "bitsandbytes"): {
        **_OWN,
        "transformers": "stays packed; needs the package bitsandbytes",
        "vLLM": "with the package vllm-bnb-plugin",
        "SGLang": "not run",
    },
    ("fp4", "compressed-tensors"): {**_OWN, "transformers": _DENSE, "vLLM": "from SM75", "SGLang": "not run"},
    ("fp8", "compressed-tensors"): {**_OWN, "transformers": _DENSE, "vLLM": "from SM75", "SGLang": "not run"},
    ("fp8", "hf-fp8"): {**_OWN, "transformers": "dense below SM89", "vLLM": "", "SGLang": "not run", "Surogate": ""},
    ("fp4", "modelopt"): {
        **_OWN,
        "transformers": _WITH_US,
        "vLLM": "weights alone, from SM75",
        "TensorRT-LLM": "not run",
        "Surogate": "",
    },
    ("fp8", "modelopt"): {
        **_OWN,
        "transformers": "stays packed, where surogate_load is imported; elsewhere wrong weights without an error",
        "vLLM": f"from SM80; {_UNCALIBRATED}",
        "TensorRT-LLM": f"not run; {_UNCALIBRATED}",
    },
}
"""Format and layout to each reader and a remark."""

NOT_BF16: dict[tuple[str, str], dict[str, str]] = {
    ("nf4", "bitsandbytes"): {"transformers": "stays packed, multiplies in bfloat16; needs the package bitsandbytes"},
    ("fp4", "compressed-tensors"): {
        "transformers": f"with dtype=bfloat16 only (else RuntimeError at the first forward), {_DENSE}"
    },
    ("fp8", "compressed-tensors"): {"transformers": f"{_DENSE}; rounds the scales to the model's dtype"},
}
"""Remarks that replace those of `READERS` where the source isn't in bfloat16."""

WITH_EXPERTS: dict[tuple[str, str], dict[str, str]] = {
    ("nf4", "surogate"): {},
    ("nf4", "bitsandbytes"): {"transformers": "not these experts (an error at load)", "vLLM": "not run"},
    ("fp4", "compressed-tensors"): {
        "transformers": "reads the experts wrongly, without an error; refused where surogate_load is imported"
    },
    ("fp8", "compressed-tensors"): {"vLLM": "not these experts (weight-only FP8 experts: RuntimeError)"},
    ("fp8", "hf-fp8"): {},
    ("fp4", "modelopt"): {"vLLM": "not run"},
    ("fp8", "modelopt"): {"vLLM": "not run"},
}
"""Remarks that replace both where experts are quantized."""

OF_OTHERS: dict[tuple[str, str], dict[str, str]] = {
    ("fp8", "modelopt"): {
        "vLLM": "from SM80; quantizes activations with the stored scales",
        "TensorRT-LLM": "not run",
    },
}
"""Remarks that replace them where others packed the checkpoint."""

NEVER_WRITTEN: dict[tuple[str, str, str], dict[str, str]] = {
    ("hf-fp8", "fp8", "tensor"): {**_OWN, "transformers": "dense below SM89"},
    ("compressed-tensors", "fp8", "block"): {
        **_OWN,
        "transformers": _DENSE,
        "vLLM": "with dynamic activations in groups of 128 only",
    },
}
"""Layout, format and FP8's scaling to the readers of what others write and we don't."""


FUSED_ONLY = {
    "vLLM": "not these experts, which it knows fused only (no error: they stay at random)",
    "SGLang": "not run",
    "TensorRT-LLM": "not run",
    "Surogate": "not run",
}
"""Remarks that replace all others where only surogate_load knows a model's experts apart from each other."""


def readers(
    fmt: Format,
    layout: str,
    *,
    experts: bool = False,
    fused_only: bool = False,
    bf16: bool = True,
    ours: bool = True,
) -> dict[str, str]:
    """Who loads this format in this layout: each reader with a remark, which may be empty.

    Args:
        fmt: the format.
        layout: the layout's name.
        experts: whether experts of a mixture are quantized.
        fused_only: whether only surogate_load knows such a model's experts apart from each other.
        bf16: whether every quantized weight was bfloat16 in the source.
        ours: whether surogate-quantize wrote it.
    """
    never = NEVER_WRITTEN.get((layout, fmt.name, getattr(fmt, "scaling", "")))
    if never is not None and not ours:
        return dict(never)
    key = fmt.name, layout
    found = {
        **READERS[key],
        **({} if bf16 else NOT_BF16.get(key, {})),
        **({} if ours else OF_OTHERS.get(key, {})),
        **(WITH_EXPERTS.get(key, {}) if experts else {}),
    }
    if experts and fused_only:
        found.update({reader: remark for reader, remark in FUSED_ONLY.items() if reader in found})
    return found
