"""Output heads whose weight is tied to the embedding: linears that readers build, and no file holds.

A loader quantizes, or waits for packed bytes of, every linear that isn't listed as kept: unlisted, a tied head gives
infinite logits in transformers. Its name is known from the tensors that stand beside it.
"""

import re
from collections.abc import Iterable
from typing import Final

_HEADS: Final = {
    "lm_head": r"",
    "lm_head.decoder": r"lm_head\.(?:(?:dense|layer_norm)\.|bias$)",
    "lm_head.out_proj": r"model\.decoder\.layers\.0\.",
    "language_model.lm_head": r"language_model\.model\.",
    "text_model.lm_head": r"text_model\.model\.",
    "cls.predictions.decoder": r"cls\.predictions\.",
    "decoder.cls.predictions.decoder": r"decoder\.cls\.predictions\.",
    "text_decoder.cls.predictions.decoder": r"text_decoder\.cls\.predictions\.",
    "predictions.decoder": r"predictions\.",
    "entity_predictions.decoder": r"entity_predictions\.",
    "generator_lm_head": r"generator_(?:lm_head|predictions)\.",
    "vocab_projector": r"vocab_(?:transform|projector)\.",
    "pred_layer.proj": r"pred_layer\.",
    "lm_loss": r"lm_loss\.",
    "embed_out": r"gpt_neox_japanese\.",
    "proj_out": r"model\.decoder\.layers\.0\.encoder_attn\.",
    "output_projection": r"biogpt\.|model\.decoder\.layers\.0\.encoder_attn\.",
    "unembedding_projection": r"model\.embed_tokens\.embedding_projection\.",
    "text_decoder_postnet.lm_head": r"speecht5\.decoder\.prenet\.embed_tokens\.",
    "mlm_score.decoder": r"mlm_score\.",
    "ctc_head": r"encoder\.out\.",
    "head": r"rwkv\.embeddings\.",
    "output": r"git\.embeddings\.",
    "decoder": r"head\.dense\.|decoder\.bias$",
}
"""Full name of a head to the beginning of names of tensors that come with it; transformers' `_tied_weights_keys`."""


def tied_heads(tensors: Iterable[str]) -> list[str]:
    """Full names of the heads that a model with these tensors may build without finding their weight in a file."""
    names = set(tensors)
    present = [head for head, witness in _HEADS.items() if any(re.match(witness, name) for name in names)]
    return [head for head in present if f"{head}.weight" not in names]
