"""Evaluates an artifact on a text against the dense model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surogate_formats.artifact import ADAPTER, Artifact
from surogate_formats.checkpoint import Checkpoint
from surogate_formats.errors import CheckpointError, UsageError
from surogate_load.architecture import DECLARATIONS, model_class, one_line
from surogate_load.block_evaluation import evaluate_blocks
from surogate_load.block_runner import BlockRunner, NoBlocksError
from surogate_load.device_choice import default_dtype, memory_errors, reachable
from surogate_load.divergence import Evaluation, evaluate, windows
from surogate_load.errors import ForeignTextError
from surogate_load.load_keywords import chosen_dtype
from surogate_load.loading import load_model
from surogate_load.local import open_local
from surogate_load.lora_factors import NotPlainAdapterError, check_shapes, read_factors
from surogate_load.model_tensors import PackedTensors
from surogate_load.saved_adapter import INIT, check_saved, with_adapter
from surogate_load.tokenizer import check_tokens, need_tokenizer


class UnreadableTextError(UsageError):
    """The text to evaluate on can't be read."""


class UnreadableModelError(UsageError):
    """The dense model, or its tokenizer, can't be loaded."""


CONTEXT = 1024
"""Tokens of a window by default."""


def evaluate_artifact(
    artifact: str | Path,
    against: str | Path,
    text: str | Path | None = None,
    *,
    context: int | None = None,
    count: int = 3,
    device: str = "cpu",
    dtype: str | None = None,
    adapter: str | Path | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Compares an artifact under recipe bf16 with its dense source, a decoder block of either in memory at a time.

    Models that can't be run block by block (`told` says why), and adapters that are more than LoRA on linears of
    blocks, are loaded whole.

    Args:
        artifact: directory of the artifact, or its name on the Hub.
        against: directory of the dense model; its tokenizer is used.
        text: a UTF-8 file; by default CPython's language reference, as the running Python has it.
        context: tokens of a window; by default 1024, or as many as the model takes.
        count: how many windows, from the start of the text.
        device: where both models run.
        dtype: of both models, see `load_model`; by default that of the source.
        adapter: of the artifact: a directory that PEFT saved, or `init` for the one that was made with it.
        told: is given a line where something isn't done as usual.

    Raises:
        UnreadableTextError, ForeignTextError, TooShortTextError: the text can't be used.
        NoTokenizerError, UnreadableModelError: see the classes.
        OtherVocabularyError: the artifact isn't made of that model.
        UnreadableAdapterError: there is no such adapter.
        Everything that `load_model` raises.
    """
    content = _read(text)
    if not Path(against).is_dir():
        raise UnreadableModelError(f"{against}: no such directory; give that of the dense model, with its tokenizer")
    tokens = need_tokenizer(against)(content, add_special_tokens=False)["input_ids"]
    reached = reachable(device)
    with open_local(artifact) as opened, memory_errors(opened, reached):
        ids = windows(tokens, context or min(CONTEXT, _longest(opened.config)), count)
        folder = opened.path / ADAPTER if adapter == INIT else adapter
        if folder is not None:
            check_saved(folder)
        chosen = chosen_dtype(dtype, None) or default_dtype(opened, reached)
        try:
            return _evaluate_blocks(opened, against, ids, reached, chosen, folder)
        except (NoBlocksError, NotPlainAdapterError) as error:
            told(f"{error}: both models are loaded whole")
        return _evaluate_whole(opened, against, ids, reached, chosen, folder)


def _evaluate_blocks(
    opened: Artifact, against: str | Path, ids: Tensor, device: torch.device, dtype: torch.dtype, folder: Any
) -> Evaluation:
    factors = {} if folder is None else read_factors(folder)
    check_shapes(factors, opened.modules, folder)
    try:
        checkpoint = Checkpoint.open(against)
    except CheckpointError as error:
        raise UnreadableModelError(f"{against}: its model can't be loaded ({one_line(error)})") from error
    with checkpoint:
        if any(checkpoint.config.get(key) for key in DECLARATIONS):
            raise UnreadableModelError(f"{against}: is packed; give the dense model that {opened.path} was made from")
        model = BlockRunner(PackedTensors(opened), device, dtype)
        _check_ids(ids, model.vocabulary, model.longest)
        return evaluate_blocks(model, BlockRunner(checkpoint, device, dtype), ids, factors)


def _evaluate_whole(
    opened: Artifact, against: str | Path, ids: Tensor, device: torch.device, dtype: torch.dtype, folder: Any
) -> Evaluation:
    packed = load_model(opened.path, "bf16", device, dtype)
    config = packed.config.get_text_config()
    _check_ids(ids, config.vocab_size, getattr(config, "max_position_embeddings", ids.shape[1]))
    if folder is not None:
        packed = with_adapter(packed, folder)
    with _reading(against):
        dense: Any = model_class(dict(opened.config)).from_pretrained(str(against), dtype=dtype, local_files_only=True)
    return evaluate(packed, dense.to(device), ids)


def _longest(config: Mapping[str, Any]) -> int:
    """Tokens that a model takes, as far as its config.json says."""
    text = config.get("text_config")
    entry = (text if isinstance(text, Mapping) else config).get("max_position_embeddings")
    return entry if isinstance(entry, int) and entry > 1 else CONTEXT


def _check_ids(ids: Tensor, vocabulary: int, longest: int) -> None:
    check_tokens(ids, vocabulary)
    if ids.shape[1] > longest:
        raise ForeignTextError(f"--context {ids.shape[1]}: the model takes {longest} tokens; lower it")


@contextmanager
def _reading(against: str | Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises no narrower class
        raise UnreadableModelError(f"{against}: its model can't be loaded ({one_line(error)})") from error


def _read(text: str | Path | None) -> str:
    if text is None:
        return _language_reference()
    try:
        return Path(text).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableTextError(f"{text}: can't be read as UTF-8 text ({error}); check the path") from error


def _language_reference() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UnreadableTextError("this Python has no language reference (pydoc_data); give a --text") from error
    return "\n".join(topics[key] for key in sorted(topics))
