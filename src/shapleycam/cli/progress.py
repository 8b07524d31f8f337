"""How far a command is: a bar on a terminal, a line every so often into a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: Seconds between two lines where there is no terminal; a command that takes less says nothing.
INTERVAL = 10.0


class Steps:
    """A context in which :meth:`at` says how far the work is.

    Attributes:
        done, total: what was said last; ``total`` is None before.
    """

    def __init__(self, console: Console, label: str, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._label, self._unit, self._clock = console, label, unit, clock
        self.done: int = 0
        self.total: int | None = None
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
        self._began = self._said = clock()
        self._first: int | None = None

    def __enter__(self) -> Steps:
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task(escape(self._label), total=None, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, done: int, total: int, note: str = "") -> None:
        """So much of so much is behind us; ``note`` is what else there is to say."""
        self.done, self.total = done, total
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, note=escape(note))
            return
        now = self._clock()
        if self._first is None:  # what an interrupted run had done took none of this run's time
            self._first, self._began = done, now
        elif now - self._said >= INTERVAL and done < total:
            self._said = now
            left = (now - self._began) / max(done - self._first, 1) * (total - done)
            self._console.print(
                escape(f"{self._label}: {done} of {total} {self._unit}, about {_span(left)} left{note and f', {note}'}")
            )


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
