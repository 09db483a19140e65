"""Has transformers leave to us those tensors of packed models that go into the model as they are.

Its own loop takes about a millisecond for each tensor, and an 8B model has 1155 of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from transformers.utils import logging

from surogate_load.errors import UnsupportedShardingError
from surogate_load.load_keywords import NO_PLANS
from surogate_load.reading.filling import fill
from surogate_load.reading.taking import taken

_LOOP = "convert_and_load_state_dict_in_model"
"""transformers' function that brings every tensor into the model."""

_ASKED = {"model", "state_dict", "load_config"}
"""Its arguments that are looked at. Where it, or one of them, is called otherwise, transformers loads by itself."""


def read_directly() -> None:
    """Changes how it loads packed models, and no others; a second call does nothing."""
    from transformers import modeling_utils  # which imports the plug-in that imports this

    original = getattr(modeling_utils, _LOOP, None)
    if original is None or getattr(original, "asks_surogate", False):
        return
    if inspect.signature(original).parameters.keys() >= _ASKED:
        setattr(modeling_utils, _LOOP, _asking(original))


def _asking(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        model, state_dict, config = given["model"], given["state_dict"], given["load_config"]
        places = getattr(getattr(config, "hf_quantizer", None), "places", None)
        if places and config.device_mesh is not None:
            raise UnsupportedShardingError(NO_PLANS)
        device = _one_device(config) if places else None
        if not places or device is None:
            return original(*args, **kwargs)
        ours = taken(model, {name: places[name][1] for name in state_dict if name in places}, config)
        fill(model, ours, places, device)
        read = {tensor for tensors in ours.values() for tensor in tensors}
        given["state_dict"] = {name: value for name, value in state_dict.items() if name not in read}
        with _silent(not given["state_dict"]):
            info, *others = original(**given)
        info.missing_keys.difference_update(ours)
        return info, *others

    load.asks_surogate = True  # type: ignore[attr-defined]
    return load


def _one_device(config: Any) -> torch.device | None:
    """Where the whole model goes; None if that isn't one device, or none that we read for."""
    found = set((config.device_map or {"": "cpu"}).values())
    if len(found) > 1 or "disk" in found:
        return None
    device = torch.device(found.pop())
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # which is another one in each thread
    return device if device.type in ("cpu", "cuda", "meta") else None


@contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    """Without a bar of its own for nothing."""
    if not wanted or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
