"""Passes in a row, each begun before the one before it is waited for: a GPU then never waits for its next batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.runtimes.kind import Maps, Run

_What = TypeVar("_What")


def begin(run: Run, values: NDArray[np.float32]) -> Callable[[], Maps]:
    """Begin a pass over `values` (n, 1, x, y, z); what is returned gives its maps. Most runs have them at once."""
    own: Callable[[NDArray[np.float32]], Callable[[], Maps]] | None = getattr(run, "begin", None)
    if own is not None:
        return own(values)
    found = run(values)
    return lambda: found


def in_a_row(run: Run, batches: Iterable[tuple[_What, NDArray[np.float32]]]) -> Iterator[tuple[_What, Maps]]:
    """The maps of each batch, with what it came with and in the order of the batches; two of them are in memory."""
    before: tuple[_What, Callable[[], Maps]] | None = None
    for what, values in batches:
        begun = (what, begin(run, values))
        if before is not None:
            yield before[0], before[1]()
        before = begun
    if before is not None:
        yield before[0], before[1]()
