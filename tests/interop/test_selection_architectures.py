"""Layer selection against transformers' own modules: every model type it can build, on the meta device, few layers.

Truth comes from the modules, never from names: transformers' own reversal of its renamings gives the tensors on disk,
each is traced back to the parameters that it is made of, and those to the modules that own them.
"""

import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import transformers
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from surogate_quantize.selection import Decision, SkipOptions, select

LAYERS = 4
MORE_LAYERS = dict.fromkeys(("bailing_hybrid", "inkling2", "jamba", "kimi_linear", "nemo_speechlm"), 8)
EXPERTS = 7  # no model has 7 heads, so a linear with 7 rows is a router

OVERRIDES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 1}},
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "doge": {"is_moe": True, "num_hidden_layers": LAYERS},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 1}},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": EXPERTS},
    "hunyuan_vl": {"text_config": {"head_dim": 128, "num_hidden_layers": LAYERS}},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "zamba2": {"num_hidden_layers": 8, "layer_types": ["linear_attention", "hybrid"] * 4},
}

UNCUT = {"fun_asr_nano", "inkling2_loop", "molmo2", "nemotron_h_omni", "zamba"}  # parts that must agree

NOT_BUILT = {
    "aya_vision": "the heads of its default vision tower don't divide its width",
    "cohere_compass": "its default config lacks a kind of attention",
    "cohere_compass_text": "its default config lacks a kind of attention",
    "deepseek_ocr2": "its default config has no kinds of layers",
    "diffusion_gemma": "its default config lacks a size",
    "dots3_note": "its per-layer settings need all of its layers",
    "dots3_note_text": "its per-layer settings need all of its layers",
    "fast_vlm": "needs timm",
    "gemma3n": "needs timm; its text half is built",
    "gemma4_assistant": "its default config is not valid",
    "granite4_vision": "its default config lacks the projector's sizes",
    "inkling_mm_model": "needs scipy; its text half is built",
    "moonshine_streaming": "its default config lacks the number of heads",
    "musicgen": "its config is not the one that its causal class takes",
    "musicgen_melody": "its config is not the one that its causal class takes",
    "perception_lm": "needs timm",
    "qwen4_exp": "its default config lacks the indexer's sizes",
    "qwen4_exp_text": "its default config lacks the indexer's sizes",
}

if Version(transformers.__version__) < Version("5.24"):
    NOT_BUILT |= {
        **dict.fromkeys(("encoder-decoder", "speech-encoder-decoder", "vision-encoder-decoder"), "needs two configs"),
        "gemma4_unified_assistant": "its default config lacks the vocabulary's size",
        "vibevoice": "its default config is not valid",
    }

ALL_KEPT = {
    "gpt-sw3": "Conv1D",  # GPT2LMHeadModel; `gpt2` itself comes later in transformers' list
    "ibert": "quantizes its own weights",
    "openai-gpt": "Conv1D",
    "squeezebert": "convolutions in place of linears",
}

# BLOOM slices `.weight` only to emulate tensor parallelism (`pretraining_tp` above 1).
READ_RAW_ON_REQUEST = {"bloom"}

MAPPINGS = (
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)


def _classes() -> dict[str, str]:
    """One class for every model type, each class once; a text half only where the whole model is not built."""
    classes: dict[str, str] = {}
    for model_type, names in (item for mapping in MAPPINGS for item in mapping.items()):
        name = names if isinstance(names, str) else names[0]
        if model_type not in classes.keys() | NOT_BUILT.keys() and name not in classes.values():
            classes[model_type] = name
    return {kind: name for kind, name in classes.items() if kind.removesuffix("_text") not in classes.keys() - {kind}}


CLASSES = _classes()


