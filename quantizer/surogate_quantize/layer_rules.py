"""What the name of a tensor says about it: one table a question, first match wins.

A safetensors header can't tell a position table or a router from the weight of a linear layer: all are 2-D. So names
decide, and whatever no rule knows is quantized only if it is the 2-D `.weight` of a module inside a numbered block.
`tests/interop/test_selection_architectures.py` holds these tables to transformers' own modules.
"""

import re
from collections.abc import Sequence
from typing import Final


class Rules:
    """Rows of (reason, alternatives): a regular expression that a whole dotted component must match, case ignored."""

    def __init__(self, *rows: tuple[str, str]) -> None:
        self._rows = tuple((reason, re.compile(row, re.IGNORECASE)) for reason, row in rows)
        self._row_of: dict[str, int | None] = {}

    def reason(self, components: Sequence[str]) -> str | None:
        """Return the reason of the first row that one of the components matches, or None."""
        rows = [row for component in components if (row := self._first_row(component)) is not None]
        return self._rows[min(rows)][0] if rows else None

    def _first_row(self, component: str) -> int | None:
        if component not in self._row_of:
            hits = (i for i, (_, pattern) in enumerate(self._rows) if pattern.fullmatch(component))
            self._row_of[component] = next(hits, None)
        return self._row_of[component]


BLOCK_CONTAINERS: Final = frozenset(
    {
        *("layers", "layer", "h", "block", "blocks", "resblocks", "self_attends"),
        *("decoder_layer", "decoder_layers", "encoder_layers", "transformer_layers", "transformer_blocks"),
        *("attentions", "ffns"),  # XLM lists the halves of its blocks apart
        *("albert_layer_groups", "cross_attn_layers", "gated_cross_attn_layers"),
    }
)
"""Names of the lists whose numbered members are the blocks of an encoder or a decoder."""

_PARTS: Final = "tower|model|encoder|backbone|tokenizer"

SUBTREES: Final = Rules(
    ("MTP head", r"mtp|mtp_\w+|nextn\w*"),
    ("audio generator", r"talker|tts|token2wav|code2wav|codec_model|t2u_model|vocoder|diffusion_\w+"),
    (
        "vision tower",
        r"vision|visual(?:_\w+)?|vit|image_vit|vpm|sam_model|img_processor"
        rf"|(?:\w+_)?(?:vision|image|video)_(?:{_PARTS}|embed\w*)",
    ),
    (
        "audio tower",
        rf"audio|apm|(?:\w+_)?(?:audio|speech)_(?:{_PARTS}|embed\w*)|perception|ctc_timestamp",
    ),
    ("vector quantizer", r"vq_?model|\w+_tokenizer(?:_encoder)?|\w*quantizer"),
    ("protein tower", r"protein_encoder"),
    ("audio front end", r"subsampling|feature_extractor|pre_encode"),
    (
        "modality projector",
        r"(?:\w+_)?(?:projector|connector|aligner|resampler|merger(?:_list)?)|\w*qformer"
        r"|(?:modality|image|vision|vision_language)_(?:projection|adapter|newline)|mlp_ar|embed_(?:vision|audio|image)",
    ),
)
"""Whole parts of a multimodal model, by the path to the list of blocks: a text block's own modules never match."""

TOWERS: Final = {
    "cosmos3_omni": ("blocks", "vision tower"),
    "granite_speech": ("encoder", "audio tower"),
    "granite_speech_plus": ("encoder", "audio tower"),
    "pix2struct": ("encoder", "vision tower"),
    "pp_formulanet": ("model.encoder", "vision tower"),
    "speech-encoder-decoder": ("encoder", "audio tower"),
    "vision-encoder-decoder": ("encoder", "vision tower"),
}
"""Model types whose tower has a name that says nothing: its path, and what it is."""

PATHS: Final = Rules(
    ("LoRA adapter", r"lora_[ab]\w*|lora_embedding_\w+"),
    ("norm", r"(?!norm_attn_norm)\w*norm(?:s|\d*|_\w+)?|ln_\w+|ln\d*"),  # DBRX's attention is in norm_attn_norm
    (
        "position table",
        r"wpe|(?:\w+_)?positions?(?:_\w+)?|positional_\w+|(?:\w+_)?pos_?(?:emb|enc|bias|table)\w*|rel_pos\w*"
        r"|relative_(?:attention_bias|pos\w*)|distance_embedding",
    ),
    ("embedding", r"wte|emb|(?:\w+_)?embed(?:s|der|ding|dings)?(?:_\w+)?"),
    ("AltUp coefficients", r"altup\w*"),
    ("router", r"gate|gating|\w*router\w*|shared_expert_gate|(?:moe|expert)_gate"),
    ("kept in fp32 by its model", r"compressor|weights_proj"),
    ("per-head recurrence gate", r"in_proj_b?a|in_proj_b|[ab]_proj|[if]gate_preact"),
    ("grouped (block-diagonal) linear", r"o_a_proj|wo_a"),
)
"""Modules by any component of their path inside the block, or of the whole path where there is no block."""

HEADS: Final = Rules(
    ("lm_head", r"lm_head|embed_out|unembed|output_projection|logits_dense|head|output"),
    ("task head", r"cls|classifier|score|qa_outputs|\w*pooler|\w*predictions?|vocab_\w+"),
    ("embedding", r"shared"),
)
"""Modules that are heads (or the shared embedding) only where they stand outside every block."""

PARAMETERS: Final = Rules(
    ("SSM parameter", r"A_logs?|D|dt_bias|time_\w+|\w*_decay|(?:x|dt)_proj_(?:weight|bias)|ssm_\w+"),
    ("bias", r"bias(?:_\w+)?|\w+_bias(?:es)?"),
)
"""The last component: the parameter itself."""

CONVOLUTION: Final = re.compile(r"\w*conv\w*", re.IGNORECASE)
"""The module that owns the parameter; a linear inside a module named `conv` (LFM2) is still a linear."""

EXPERTS: Final = re.compile(
    r"(?:^|\.)(?:\w*experts?|moe|block_sparse_moe)\.|\.(?:input|output)_linear\.weight$", re.IGNORECASE
)
"""Names under which a tensor of more than two axes holds all experts of a layer."""

CONV1D_MODEL_TYPES: Final = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder", "jais"}
)
"""Model types whose `Conv1D` modules store their weight as `[in, out]`."""

CONV1D_MODULES: Final = frozenset({"c_attn", "q_attn", "c_fc", "c_proj"})
"""Names of `Conv1D` modules; GPTBigCode, Qwen and others use some of them for linears."""

_MAMBA: Final = (
    *("mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba", "zamba2"),
    *("granitemoehybrid", "nemotron_h", "nemotron_h_omni", "nemo_speechlm"),
)
"""Model types that hand out_proj.weight to a fused CUDA kernel."""

READ_RAW: Final = {
    **dict.fromkeys(_MAMBA, re.compile(r"\.out_proj$")),
    "deberta": re.compile(r"\.in_proj$"),
    "ibert": re.compile(r"."),
    "nllb-moe": re.compile(r"\.fc2$"),
    "reformer": re.compile(r"\.(?:query_key|value)$"),
    **dict.fromkeys(("seamless_m4t", "seamless_m4t_v2"), re.compile(r"^text_.*\.ffn\.fc2$")),
    "rwkv": re.compile(r"\.(?:attention\.output|feed_forward\.value)$"),
}
"""Linears whose model slices, rescales or casts to `.weight` itself; it would misread packed bytes."""
