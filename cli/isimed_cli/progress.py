"""Progress on stderr: bars on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from isimed_index.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Task, TaskID

LINE_EVERY_S = 10.0
_ETA = "ETA"  # in a note that says itself how much time is left


@contextmanager
def progress_on(stream: TextIO, *, shown: bool) -> Iterator[Progress]:
    """A `Progress` that suits the stream: bars on a terminal, lines in a file or pipe, nothing when not `shown`."""
    if not shown:
        yield Silent()
    elif stream.isatty():
        bars = Bars(stream)
        try:
            yield bars
        finally:
            bars.close()
    else:
        yield Lines(stream)


class Bars:
    """Bars with count, rate, time left and a note; the task started last is the one that advances."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.text import Text

        class _Remaining(TimeRemainingColumn):
            """Time left by the number of units, unless the note knows better."""

            def render(self, task: Task) -> Text:
                return Text() if _ETA in task.fields["note"] else Text("ETA ") + super().render(task)

        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            _Remaining(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[note]}"),
            console=Console(file=stream),
        )
        self._open: list[TaskID] = []

    def start(self, task: str, total: int | None, unit: str, done: int = 0) -> None:
        """Show a new bar below the open ones."""
        self._bars.start()
        bar = self._bars.add_task(task, total=total, completed=done, unit=unit, before=done, note="", rate="")
        self._open.append(bar)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Move the newest bar; an empty note leaves the last one standing."""
        task = self._open[-1]
        self._bars.update(task, advance=n)
        shown = self._bars.tasks[self._bars.task_ids.index(task)]
        now_done = shown.completed - shown.fields["before"]
        rate = rate_of(now_done, shown.elapsed or 0.0, shown.fields["unit"], shown.total)
        self._bars.update(task, note=note or shown.fields["note"], rate=rate)

    def finish(self) -> None:
        """Close the newest bar and leave it on the screen."""
        self._bars.stop_task(self._open.pop())
        if not self._open:
            self._bars.refresh()

    def close(self) -> None:
        """Stop drawing, also after an error."""
        self._bars.stop()


class Lines:
    """One line when a task starts, one every ten seconds, one at its end: readable in a log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._open: list[_Task] = []
        self._last = 0.0

    def start(self, task: str, total: int | None, unit: str, done: int = 0) -> None:
        """Remember the task; its first line comes with its first news."""
        self._open.append(_Task(task, total, unit, done))
        self._last = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count, and print if the last line is ten seconds old."""
        task = self._open[-1]
        task.done += n
        task.note = note or task.note
        if time.monotonic() - self._last >= LINE_EVERY_S:
            self._print(task)

    def finish(self) -> None:
        """Print where the task ended, unless the last line says so."""
        task = self._open.pop()
        if task.told != (task.done, task.note):
            self._print(task)

    def _print(self, task: _Task) -> None:
        self._last = time.monotonic()
        task.told = task.done, task.note
        print(task.line(self._last), file=self._stream, flush=True)


class _Task:
    """The state of one task of `Lines`."""

    def __init__(self, name: str, total: int | None, unit: str, done: int) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.before, self.done, self.note, self.began = done, done, "", time.monotonic()
        self.told: tuple[int, str] | None = None  # count and note of the last line

    def line(self, now: float) -> str:
        """Such as `add: 12/60 scans · 48 s · 0.25 scans/s · ETA 192 s · 41 MB/s`."""
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        took = now - self.began
        now_done = self.done - self.before
        left = None if self.total is None or not now_done else took / now_done * (self.total - self.done)
        eta = f"{_ETA} {left:.0f} s" if left and took >= 1 and _ETA not in self.note else ""
        rate = rate_of(now_done, took, self.unit, self.total)
        parts = [f"{self.name}: {count} {self.unit}", f"{took:.0f} s", rate, eta, self.note]
        return " · ".join(part for part in parts if part)


def rate_of(done: float, took_s: float, unit: str, total: float | None = None) -> str:
    """Such as `0.25 scans/s`; nothing in the first second, which says little, nor for a single thing."""
    return f"{done / took_s:.3g} {unit}/s" if took_s >= 1 and done and total != 1 else ""
