"""The scaling state of a model's recipe in a file: a run that is resumed goes on with the scales that it had."""

from __future__ import annotations

import logging
import os
from functools import wraps
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surogate_load.errors import UnreadableStateError
from surogate_load.recipes.delayed import DelayedScale
from surogate_load.recipes.noise import Noise

STATE_NAME = "surogate_scaling.safetensors"

_LOG = logging.getLogger("surogate_load")


def save_scaling_state(model: nn.Module, directory: str | Path) -> Path | None:
    """Writes the state of recipe fp8-hybrid (amax histories, scales) or nvfp4 (noise) into a directory that exists.

    `captured(Trainer)` and transformers' own `Trainer` do it for each checkpoint.

    Returns:
        The file, `surogate_scaling.safetensors`; None, and no file, where the recipe has no state.
    """
    state = {name: tensor.contiguous() for name, tensor in _state(model).items()}
    state |= {f"{name}.seed": noise.saved_seed() for name, noise in _noises(model)}
    path = Path(directory) / STATE_NAME
    if not state:
        return None
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    save_file(state, partial)
    partial.replace(path)
    return path


def load_scaling_state(model: nn.Module, directory: str | Path) -> bool:
    """Takes over what `save_scaling_state` wrote for the same model under the same recipe.

    Returns:
        Whether there was a file; without one the state stays as it is.

    Raises:
        UnreadableStateError: the file is damaged, or another model's or recipe's.
    """
    path = Path(directory) / STATE_NAME
    if not path.is_file():
        return False
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise UnreadableStateError(f"{path}: can't be read ({error}); delete it to start with new scales") from error
    own = _state(model)
    different = sorted(saved.keys() ^ own.keys()) or [name for name in own if own[name].shape != saved[name].shape]
    if different:
        raise UnreadableStateError(
            f"{path}: is of another model or recipe ({different[0]} differs); delete it to start with new scales"
        )
    for name, tensor in own.items():
        tensor.copy_(saved[name])
    _swap_seeds(model)
    return True


def _swap_seeds(model: nn.Module) -> None:
    for _, noise in _noises(model):
        noise.seed.copy_(noise.saved_seed())


def _noises(model: nn.Module) -> list[tuple[str, Noise]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Noise)]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{buffer}": tensor
        for name, module in model.named_modules()
        if isinstance(module, (DelayedScale, Noise))
        for buffer, tensor in module.named_buffers(recurse=False)
    }


def register() -> None:
    """Has transformers' `Trainer` save and load the state with its checkpoints; a second call does nothing."""
    from transformers import Trainer

    save, load = Trainer._save, Trainer._load_from_checkpoint
    save_optimizer = Trainer._save_optimizer_and_scheduler
    if getattr(save, "asks_surogate", False):
        return

    @wraps(save)
    def _save(self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        save(self, output_dir, *args, **kwargs)
        save_scaling_state(self.model, output_dir or self.args.output_dir)

    @wraps(save_optimizer)
    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        save_optimizer(self, output_dir)
        if self.args.should_save:  # with sharded checkpoints `_save` isn't called
            save_scaling_state(self.model, output_dir)

    @wraps(load)
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        load(self, resume_from_checkpoint, *args, **kwargs)
        if not load_scaling_state(self.model, resume_from_checkpoint) and _state(self.model):
            _LOG.warning("%s holds no %s: the recipe's scales start anew", resume_from_checkpoint, STATE_NAME)

    _save.asks_surogate = True  # type: ignore[attr-defined]
    Trainer._save, Trainer._load_from_checkpoint = _save, _load_from_checkpoint
    Trainer._save_optimizer_and_scheduler = _save_optimizer_and_scheduler
