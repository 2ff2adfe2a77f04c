"""How `add` reads what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from isimed_index.errors import UsageError


@dataclass(frozen=True, slots=True)
class AddOptions:
    """How files are read: where label maps lie, what labels are called, a metadata table, and so on."""

    labels: str | None = None
    label_names: Path | None = None
    metadata: Path | None = None
    subject_from: str | None = None
    spacing_mm: float | None = None
    workers: int = 1
    surrogate_key: Path | None = None  # the file; None: where `key_file` says

    def __post_init__(self) -> None:
        if self.labels and self.spacing_mm is not None:
            raise UsageError("label maps are not resampled", next_step="leave out --spacing or --labels")
        if self.workers < 1:
            raise UsageError(f"expected at least one worker, found {self.workers}")
