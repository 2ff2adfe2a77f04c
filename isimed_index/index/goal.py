"""What an index has to reach, and the rows by which that is found out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isimed_index.errors import UsageError
from isimed_index.index.candidates import TRAIN_PER_LIST, lists_for
from isimed_index.index.exact import ExactIndex
from isimed_index.index.protocol import RowIds
from isimed_index.index.recipe import Recipe, ram_bytes

JUDGES = 500  # rows that are asked for their neighbours, for what is written down
TUNERS = 400  # and for tuning
FEW_JUDGES = 100  # where nothing but flat is tried, which finds all in any case


@dataclass(frozen=True, slots=True)
class Goal:
    """The recall asked for, and the limits within which it is wanted."""

    min_recall: float = 0.98
    max_ram_bytes: int | None = None  # of what stays in memory
    max_latency_ms: float | None = None  # of a single query without filter

    def __post_init__(self) -> None:
        if not 0 < self.min_recall <= 1:
            raise UsageError(f"expected min_recall above 0 and up to 1, found {self.min_recall}")
        if self.max_latency_ms is not None and not self.max_latency_ms > 0:
            raise UsageError(f"expected max_latency above 0 ms, found {self.max_latency_ms}")

    def fits(self, recipe: Recipe, n: int, dim: int) -> bool:
        """Whether an index of this recipe stays within the memory allowed."""
        return self.max_ram_bytes is None or ram_bytes(recipe, n, dim) <= self.max_ram_bytes

    def in_time(self, ms: float | None) -> bool:
        """Whether a measured time is within the latency allowed."""
        return ms is not None and (self.max_latency_ms is None or ms <= self.max_latency_ms)


@dataclass(frozen=True, slots=True)
class Samples:
    """Disjoint, rising row ids: those that judge, that tune, and that train. Of few rows, all may judge."""

    judges: RowIds
    tuners: RowIds
    training: RowIds

    @classmethod
    def draw(cls, exact: ExactIndex, seed: int, small: bool) -> Samples:
        """Drawn at random from all rows; for a `small` trial, of flat, which is exact, few judges and no others."""
        row_ids = np.concatenate([ids for ids, _ in exact.blocks])
        wanted = FEW_JUDGES if small else JUDGES + TUNERS + TRAIN_PER_LIST * lists_for(row_ids.size)
        drawn = np.random.default_rng(seed).choice(row_ids, min(row_ids.size, wanted), replace=False)
        judges, tuners, training = (np.sort(part) for part in np.split(drawn, [JUDGES, JUDGES + TUNERS]))
        return cls(judges, tuners, training)
