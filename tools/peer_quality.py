"""Quality of bitsandbytes' NF4 (block 64, double quantization) on the demo's model and text."""

from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation_text import licence_windows
from make_smollm2 import make_smollm2
from surogate_load.divergence import kl_and_perplexity, reference_logprobs

DEMO = Path(__file__).resolve().parents[1] / ".demo"


def main() -> None:
    """Replaces every linear of a block by what bitsandbytes makes of it; compares in float32."""
    source = make_smollm2(DEMO / "smollm2-135m")
    ids = licence_windows(AutoTokenizer.from_pretrained(source))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    reference = reference_logprobs(model, ids)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            packed, state = bnb.quantize_4bit(
                module.weight.data.bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=True
            )
            module.weight.data = bnb.dequantize_4bit(packed, state).float()
    divergence, perplexity = kl_and_perplexity(model, ids, reference)
    print(f"bitsandbytes NF4, block 64, double quantization: mean KL {divergence:.4f}, perplexity {perplexity:.2f}")


if __name__ == "__main__":
    main()
