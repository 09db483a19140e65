"""Keys of a training file that are not ours: passed over, unless that would leave a default where the user chose."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from surogate_formats.checkpoint.errors import shown
from surogate_formats.strict_yaml import TrainingConfigError


class UnknownKeyError(TrainingConfigError):
    """A key that looks like one of ours and is none."""


_OTHERS_NAMES = {
    "lora_r": "lora_rank",
    "target_modules": "lora_target_modules",
    "load_in_4bit": "qlora_bnb",
    "qlora_nf4": "qlora_bnb",
    "load_in_8bit": "qlora_fp8",
    "bnb_4bit_use_double_quant": "qlora_bnb_double_quant",
    "double_quant": "qlora_bnb_double_quant",
}
"""How other trainers call keys of ours: passed over, they would leave a default where the user chose."""

_OTHER_ADAPTERS = "for such adapters call peft.get_peft_model yourself"
_AT_LOAD = "pass {key}= to from_config or load_model"
_WITHOUT_EFFECT = {
    **dict.fromkeys(("dtype", "torch_dtype", "device_map", "attn_implementation"), _AT_LOAD),
    "bnb_4bit_quant_type": "qlora_bnb is NF4",
    "bnb_4bit_compute_dtype": "products are computed in the model's dtype; pass dtype= to from_config",
    "trust_remote_code": "an artifact holds no code, and none is run",
    **dict.fromkeys(("use_dora", "use_rslora", "modules_to_save"), _OTHER_ADAPTERS),
}
"""Keys of other trainers that mean something for what is loaded, and what to do instead."""

_OURS = ("qlora_", "fp8_", "fp4_", "skip_quant_", "amax_")
"""A key that starts so and is not in `KEYS` would change what is quantized: it is never passed over."""

_LOOKALIKES = frozenset({"local_rank", "mode"})
"""Keys of real trainers that are as near to one of ours as a misspelling."""


def check_foreign(path: Path, key: Any, value: Any, known: Collection[str], strict: bool) -> None:
    """Passes over a key that isn't ours, unless that could change what the user asked for.

    Args:
        path: the training file, for the message.
        key: the key.
        value: its value.
        known: our keys.
        strict: refuse it in any case.

    Raises:
        UnknownKeyError: it looks like one of ours, is another trainer's name for one, or `strict`.
    """
    name, where = str(key), shown(path)
    if name in _OTHERS_NAMES and value is not None and value is not False:
        raise UnknownKeyError(f"{where}: {name!r:.80} is another trainer's key; here it is {_OTHERS_NAMES[name]!r}")
    foreign = name in _LOOKALIKES or name in _OTHERS_NAMES or name in _WITHOUT_EFFECT
    near = [] if foreign else difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.84)
    if not near and name.startswith(_OURS):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    if near:
        raise UnknownKeyError(f"{where}: unknown key {name!r:.80}; did you mean {near[0]!r}?")
    if strict:
        raise UnknownKeyError(f"{where}: {name!r:.80} is not a key of ours; leave out --strict to pass over such keys")


def without_effect(data: Mapping[Any, Any], known: Collection[str]) -> dict[str, str]:
    """Keys that aren't ours but mean something for what is loaded, in the file's order, and what to do instead."""
    found = {}
    for key, value in data.items():
        name = str(key)
        if name in known or name in _OTHERS_NAMES or value is None or value is False:
            continue
        advice = _WITHOUT_EFFECT.get(name, _OTHER_ADAPTERS if name.startswith("lora_") else None)
        if advice is not None:
            found[name] = advice.format(key=name)
    return found
