"""Charting: an encoder's frame is made to hold a chart of every encoded scan, some at a time.

    nothing, or many newcomers ─▶ founders: template and charts ─▶ commit ─┐
    few newcomers ─────────────────────────────────────────────────────────┴─▶ a group's charts ─▶ commit ─▶ the next …

What an interruption costs is a group. A frame that is to be replaced answers until its successor, which grows in a
folder inside of it, has a chart of every scan.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from isimed_index.encoders.card import EncoderCard
from isimed_index.errors import StoreDamaged, StoreWarning
from isimed_index.frame import (
    MATCHED_MM,
    WINDOW_MM,
    Chart,
    Frame,
    extend_frame,
    fit_frame,
    median_scan,
    read_calibration,
    read_frame,
    without_patches,
    write_frame,
)
from isimed_index.lattice import Lattice, Standard, read_lattice
from isimed_index.progress import Progress
from isimed_index.store.derived import commit_derived
from isimed_index.store.files import NEXT_FRAME
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Transaction

REFIT_SHARE = 0.25  # the frame is fitted anew when more than this share of the scans is new to it
FOUNDERS = 128  # scans at most that a template is made from; the others get their charts by it
_GROUP = 64  # charts at least that are worth a commit
_GROUPS = 8  # or this part of those that are left, for each commit writes the template again
_KEPT_BYTES = 1 << 30  # of lattices in memory
_COARSER = 1.25  # times as wide as it would be now, a template is made anew, and all charts with it
NAMED = 5  # scans without a chart that are told by name
_SAMPLE = 200  # vectors of each founder that the standard is estimated from


def commit_frame(transaction: Transaction, card: EncoderCard, progress: Progress, *, refit: bool = False) -> None:
    """Bring an encoder's frame up to date: fitted anew when many scans are new to it, extended when few are.

    Every group of charts is committed. When another process commits a frame meanwhile, its charts are kept: this one
    goes on from there. With `refit` the frame is fitted anew whatever it holds.
    """
    begun, extending = not refit, False
    while True:
        with transaction.repository.pin() as snapshot:
            work = _Work.of(snapshot, card, refit=refit)
            if not begun:
                work = replace(work, grown=None)
            elif refit and work.grown is None:  # the new frame has taken the place of the one before it
                refit = False
                continue
            elif not refit and not work.missing_from(work.stored):
                break
            if work.grown is not None and not extending:
                progress.start("frame", len(work.missing_from(work.grown)), "charts")
                extending = True
            frame = work.next_frame(progress)
            # The stored frame answers until its successor is whole, unless it is what is extended.
            answers = work.stored if frame.awaited and work.stored is not work.grown else None
            directory = transaction.stage("frame")
            _write(directory, frame, answers, snapshot.voxels_of)
            artefact = transaction.add("frame", directory, encoder=card.id)
            done = commit_derived(transaction, artefact, {"frame": snapshot.newest("frame", card.id)})
            begun = begun or done
    if extending:
        progress.finish()


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """Encoded scans, the frame that is stored, and the one that is to be extended: it, its successor, or none."""

    card: EncoderCard
    segments: Mapping[str, Segment]  # by name: results do not depend on the order in which scans were encoded
    stored: Frame | None
    grown: Frame | None
    template_mm: float  # the spacing that a template made now would have, or what is fine enough if that is less

    @classmethod
    def of(cls, snapshot: Snapshot, card: EncoderCard, *, refit: bool = False) -> _Work:
        """What there is to do in a generation; with `refit` the stored frame is not extended, but replaced."""
        segments = dict(sorted(snapshot.segments_by_scan(card.id).items()))
        stored = _stored_frame(snapshot, card)
        living = {scan: segment.rows for scan, segment in segments.items() if segment.rows}
        template_mm = _spacing_mm(segments[median_scan(living)].lattice()["affine"]) if living else 0.0
        work = cls(card, segments, stored, None, max(template_mm, MATCHED_MM))
        for frame in (None if refit else stored, _successor(snapshot, card)):
            if frame is not None and len(work.missing_from(frame)) - frame.awaited <= REFIT_SHARE * len(segments):
                return replace(work, grown=frame)
        return work

    def missing_from(self, frame: Frame | None) -> list[str]:
        """Scans that have no chart in a frame, or one of a coarser lattice; all, if its template is coarser."""
        if frame is None:
            return list(self.segments)
        template_mm = _spacing_mm(frame.template.affine)
        if template_mm > _COARSER * self.template_mm:
            return list(self.segments)
        finest_mm = max(template_mm, MATCHED_MM)
        charts = frame.charts
        return [scan for scan in self.segments if scan not in charts or self._is_coarse(scan, charts[scan], finest_mm)]

    def _is_coarse(self, scan: str, chart: Chart, finest_mm: float) -> bool:
        """Whether a chart was fitted to a coarser lattice than the scan has now; none below `finest_mm` is."""
        # Only of coarse charts is the lattice read, which means to check the segment's hash.
        if chart.stride_mm is None or chart.stride_mm <= _COARSER * finest_mm:
            return False
        return chart.stride_mm > _COARSER * max(_spacing_mm(self.segments[scan].lattice()["affine"]), finest_mm)

    def next_frame(self, progress: Progress) -> Frame:
        """The frame with some more charts."""
        if self.grown is None:
            living = [scan for scan, segment in self.segments.items() if segment.rows]
            if not living:
                raise without_patches(len(self.segments))
            founders = {scan: self.segments[scan] for scan in _founders(living)}
            standard = sampled_standard(self.card, list(founders.values()))
            median = median_scan({scan: segment.rows for scan, segment in founders.items()})
            first = read_lattice(founders[median], self.card.match_output, standard, WINDOW_MM)
            lattices = _StoredLattices(founders, self.card.match_output, standard)
            frame = fit_frame(self.card.id, standard, lattices, first=first, progress=progress)
            fitted = founders
        else:
            missing = self.missing_from(self.grown)
            fitted = {scan: self.segments[scan] for scan in missing[: max(_GROUP, len(missing) // _GROUPS)]}
            lattices = _StoredLattices(fitted, self.card.match_output, self.grown.standard)
            frame = extend_frame(self.grown, lattices, progress)
        strides = {scan: _spacing_mm(segment.lattice()["affine"]) for scan, segment in fitted.items()}
        charts = {scan: replace(frame.charts[scan], stride_mm=stride) for scan, stride in strides.items()}
        frame = replace(frame, charts={**frame.charts, **charts})
        return replace(frame, awaited=len(self.missing_from(frame)))


@dataclass(frozen=True, slots=True, eq=False)
class _StoredLattices(Mapping[str, Lattice]):
    """The lattices of scans, each read when it is asked for, and only the points that a chart is fitted to.

    The first ones are kept in memory, as many as find room in `_KEPT_BYTES`.
    """

    segments: Mapping[str, Segment]
    output: str
    standard: Standard
    kept: dict[str, Lattice] = field(default_factory=dict)

    def __getitem__(self, scan: str) -> Lattice:
        if scan in self.kept:
            return self.kept[scan]
        lattice = read_lattice(self.segments[scan], self.output, self.standard, MATCHED_MM)
        if sum(each.vectors.nbytes for each in [*self.kept.values(), lattice]) <= _KEPT_BYTES:
            self.kept[scan] = lattice
        return lattice

    def __iter__(self) -> Iterator[str]:
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)


def _spacing_mm(affine: ArrayLike) -> float:
    """The widest spacing of a lattice, by its affine (4, 4)."""
    return float(np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0).max())


def uncharted(snapshot: Snapshot, encoder_id: str) -> list[str]:
    """Encoded scans that cannot answer yet: the encoder's frame has no chart of them, is not there, or is damaged."""
    encoded = sorted(scan for scan, segment in snapshot.segments_by_scan(encoder_id).items() if segment.rows)
    charts: Mapping[str, Chart] = {}
    with suppress(StoreDamaged):
        path = snapshot.frame_path(encoder_id) if encoded else None
        charts = {} if path is None else read_frame(path, snapshot.voxels_of).charts
    return [scan for scan in encoded if scan not in charts]


