"""How the ranks of a run agree: on errors, on data, and on who is still alive."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from surogate_formats.errors import SurogateError
from surogate_quantize.ranks.environment import own_gpu, world_size
from surogate_quantize.ranks.errors import RankLostError, StoppedByTeamError

T = TypeVar("T")

FAILED = "surogate/failed"

SAID = "surogate/said"
"""Set by the first rank when it has cleaned up after a failure."""

_RUNS = itertools.count()
"""A process may make several artifacts, and the store remembers what was said about all of them."""

BEAT = 2.0
"""Seconds between two signs of life."""

SILENCE = 60.0
"""Seconds without a sign of life after which a rank is given up; the time that a collective may take, too."""


class Team(Protocol):
    """The processes that make an artifact together.

    Attributes:
        rank: which one this is.
        size: how many there are.
    """

    rank: int
    size: int

    def together(self, step: Callable[[], T]) -> list[T]:
        """Runs a step on every rank and returns what all of them returned, by rank.

        Raises:
            SurogateError: what the step raised here; where it failed on other ranks alone, the same error of the first
                of them, which the message then names.
            RankLostError: a rank has died or can't be reached.
        """
        ...

    def pulse(self) -> None:
        """Raises `StoppedByTeamError`, in the middle of a long step, if the step has failed on another rank."""
        ...


class Alone:
    """A team of one."""

    rank = 0
    size = 1

    def together(self, step: Callable[[], T]) -> list[T]:
        """See `Team`."""
        return [step()]

    def pulse(self) -> None:
        """See `Team`."""


class TorchTeam:
    """The ranks of a torchrun, over gloo."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        """Starts to give signs of life."""
        self.rank, self.size = rank, size
        self._store, self._steps, self._looked, self._over = store, 0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="beat")
        self._thread.start()

    def close(self) -> None:
        """Gives no more signs of life."""
        self._over.set()
        self._thread.join()

    def together(self, step: Callable[[], T]) -> list[T]:
        """See `Team`."""
        from torch import distributed

        result: T | None = None
        error: Exception | None = None
        try:
            result = step()
        except Exception as failed:
            error = failed
            with suppress(RuntimeError, OSError):
                self._store.set(FAILED, "")
        try:
            self._wait_for_all()
            told: list[Any] = [None] * self.size
            distributed.all_gather_object(told, (_sendable(error), result if error is None else None))
        except (RuntimeError, OSError, RankLostError) as lost:  # torch's DistError among them
            if error is not None:
                raise error from None
            if isinstance(lost, RankLostError):
                raise
            raise RankLostError(f"rank {self.rank} can't reach the others; the same command goes on") from lost
        if error is not None and not isinstance(error, StoppedByTeamError):
            raise error
        for rank, (failed_there, _) in enumerate(told):
            if failed_there is not None and not isinstance(failed_there, StoppedByTeamError):
                raise type(failed_there)(f"rank {rank}: {failed_there}")
        return [result for _, result in told]

    def pulse(self) -> None:
        """See `Team`."""
        if time.monotonic() - self._looked > BEAT:
            self._looked = time.monotonic()
            if self._store.check([FAILED]):
                raise StoppedByTeamError("another rank has failed")

    def _wait_for_all(self) -> None:
        """Returns when every rank is done with this step; that may take hours, but a dead rank is noticed."""
        self._steps += 1
        self._store.set(f"surogate/done/{self._steps}/{self.rank}", "")
        waiting, last = set(range(self.size)), dict.fromkeys(range(self.size), (b"", time.monotonic()))
        while waiting:
            for rank in sorted(waiting):
                if self._store.check([f"surogate/done/{self._steps}/{rank}"]):
                    waiting.discard(rank)
                    continue
                key, seen = f"surogate/beat/{rank}", time.monotonic()
                beat = self._store.get(key) if self._store.check([key]) else b"none"
                if beat != last[rank][0]:
                    last[rank] = (beat, seen)
                elif seen - last[rank][1] > SILENCE:
                    raise RankLostError(f"rank {rank} gives no sign of life; the same command goes on")
            time.sleep(BEAT / 10 if waiting else 0)

    def let_the_first_speak(self) -> None:
        """Waits, after a failure, until the first rank has cleaned up: torchrun ends it once another has ended."""
        started = time.monotonic()
        with suppress(RuntimeError, OSError):
            if self.rank == 0:
                self._store.set(SAID, "")
                return
            while not self._store.check([SAID]) and time.monotonic() - started < SILENCE:
                time.sleep(BEAT / 10)
            time.sleep(BEAT / 2)  # for its line

    def _beat(self) -> None:
        for count in range(10**9):
            try:
                self._store.set(f"surogate/beat/{self.rank}", str(count))
            except (RuntimeError, OSError):  # whoever keeps the store is gone, as `together` will find
                return
            if self._over.wait(BEAT):
                return


@contextmanager
def joined() -> Iterator[Team]:
    """The team that torchrun has put this process into; a team of one without it.

    Raises:
        RankLostError: the other ranks can't be reached.
    """
    if world_size() == 1:
        yield Alone()
        return
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    wait = timedelta(seconds=SILENCE)
    try:
        shared, rank, size = next(rendezvous("env://", timeout=wait))
        store = PrefixStore(f"surogate/{next(_RUNS)}", shared)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, OSError, ValueError) as error:
        raise RankLostError(f"the ranks can't reach each other ({str(error).splitlines()[0]})") from error
    team = TorchTeam(store, rank, size)
    try:
        with own_gpu():
            yield team
    except Exception:
        team.let_the_first_speak()
        raise
    finally:
        team.close()
        distributed.destroy_process_group()


def _sendable(error: Exception | None) -> SurogateError | None:
    """An error as it goes to other ranks; a mistake of ours goes as its text."""
    if error is None or (isinstance(error, SurogateError) and error.args == (str(error),)):
        return error
    return SurogateError(f"{type(error).__name__}: {error}")
