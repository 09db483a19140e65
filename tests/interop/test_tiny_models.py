"""Whole runs over many architectures: each weight is quantized right, or kept or refused with its reason."""

import json
from collections import Counter

import pytest
import torch
import transformers
from quantizer.checkpoints import check_artifact, contents, payloads

from make_tiny import KINDS
from surogate_formats.artifact import Artifact
from surogate_quantize import make_options, quantize
from surogate_quantize.plan import NothingToQuantizeError

ATTENTION = tuple(f"self_attn.{leaf}_proj" for leaf in "qkvo")
MLP = tuple(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down"))
SHARED_EXPERT = tuple(f"mlp.shared_expert.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj"))
EXPERTS = tuple(f"mlp.experts.{expert}.{leaf}_proj" for expert in range(4) for leaf in ("gate", "up", "down"))
MIXTRAL_EXPERTS = tuple(f"block_sparse_moe.experts.{expert}.w{i}" for expert in range(4) for i in (1, 2, 3))
BERT = ("query", "key", "value")

LINEARS = {
    "llama": ("model.layers", ATTENTION + MLP),
    "llama-tied": ("model.layers", ATTENTION + MLP),
    "llama-odd": ("model.layers", ATTENTION + MLP),
    "qwen3": ("model.layers", ATTENTION + MLP),
    "qwen3-tied": ("model.layers", ATTENTION + MLP),
    "qwen3-moe": ("model.layers", ATTENTION + EXPERTS),
    "qwen2-moe": ("model.layers", ATTENTION + EXPERTS + SHARED_EXPERT),
    "mixtral": ("model.layers", ATTENTION + MIXTRAL_EXPERTS),
    "gemma3": ("model.layers", ATTENTION + MLP),
    "phi3": ("model.layers", ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    "gpt2": ("transformer.h", ()),
    "bert": (
        "bert.encoder.layer",
        (*(f"attention.self.{leaf}" for leaf in BERT), "attention.output.dense", "intermediate.dense", "output.dense"),
    ),
    "gpt-oss": ("model.layers", ATTENTION),
}
"""The linears of a block by kind, written out; nothing else is quantized."""

FUSED = "fused experts, which readers of layout {layout} take whole"

REASONS = {
    "llama": {"norm": 5, "embedding": 1, "lm_head": 1},
    "llama-tied": {"norm": 5, "embedding": 1},
    "llama-odd": {"norm": 5, "embedding": 1, "lm_head": 1},
    "qwen3": {"norm": 9, "embedding": 1, "lm_head": 1},
    "qwen3-tied": {"norm": 9, "embedding": 1},
    "qwen3-moe": {"norm": 9, "router": 2, "embedding": 1, "lm_head": 1},
    "qwen2-moe": {"norm": 5, "bias": 6, "router": 4, "embedding": 1, "lm_head": 1},
    "mixtral": {"norm": 5, "router": 2, "embedding": 1, "lm_head": 1},
    "gemma3": {"norm": 13, "embedding": 1},
    "phi3": {"norm": 5, "embedding": 1, "lm_head": 1},
    "bert": {"bias": 20, "norm": 5, "embedding": 2, "position table": 1, "task head": 2},
    "gpt-oss": {"norm": 5, "bias": 14, "router": 2, FUSED: 4, "1-D": 2, "embedding": 1, "lm_head": 1},
}

FORMATS = {
    "nf4": ("nf4", {}),
    "fp4": ("fp4", {}),
    "fp4-1d-amax": ("fp4", {"two_d": False, "global_scale": "amax"}),
    "fp8-tensor": ("fp8", {}),
    "fp8-channel": ("fp8", {"scaling": "channel"}),
    "fp8-block": ("fp8", {"scaling": "block"}),
}

TAKES_EXPERTS_APART = ("nf4", "fp4")
"""Formats whose layout packs experts that others know fused only."""

TAKES_NOTHING = {("gpt2", name) for name in FORMATS} | {("llama-odd", "fp8-block")}


def linears(kind, name=""):
    stack, names = LINEARS[kind]
    names += EXPERTS if kind == "gpt-oss" and name in TAKES_EXPERTS_APART else ()
    return sorted(f"{stack}.{layer}.{name}" for layer in range(2) for name in names)


def options(name, **extra):
    return make_options(*FORMATS[name], **extra)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_what_its_format_makes_of_the_source_or_kept_byte_for_byte(kind, name, tiny, tmp_path):
    if (kind, name) in TAKES_NOTHING:
        with pytest.raises(NothingToQuantizeError, match=r"Conv1D weight is stored \[in, out\]|not a multiple of 128"):
            quantize(tiny(kind), tmp_path / "out", options(name))
        assert not (tmp_path / "out").exists()
        return
    quantize(tiny(kind), tmp_path / "out", options(name))
    assert check_artifact(tiny(kind), tmp_path / "out") == linears(kind, name)
    with Artifact.open(tmp_path / "out") as artifact:
        kept = Counter(r.reason for r in artifact.manifest.tensors.values() if r.decision == "keep")
        expected = {reason.format(layout=artifact.layout.name): count for reason, count in REASONS[kind].items()}
        if kind == "gpt-oss" and name in TAKES_EXPERTS_APART:
            del expected[FUSED.format(layout=artifact.layout.name)]
        assert kept == expected
        declared = artifact.config["quantization_config"]
    listed = next(declared[key] for key in ("ignore", "modules_to_not_convert") if key in declared)
    assert not set(listed) & set(linears(kind, name))
    assert "lm_head" in listed
    assert ("model.layers.0.mlp.experts" in listed) == (kind == "gpt-oss" and name not in TAKES_EXPERTS_APART)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gpt2", "qwen3-moe", "qwen2-moe", "mixtral")])
def test_every_linear_of_the_model_that_is_not_quantized_is_listed(kind, tiny, tmp_path):
    """Loaders quantize what is not listed, tied heads included."""
    quantize(tiny(kind), tmp_path / "out", options("fp8-tensor"))
    config = transformers.AutoConfig.from_pretrained(tiny(kind))
    with torch.device("meta"):
        model = getattr(transformers, KINDS[kind].model)(config)
    modules = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert modules - set(listed) == set(linears(kind))


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3-tied", "gemma3"])
def test_a_tied_head_has_no_tensor_and_is_listed(kind, tiny, tmp_path):
    quantize(tiny(kind), tmp_path / "out", options("nf4"))
    assert not any("lm_head" in name for name in payloads(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"][-1] == "lm_head"
    assert config["tie_word_embeddings"]


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe", "mixtral", "phi3"])
@pytest.mark.parametrize("name", ["nf4", "fp4", "fp8-tensor"])
def test_shards_of_source_and_artifact_and_threads_change_no_payload(kind, name, tiny, tmp_path):
    quantize(tiny(kind), tmp_path / "whole", options(name), workers=1)
    quantize(tiny(kind, shards=2), tmp_path / "cut", options(name, max_shard_size="300kB"), workers=2)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    assert payloads(tmp_path / "cut") == payloads(tmp_path / "whole")
    quantize(tiny(kind), tmp_path / "again", options(name), workers=2)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_other_dtypes(kind, dtype, tiny, tmp_path):
    for name in ("nf4", "fp4", "fp8-tensor"):
        quantize(tiny(kind, dtype=dtype), tmp_path / name, options(name))
        assert check_artifact(tiny(kind, dtype=dtype), tmp_path / name) == linears(kind)


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_experts_share_one_amax_a_layer_and_warn(kind, tiny, tmp_path):
    summary = quantize(tiny(kind), tmp_path / "out", options("fp4-1d-amax"))
    with Artifact.open(tmp_path / "out") as artifact:
        scale = {module: float(artifact.parts(module)["global_scale"][0]) for module in artifact.modules}
    for layer in range(2):
        experts = [name for name in scale if f"layers.{layer}." in name and ".experts." in name]
        down = {scale[name] for name in experts if name.endswith(("down_proj", "w2"))}
        rest = {scale[name] for name in experts if not name.endswith(("down_proj", "w2"))}
        assert (len(down), len(rest)) == (1, 1)
        assert down != rest
    assert any("reads fp4 experts in layout compressed-tensors wrongly" in line for line in summary.warnings)
    assert quantize(tiny(kind), tmp_path / "nf4", options("nf4")).warnings == ()


def test_skipped_layers_of_every_kind_stay(tiny, tmp_path):
    for kind in ("llama", "bert", "mixtral", "gpt-oss"):
        quantize(tiny(kind), tmp_path / kind, options("nf4", skip_first_layers=1))
        stack = LINEARS[kind][0]
        expected = [name for name in linears(kind, "nf4") if name.startswith(f"{stack}.1.")]
        assert check_artifact(tiny(kind), tmp_path / kind) == expected
