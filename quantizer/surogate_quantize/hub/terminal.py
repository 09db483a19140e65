"""What huggingface_hub shows on the terminal, and how a download of its is given up."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

from surogate_quantize.hub.errors import StoppedError


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keeps huggingface_hub's bars and warnings off the terminal: a run has its own bar, and errors are ours."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    level, bars = get_verbosity(), not are_progress_bars_disabled()
    disable_progress_bars()
    if level == logging.WARNING:  # the default
        set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(level)
        if bars:
            enable_progress_bars()


def bar_class(stop: Event) -> type[Any]:
    """A bar that shows nothing: huggingface_hub's one way to be told, between two pieces, to give up."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **{**keywords, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise StoppedError("the run was ended")
            return bool(super().update(n))

    return Bar
