"""How `add` reads what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isimed_index.errors import UsageError
from isimed_index.scans.discover import check_there, label_path, subject_and_session
from isimed_index.scans.label_names import read_label_names
from isimed_index.scans.layouts.recognise import AUTO, CHOICES
from isimed_index.scans.metadata import read_metadata
from isimed_index.space import AXIS_CODES


@dataclass(frozen=True, slots=True)
class AddOptions:
    """How files are read: where label maps lie, what labels are called, tables of metadata, and so on."""

    labels: str | None = None
    label_names: Path | None = None
    metadata: tuple[Path, ...] = ()
    subject_from: str | None = None
    spacing_mm: float | None = None
    workers: int = 1
    surrogate_key: Path | None = None  # the file; None: where `key_file` says
    surrogate_ids: bool = False  # of scans, subjects and sessions that are called after names of files and folders
    keep_source: bool = False
    allow_burned_in: bool = False
    volume: int | None = None  # which one of 4-D data, from 0
    analyze_axes: str | None = None  # directions in which the axes of Analyze files grow, one of `AXIS_CODES`
    thumbnails: Path | None = None  # a folder; None: no pictures are made
    layout: str = AUTO  # of the folders, one of `CHOICES`

    def __post_init__(self) -> None:
        if self.labels and self.spacing_mm is not None:
            raise UsageError("label maps are not resampled", next_step="leave out --spacing or --labels")
        if self.layout not in CHOICES:
            raise UsageError(f"expected a layout among {', '.join(CHOICES)}, found {self.layout!r}")
        if self.workers < 1:
            raise UsageError(f"expected at least one worker, found {self.workers}")
        if self.volume is not None and self.volume < 0:
            raise UsageError(f"expected a volume's number, from 0, found {self.volume}")
        if self.analyze_axes is not None and self.analyze_axes not in AXIS_CODES:
            raise UsageError(
                f"expected the directions of three axes, such as LAS, found {self.analyze_axes!r}",
                next_step="give one letter an axis, in the file's order: R or L, A or P, S or I, each pair once",
            )


def check_usage(paths: Sequence[Path], options: AddOptions) -> None:
    """Raise `UsageError` for what was asked wrongly, as `add` would, with no need of a store.

    Paths that are not there, patterns and expressions that say nothing, tables that cannot be read.
    """
    for path in paths:
        check_there(path)
    if options.labels:
        label_path(Path("image.nii"), options.labels)
    if options.subject_from:
        subject_and_session(Path("image.nii"), regex=options.subject_from)
    if options.label_names:
        read_label_names(options.label_names)
    read_metadata(options.metadata)
