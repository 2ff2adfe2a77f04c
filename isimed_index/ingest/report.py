"""What became of every file that `add` was given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from isimed_index.errors import IsimedError
from isimed_index.scans.discover import is_text
from isimed_index.scans.scan import Scan

Outcome = Literal["added", "unchanged", "refused"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """One input that was left out: its base name, the stable kind of error, why, and what to do."""

    name: str
    kind: str
    reason: str
    next_step: str = ""

    @classmethod
    def of(cls, name: str, error: IsimedError) -> Refusal:
        """The refusal that an error stands for; what of the name cannot be shown is written as an escape."""
        return cls(shown_name(name), error.kind, error.message.removeprefix(f"{name}: "), error.next_step)


def shown_name(name: str) -> str:
    """A file's name as one line of text: line breaks, terminal codes and bytes that are no text read as `\\n`."""
    return "".join(letter if is_text(letter) else ascii(letter)[1:-1] for letter in name)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file turned out to be."""

    shape: tuple[int, int, int]  # voxels along x, y and z as they are stored
    spacing_mm: tuple[float, float, float]
    orientation: str | None  # of the file's own axes, such as LPS
    modality: str | None
    format: str | None
    low: float  # the least physical value
    high: float  # the greatest

    @classmethod
    def of(cls, scan: Scan) -> Facts:
        """The facts of a scan that was read."""
        x, y, z = map(float, scan.spacing_mm)
        ends = [float(end) * scan.slope + scan.intercept for end in (scan.voxels.min(), scan.voxels.max())]
        orientation, modality, kind = (
            None if (found := scan.attributes.get(key)) is None else str(found)
            for key in ("source_orientation", "modality", "source_format")
        )
        return cls(scan.shape, (x, y, z), orientation, modality, kind, min(ends), max(ends))


@dataclass(frozen=True, slots=True)
class FileOutcome:
    """What became of one file; a scan that was there already may have a refusal too, such as of labels come late."""

    name: str  # as in refusals: a file's base name, the surrogate of a DICOM series
    outcome: Outcome
    scan: str | None = None
    refusal: Refusal | None = None
    facts: Facts | None = None  # of a file that was read
    labels: int | None = None  # how many occur; None without a label map
    seconds: float | None = None  # to read and write it, in its worker
    thumbnail: str | None = None  # its name in the folder of thumbnails

    @classmethod
    def refused(cls, refusal: Refusal) -> FileOutcome:
        """The outcome of a file that became no scan."""
        return cls(refusal.name, "refused", refusal=refusal)


@dataclass(frozen=True, slots=True)
class AddReport:
    """What became of every file: ids of new scans, ids of scans that were there already, and refusals.

    `unnamed` are the values in label maps of new scans for which no name was given. `dropped` counts, by column, the
    headers that said something which was not kept: out of range, not in the vocabulary, or not the same in all files.
    `files` has one entry a file or DICOM series: first those that were refused unread, then the others in the order in
    which they were found. `notes` say how folders were read, and what a person may have meant otherwise.
    """

    added: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    unnamed: list[int] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    files: list[FileOutcome] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
