"""A signal ends downloads that another thread waits for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from surogate_quantize.interruption import WORDS


@contextmanager
def stopping(stop: threading.Event) -> Iterator[None]:
    """Sets `stop` when the block ends, and before that at a signal that will end the run.

    The thread that reads tensors may wait for a download of minutes, and the run for that thread.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
        before = {number: handler for number in WORDS if callable(handler := signal.getsignal(number))}

    def stop_first(number: int, frame: FrameType | None) -> None:
        stop.set()
        before[number](number, frame)

    for number in before:
        signal.signal(number, stop_first)
    try:
        yield
    finally:
        stop.set()
        for number, handler in before.items():
            with suppress(ValueError):
                signal.signal(number, handler)
