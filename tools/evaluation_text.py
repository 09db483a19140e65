"""The fixed text on which models are compared: the beginnings of three licences."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TEXTS = Path(__file__).resolve().parent / "texts"
LICENCES = ("GPL-3.txt", "Apache-2.0.txt", "MPL-2.0.txt")


class ShortTextError(ValueError):
    """A licence text has fewer tokens than were asked for."""


def licence_windows(tokenizer: Any, tokens: int = 1024) -> "torch.LongTensor":
    """Returns the first `tokens` tokens of GPL-3, Apache-2.0 and MPL-2.0, without special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        tokens: length of a window.

    Returns:
        int64 token ids `[3, tokens]`.

    Raises:
        ShortTextError: a text has fewer than `tokens` tokens.
    """
    import torch

    windows = [_first_tokens(tokenizer, TEXTS / name, tokens) for name in LICENCES]
    return torch.LongTensor(windows)


def _first_tokens(tokenizer: Any, file: Path, tokens: int) -> list[int]:
    ids: list[int] = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if len(ids) < tokens:
        raise ShortTextError(f"{file.name} has {len(ids)} tokens, {tokens} were asked for: ask for fewer")
    return ids[:tokens]
