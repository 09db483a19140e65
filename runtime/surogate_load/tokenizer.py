"""The tokenizer that stands beside a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surogate_load.architecture import need_transformers, one_line
from surogate_load.errors import ForeignTextError, NoTokenizerError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
"""Any of them makes a tokenizer; without one transformers makes an empty one, or fails in many lines."""


def load_tokenizer(directory: str | Path) -> Any:
    """A model's tokenizer; None if it has none.

    Raises:
        NoTokenizerError: it can't be loaded.
    """
    if not any((Path(directory) / name).exists() for name in FILES):
        return None
    try:
        return need_transformers().AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # the tokenizers package raises no narrower class
        raise NoTokenizerError(f"{directory}: its tokenizer can't be loaded ({one_line(error)})") from error


def need_tokenizer(directory: str | Path) -> Any:
    """The same; `NoTokenizerError` if there is none."""
    if (tokenizer := load_tokenizer(directory)) is None:
        raise NoTokenizerError(f"{directory}: has no tokenizer; put its files beside config.json")
    return tokenizer


def check_tokens(ids: Any, vocabulary: int) -> None:
    """Raises `ForeignTextError` where a tensor has tokens that a model of so many doesn't know."""
    if (largest := int(ids.max())) >= vocabulary:
        raise ForeignTextError(
            f"the text has token {largest}, and the model knows {vocabulary}: is the tokenizer its own?"
        )
