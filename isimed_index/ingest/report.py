"""What became of every file that `add` was given."""

from __future__ import annotations

from dataclasses import dataclass, field

from isimed_index.errors import IsimedError


@dataclass(frozen=True, slots=True)
class Refusal:
    """One input that was left out: its base name, the stable kind of error, why, and what to do."""

    name: str
    kind: str
    reason: str
    next_step: str = ""

    @classmethod
    def of(cls, name: str, error: IsimedError) -> Refusal:
        """The refusal that an error stands for."""
        return cls(name, error.kind, error.message.removeprefix(f"{name}: "), error.next_step)


@dataclass(frozen=True, slots=True)
class AddReport:
    """What became of every file: ids of new scans, ids of scans that were there already, and refusals.

    `unnamed` are the values in label maps of new scans for which no name was given.
    """

    added: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    unnamed: list[int] = field(default_factory=list)
