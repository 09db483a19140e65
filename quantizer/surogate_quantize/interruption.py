"""Ctrl-C, SIGTERM and a closed terminal: one line, a clean directory, and the exit status that shells expect."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from surogate_quantize.ranks.environment import is_first_rank

WORDS = {
    getattr(signal, name): word
    for name, word in (("SIGINT", "Interrupted"), ("SIGTERM", "Terminated"), ("SIGHUP", "Hung up"))
    if hasattr(signal, name)  # Windows has no SIGHUP
}
"""The signals that end a run early, and what the last line calls them."""

NOTHING_LEFT = "nothing was left behind"

Handler = Callable[[int, FrameType | None], Any] | int


class EndedBySignal(KeyboardInterrupt):
    """A signal asks the run to end; whatever cleans up after Ctrl-C cleans up after it."""

    def __init__(self, number: int) -> None:
        """Takes the signal's number; the arguments are free for `name_leftover`."""
        super().__init__()
        self.number = number


def name_leftover(interrupt: BaseException, text: str) -> None:
    """Has the last line say what was left behind, where an interrupted run can't take everything away."""
    if isinstance(interrupt, KeyboardInterrupt):
        interrupt.args = (text,)


@contextmanager
def leaving(text: str) -> Iterator[None]:
    """Has the last line say what is there, where a signal comes in the block."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        name_leftover(interrupt, text)
        raise


@contextmanager
def one_line_at_the_end() -> Iterator[None]:
    """Ends the process with one line on stderr and status 128 + number where a signal ends the block."""
    try:
        with _handled(_end):
            yield
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "number", signal.SIGINT)
        left = interrupt.args[0] if interrupt.args else NOTHING_LEFT
        if is_first_rank():
            sys.stderr.write(f"{WORDS[number]}; {left}.\n")
        sys.exit(128 + number)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignores those signals while a run takes away what it has written: a second Ctrl-C must not stop that."""
    with _handled(signal.SIG_IGN):
        yield


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise EndedBySignal(number)


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    """Sets a handler for the block; a signal that is ignored already (by `nohup`, say) stays ignored."""
    before: dict[int, Handler] = {}
    if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
        known = {number: signal.getsignal(number) for number in WORDS}
        before = {number: old for number, old in known.items() if old is not None and old != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
