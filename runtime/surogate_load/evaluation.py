"""Evaluates an artifact on a text against the dense model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surogate_formats.errors import UsageError
from surogate_load.evaluate import Evaluation, evaluate, windows
from surogate_load.loading import load_model, model_class, need_transformers


class UnreadableTextError(UsageError):
    """The text to evaluate on can't be read."""


def evaluate_artifact(
    artifact: str | Path, against: str | Path, text: str | Path, *, context: int, count: int, device: str = "cpu"
) -> Evaluation:
    """Compares an artifact under recipe bf16 with its dense source.

    Args:
        artifact: directory of the artifact.
        against: directory of the dense model; its tokenizer is used.
        text: a UTF-8 file.
        context: tokens of a window.
        count: how many windows, from the start of the text.
        device: where both models run.
    """
    content = _read(Path(text))
    transformers = need_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(against), local_files_only=True)
    ids = windows(tokenizer(content, add_special_tokens=False)["input_ids"], context, count)
    packed = load_model(artifact, "bf16", device)
    dense: Any = model_class(packed.config.to_dict()).from_pretrained(
        str(against), dtype=packed.dtype, local_files_only=True
    )
    return evaluate(packed, dense.to(device), ids)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableTextError(f"{path}: can't be read as UTF-8 text ({error}); check the path") from error
