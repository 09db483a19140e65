"""A packed head in plain transformers: the logits of the same model with our dequantized weights, to the bit."""

from interop.test_plain_transformers import assert_same, load_in_plain_transformers

from make_tiny import KINDS
from surogate_quantize import make_options

CASES = {
    "fp4": ("fp4", {}),
    "fp4-1d": ("fp4", {"two_d": False}),
    "fp8-tensor": ("fp8", {}),
    "fp8-channel": ("fp8", {"scaling": "channel"}),
}


def test_plain_transformers_reads_the_packed_head(tiny, tmp_path, subtests):
    """One test, so that one process loads them all."""
    cases = [
        (("llama", name), tiny("llama"), KINDS["llama"].model, make_options(*arguments, quantize_lm_head=True))
        for name, arguments in CASES.items()
    ]
    for case, result in load_in_plain_transformers(tmp_path, cases).items():
        with subtests.test("-".join(case)):
            assert_same(*result)