@dataclass(frozen=True)
class Family:
    """A model, the tensors that it has on disk, and the parameters that each is made of."""

    model: nn.Module
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    origins: Mapping[str, frozenset[str]]
    modules: Mapping[str, nn.Module]

    def owners(self, parameter: str) -> list[nn.Module]:
        """The module that owns a parameter, then the modules around it, innermost first."""
        path = parameter.split(".")[:-1]
        return [self.modules[".".join(path[:end])] for end in range(len(path), -1, -1)]

    def is_linear(self, parameter: str) -> bool:
        owner, *around = self.owners(parameter)
        in_block = any(isinstance(module, nn.ModuleList) for module in around)
        return in_block and isinstance(owner, nn.Linear) and parameter.endswith(".weight")

    def is_expert(self, parameter: str) -> bool:
        name = type(self.owners(parameter)[0]).__name__
        return name.endswith("Experts") and not parameter.endswith("bias")

    def is_router(self, parameter: str) -> bool:
        counts = {value for key, value in _items(self.config) if COUNT.fullmatch(str(key))} | {1}
        return self.is_within(parameter, r"Router|TopKGating|MoE\w*Gate$") or self._rows(parameter) in counts

    def is_gate_of_heads(self, parameter: str) -> bool:
        heads = {value for key, value in _items(self.model.config.to_dict()) if "heads" in str(key)}
        return self._rows(parameter) in heads | {2 * count for count in heads if isinstance(count, int)}

    def is_in_tower(self, parameter: str) -> bool:
        """Whether a model of its own that reads pixels or sound, without a vocabulary, holds the parameter."""
        *parts, whole = (owner for owner in self.owners(parameter) if isinstance(owner, transformers.PreTrainedModel))
        speech_recogniser = whole.main_input_name in {"input_features", "input_values"}  # no tower, but half of it
        return not speech_recogniser and any(map(_is_tower, parts))

    def is_fp32(self, parameter: str) -> bool:
        kept = self.model._keep_in_fp32_modules | self.model._keep_in_fp32_modules_strict
        return any(re.search(rf"(?:^|\.){part}(?:\.|$)", parameter) for part in kept)

    def is_read_raw(self, parameter: str) -> bool:
        """Whether the model uses the weight other than by calling a plain `nn.Linear`."""
        owner, *around = self.owners(parameter)
        if type(owner).forward is not nn.Linear.forward and type(owner).__name__ != "FalconLinear":
            return True
        reader = next(module for module in around if not isinstance(module, nn.ModuleList | nn.ModuleDict))
        return parameter.split(".")[-2] in _raw_reads(type(reader))

    def is_within(self, parameter: str, pattern: str) -> bool:
        return any(re.search(pattern, type(owner).__name__) for owner in self.owners(parameter))

    def is_in_part(self, parameter: str) -> bool:
        towers = (owner for owner in self.owners(parameter) if isinstance(owner, transformers.PreTrainedModel))
        return bool(type(self.model.config).sub_configs) or any(map(_is_tower, towers))

    def _rows(self, parameter: str) -> int | None:
        return getattr(self.owners(parameter)[0], "out_features", None)


PARTS = ("vision tower", "audio tower", "audio generator", "modality projector", "vector quantizer", "protein tower")

EXPLANATIONS: Mapping[str, Callable[[Family, str], bool]] = {
    **dict.fromkeys(PARTS, Family.is_in_part),
    # Doge routes by product keys, with a row for each key.
    "router": lambda family, parameter: family.is_router(parameter) or family.config["model_type"] == "doge",
    "norm": lambda family, parameter: family.is_within(parameter, "(?<!Attention)Norm$"),
    "convolution": lambda family, parameter: family.is_within(parameter, "(?i)conv"),
    "AltUp coefficients": lambda family, parameter: "gemma3n" in family.config["model_type"],
    "position table": lambda family, parameter: family.config["model_type"] == "prophetnet",
    "SSM parameter": lambda family, parameter: hasattr(family.owners(parameter)[1], "A_log"),
    "per-head recurrence gate": Family.is_gate_of_heads,
    "kept in fp32 by its model": lambda family, p: family.is_fp32(p) or family.is_read_raw(p),
    "grouped (block-diagonal) linear": Family.is_read_raw,
    "read as a raw weight by its model": lambda family, parameter: (
        family.is_read_raw(parameter) or family.config["model_type"] in {"reformer", "rwkv", "tipsv2_text_model"}
    ),
}
"""For every reason to keep a linear of a block: what must be true of the module."""


@pytest.mark.parametrize("model_type", CLASSES)
def test_plan_agrees_with_modules(model_type: str) -> None:
    family = _build(model_type)
    decisions = select(family.tensors, family.config, SkipOptions())
    assert list(decisions) == list(family.tensors)
    assert [mistake for name in decisions if (mistake := _mistake(name, decisions, family))] == []
    assert any(decision.quantize for decision in decisions.values()) == (model_type not in ALL_KEPT)


def test_many_architectures_are_built() -> None:
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert len(CLASSES) >= 280
    assert len(CLASSES.keys() & causal.keys()) >= 140
    assert not CLASSES.keys() & NOT_BUILT.keys()


def _mistake(name: str, decisions: Mapping[str, Decision], family: Family) -> str | None:
    """Say what is wrong with the decision on one tensor on disk, or nothing."""
    decision, origins = decisions[name], family.origins[name]
    linear = bool(origins) and all(map(family.is_linear, origins))
    expert = bool(origins) and all(map(family.is_expert, origins))
    if decision.quantize:
        wrong = {
            "no linear of a block": not (linear or expert),
            "a router": any(map(family.is_router, origins)),
            "in a tower": any(map(family.is_in_tower, origins)),
            "kept in fp32": any(map(family.is_fp32, origins)),
            "read raw": linear
            and any(map(family.is_read_raw, origins))
            and family.config["model_type"] not in READ_RAW_ON_REQUEST,
        }
        return next((f"{name} is quantized, but {what}" for what, is_so in wrong.items() if is_so), None)
    if decision.reason == "MTP head":
        return f"{name}: transformers builds no MTP heads"
    if not linear and not (expert and len(family.tensors[name][1]) == 2):
        return None
    return None if _is_explained(name, decision.reason, family) else f"{name} is kept: {decision.reason}"


