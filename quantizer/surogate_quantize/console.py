"""The one place that prints: results on stdout, everything else on stderr; bars only on a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surogate_quantize import report
from surogate_quantize.plan import Plan, PlannedTensor
from surogate_quantize.summary import RunSummary, plan_json

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 160
"""Columns of a table that goes to a file or another program."""

LINE_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""


@dataclass
class Out:
    """Prints for people, for programs (`json_mode`) or hardly at all (`quiet`: just the artifact's path).

    Commands hand their results to it and never print themselves.
    """

    json_mode: bool = False
    quiet: bool = False
    verbose: bool = False
    _bars: Any = field(default=None, repr=False)

    @property
    def stderr(self) -> Console:
        """The terminal on stderr, through rich, which respects NO_COLOR."""
        from rich.console import Console

        return Console(stderr=True, highlight=False, soft_wrap=True)

    @property
    def stdout(self) -> Console:
        """The terminal on stdout, through rich, which respects NO_COLOR."""
        from rich.console import Console

        return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)

    def note(self, text: str) -> None:
        """Something worth knowing."""
        if not self.quiet:
            self.stderr.print(text, markup=False)

    def warning(self, text: str) -> None:
        """Something that may surprise; printed in every mode."""
        self.stderr.print(f"Warning: {text}", markup=False, style="yellow")

    def plan(self, made: Plan, warnings: Iterable[str]) -> None:
        """The result of a dry run."""
        for line in warnings:
            self.warning(line)
        if self.json_mode:
            print(json.dumps(plan_json(made), indent=2))
        elif not self.quiet:
            self.stdout.print(report.plan_tables(made, every_tensor=self.verbose))

    def summary(self, summary: RunSummary) -> None:
        """The result of a run."""
        for line in summary.warnings:
            self.warning(line)
        if self.json_mode:
            print(json.dumps(summary.to_json(), indent=2))
        elif self.quiet:
            print(summary.out)
        else:
            self.stdout.print(report.run_table(summary))

    def watch(self, made: Plan) -> Callable[[PlannedTensor], None]:
        """Shows a run's progress: a bar on a terminal, else a line every ten seconds."""
        total = sum(tensor.info.nbytes for tensor in made.tensors)
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