def calibrated_from(snapshot: Snapshot, encoder_id: str) -> int:
    """From how many subjects it is known what an encoder's answers are off by; 0 where that was not measured."""
    with suppress(StoreDamaged):
        path = snapshot.frame_path(encoder_id)
        calibration = None if path is None else read_calibration(path)
        return 0 if calibration is None else calibration.subjects
    return 0


def some_of(scans: Sequence[str]) -> str:
    """Such as `sub-01, sub-02 and 40 more`."""
    more = f" and {len(scans) - NAMED} more" if len(scans) > NAMED else ""
    return ", ".join(scans[:NAMED]) + more


def _write(directory: Path, frame: Frame, answers: Frame | None, voxels: Mapping[str, str]) -> None:
    """Write a frame, or where another one still answers, that one with the frame as its successor."""
    write_frame(directory, answers or frame, voxels)
    if answers is not None:
        (directory / NEXT_FRAME).mkdir()
        write_frame(directory / NEXT_FRAME, frame, voxels)


def _founders(scans: Sequence[str]) -> list[str]:
    """Evenly spread among the names, so that each data set has its share."""
    if len(scans) <= FOUNDERS:
        return list(scans)
    return [scans[number] for number in np.linspace(0, len(scans) - 1, FOUNDERS).round().astype(int)]


def _stored_frame(snapshot: Snapshot, card: EncoderCard) -> Frame | None:
    """The frame that is stored; None when there is none, or when it is damaged: it can be fitted again."""
    try:
        path = snapshot.frame_path(card.id)
        return None if path is None else read_frame(path, snapshot.voxels_of)
    except StoreDamaged as error:
        warnings.warn(f"{error}; the frame is fitted anew", StoreWarning, stacklevel=2)
        return None


def _successor(snapshot: Snapshot, card: EncoderCard) -> Frame | None:
    """The frame that is to replace the stored one; None when there is none, or it cannot be used."""
    try:
        path = snapshot.frame_path(card.id)
        return read_frame(path / NEXT_FRAME, snapshot.voxels_of) if path and (path / NEXT_FRAME).is_dir() else None
    except StoreDamaged:
        return None  # of the stored frame `_stored_frame` tells; without a successor, one is begun


def sampled_standard(card: EncoderCard, segments: Sequence[Segment]) -> Standard:
    """Estimate centre and scale of an encoder's vectors from a regular sample of every scan's patches."""
    samples = []
    for segment in segments[:1] if card.metric == "cosine" else segments:  # cosine has no centre and no scale
        vectors = segment.vectors(card.match_output)
        samples.append(np.asarray(vectors[:: max(1, len(vectors) // _SAMPLE)], dtype=np.float32))
    return Standard.of(card.metric, np.concatenate(samples))
