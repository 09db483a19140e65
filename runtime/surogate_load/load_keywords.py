"""The keywords of `load_model` beside its own: switches of the recipe, and what goes on to transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch

from surogate_formats.errors import UsageError
from surogate_formats.recipe import Recipe

OWN = ("recipe", "device", "dtype", "emulate", "compile", "revision", "token")
"""What `load_model` names itself."""

SWITCHES = tuple(field.name for field in fields(Recipe) if field.name != "name")

LOADING = ("attn_implementation", "experts_implementation", "use_kernels", "kernel_config", "allow_all_kernels",
           "generation_config", "tqdm_class", "disable_mmap")  # fmt: skip
"""Keywords of `from_pretrained` that mean the same for a packed model."""

CONFIG = ("use_cache", "output_attentions", "output_hidden_states", "return_dict")
"""Keywords that `from_pretrained` sets in the config, beside the keys of config.json."""

_ONE_DEVICE = (
    "a packed model goes to one device: pass device='cuda'; surogate_load.fully_shard divides it between ranks"
)
NO_PLANS = (
    "plans of transformers cut weights into columns and rows, packed ones aren't: share them between ranks with "
    "surogate_load.fully_shard(model)"
)
"""What is said of tensor parallelism."""
_IS_PACKED = "the artifact says how it is packed, and nothing is quantized at load"
_CACHE = "a model on the Hub goes through its cache; HF_HOME says where that is, HF_HUB_OFFLINE=1 asks nothing else"
_OWN_FILES = "config and weights are the artifact's own"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("max_memory", "offload_folder", "offload_buffers", "offload_state_dict"), _ONE_DEVICE),
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config"), NO_PLANS),
    **dict.fromkeys(("quantization_config", "load_in_4bit", "load_in_8bit", "gguf_file"), _IS_PACKED),
    **dict.fromkeys(("cache_dir", "force_download", "proxies", "local_files_only"), _CACHE),
    **dict.fromkeys(("subfolder", "variant"), "an artifact is a whole directory or repository"),
    **dict.fromkeys(("config", "state_dict", "key_mapping", "ignore_mismatched_sizes", "weights_only"), _OWN_FILES),
    "use_safetensors": "artifacts are safetensors, and nothing else",
    "output_loading_info": "whatever it would report is an error here",
    "trust_remote_code": "an artifact holds no code; load_model runs transformers' own architectures",
    "adapter_kwargs": "load the adapter with peft.PeftModel.from_pretrained(model, DIR)",
}
"""Keywords of `from_pretrained` that a packed model can't honour, and what to do instead."""


GIVEN_ANYWAY = ("low_cpu_mem_usage",)
"""Keywords that ask for what happens in any case."""


class Keywords(NamedTuple):
    """Keywords by their reader: the recipe, `from_pretrained`, the model's config."""

    switches: dict[str, Any]
    loading: dict[str, Any]
    config: dict[str, Any]


def sort_keywords(keywords: Mapping[str, Any], config_keys: Collection[str] = ()) -> Keywords:
    """Sorts keywords by who takes them.

    Args:
        keywords: as given to `load_model`.
        config_keys: keys of config.json, which a keyword may override, as in `from_pretrained`.

    Raises:
        UsageError: a keyword that is refused (the message says what to do instead) or unknown.
    """
    found = Keywords({}, {}, {})
    for key, value in keywords.items():
        if key in GIVEN_ANYWAY:
            continue
        if key in REFUSED:
            raise UsageError(f"load_model: {key} has no place here: {REFUSED[key]}")
        if key in SWITCHES:
            found.switches[key] = value
        elif key in LOADING:
            found.loading[key] = value
        elif key in CONFIG or key in config_keys:
            found.config[key] = value
        else:
            raise UsageError(f"load_model: no keyword {key!r}; {nearest(key, (*OWN, *SWITCHES, *LOADING, *CONFIG))}")
    return found


def nearest(word: str, known: tuple[str, ...]) -> str:
    """`did you mean`, or where nothing is near, all that is known."""
    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def chosen_device(device: str | torch.device | None, device_map: Any) -> str | torch.device:
    """The one device that `device`, or transformers' `device_map`, names; the CPU by default.

    `device_map="auto"` is the GPU, if there is one.

    Raises:
        UsageError: a map over several devices, or two different devices.
    """
    named = device_map
    if named == "auto":
        named = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else None
    if isinstance(device_map, Mapping):
        named = device_map[""] if device_map.keys() == {""} else "several devices"
    if isinstance(named, int):
        named = f"cuda:{named}"
    if named in ("balanced", "balanced_low_0", "sequential", "several devices", "disk"):
        raise UsageError(f"load_model: device_map={device_map!r} has no place here: {_ONE_DEVICE}")
    if device is not None and named is not None and str(device) != str(named):
        raise UsageError(f"load_model: device is {device}, device_map says {named}; give one of them")
    chosen: str | torch.device = "cpu" if device is None and named is None else named if device is None else device
    return chosen


def chosen_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that either keyword names, by itself or by name; None for `auto` and where none is given.

    Raises:
        UsageError: both, and different; or no floating-point dtype of a model's.
    """
    first, second = _dtype(dtype), _dtype(torch_dtype)
    if first is not None and second is not None and first != second:
        raise UsageError(f"load_model: dtype is {dtype}, torch_dtype {torch_dtype}; give one of them")
    return first or second


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    if value is None or value == "auto":
        return None
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if found not in (torch.bfloat16, torch.float16, torch.float32):
        raise UsageError(
            f"load_model: dtype {value!r} is none of bfloat16, float16, float32; packed tensors keep theirs"
        )
    return found
