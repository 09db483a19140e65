"""safetensors' writer with errors of the operating system's class."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def save(writer: Callable[..., None], tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes tensors with a `save_file` of safetensors.

    Raises:
        OSError: the disk refuses; safetensors has a class of its own for that.
    """
    try:
        writer(dict(tensors), path, dict(metadata))
    except SafetensorError as error:
        full = any(word in str(error) for word in ("No space left", "quota"))
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error).partition(": ")[2] or str(error)) from error
