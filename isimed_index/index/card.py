"""`index.json`: what an index covers, how it is laid out and why, and the recall measured when it was built.

Format 2 has the recall contract (`strata`), what else was tried, and the costs by which filters are planned. An index
of format 1 still answers, by the rules of its version; the next `isimed index` builds it anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isimed_index.errors import Incompatible, StoreDamaged
from isimed_index.index.costs import UNKNOWN, Costs
from isimed_index.index.protocol import Metric, RowIds, checked_metric
from isimed_index.index.recipe import Recipe
from isimed_index.index.strata import Stratum

FILE = "index.json"
FORMAT_VERSION = 2
_AGAIN = "run isimed index again"


@dataclass(frozen=True, slots=True)
class Tried:
    """A recipe that was built and measured: the plan of an index is what was tried, and why one was taken.

    One that the judges had made stronger is told as it was then.
    """

    factory: str
    rows: int  # a sample of the rows where there are very many
    probes: int
    fetch: float
    recall: float | None  # recall@10 of the rows that it was tuned on; None: more memory than allowed, not built
    at_least: float | None  # one-sided bound of it, 95 %
    ms: float | None  # a query, alone, ranked again; None where the target was out of reach
    bytes: int  # in memory
    verdict: str  # such as `taken`, `slower`, `recall out of reach`


@dataclass(frozen=True, slots=True)
class IndexCard:
    """The description of one stored index."""

    metric: Metric
    dim: int
    rows: int
    row_ranges: tuple[tuple[int, int], ...]  # half-open ranges of the row ids that the index holds
    recipe: Recipe
    min_recall: float  # what was asked for
    recall_at_10: float  # measured on `recall_queries` rows, which neither trained nor tuned the index
    recall_at_10_filtered: float  # the lowest under any filter of `strata`
    recall_queries: int
    bytes: int  # size of index.faiss
    sha256: str  # of index.faiss
    resident_bytes: int = 0  # in memory: codes, row ids, centres, axes
    ms: float | None = None  # median time of a query without filter, alone, on the machine that built it: as tuned
    strata: tuple[Stratum, ...] = ()  # the recall contract
    costs: Costs = UNKNOWN
    tried: tuple[Tried, ...] = ()
    max_ram_bytes: int | None = None  # what was asked for
    max_latency_ms: float | None = None
    format_version: int = FORMAT_VERSION

    def explain(self) -> str:
        """The plan in words and a table: what was asked for, tried, measured and taken."""
        limits = [f"recall@10 of {self.min_recall:g} or more"]
        limits += [f"{self.max_ram_bytes / 2**20:.1f} MiB or less"] if self.max_ram_bytes is not None else []
        limits += [f"{self.max_latency_ms:g} ms or less"] if self.max_latency_ms is not None else []
        lines = [f"{self.rows:,} vectors of {self.dim} dimensions, {self.metric}. Asked for: {', '.join(limits)}."]
        if self.tried:
            lines += [f"{'recipe':<28}{'rows':>9}{'lists':>6}{'fetch':>6}{'recall':>8}{'ms':>8}{'MiB':>9}  verdict"]
            lines += [_tried_line(one) for one in self.tried]
        else:
            lines += ["So few vectors are compared one by one: nothing else was tried."]
        if self.strata:
            lines += [
                "",
                f"{'filter':<16}{'recall':>8}{'at least':>10}{'ms':>8}  of other queries than it was tuned on",
            ]
            lines += [f"{one.name:<16}{one.recall:>8.4f}{one.at_least:>10.4f}{one.ms:>8.2f}" for one in self.strata]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The card as JSON values, with its own hash under `card_sha256`."""
        fields: dict[str, Any] = asdict(self)
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
        version = fields["format_version"]
        if version not in (1, FORMAT_VERSION):
            raise Incompatible(
                f"the index has format {version}, this version reads formats 1 to {FORMAT_VERSION}", next_step=_AGAIN
            )
        fields["metric"] = checked_metric(fields["metric"])
        fields["recipe"] = Recipe(**fields["recipe"])
        fields["row_ranges"] = tuple((first, stop) for first, stop in fields["row_ranges"])
        if version == FORMAT_VERSION:
            fields["strata"] = tuple(Stratum(**one) for one in fields["strata"])
            fields["costs"] = Costs(**fields["costs"])
            fields["tried"] = tuple(Tried(**one) for one in fields["tried"])
        return cls(**fields)


def _tried_line(one: Tried) -> str:
    shown = [f"{one.recall:.4f}" if one.recall is not None else "", f"{one.ms:.3f}" if one.ms is not None else ""]
    return (
        f"{one.factory:<28}{one.rows:>9}{one.probes or '':>6}{one.fetch:>6.1f}{shown[0]:>8}{shown[1]:>8}"
        f"{one.bytes / 2**20:>9.1f}  {one.verdict}"
    )


def row_ranges(blocks: Sequence[RowIds]) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of the row ids in ascending, disjoint blocks, neighbours joined."""
    if not (several := [ids for ids in blocks if ids.size]):
        return ()
    every = np.concatenate(several)
    breaks = np.flatnonzero(np.diff(every) != 1)
    firsts = every[np.concatenate([[0], breaks + 1])]
    lasts = every[np.concatenate([breaks, [every.size - 1]])]
    return tuple((int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True))


def covered(row_ids: RowIds, ranges: Sequence[tuple[int, int]] | RowIds) -> RowIds:
    """Those of `row_ids` that lie in sorted half-open ranges; for many blocks give these as an array (r, 2)."""
    if not len(ranges):
        return row_ids[:0]
    bounds = np.asarray(ranges, dtype=np.int64)  # (r, 2)
    place = np.searchsorted(bounds[:, 0], row_ids, side="right") - 1
    inside: RowIds = row_ids[(place >= 0) & (row_ids < bounds[place, 1])]
    return inside


def _own_hash(fields: dict[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
