"""Registering a cohort: to an atlas once, or to its own mean image in rounds.

    mean of scans with centres on each other ─▶ [ every scan to the mean ─▶ anchor ─▶ mean of what was placed ] × rounds

After every group of scans, and after every mean, there is a commit, so a run that was cut short goes on where it was. A
scan that comes later is registered to the mean as it is; nothing else moves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import NotFound, ScanRefused, StoreDamaged, StoreLocked, UsageError
from isimed_index.ingest.report import Refusal
from isimed_index.progress import Progress
from isimed_index.register.align import ALGORITHM, Kind, align, load_itk
from isimed_index.register.images import Working, working_image, working_spacing
from isimed_index.register.reference import (
    Grid,
    Placed,
    Reference,
    anchored,
    from_atlas,
    mean_of,
    read_reference,
    write_reference,
)
from isimed_index.register.rows import Registered, centre_of_row, moved, replacing, row_of
from isimed_index.scans.chunks import open_chunks
from isimed_index.scans.read import read_scan
from isimed_index.space import Affine, apply_affine
from isimed_index.store.manifest import Artefact
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal, Transaction
from isimed_index.store.transforms import TABLE, affine_of, cells_of, rows_to

COMMIT_SCANS = 16  # registered in one commit: what a kill can cost
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class RegisterOptions:
    """To which atlas (None: the cohort's mean), how, and in how many rounds a new mean is made."""

    to: Path | None = None
    kind: Kind = "rigid"
    rounds: int = 2
    workers: int = 1
    redo: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("rigid", "affine"):
            raise UsageError(f"expected rigid or affine, found {self.kind!r}", next_step="isimed register --help")
        for name in ("rounds", "workers"):
            if getattr(self, name) < 1:
                raise UsageError(f"expected {name} 1 or more, found {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class RegisterReport:
    """What `register` did: scans registered now, before, refused; the reference and how many scans its image shows."""

    reference: str
    kind: Kind
    round: int
    mean_of: int
    registered: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


def register_scans(
    repository: Repository, scans: Sequence[str], options: RegisterOptions, progress: Progress
) -> RegisterReport:
    """Register `scans`; those that are registered to the same reference with the same settings are skipped."""
    load_itk()
    scans = list(dict.fromkeys(scans))
    if not scans:
        raise NotFound("there is no scan to register", next_step="isimed add PATH, or widen --where")
    with repository.transaction("register") as transaction:
        run = _Run(transaction, scans, options, progress)
        reference = run.begin()
        done = run.round(reference, again=options.redo and options.to is not None)
        while done and reference.origin == "mean" and reference.round < options.rounds:
            reference = run.next_mean(reference)
            done = run.round(reference)
    return RegisterReport(
        reference.id,
        options.kind,
        reference.round,
        len(reference.made_from),
        [scan for scan in scans if scan in done and scan in run.registered],
        [scan for scan in scans if scan in done and scan not in run.registered],
        list(run.refused.values()),
    )


@dataclass(slots=True)
class _Run:
    """One run of `register`: what it was asked, and what became of the scans."""

    transaction: Transaction
    scans: Sequence[str]
    options: RegisterOptions
    progress: Progress
    registered: set[str] = field(default_factory=set)
    refused: dict[str, Refusal] = field(default_factory=dict)

    def begin(self) -> Reference:
        """The reference to register to first: a stored one, or one that is made and committed now."""
        with self.transaction.repository.pin() as head:
            if self.options.to is not None:
                made = _atlas(head, self.options.to)
                if made.id in _references(head):
                    return made
            else:
                found = _newest_mean(head, self.options.kind)
                if found is not None and not self.options.redo:
                    return found
                made = self._first_mean(head)
            staged = self._staged(made)
        # A first mean of the same scans is the same: where one is left from a run that was cut short, it is the newest.
        self.transaction.commit(lambda now: Proposal(add=[staged], drop=_paths(now, {made.id})))
        return made

    def round(self, reference: Reference, again: bool = False) -> set[str]:
        """Register what is not registered to the reference yet, or all; returns the scans that are in the end."""
        building = reference.origin == "mean" and reference.round < self.options.rounds
        settings = _settings(reference)
        with self.transaction.repository.pin() as head:
            rows = rows_to(head, reference.id, self.options.kind)
            least = reference.round + 1 if building else 0
            fit = {scan for scan, row in rows.items() if row["settings"] == settings and row["rounds"] >= least}
            todo = [scan for scan in self.scans if again or scan not in fit]
            name = f"register, round {reference.round + 1}" if building else "register"
            self.progress.start(name, len(todo), "scans")
            fixed = reference.working()
            starts = {scan: affine_of(row) for scan, row in rows.items()}
            one = partial(_registered, head, fixed, reference, self.options.kind, starts)
            for group in _groups(todo):
                self._commit(reference, settings, list(self._each(one, group)))
            self.progress.finish()
        now = self.transaction.repository.snapshot()
        return set(self.scans) & set(rows_to(now, reference.id, self.options.kind))

    def next_mean(self, reference: Reference) -> Reference:
        """The mean of what was registered to a reference, in its place; all transforms are moved along with it."""
        kind, ids = self.options.kind, {reference.id}
        with self.transaction.repository.pin() as head:
            rows = rows_to(head, reference.id, kind)
            chosen = [scan for scan in self.scans if scan in rows and rows[scan]["rounds"] > reference.round]
            affines = [affine_of(rows[scan]) for scan in chosen]
            back = anchored(affines, [centre_of_row(rows[scan]) for scan in chosen], kind)
            placed = {scan: back @ affine for scan, affine in zip(chosen, affines, strict=True)}
            made = self._mean(head, placed, reference.spacing_mm, reference.round + 1)
            staged = self._staged(made)
        final = made.round >= self.options.rounds

        def propose(now: Snapshot) -> Proposal:
            _still_there(now, reference)
            gone = ids | {made.id} | (_means(now, kind) if final else set())
            carried = [
                {**row, "reference": made.id, **cells_of(back @ affine_of(row))}
                for row in rows_to(now, reference.id, kind).values()
            ]
            return Proposal(add=[staged], drop=_paths(now, gone), rewrite={TABLE: moved(now, carried, gone)})

        self.transaction.commit(propose)
        return made

    def _first_mean(self, head: Snapshot) -> Reference:
        """The mean of the scans as they come, but for their place: centres of mass lie on each other."""
        spacing = _median_spacing(head, self.scans)
        self.progress.start("centres", len(self.scans), "scans")
        centres: dict[str, NDArray[np.float64]] = {}
        for group in _groups(self.scans):
            centres.update(self._each(partial(_centre, head, spacing), group))
        self.progress.finish()
        if not centres:
            first = next(iter(self.refused.values()))
            raise NotFound(f"no scan can be registered; the first: {first.reason}", next_step=first.next_step)
        goal = np.mean(list(centres.values()), axis=0)
        placed = {scan: _shift(goal - centre) for scan, centre in centres.items()}
        return self._mean(head, placed, spacing, 0)

    def _mean(self, head: Snapshot, placed: Mapping[str, Affine], spacing: float, rounds: int) -> Reference:
        """The mean image of scans that are placed: patient RAS+ mm → common RAS+ mm."""
        grid = Grid.around([_box(head, scan, affine) for scan, affine in placed.items()], spacing)
        made_from = [head.voxels_of[scan] for scan in placed]

        def parts() -> Iterator[Placed]:
            for group in _groups(list(placed), self.options.workers):  # so many are in memory
                for scan, working in self._each(partial(_working, head, spacing), group):
                    yield Placed(working, placed[scan])

        self.progress.start("mean", len(placed), "scans")
        made = mean_of(parts(), grid, spacing, self.options.kind, rounds, made_from)
        self.progress.finish()
        if not made.compared.any():
            raise ScanRefused(
                "the mean image shows nothing but air", next_step="narrow --where to one part of the body"
            )
        return made

    def _staged(self, reference: Reference) -> Artefact:
        directory = self.transaction.stage("reference")
        write_reference(directory, reference)
        return self.transaction.add("reference", directory, reference=reference.id)

    def _each(self, function: Callable[[str], _Out], scans: Sequence[str]) -> Iterator[tuple[str, _Out]]:
        """What a function makes of each scan, in order; a scan that cannot be read or believed is refused by name."""
        with ThreadPoolExecutor(self.options.workers, thread_name_prefix="register") as pool:
            tasks = [(scan, pool.submit(function, scan)) for scan in scans]
            try:
                for scan, task in tasks:
                    try:
                        made = task.result()
                    except (ScanRefused, StoreDamaged, NotFound) as error:
                        self.refused[scan] = Refusal.of(scan, error)
                    else:
                        self.refused.pop(scan, None)
                        yield scan, made
                    self.progress.advance(1)
            finally:
                for _, task in tasks:
                    task.cancel()

    def _commit(self, reference: Reference, settings: str, done: Sequence[tuple[str, Registered]]) -> None:
        """Commit the rows of a group; scans that were deleted or replaced meanwhile have none."""
        kind = self.options.kind
        rows = {scan: (made.voxels, row_of(made, reference.id, kind, settings)) for scan, made in done}
        gone = [(scan, reference.id, kind) for scan in self.refused]

        def propose(now: Snapshot) -> Proposal:
            _still_there(now, reference)
            living = [row for scan, (voxels, row) in rows.items() if now.voxels_of.get(scan) == voxels]
            return replacing(now, living, gone)

        self.transaction.commit(propose)
        self.registered |= rows.keys()


# -- one scan, in a thread ------------------------------------------------------------------------------------------


def _working(head: Snapshot, spacing: float, scan: str) -> Working:
    return working_image(open_chunks(head.chunks_path(scan), scan), spacing)


def _centre(head: Snapshot, spacing: float, scan: str) -> NDArray[np.float64]:
    return _working(head, spacing, scan).centre_mm


def _registered(
    head: Snapshot, fixed: Working, reference: Reference, kind: Kind, starts: Mapping[str, Affine], scan: str
) -> Registered:
    moving = _working(head, reference.spacing_mm, scan)
    found = align(fixed, moving, kind, starts.get(scan))
    return Registered(scan, head.voxels_of[scan], found, moving.centre_mm, reference.round + 1)


# -- references of a generation -------------------------------------------------------------------------------------


def _references(head: Snapshot) -> dict[str, Artefact]:
    return {made.fields["reference"]: made for made in head.artefacts("reference")}


def _paths(head: Snapshot, ids: Set[str]) -> list[str]:
    return [made.path for made in head.artefacts("reference") if made.fields["reference"] in ids]


def _newest_mean(head: Snapshot, kind: Kind) -> Reference | None:
    """The mean that was committed last for transforms of a kind."""
    for made in reversed(head.artefacts("reference")):
        found = read_reference(head.verified(made))
        if (found.origin, found.kind) == ("mean", kind):
            return found
    return None


def _means(head: Snapshot, kind: Kind) -> set[str]:
    """Ids of all means of a kind, and of references that rows name and the store has lost."""
    there = _references(head)
    lost = set(head.table(TABLE).column("reference").to_pylist()) - there.keys()
    found = (read_reference(head.verified(made)) for made in there.values())
    return lost | {one.id for one in found if (one.origin, one.kind) == ("mean", kind)}


def _still_there(now: Snapshot, reference: Reference) -> None:
    if reference.id not in _references(now):
        raise StoreLocked(
            "another process replaced or erased the reference that scans were being registered to",
            next_step="isimed register",
        )


def _atlas(head: Snapshot, path: Path) -> Reference:
    """An atlas file as a reference; where it is a stored scan, erasing the patient has to take it along.

    Of a scan that is stored only later, the reference's id tells: both come from the digest of the same content.
    """
    atlas = read_scan(path, "atlas")
    rows = head.table("scans").select(["digest", "artefact"]).to_pylist()
    made = from_atlas(atlas, [row["artefact"] for row in rows if row["digest"] == atlas.digest])
    if not made.compared.any():
        raise ScanRefused(f"{path.name} shows nothing but air", next_step="give another atlas")
    return made


# -- small geometry -------------------------------------------------------------------------------------------------


def _median_spacing(head: Snapshot, scans: Sequence[str]) -> float:
    """The working spacing of the scan whose extent is the median one."""
    rows = [head.scan_row(scan) for scan in scans]
    shapes = [(row["nx"], row["ny"], row["nz"]) for row in rows]
    grids = [np.diag([row["dx_mm"], row["dy_mm"], row["dz_mm"], 1.0]) for row in rows]
    volumes = [float(np.prod(shape)) * float(np.linalg.det(grid)) for shape, grid in zip(shapes, grids, strict=True)]
    middle = int(np.argsort(volumes)[len(volumes) // 2])
    return working_spacing(shapes[middle], grids[middle])


def _box(head: Snapshot, scan: str, affine: Affine) -> NDArray[np.float64]:
    """The corners (8, 3) of a scan in common mm."""
    stored = open_chunks(head.chunks_path(scan), scan)
    corners = np.argwhere(np.ones((2, 2, 2))) * np.array(stored.shape) - 0.5
    return apply_affine(affine @ stored.affine, corners)


def _shift(by_mm: NDArray[np.float64]) -> Affine:
    affine = np.eye(4)
    affine[:3, 3] = by_mm
    return affine


def _settings(reference: Reference) -> str:
    """A hash of what decides a transform besides the scan, the reference and the kind."""
    return hashlib.sha256(json.dumps([ALGORITHM, reference.spacing_mm]).encode()).hexdigest()[:12]


def _groups(scans: Sequence[str], size: int | None = None) -> Iterator[Sequence[str]]:
    size = size or COMMIT_SCANS
    return (scans[start : start + size] for start in range(0, len(scans), size))
