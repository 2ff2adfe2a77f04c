"""Rows of the table `transforms`: where scans lie in the frame of a reference, patient RAS+ mm → common RAS+ mm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from isimed_index.errors import NotFound
from isimed_index.space import Affine
from isimed_index.store.snapshot import Snapshot

TABLE: Literal["transforms"] = "transforms"
_CELLS = tuple(f"a{row}{column}" for row in range(3) for column in range(4))


def cells_of(affine: Affine) -> dict[str, float]:
    """The columns a00 … a23 of an affine."""
    return dict(zip(_CELLS, map(float, affine[:3].ravel()), strict=True))


def affine_of(row: Mapping[str, Any]) -> Affine:
    """The affine (4, 4) of a row: patient RAS+ mm → common RAS+ mm."""
    affine = np.eye(4)
    affine[:3] = np.array([row[cell] for cell in _CELLS], dtype=np.float64).reshape(3, 4)
    return affine


def rows_to(head: Snapshot, reference: str, kind: str) -> dict[str, dict[str, Any]]:
    """By scan id, the rows of one reference and kind."""
    rows = head.table(TABLE).to_pylist()
    return {row["scan"]: row for row in rows if (row["reference"], row["kind"]) == (reference, kind)}


def transforms_to(head: Snapshot, scans: Sequence[str], reference: str, kind: str) -> list[Affine]:
    """The transform of every one of `scans` to a reference; `NotFound` names the first scan that has none."""
    rows = rows_to(head, reference, kind)
    without = [scan for scan in scans if scan not in rows]
    if not without:
        return [affine_of(rows[scan]) for scan in scans]
    others = len(without) - 1
    more = f"; {'one more has' if others == 1 else f'{others} more have'} none" if others else ""
    raise NotFound(
        f"scan {without[0]!r} has no {kind} transform to the reference {reference!r}{more}",
        next_step=_without_them(reference, kind) if rows else _instead(head),
    )


def _instead(head: Snapshot) -> str:
    """What to do where nothing is registered so: take a reference that there is, or make one."""
    rows = head.table(TABLE).to_pylist()
    known = sorted({f"{row['reference']} ({row['kind']})" for row in rows})
    return f"isimed register, or name one that there is: {', '.join(known)}" if known else "isimed register"


def _without_them(reference: str, kind: str) -> str:
    only = f"scan IN (SELECT scan FROM transforms WHERE reference = '{reference}' AND kind = '{kind}')"
    return f'isimed register, as before, or leave out what it refuses: --where "{only}"'