def _is_explained(name: str, reason: str, family: Family) -> bool:
    if reason == "not stored as a module's .weight":
        return not name.endswith(".weight")
    if fused := re.fullmatch(r"fused with (\S+) \((.+)\)", reason):
        return _is_explained(f"{fused[1]}.weight", fused[2], family)
    if reason.startswith("fused ") and reason.endswith("-D experts"):
        return not name.endswith(".weight")
    return reason in EXPLANATIONS and all(EXPLANATIONS[reason](family, origin) for origin in family.origins[name])


DECODER_DEPTH = re.compile(r"(?:num_)?decoder_layers")
DEPTH = re.compile(r"num_hidden_layers|n_layers?|num_layers|(?:num_)?encoder_layers|depth")
COUNT = re.compile(r"(?:num|n|moe_num)_(?:routed_|local_)?experts")
TOP_K = re.compile(r"num_experts_per_tok|moe_topk|top_k")


def _build(model_type: str) -> Family:
    overrides = OVERRIDES.get(model_type, {})
    config = CONFIG_MAPPING[model_type](**overrides)
    if model_type not in UNCUT:
        config = type(config)(**{**_cut(config, MORE_LAYERS.get(model_type, LAYERS)), **overrides})
    with torch.device("meta"), no_init_weights():
        model = getattr(transformers, CLASSES[model_type])(config)
    disk = revert_weight_conversion(model, _trace(model))
    with torch._C.DisableTorchFunctionSubclass():
        tensors = {name: (DTYPES.get(tensor.dtype, "I64"), tuple(tensor.shape)) for name, tensor in disk.items()}
    origins = {name: tensor.origins for name, tensor in disk.items()}
    on_disk = json.loads(config.to_json_string())
    return Family(model, on_disk, tensors, origins, dict(model.named_modules()))


DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def _cut(config: Any, layers: int) -> dict[str, Any]:
    """Return what makes a config shallow, with few experts; nested configs too."""
    limits = ((DECODER_DEPTH, layers - 1), (DEPTH, layers), (COUNT, EXPERTS), (TOP_K, 2))
    changed: dict[str, Any] = {
        key: limit
        for key, value in config.to_dict().items()
        for pattern, limit in limits
        if pattern.fullmatch(key) and isinstance(value, int) and value > limit
    }
    for key, nested in vars(config).items():
        if isinstance(nested, transformers.PreTrainedConfig):
            changed[key] = {**_cut(nested, layers), "model_type": nested.model_type}
    return changed


class Traced(torch.Tensor):
    """A tensor that remembers the names of the parameters it was computed from."""

    origins: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        origins = frozenset().union(*(tensor.origins for tensor in _traced((args, kwargs))))
        for tensor in _traced(result):
            tensor.origins = tensor.origins | origins
        return result


def _trace(model: nn.Module) -> dict[str, Traced]:
    state = {name: tensor.detach().as_subclass(Traced) for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        tensor.origins = frozenset({name})
    return state


def _traced(value: Any) -> Iterator[Traced]:
    if isinstance(value, Traced):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _traced(item)
    elif isinstance(value, dict):
        yield from _traced(list(value.values()))


@cache
def _is_tower(part: nn.Module) -> bool:
    tables = (module for module in part.modules() if isinstance(module, nn.Embedding))
    reads = re.match("pixel|image|audio|flattened|input_features|input_values", part.main_input_name)
    named = re.search("Vision|Audio|Speech|CTC", type(part).__name__)
    return bool(reads or named) and not any(table.num_embeddings >= 10_000 for table in tables)


def _items(config: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _items(value)


@cache
def _source(module: str) -> str:
    return inspect.getsource(sys.modules[module])


@cache
def _raw_reads(kind: type) -> frozenset[str]:
    """Names of the children whose `.weight` a class reads itself, or to whose dtype it casts their input."""
    own = re.search(rf"^class {kind.__name__}\b.*?(?=^\S|\Z)", _source(kind.__module__), re.MULTILINE | re.DOTALL)
    source = re.sub(r"isinstance\([^)]*\)", "", own.group() if own else "")
    reads = r"self\.(\w+)\.weight\b(?!\.(?:dtype|device))|\.to\(self\.(\w+)\.weight\.dtype\)"
    return frozenset(a or b for a, b in re.findall(reads, source))
