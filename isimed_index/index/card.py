"""`index.json`: what an index covers, how it is laid out, and the recall that was measured when it was built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isimed_index.errors import Incompatible, StoreDamaged
from isimed_index.index.faiss_index import Recipe
from isimed_index.index.protocol import Metric, RowIds, checked_metric

FILE = "index.json"
FORMAT_VERSION = 1
_AGAIN = "run isimed index again"


@dataclass(frozen=True, slots=True)
class IndexCard:
    """The description of one stored index."""

    metric: Metric
    dim: int
    rows: int
    row_ranges: tuple[tuple[int, int], ...]  # half-open ranges of the row ids that the index holds
    recipe: Recipe
    min_recall: float  # what was asked for
    recall_at_10: float  # measured on `recall_queries` rows that were held out of training
    recall_at_10_filtered: float  # the same under a filter that keeps one side of the data, 10 % of the rows
    recall_queries: int
    bytes: int  # size of index.faiss
    sha256: str  # of index.faiss

    def to_json(self) -> dict[str, Any]:
        """The card as JSON values, with its own hash under `card_sha256`."""
        fields: dict[str, Any] = {"format_version": FORMAT_VERSION, **asdict(self)}
        return {**fields, "card_sha256": _own_hash(fields)}

    def write(self, directory: Path) -> None:
        """Write `index.json` into `directory`."""
        (directory / FILE).write_text(json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> IndexCard:
        """Read `index.json`; raises `StoreDamaged` (missing, or not what was written) or `Incompatible` (newer)."""
        try:
            fields = json.loads((directory / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise StoreDamaged(f"the index card {FILE} is missing", next_step=_AGAIN) from error
        except (OSError, ValueError) as error:
            raise StoreDamaged(f"the index card {FILE} cannot be read", next_step=_AGAIN) from error
        if not isinstance(fields, dict) or fields.pop("card_sha256", None) != _own_hash(fields):
            raise StoreDamaged(f"the index card {FILE} does not match its hash: it is damaged", next_step=_AGAIN)
        version = fields.pop("format_version")
        if version != FORMAT_VERSION:
            raise Incompatible(
                f"the index has format {version}, this version reads format {FORMAT_VERSION}", next_step=_AGAIN
            )
        fields["metric"] = checked_metric(fields["metric"])
        fields["recipe"] = Recipe(**fields["recipe"])
        fields["row_ranges"] = tuple((first, stop) for first, stop in fields["row_ranges"])
        return cls(**fields)


def row_ranges(blocks: Sequence[RowIds]) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of the row ids in ascending, disjoint blocks, neighbours joined."""
    if not (several := [ids for ids in blocks if ids.size]):
        return ()
    every = np.concatenate(several)
    breaks = np.flatnonzero(np.diff(every) != 1)
    firsts = every[np.concatenate([[0], breaks + 1])]
    lasts = every[np.concatenate([breaks, [every.size - 1]])]
    return tuple((int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True))


def covered(row_ids: RowIds, ranges: Sequence[tuple[int, int]]) -> RowIds:
    """Those of `row_ids` that lie in sorted half-open ranges."""
    if not ranges:
        return row_ids[:0]
    bounds = np.array(ranges, dtype=np.int64)  # (r, 2)
    place = np.searchsorted(bounds[:, 0], row_ids, side="right") - 1
    inside: RowIds = row_ids[(place >= 0) & (row_ids < bounds[place, 1])]
    return inside


def _own_hash(fields: dict[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
