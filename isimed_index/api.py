"""The Python API: one `Store` with the words of the command line.

create / open ─▶ Store.add ─▶ Store.pretrain ─▶ Store.index ─▶ Store.lookup · Store.sql · Store.evaluate · Store.plot
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isimed_index.errors import UsageError
from isimed_index.ingest import AddOptions, AddReport, Refusal, add
from isimed_index.progress import Progress, Silent
from isimed_index.scans.discover import SUFFIXES
from isimed_index.space import Space
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot

if TYPE_CHECKING:
    import pyarrow as pa

    from isimed_index.encoders.card import EncoderCard
    from isimed_index.evaluate.landmarks import Evaluation
    from isimed_index.indexing import IndexReport
    from isimed_index.lookup import Lookup, SameSubject, Source
    from isimed_index.matches import Matches
    from isimed_index.scans.prepare import Volume

__all__ = ["AddReport", "Refusal", "Store", "create", "open"]

_UMAP_PATCHES = 4000  # drawn by `plot umap`
FilePath = str | Path
PointLike = Sequence[float]


def create(path: FilePath) -> Store:
    """Make an empty store at `path`, a folder that is empty or does not exist."""
    return Store(Repository.create(Path(path)))


def open(path: FilePath, mode: str = "a", generation: int | None = None) -> Store:
    """Open the store at `path`; `mode="r"` or a `generation` make it read-only, `mode="a"` may write."""
    if mode not in ("r", "a"):
        raise UsageError(f"expected mode r or a, found {mode!r}")
    return Store(Repository.open(Path(path)), writable=mode == "a" and generation is None, generation=generation)


class Store:
    """A cohort: scans, encoders, embeddings and indexes in one directory.

    Reading pins the newest generation at the first question; `refresh` pins the newest again, and so does every write.
    """

    def __init__(self, repository: Repository, *, writable: bool = True, generation: int | None = None) -> None:
        self._repository = repository
        self._writable = writable
        self._snapshot: Snapshot | None = None
        self._asked_generation = generation
        self._lookups: dict[str | None, Lookup] = {}

    @property
    def path(self) -> Path:
        """The store's directory."""
        return self._repository.path

    @property
    def snapshot(self) -> Snapshot:
        """The pinned generation that questions are answered from."""
        if self._snapshot is None:
            self._snapshot = self._repository.snapshot(self._asked_generation)
        return self._snapshot

    @property
    def generation(self) -> int:
        """Number of the pinned generation."""
        return self.snapshot.generation

    def refresh(self) -> None:
        """Pin the newest generation (or, for a store opened at one, that one) again."""
        self._snapshot = None
        self._lookups = {}

    def _writing(self) -> Repository:
        if not self._writable:
            raise UsageError("the store was opened read-only", next_step="open it with mode='a'")
        return self._repository

    # -- writing ----------------------------------------------------------------------------------------------------

    def add(
        self,
        paths: FilePath | Sequence[FilePath],
        labels: str | None = None,
        label_names: FilePath | None = None,
        metadata: FilePath | None = None,
        subject_from: str | None = None,
        spacing_mm: float | None = None,
        workers: int = 1,
        progress: Progress | None = None,
        surrogate_key: FilePath | None = None,
    ) -> AddReport:
        """Read image files and folders into the store; idempotent by content, bad files are refused by name.

        Args:
            labels: where an image's label map lies, relative to it: `{stem}_seg.nii.gz`.
            label_names: CSV or TSV with the columns `label` and `name`.
            metadata: CSV or TSV keyed by `scan`, `participant_id` or `subject`; its columns become columns of `scans`.
            subject_from: regular expression whose group finds the subject in a file's stem, or else in its folders.
            spacing_mm: resample to this isotropic spacing; None keeps every voxel as it is.
            workers: files read at once.
            surrogate_key: file with the key that DICOM identifiers are hashed with, made where there is none; by
                default the one that ISIMED_SURROGATE_KEY names, or else isimed/surrogate.key in the user's config.
        """
        listed = [paths] if isinstance(paths, str | Path) else list(paths)
        options = AddOptions(
            labels, _path(label_names), _path(metadata), subject_from, spacing_mm, workers, _path(surrogate_key)
        )
        try:
            return add(self._writing(), [Path(path) for path in listed], options, progress)
        finally:
            self.refresh()

    def pretrain(
        self,
        method: str = "isimed",
        preset: str = "default",
        config: FilePath | None = None,
        epochs: int | None = None,
        batch_scans: int | None = None,
        patches_per_scan: int | None = None,
        device: str = "auto",
        resume: bool = False,
        name: str | None = None,
        where: str | None = None,
        seed: int | None = None,
        progress: Progress | None = None,
    ) -> EncoderCard:
        """Train an encoder on the stored scans (those that `where`, SQL over `scans`, keeps) and store it.

        Checkpoints are written after every epoch; `resume=True` with the same arguments goes on from the last one.
        """
        from isimed_index.config import pretrain_config
        from isimed_index.encoders.runtime import write_encoder
        from isimed_index.pretrain.trainer import train
        from isimed_index.store.transaction import Proposal

        repository = self._writing()
        self.refresh()
        overrides = {
            "method": method,
            "epochs": epochs,
            "batch_scans": batch_scans,
            "patches_per_scan": patches_per_scan,
            "seed": seed,
        }
        resolved = pretrain_config(preset, _path(config), overrides)
        scans = sorted(self._scan_ids(where))
        digests = [self.snapshot.scan_row(scan)["digest"] for scan in scans]
        run = self.path / "tmp" / f"pretrain-{_hash([asdict(resolved), digests])}"
        run.mkdir(parents=True, exist_ok=True)
        trained = train(
            resolved,
            [partial(_working_volume, self.snapshot, scan, resolved.spacing_mm) for scan in scans],
            run,
            name=name or f"{method}-{preset}",
            preset=preset,
            device=device,
            resume=resume,
            progress=progress,
        )
        with repository.transaction("pretrain") as transaction:
            directory = transaction.stage("encoder")
            card = write_encoder(directory, trained.card, trained.state)
            shutil.copyfile(trained.metrics, directory / "metrics.jsonl")
            artefact = transaction.add("encoder", directory, encoder=card.id)

            def propose(head: Snapshot) -> Proposal:
                # The same run again gives the same weights, and so the same id: there is nothing to add.
                there = {known.fields["encoder"] for known in head.artefacts("encoder")}
                return Proposal(add=[] if card.id in there else [artefact])

            transaction.commit(propose)
        shutil.rmtree(run)
        self.refresh()
        return card

    def index(
        self,
        encoder: str | None = None,
        stride_mm: float | None = None,
        where: str | None = None,
        scheduler: str = "threads",
        device: str = "auto",
        min_recall: float = 0.98,
        max_ram: int | None = None,
        progress: Progress | None = None,
    ) -> IndexReport:
        """Encode every patch of the scans that `where` keeps, fit the canonical frame and build the index.

        Scans that are encoded already are skipped; every few scans are committed, so that an interruption costs little.
        """
        from isimed_index.indexing import IndexOptions, index_scans

        repository = self._writing()
        self.refresh()
        options = IndexOptions(encoder, stride_mm, scheduler, device, min_recall, max_ram)
        try:
            return index_scans(repository, self._scan_ids(where), options, progress or Silent())
        finally:
            self.refresh()

    # -- questions --------------------------------------------------------------------------------------------------

    def lookup(
        self,
        point: PointLike,
        scan: FilePath,
        space: Space = "ras",
        k: int = 10,
        where: str | None = None,
        within_mm: float | None = None,
        same_subject: SameSubject = "exclude",
        cycle: bool = False,
        exact: bool = False,
        encoder: str | None = None,
    ) -> Matches:
        """The same anatomy in every other scan: one best match per scan, ranked by descriptor distance.

        Args:
            point: three numbers in `space`: `ras` or `lps` mm, `voxel` of the source file, or `canonical` mm.
            scan: a stored scan's id, or the path of a file that need not be in the store.
            where: SQL over `scans` that chooses which scans may answer.
            within_mm: leave out answers farther than this from the expected place, in canonical mm.
            same_subject: what to do with other scans of the query's own subject.
            cycle: match every answer back and report the distance in `cycle_mm`.
            exact: accepted for symmetry with `search_patches`; this answer never uses an approximate index.
        """
        from isimed_index.lookup import Question

        question = Question(k, where, within_mm, same_subject, cycle)
        lookup = self._lookup(encoder)
        return lookup.nearest(self._source(lookup, scan), _triple(point), space, question)

    def search_patches(
        self,
        point: PointLike,
        scan: FilePath,
        space: Space = "ras",
        k: int = 10,
        where: str | None = None,
        within_mm: float | None = None,
        same_subject: SameSubject = "exclude",
        cycle: bool = False,
        exact: bool = False,
        encoder: str | None = None,
    ) -> Matches:
        """The raw nearest stored patches to the patch at a point, several of which may be in one scan."""
        from isimed_index.lookup import Question

        if cycle:
            raise UsageError("raw patches have no cycle error", next_step="leave out --cycle or --patches")
        question = Question(k, where, within_mm, same_subject)
        lookup = self._lookup(encoder)
        return lookup.nearest_patches(self._source(lookup, scan), _triple(point), space, question, exact=exact)

    def sql(self, query: str, params: Mapping[str, Any] | None = None, timeout_s: float = 30.0) -> pa.Table:
        """One read-only statement over the views of this generation (scans, patches, labels, …)."""
        return self.snapshot.sql(query, params, timeout_s)

    def scans(self) -> pa.Table:
        """All scans, one row each."""
        return self.sql("SELECT * EXCLUDE (digest, artefact) FROM scans ORDER BY scan")

    def encoders(self) -> pa.Table:
        """All encoders, one row each."""
        return self.sql("SELECT * FROM encoders")

    def log(self) -> pa.Table:
        """All generations, oldest first."""
        return self.sql("SELECT * FROM generations ORDER BY generation")

    def info(self) -> dict[str, Any]:
        """What the store holds, in numbers."""
        snapshot = self.snapshot
        return {
            "store": self.path.name,
            "generation": snapshot.generation,
            "scans": snapshot.table("scans").num_rows,
            "subjects": snapshot.table("subjects").num_rows,
            "labels": snapshot.table("labels").num_rows,
            "patches": sum(segment.rows for segment in snapshot.segments()),
            "encoders": [snapshot.card(artefact)["name"] for artefact in snapshot.artefacts("encoder")],
            "indexes": self.sql("SELECT encoder, kind, rows, recall_at_10 FROM indexes").to_pylist(),
            "bytes": sum(artefact.bytes for artefact in snapshot.manifest.artefacts),
        }

    def evaluate(
        self,
        encoder: str | None = None,
        where: str | None = None,
        label_where: str | None = None,
        pairs: int = 60,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Landmark errors in mm at label centroids, beside guesses that need no learning."""
        from isimed_index.evaluate.landmarks import landmark_errors

        lookup = self._lookup(encoder)
        return landmark_errors(lookup, where=where, label_where=label_where, pairs=pairs, seed=seed, progress=progress)

    def plot(
        self,
        figure: Literal["umap", "match", "training"],
        out: FilePath,
        encoder: str | None = None,
        point: PointLike | None = None,
        scan: FilePath | None = None,
        space: Space = "ras",
        k: int = 3,
        where: str | None = None,
        seed: int = 0,
    ) -> None:
        """Draw patches coloured by position, a point and its `k` matches, or a training run; .png, .svg or .pdf."""
        from isimed_index.lookup import Question
        from isimed_index.report import pictures

        lookup = self._lookup(encoder)
        if figure == "match":
            if point is None or scan is None:
                raise UsageError("a match figure needs a point and a scan")
            source = self._source(lookup, scan)
            pictures.draw_match(lookup, source, _triple(point), space, Question(k, where), Path(out))
        elif figure == "umap":
            pictures.draw_umap(lookup, where, seed, _UMAP_PATCHES, Path(out))
        elif figure == "training":
            pictures.draw_training(lookup, Path(out))
        else:
            raise UsageError(f"expected the figure umap, match or training, found {figure!r}")

    # -- inside -----------------------------------------------------------------------------------------------------

    def _lookup(self, encoder: str | None) -> Lookup:
        from isimed_index.lookup import Lookup

        if encoder not in self._lookups:
            self._lookups[encoder] = Lookup(self.snapshot, encoder)
        return self._lookups[encoder]

    def _source(self, lookup: Lookup, scan: FilePath) -> Source:
        """A stored scan by id, or else a file."""
        if isinstance(scan, str) and scan in self.snapshot.scan_ids():
            return lookup.source(scan)
        path = Path(scan)
        if path.is_file():
            return lookup.source_of_file(path)
        if isinstance(scan, Path) or path.name.lower().endswith(SUFFIXES):
            raise UsageError(f"there is no file {path.name}", next_step="check the path, or give a scan's id")
        return lookup.source(scan)  # raises NotFound, with the ids that look like it

    def _scan_ids(self, where: str | None) -> list[str]:
        ids: list[str] = self.snapshot.matching("scans", where).column("scan").to_pylist()
        return ids


def _working_volume(snapshot: Snapshot, scan: str, spacing_mm: float) -> Volume:
    from isimed_index.scans.chunks import open_chunks
    from isimed_index.scans.prepare import Intensity, prepare

    stored = open_chunks(snapshot.chunks_path(scan))
    return prepare(stored.values(), stored.affine, spacing_mm, Intensity())


def _triple(point: PointLike) -> tuple[float, float, float]:
    try:
        x, y, z = (float(value) for value in point)
    except (TypeError, ValueError):
        x = y = z = math.nan
    if not all(map(math.isfinite, (x, y, z))):
        raise UsageError(f"expected a point of three finite numbers, found {point!r}")
    return x, y, z


def _path(path: FilePath | None) -> Path | None:
    return None if path is None else Path(path)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
