"""How a download of huggingface_hub is given up."""

from __future__ import annotations

from threading import Event
from typing import Any

from surogate_quantize.hub.errors import StoppedError


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
