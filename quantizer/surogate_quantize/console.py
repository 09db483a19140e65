"""The one place that prints: results on stdout, everything else on stderr; bars only on a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from surogate_quantize import report
from surogate_quantize.plan import Plan, PlannedTensor
from surogate_quantize.summary import RunSummary, plan_json

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

UNFOLDED = 1 << 20
"""Columns of a table that goes to a file or another program: no name is so long that it would be folded."""

LINE_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""


@dataclass
class Out:
    """Prints for people, for programs (`json_mode`) or hardly at all (`quiet`: just the artifact's path).

    Commands hand their results to it and never print themselves. A context manager, which takes a bar off the terminal.

    Attributes:
        words: puts what the Python API says into the words of the command.
    """

    json_mode: bool = False
    quiet: bool = False
    verbose: bool = False
    words: Callable[[str], str] = str
    _bars: Any = field(default=None, repr=False)

    def __enter__(self) -> Out:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes a bar off the terminal."""
        self.close()

    @property
    def stderr(self) -> Console:
        """The terminal on stderr, through rich, which respects NO_COLOR."""
        from rich.console import Console

        return Console(stderr=True, highlight=False, soft_wrap=True)

    def table(self, content: RenderableType, *, on_stderr: bool = False) -> None:
        """A table; where no terminal shows it, neither folded nor padded, for `grep` and `diff`."""
        from rich.console import Console

        stream = sys.stderr if on_stderr else sys.stdout
        if stream.isatty():
            Console(stderr=on_stderr, highlight=False, markup=False).print(content)
            return
        console = Console(stderr=on_stderr, highlight=False, markup=False, width=UNFOLDED)
        with console.capture() as capture:
            console.print(content)
        stream.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())

    def note(self, text: str) -> None:
        """Something worth knowing."""
        if not self.quiet:
            self.stderr.print(text, markup=False)

    def warning(self, text: str) -> None:
        """Something that may surprise; printed in every mode."""
        self.stderr.print(f"Warning: {self.words(text)}", markup=False, style="yellow")

    def plan(self, made: Plan, warnings: Iterable[str]) -> None:
        """The result of a dry run."""
        for line in warnings:
            self.warning(line)
        if self.json_mode:
            print(json.dumps(plan_json(made), indent=2))
        elif not self.quiet:
            self.table(report.plan_tables(made, every_tensor=self.verbose))

    def summary(self, summary: RunSummary) -> None:
        """The result of a run."""
        for line in summary.warnings:
            self.warning(line)
        if self.json_mode:
            worded = replace(summary, warnings=tuple(map(self.words, summary.warnings)))
            print(json.dumps(worded.to_json(), indent=2))
        elif self.quiet:
            print(summary.out)
        else:
            self.table(report.run_table(summary))

    def watch(self, made: Plan, todo: Sequence[PlannedTensor]) -> Callable[[PlannedTensor], None]:
        """Shows a run's progress, if verbose after the plan: a bar on a terminal, else a line every ten seconds."""
        if self.verbose and not self.quiet:
            self.table(report.plan_tables(made, every_tensor=True), on_stderr=True)
        total = sum(tensor.info.nbytes for tensor in todo)
        if self.quiet or self.json_mode:
            return lambda tensor: None
        return self._bar(total) if sys.stderr.isatty() else self._lines(total)

    def close(self) -> None:
        """Takes a bar off the terminal."""
        if self._bars is not None:
            self._bars.stop()

    def _bar(self, total: int) -> Callable[[PlannedTensor], None]:
        from rich import progress as p

        measures = (p.BarColumn(), p.DownloadColumn(), p.TransferSpeedColumn(), p.TimeRemainingColumn())
        current = p.TextColumn("{task.description}")
        self._bars = bars = p.Progress(*measures, current, console=self.stderr, transient=True)
        bars.start()
        task = bars.add_task("", total=total)
        return lambda tensor: bars.update(task, advance=tensor.info.nbytes, description=tensor.info.name)

    def _lines(self, total: int) -> Callable[[PlannedTensor], None]:
        started = last = time.monotonic()
        done = 0

        def step(tensor: PlannedTensor) -> None:
            nonlocal last, done
            done += tensor.info.nbytes
            now = time.monotonic()
            if now - last >= LINE_EVERY:
                last = now
                self.note(report.progress_line(done, total, now - started, tensor.info.name))

        return step
