"""How long jobs report where they are; the library is silent unless it is handed a `Progress`."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the state of one long job at a time."""

    def start(self, task: str, total: int | None, unit: str, done: int = 0) -> None:
        """A task begins: its name, how many units it has (None when unknown) and what a unit is.

        `done` of them were done before, by a run that this one goes on with.
        """
        ...

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more units are done; `note` is a short state to show beside the bar (loss, rate).

        A note with `ETA` in it says the time that is left better than the number of units does.
        """
        ...

    def finish(self) -> None:
        """The task that was started last has ended."""
        ...


class Silent:
    """A `Progress` that shows nothing."""

    def start(self, task: str, total: int | None, unit: str, done: int = 0) -> None:
        """Show nothing."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Show nothing."""

    def finish(self) -> None:
        """Show nothing."""
