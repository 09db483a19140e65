"""Calibration text: tokens of a file, or what the model writes itself."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surogate_quantize.calibration.text_file import CalibrationTextError, text_pieces

ROWS_AT_ONCE = 36
"""Rows that the model writes at a time."""


def rows_of_file(path: Path, tokenizer: Any, rows: int, length: int) -> Tensor:
    """int64 [rows, length] of a file: its text one after the other, cut into rows.

    Rows of text begin with `first_token`: models are trained on, and write, rows that do. Those of a file whose first
    line has `input_ids` are cut from its ids as they are.

    Args:
        path: a file of UTF-8 text; `.jsonl`: a line an object with `text`, or with `input_ids`.
        tokenizer: of the model; None for a file of ids.
        rows: how many at most; fewer where the text ends. What follows them isn't looked at.
        length: tokens of a row, the first one among them.

    Raises:
        CalibrationTextError: it can't be read, or has less than one row.
    """
    pieces = text_pieces(path)
    first: str | list[int] = next(pieces, [])
    start = first_token(tokenizer) if isinstance(first, str) and tokenizer is not None else None
    each = length if start is None else length - 1
    ids: list[int] = []
    for piece in chain([first], pieces):
        ids += piece if isinstance(piece, list) else _tokenized(piece, tokenizer, path)
        if len(ids) >= rows * each:
            break
    count = min(len(ids) // each, rows)
    if not count:
        raise CalibrationTextError(
            f"`calibration_text` {path}: has {len(ids)} tokens, and a row takes {each}; give more text"
        )
    found = torch.tensor(ids[: count * each]).reshape(count, each)
    return found if start is None else torch.cat([torch.full((count, 1), start), found], 1)


def first_token(tokenizer: Any) -> int | None:
    """The token that begins texts, else that which ends them; None if a tokenizer has neither."""
    found: int | None = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return found


def written_rows(model: Any, tokenizer: Any, rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """What a model writes, int64 [some rows, length] at a time: sampled at temperature 1, all tokens allowed.

    Each row starts with `first_token`, and one ordinary token at random.

    Args:
        model: of transformers.
        tokenizer: of the model.
        rows: how many.
        length: tokens of a row.
        seed: of everything random.
    """
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    start = first_token(tokenizer)
    pad = next(iter(sorted(special)), 0)
    for first in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - first)
        generator = torch.Generator().manual_seed(seed + first)
        second = ordinary[torch.randint(len(ordinary), (count, 1), generator=generator)]
        prompt = second if start is None else torch.cat([torch.full_like(second, start), second], 1)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed + first)
            yield model.generate(
                prompt.to(model.device),
                attention_mask=torch.ones_like(prompt).to(model.device),
                min_new_tokens=length - prompt.shape[1],
                max_new_tokens=length - prompt.shape[1],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=None,
                pad_token_id=pad,
                cache_implementation="static"
                if model._can_compile_fullgraph
                else None,  # the other is copied each step
                disable_compile=True,
            ).cpu()


def writing_dtype(config: dict[str, Any], device: str) -> torch.dtype:
    """The dtype in which a model writes: bfloat16 if it is one of that dtype, and the device multiplies that fast.

    Args:
        config: of the model.
        device: where it writes.
    """
    if (config.get("dtype") or config.get("torch_dtype")) != "bfloat16":
        return torch.float32
    if device == "cpu":
        known = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        fast = any(supported() for supported in known if supported is not None)
    else:
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


def check_writes(model: Any) -> None:
    """Raises `CalibrationTextError` for a model from whose logits no token can be drawn."""
    with torch.no_grad():
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise CalibrationTextError(
            "the model's logits hold a NaN or an infinity, so it can't write its calibration text"
        )


def _tokenized(text: str, tokenizer: Any, path: Path) -> list[int]:
    if tokenizer is None:
        raise CalibrationTextError(
            f"`calibration_text` {path}: the model has no tokenizer; give a .jsonl file with `input_ids`"
        )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
