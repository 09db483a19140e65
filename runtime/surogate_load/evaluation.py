"""Evaluates an artifact on a text against the dense model that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surogate_formats.errors import UsageError
from surogate_load.architecture import model_class, need_transformers, one_line
from surogate_load.divergence import Evaluation, evaluate, windows
from surogate_load.loading import load_model


class UnreadableTextError(UsageError):
    """The text to evaluate on can't be read."""


class UnreadableModelError(UsageError):
    """The dense model, or its tokenizer, can't be loaded."""


def evaluate_artifact(
    artifact: str | Path, against: str | Path, text: str | Path, *, context: int, count: int, device: str = "cpu"
) -> Evaluation:
    """Compares an artifact under recipe bf16 with its dense source.

    Args:
        artifact: directory of the artifact, or its name on the Hub.
        against: directory of the dense model; its tokenizer is used.
        text: a UTF-8 file.
        context: tokens of a window.
        count: how many windows, from the start of the text.
        device: where both models run.

    Raises:
        UnreadableTextError: see the class.
        UnreadableModelError: see the class.
        Everything that `load_model` raises.
    """
    content = _read(Path(text))
    transformers = need_transformers()
    if not Path(against).is_dir():
        raise UnreadableModelError(f"{against}: no such directory; give that of the dense model, with its tokenizer")
    with _reading(against, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(against), local_files_only=True)
    ids = windows(tokenizer(content, add_special_tokens=False)["input_ids"], context, count)
    packed = load_model(artifact, "bf16", device)
    with _reading(against, "model"):
        dense: Any = model_class(packed.config.to_dict()).from_pretrained(
            str(against), dtype=packed.dtype, local_files_only=True
        )
    return evaluate(packed, dense.to(device), ids)


@contextmanager
def _reading(against: str | Path, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the tokenizers package raises no narrower class
        raise UnreadableModelError(f"{against}: its {what} can't be loaded ({one_line(error)})") from error


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableTextError(f"{path}: can't be read as UTF-8 text ({error}); check the path") from error
