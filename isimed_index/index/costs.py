"""What an answer under a filter costs, exactly and by the index: measured once when an index is built."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

_FEW, _MANY = 500, 8_000  # rows kept by the filters that are timed; the third keeps half of all rows
_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds of one call with m queries under a filter that keeps r rows.

    Exactly: `exact_call` + `exact_row` r + `exact_pair` r m, over the kept rows gathered from the stored vectors.
    By the index: `index_call` + `index_row` r + `index_query` m, over its codes.
    """

    BATCH: ClassVar[int] = 16  # queries of a call, against single ones

    exact_call: float
    exact_row: float
    exact_pair: float
    index_call: float
    index_row: float
    index_query: float

    def exact_ms(self, rows: int, queries: int) -> float:
        """Predicted time of exact search over the kept rows."""
        return self.exact_call + rows * (self.exact_row + self.exact_pair * queries)

    def index_ms(self, rows: int, queries: int) -> float:
        """Predicted time of the index under the filter."""
        return self.index_call + self.index_row * rows + self.index_query * queries

    def exact_is_cheaper(self, rows: int, queries: int) -> bool:
        """Whether to gather the kept rows and compare them all."""
        return self.exact_ms(rows, queries) <= self.index_ms(rows, queries)

    @staticmethod
    def sizes(total: int) -> tuple[int, int, int]:
        """How many rows the filters keep that `measure` times."""
        return max(1, min(_FEW, total // 4)), min(_MANY, total), max(1, total // 2)

    @classmethod
    def measure(
        cls, total: int, exactly: Callable[[int, int], object], by_index: Callable[[int, int], object]
    ) -> Costs:
        """Time both ways, as functions of (rows kept, queries), over `total` rows."""
        few, many, half = cls.sizes(total)
        exact_few, exact_many = best_ms(exactly, few, 1), best_ms(exactly, many, 1)
        exact_batch = best_ms(exactly, many, cls.BATCH)
        index_few, index_half = best_ms(by_index, few, 1), best_ms(by_index, half, 1)
        index_batch = best_ms(by_index, many, cls.BATCH)
        pair = max(0.0, exact_batch - exact_many) / (cls.BATCH - 1) / many
        row = max(0.0, (exact_many - exact_few) / max(1, many - few) - pair)
        index_row = max(0.0, (index_half - index_few) / max(1, half - few))
        call = max(0.0, index_batch - index_few - index_row * (many - few)) / (cls.BATCH - 1)
        return cls(
            exact_call=max(0.0, exact_few - few * (row + pair)),
            exact_row=row,
            exact_pair=pair,
            index_call=max(0.0, index_few - few * index_row - call),
            index_row=index_row,
            index_query=call,
        )


UNKNOWN = Costs(0.0, 1.0, 0.0, 5_000.0, 0.05, 0.0)  # of an index of format 1: exact up to 5000 rows
NEVER_EXACT = Costs(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def best_ms(ask: Callable[..., object], *arguments: Any, repeats: int = _REPEATS) -> float:
    """The quickest of a few calls, in milliseconds: what others do on the machine only ever adds."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        ask(*arguments)
        taken.append(time.perf_counter() - start)
    return 1e3 * min(taken)
