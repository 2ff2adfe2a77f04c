"""What an audit finds: each finding names what is hit, which scans that concerns, and what a repair would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from isimed_index.store import files

if TYPE_CHECKING:
    import pyarrow as pa

Severity = Literal["damage", "leak", "warning", "info"]

FROM_COPY = "writes it again from its copy"
NOTHING = "nothing: "  # and then what is to be done instead
_RESTORE = "nothing: " + files.RESTORE
_REPAIRS = {  # by kind; artefacts that are not as committed: by kind of artefact, below
    "format_damaged": "writes it again, when a manifest is good",
    "manifest_damaged": "moves it to quarantine/, when its copy is bad too; a new generation follows the last good one",
    "copy_damaged": "writes it again",
    "copy_missing": "writes them",
    "manifest_missing": "adds a generation that follows the last good one",
    "history_gap": "nothing: the generations after it are whole without it",
    "manifest_replaced": "nothing: the generations after it stay whole",
    "no_generation": _RESTORE,
    "head_damaged": "writes it again",
    "head_missing": "writes it again",
    "folder_missing": "makes it again",
    "key_repeated": "keeps the first row of each key",
    "scan_without_voxels": "drops the row, so that the file can be added again",
    "voxels_without_scan": "drops them, with what was encoded from them, so that the file can be added again",
    "row_without_scan": "drops the row",
    "segment_without_scan": "drops it",
    "encoder_unknown": "drops what was made by an encoder that is not there",
    "encoder_mismatch": "nothing: restore the encoder from a backup, or isimed delete --encoder",
    "weights_mismatch": "nothing: restore the encoder from a backup, or isimed delete --encoder",
    "chart_of_unknown_scan": "nothing: it harms nobody, and the next fit of the frame leaves it out",
    "tag_damaged": "moves it to quarantine/",
    "tag_missing_generation": "moves it to quarantine/",
    "orphan": "nothing: isimed gc removes it",
    "stale_intent": "nothing: isimed gc removes it",
}
_REPAIRS_ARTEFACT = {
    "scan": "drops the scan with what was encoded from it, so that its file can be added again",
    "encoder": "nothing: restore the encoder from a backup, or isimed delete --encoder",
    "segment": "drops it; isimed index encodes its scans again",
    "table": "takes its rows from older generations; a scan whose row is in none of them is dropped",
    "frame": "drops it; isimed index fits it again",
    "reference": "drops it; isimed register makes it again",
    "index": "drops it; isimed index builds it again",
    "region": "drops them; isimed index pools them again",
    "tombstone": "drops the segments that it names, because what was deleted must not come back; isimed index encodes "
    "their scans again",
}
_ARTEFACT_KINDS = {folder: kind for kind, folder in files.FOLDERS.items()}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    `damage` keeps the newest generation, or the store, from being whole; a `leak` may name a patient; a `warning`
    concerns older generations or what is done without; `info` is harmless. `kind` is a stable word.
    """

    kind: str
    artefact: str  # path inside the store of the artefact or file; '' for the store as a whole
    scans: tuple[str, ...]  # ids of the scans that are hit, as far as they are known
    message: str
    repair: str  # what `repair` does about it
    severity: Severity = "damage"
    generations: tuple[int, ...] = ()  # that name the artefact, the newest first

    @classmethod
    def of(
        cls,
        kind: str,
        artefact: str,
        message: str,
        scans: Sequence[str] = (),
        severity: Severity = "damage",
        generations: Sequence[int] = (),
        repair: str = "",
    ) -> Finding:
        """A finding that says what a repair does about it: by its kind, unless it is given."""
        repair = repair or _REPAIRS.get(kind) or _REPAIRS_ARTEFACT[_ARTEFACT_KINDS[artefact.split("/")[0]]]
        return cls(kind, artefact, tuple(scans), message, repair, severity, tuple(generations))

    def to_json(self) -> dict[str, Any]:
        """The finding by field."""
        return asdict(self)


def as_table(findings: Sequence[Finding]) -> pa.Table:
    """Findings as an Arrow table, one row each."""
    import pyarrow as pa

    texts = ("severity", "kind", "artefact", "message", "repair")
    lists = {"scans": pa.string(), "generations": pa.int64()}
    columns = {name: pa.array([getattr(found, name) for found in findings], pa.string()) for name in texts}
    for name, kind in lists.items():
        columns[name] = pa.array([list(getattr(found, name)) for found in findings], pa.list_(kind))
    return pa.table(columns)
