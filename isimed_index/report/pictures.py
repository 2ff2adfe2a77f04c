"""What `isimed plot` draws: a point and its matches, an embedding coloured by position, a training run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from isimed_index.errors import NotFound
from isimed_index.lookup import Lookup, Question, Source
from isimed_index.report.curves import training_figure
from isimed_index.report.figures import Panel, check_suffix, embedding_figure, match_figure, save
from isimed_index.space import Space

FIELD_MM = 160.0  # edge of the planes drawn around a point


def draw_match(
    lookup: Lookup, source: Source, point: Sequence[float], space: Space, question: Question, out: Path
) -> None:
    """The query point and its best matches, a row each, in three planes."""
    check_suffix(out)
    if source.scan is None:
        raise NotFound("a match figure needs a stored query scan", next_step="isimed add FILE, then isimed index")
    at = source.point_mm(point, space)
    matches = lookup.nearest(source, point, space, question)
    query = _panel(lookup, source.scan, (float(at[0]), float(at[1]), float(at[2])), "query")
    found = [_panel(lookup, m.scan, m.xyz_mm, _note(m.distance)) for m in matches if m.in_view]
    save(match_figure(query, found, field_mm=FIELD_MM), out)


def draw_umap(lookup: Lookup, where: str | None, seed: int, most: int, out: Path) -> None:
    """UMAP of at most `most` patches of the scans that `where` keeps, coloured by canonical position."""
    from isimed_index.project import umap

    check_suffix(out)
    scans = lookup.snapshot.matching("scans", where).column("scan").to_pylist()
    rows = lookup.snapshot.sql(
        "SELECT patch, cx_mm, cy_mm, cz_mm FROM patches "
        "WHERE encoder = $encoder AND cx_mm IS NOT NULL AND list_contains($scans, scan) ORDER BY patch",
        {"encoder": lookup.card.id, "scans": scans},
    )
    if not rows.num_rows:
        raise NotFound("no patch of this encoder is stored for these scans", next_step="isimed index")
    chosen = np.sort(np.random.default_rng(seed).permutation(rows.num_rows)[:most])
    rows = rows.take(chosen)
    wanted = rows.column("patch").to_numpy()
    parts = []
    for segment in lookup.snapshot.segments(lookup.card.id):
        here = np.isin(segment.row_ids, wanted)
        parts.append(np.asarray(segment.vectors("embedding")[here], dtype=np.float32))
    centres = np.stack([rows.column(f"c{axis}_mm").to_numpy() for axis in "xyz"], axis=1)
    save(embedding_figure(umap(np.concatenate(parts), seed), centres, frame="canonical", seed=seed), out)


def draw_training(lookup: Lookup, out: Path) -> None:
    """Losses, distance errors, effective ranks and validation of an encoder's training, epoch by epoch."""
    check_suffix(out)
    path = lookup.snapshot.encoder_path(lookup.card.id) / "metrics.jsonl"
    if not path.exists():
        raise NotFound(f"encoder {lookup.card.name!r} has no training record")
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    save(training_figure(entries), out)


def _panel(lookup: Lookup, scan: str, at: tuple[float, float, float], note: str) -> Panel:
    stored = lookup.stored(scan)
    return Panel(scan, stored.values(), stored.affine, at, note=note)


def _note(distance: float | None) -> str:
    return "" if distance is None else f"distance {distance:.3f}"
