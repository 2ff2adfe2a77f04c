"""The Python API: one `Store` with the words of the command line.

create / open ─▶ Store.add ─▶ (register) ─▶ Store.pretrain ─▶ Store.index ─▶ Store.lookup · propagate · sql · …
                 ├── exchange: export · export_scan · import_ · export_encoder · import_encoder
                 └── upkeep: delete · compact · gc · tag · restore · check · repair · purge

Every method is a few lines: it turns plain arguments into the values that the room below it takes, and pins anew what
was written. That is why this module may be longer than others.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isimed_index.encoders.trust import trusted
from isimed_index.errors import Incompatible, NotFound, StoreDamaged, StoreWarning, UsageError
from isimed_index.ingest.add import add
from isimed_index.ingest.options import AddOptions
from isimed_index.ingest.report import AddReport, Refusal
from isimed_index.progress import Progress, Silent
from isimed_index.scans.discover import SUFFIXES
from isimed_index.space import Space
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import ArrayLike, NDArray

    from isimed_index.encode import IndexPlan
    from isimed_index.encoders.card import EncoderCard
    from isimed_index.evaluate.landmarks import Evaluation
    from isimed_index.exchange.encoders import KeptEncoder
    from isimed_index.exchange.folder import Exported
    from isimed_index.exchange.incoming import Imported
    from isimed_index.exchange.volume import ExportedScan
    from isimed_index.index.card import IndexCard
    from isimed_index.indexing import IndexReport
    from isimed_index.lookup import Lookup, Source
    from isimed_index.matches import Matches, SameSubject
    from isimed_index.propagate import Propagated
    from isimed_index.register.align import Kind
    from isimed_index.register.cohort import RegisterReport
    from isimed_index.similar import Pooling
    from isimed_index.store.tags import Tag
    from isimed_index.store.upkeep.collect import Collected
    from isimed_index.store.upkeep.compact import Compacted
    from isimed_index.store.upkeep.delete import Deleted
    from isimed_index.store.upkeep.findings import Finding
    from isimed_index.store.upkeep.purge import Erasure
    from isimed_index.store.upkeep.repair import Repaired
    from isimed_index.within import Within

__all__ = ["AddReport", "Refusal", "Store", "check", "create", "open", "repair"]

_UMAP_PATCHES = 4000  # drawn by `plot umap`
FilePath = str | Path
PointLike = Sequence[float]


def create(path: FilePath, trust: str | Sequence[str] | None = None) -> Store:
    """Make an empty store at `path`: a folder that is empty or does not exist, or `s3://bucket/prefix`."""
    return Store(Repository.create(path), trust=trusted(trust))


def open(
    path: FilePath,
    mode: str = "a",
    generation: int | None = None,
    tag: str | None = None,
    trust: str | Sequence[str] | None = None,
) -> Store:
    """Open the store at `path` or `s3://…`, read-only with `mode="r"`, a `generation` or a `tag`.

    Use it as a context manager, or call `close`, to let a collector remove what only the pinned generation holds.
    `trust` names code outside of this library that encoders may run (a package, a module, or a `module:callable`); by
    default what ISIMED_TRUST names. A store cannot give trust.
    """
    if mode not in ("r", "a"):
        raise UsageError(f"expected mode r or a, found {mode!r}", next_step='mode="r" to read')
    if generation is not None and tag is not None:
        raise UsageError("expected a generation or a tag, found both", next_step="leave out one of them")
    writable = mode == "a" and generation is None and tag is None
    return Store(Repository.open(path), writable=writable, generation=generation, tag=tag, trust=trusted(trust))


def check(
    path: FilePath,
    read: float = 0.0,
    progress: Progress | None = None,
    phi: bool = False,
    phi_list: FilePath | None = None,
    recall: bool = False,
) -> list[Finding]:
    """What is not as it should be in the store at `path`, which may be too damaged to be opened.

    Sizes are always compared; a share `read` (0 to 1) of the bytes is read and hashed. With `phi`, every file is also
    searched for what may identify a patient: by its look, and by `phi_list`, a file with one identifier a line.
    Findings of severity `leak` say where and how often, never what. With `recall` the recall of every index is measured
    again, over the patches that live now.
    """
    from isimed_index.store.upkeep.audit import audit

    repository = Repository.unchecked(path)
    found = audit(repository, read, progress=progress)
    if recall:
        from isimed_index.promises import broken_promises

        found += broken_promises(repository, progress)
    if not phi and phi_list is None:
        return found
    from isimed_index.phi.identifiers import Identifiers
    from isimed_index.phi.leaks import leaks

    known = None if phi_list is None else Identifiers.read(Path(phi_list))
    return [*found, *leaks(repository.storage, known, progress)]


def repair(path: FilePath, progress: Progress | None = None) -> Repaired:
    """Mend the store at `path` as far as it can be; what is lost goes to `quarantine/` and is listed.

    Segments, frames and indexes that were dropped come back with `Store.index`, lost scans with `Store.add`.
    """
    from isimed_index.store.upkeep.repair import repair as mend

    return mend(Repository.unchecked(path), progress=progress)


class Store:
    """A cohort: scans, encoders, embeddings and indexes in one directory.

    Reading pins the newest generation at the first question; `refresh` pins the newest again, and so does every write.
    The pin is a lease: until `close`, no collector removes what it reads.
    """

    def __init__(
        self,
        repository: Repository,
        *,
        writable: bool = True,
        generation: int | None = None,
        tag: str | None = None,
        trust: tuple[str, ...] = (),
    ) -> None:
        self._repository = repository
        self._trust = trust  # code outside of this library that encoders may run
        self._writable = writable
        self._snapshot: Snapshot | None = None
        self._asked_generation = generation
        self._asked_tag = tag
        self._lookups: dict[str | None, Lookup] = {}

    @property
    def path(self) -> Path:
        """The store's directory, or the cache of a store in a bucket."""
        return self._repository.path

    @property
    def snapshot(self) -> Snapshot:
        """The pinned generation that questions are answered from."""
        if self._snapshot is None:
            self._snapshot = self._repository.pin(self._asked_generation, self._asked_tag)
        return self._snapshot

    @property
    def generation(self) -> int:
        """Number of the pinned generation."""
        return self.snapshot.generation

    def refresh(self) -> None:
        """Pin the newest generation (or, for a store opened at one, that one) again."""
        self.close()

    def close(self) -> None:
        """Give up the pinned generation; the next question pins again."""
        if self._snapshot is not None:
            self._snapshot.close()
        self._snapshot = None
        self._lookups = {}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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
        metadata: FilePath | Sequence[FilePath] | None = None,
        subject_from: str | None = None,
        spacing_mm: float | None = None,
        workers: int = 1,
        progress: Progress | None = None,
        surrogate_key: FilePath | None = None,
        volume: int | None = None,
        surrogate_ids: bool = False,
        keep_source: bool = False,
        allow_burned_in: bool = False,
        layout: str = "auto",
        thumbnails: FilePath | None = None,
        analyze_axes: str | None = None,
    ) -> AddReport:
        """Read image files and folders into the store; idempotent by content, bad files are refused by name.

        Args:
            labels: where an image's label map lies, relative to it: `{stem}_seg.nii.gz`.
            label_names: a table of names: CSV or TSV with the columns `label` and `name`, a colour table of 3D Slicer,
                FreeSurfer or ITK-SNAP, or JSON.
            metadata: CSV or TSV tables, whose rows are about scans (`scan`, `file`), subjects (`participant_id`,
                `subject`) or their sessions; columns become columns of `scans`, those of subjects of `subjects` too.
            subject_from: regular expression whose group finds the subject in a file's stem, or else in its folders.
            spacing_mm: resample to this isotropic spacing; None keeps every voxel as it is.
            workers: files taken at once, each by a process of its own; 1 takes them in this process.
            surrogate_key: file with the key that DICOM identifiers are hashed with, made where there is none; by
                default the one that ISIMED_SURROGATE_KEY names, or else isimed/surrogate.key in the user's config.
            volume: which volume of 4-D files and of DICOM series with several, numbered from 0; without it these are
                refused. Its scan is called after the file, and `_vol-3` after that.
            surrogate_ids: call scans, subjects and sessions by keyed surrogates instead of names of files and folders,
                by which metadata are joined all the same.
            keep_source: store the path of each file, or the folder of a DICOM series, in the column `source`.
            allow_burned_in: take DICOM series that are marked as having text burned into their images.
            layout: how folders are read: `auto` (data sets are recognised), `files`, or the name of one layout.
            thumbnails: folder that gets a small PNG of every file that is read; `AddReport.files` has their names.
            analyze_axes: in which directions the voxel axes of Analyze 7.5 files grow, one letter each, such as `LAS`:
                first to Left, then Anterior, Superior. They do not say it themselves and are refused without it.
        """
        listed = [paths] if isinstance(paths, str | Path) else list(paths)
        options = AddOptions(
            labels=labels,
            label_names=_path(label_names),
            metadata=_paths(metadata),
            subject_from=subject_from,
            spacing_mm=spacing_mm,
            workers=workers,
            surrogate_key=_path(surrogate_key),
            surrogate_ids=surrogate_ids,
            keep_source=keep_source,
            allow_burned_in=allow_burned_in,
            layout=layout,
            volume=volume,
            thumbnails=_path(thumbnails),
            analyze_axes=analyze_axes,
        )
        try:
            return add(self._writing(), [Path(path) for path in listed], options, progress)
        finally:
            self.refresh()

    def pretrain(
        self,
        method: str | None = None,
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
        tensorboard: FilePath | None = None,
        wandb: str | None = None,
    ) -> EncoderCard:
        """Train an encoder on the stored scans (those that `where`, SQL over `scans`, keeps) and store it.

        Checkpoints are written every few minutes and after every epoch; `resume=True` with the same arguments goes on
        from the last one. Ctrl-C and SIGTERM end the step, write a checkpoint and raise `KeyboardInterrupt`.

        Args:
            method: isimed, barlowtwins, simclr, regisimed or coordinate; None is what the preset or `config` says.
            preset: default, paper or tiny.
            config: TOML whose fields replace the preset's.
            epochs, batch_scans, patches_per_scan, seed: replace the fields of that name. Where a view is one patch, as
                in the preset paper, patches_per_scan is also how many places are drawn.
            device: auto, cpu or cuda.
            resume: go on from the last checkpoint; what is finished already is returned as it is.
            name: of the encoder, 1 to 200 printable characters; by default method and preset.
            where: SQL over `scans` that chooses which are trained on.
            progress: is told of every step.
            tensorboard: folder that gets the curves as event files (extra `tensorboard`).
            wandb: project of Weights & Biases that gets the curves (extra `wandb`).
        """
        from isimed_index.pretrain.sharing import rest_soon

        rest_soon()  # before what imports PyTorch
        from isimed_index.config import pretrain_config
        from isimed_index.pretrain.records import Watchers
        from isimed_index.training import Training, pretrain

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
        training = Training(resolved, preset, name, device, resume, Watchers(_path(tensorboard), wandb))
        try:
            return pretrain(repository, self._scan_ids(where), training, progress or Silent())
        finally:
            self.refresh()

    def index(
        self,
        encoder: FilePath | None = None,
        stride_mm: float | None = None,
        where: str | None = None,
        scheduler: str = "threads",
        device: str = "auto",
        min_recall: float = 0.98,
        max_ram: int | None = None,
        progress: Progress | None = None,
        runtime: str = "auto",
        precision: str = "fp32",
        max_latency_ms: float | None = None,
        refit: bool = False,
    ) -> IndexReport:
        """Encode every patch of the scans that `where` keeps, fit the canonical frame and build the index.

        Scans that are encoded already are skipped; every few scans are committed, so that an interruption costs little.
        `scheduler` is threads, processes, processes:N, cuda (a process for each GPU) or a Dask scheduler's address.
        `encoder` is one of the store, or a folder that `export_encoder` wrote, which is imported first. `runtime` is
        torch, openvino or onnx, or `auto`: on a CPU the fastest that a short trial finds. `precision` is fp32 or bf16;
        scans that are encoded in the other one are encoded again. Ctrl-C, once it is known what is to be done, is
        raised as a `KeyboardInterrupt` that has the `report` of what is committed; so has any other error.
        The index is the quickest of those tried that reaches `min_recall` (recall@10) within `max_ram` bytes of memory
        and `max_latency_ms` a query. With `refit` the canonical frame is fitted anew, which else happens when more than
        a quarter of the scans are new to it; canonical coordinates from before are then others.
        """
        from isimed_index.encoders.runtimes.kind import Runtime
        from isimed_index.indexing import index_scans
        from isimed_index.planning import IndexOptions

        asked = Runtime(runtime, precision)
        repository = self._writing()
        self.refresh()
        named = self._stored_encoder(encoder)
        options = IndexOptions(
            named, stride_mm, scheduler, device, min_recall, max_ram, self._trust, asked, max_latency_ms, refit
        )
        try:
            return index_scans(repository, self._scan_ids(where), options, progress or Silent())
        finally:
            self.refresh()

    def plan_index(
        self,
        encoder: str | None = None,
        stride_mm: float | None = None,
        where: str | None = None,
        scheduler: str = "threads",
        device: str = "auto",
        progress: Progress | None = None,
        runtime: str = "auto",
        precision: str = "fp32",
    ) -> IndexPlan:
        """What `index` with the same arguments would encode, and what time, memory and disk that would take.

        Some patches of up to three scans are encoded to measure it, which takes some seconds; nothing is written to the
        store. `encoder` is one of the store. See `IndexPlan` for what the numbers mean, and which are extrapolated.
        """
        from isimed_index.encoders.runtimes.kind import Runtime
        from isimed_index.exchange.encoders import holds_encoder, known_encoder
        from isimed_index.planning import IndexOptions, plan_index

        asked = Runtime(runtime, precision)
        if encoder is not None and not known_encoder(self.snapshot, encoder) and holds_encoder(Path(encoder)):
            raise UsageError(
                f"a plan is made without writing, so it cannot import the encoder in {Path(encoder).name!r}",
                next_step="isimed encoders import DIR, then name the encoder",
            )
        options = IndexOptions(encoder, stride_mm, scheduler, device, trust=self._trust, runtime=asked)
        return plan_index(self.snapshot, self._scan_ids(where), options, progress or Silent())

    def register(
        self,
        to: FilePath | None = None,
        kind: Kind = "rigid",
        rounds: int = 2,
        where: str | None = None,
        workers: int = 1,
        redo: bool = False,
        progress: Progress | None = None,
    ) -> RegisterReport:
        """Register scans into a common frame and store their transforms; no image is resampled. Needs SimpleITK.

        Scans that are registered already are skipped, and every few scans are committed. A scan that comes later is
        registered to the same mean image; what was there stays as it was.

        Args:
            to: an image file to register to; None means the mean image of the scans, made in `rounds` rounds.
            kind: rigid (rotation and shift) or affine.
            where: SQL over `scans` that chooses which are registered.
            workers: scans registered at once.
            redo: register all again, to a new mean image or to the same atlas.
        """
        from isimed_index.register.cohort import RegisterOptions, register_scans

        repository = self._writing()
        self.refresh()
        options = RegisterOptions(_path(to), kind, rounds, workers, redo)
        try:
            return register_scans(repository, self._scan_ids(where), options, progress or Silent())
        finally:
            self.refresh()

    def transform(self, scan: str, reference: str | None = None, kind: Kind | None = None) -> NDArray[np.float64]:
        """A scan's newest transform (4, 4) from `register`: patient RAS+ mm → common RAS+ mm; `NotFound` without one.

        `reference` (an id, as in the view `transforms`) and `kind` choose among several.
        """
        from isimed_index.register.rows import transform_of

        return transform_of(self.snapshot, scan, reference, kind)

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
        min_confidence: float | None = None,
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
            min_confidence: leave out answers whose `confidence` is less, or not known.
        """
        from isimed_index.lookup import Question

        question = Question(k, where, within_mm, same_subject, cycle, min_confidence)
        lookup = self._lookup(encoder)
        return lookup.nearest(self._source(lookup, scan), _triple(point), space, question)

    def propagate(
        self,
        landmarks: FilePath | Mapping[str, PointLike],
        scan: FilePath,
        space: Space | None = None,
        where: str | None = None,
        same_subject: SameSubject = "include",
        cycle: bool = False,
        encoder: str | None = None,
        progress: Progress | None = None,
    ) -> Propagated:
        """Find the landmarks of one scan in all others; `write` of the answer makes files for 3D Slicer and a table.

        Args:
            landmarks: a file of 3D Slicer (.mrk.json, .fcsv), a table (.csv, .tsv) with the columns name, x, y, z, or
                points by name.
            scan: the scan that they were placed in: a stored scan's id, or the path of a file that need not be stored.
            space: of a table or of points by name: `ras` (by default) or `lps` mm, `voxel` of the source file, or
                `canonical` mm. Files of 3D Slicer say theirs.
            where: SQL over `scans` that chooses which scans may answer.
            same_subject: what to do with other scans of the scan's own subject.
            cycle: match every answer back and report the distance in `cycle_mm`.
        """
        from isimed_index.landmarks import Landmarks, read_landmarks
        from isimed_index.lookup import Question
        from isimed_index.propagate import propagate

        if isinstance(landmarks, Mapping):
            points = {name: _triple(point) for name, point in landmarks.items()}
            placed = Landmarks(points, space or "ras")
        else:
            placed = read_landmarks(Path(landmarks), space)
        lookup = self._lookup(encoder)
        question = Question(where=where, same_subject=same_subject, cycle=cycle)
        return propagate(lookup, self._source(lookup, scan), placed, question, progress)

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

    def search(
        self,
        vectors: ArrayLike,
        k: int = 10,
        where: str | None = None,
        within: Within | None = None,
        exact: bool = False,
        encoder: str | None = None,
    ) -> pa.Table:
        """The stored patches whose vectors are nearest to given ones, each vector's nearest first.

        Columns: `query` (which vector), `patch`, `scan`, `subject`, `x_mm`, `y_mm`, `z_mm` (patient RAS+), `distance`.
        A vector gets fewer than k rows only where fewer are kept.

        Args:
            vectors: (m, d), or (d,) for one, of the encoder's matching output, as `embeddings` gives them.
            k: how many answers for each.
            where: SQL over `patches` that chooses which may answer.
            within: a `Ball`, `Cuboid` or `Label`, or several: patches whose centres lie in all of them may answer.
            exact: leave the approximate index out.
            encoder: id, beginning of one, or name; by default the newest.
        """
        return self._lookup(encoder).neighbours.search(vectors, k, where, within, exact=exact)

    def row_ids(
        self, where: str | None = None, within: Within | None = None, encoder: str | None = None
    ) -> NDArray[np.int64]:
        """Ids (n,), rising, of the patches of one encoder that `where` and `within` keep, as in `search`."""
        neighbours = self._lookup(encoder).neighbours
        chosen = neighbours.filters.rows(where, within)
        return (neighbours.places.row_ids if chosen is None else chosen).copy()

    def search_like(
        self,
        patches: ArrayLike,
        k: int = 10,
        where: str | None = None,
        within: Within | None = None,
        same_subject: SameSubject = "exclude",
        exact: bool = False,
        encoder: str | None = None,
    ) -> pa.Table:
        """The patches of other scans whose vectors are nearest to those of stored patches.

        Columns: `from_patch`, `from_scan`, and those of `search` without `query`; patch after patch as they are given.

        Args:
            patches: ids (m,), or one, of the view `patches`.
            k: how many answers for each.
            where: SQL over `patches` that chooses which may answer.
            within: a `Ball`, `Cuboid` or `Label`, or several, as in `search`.
            same_subject: what to do with other scans of a patch's own subject. Its own scan never answers.
            exact: leave the approximate index out.
        """
        from isimed_index.pairs import Wanted, like

        return like(self._lookup(encoder).neighbours, patches, Wanted(k, where, within, same_subject, exact))

    def search_pairs(
        self,
        k: int = 10,
        of: str | None = None,
        where: str | None = None,
        within: Within | None = None,
        same_subject: SameSubject = "exclude",
        exact: bool = False,
        encoder: str | None = None,
    ) -> Iterator[pa.Table]:
        """`search_like` of all stored patches, or those of them that `of` keeps: a stream of tables of bounded size.

        By rising id of the patch that asks; no table has the answers of more than 1,024 patches.

        Args:
            k: how many answers for each.
            of: SQL over `patches` that chooses which are asked for; None: all.
            where: SQL over `patches` that chooses which may answer.
            within: a `Ball`, `Cuboid` or `Label`, or several, as in `search`.
            same_subject: what to do with other scans of a patch's own subject. Its own scan never answers.
            exact: leave the approximate index out.
        """
        from isimed_index.pairs import Wanted, stream

        return stream(self._lookup(encoder).neighbours, of, Wanted(k, where, within, same_subject, exact))

    def canonical(
        self, point: PointLike, scan: FilePath, space: Space = "ras", encoder: str | None = None
    ) -> tuple[float, float, float]:
        """A point of a scan in canonical mm, which mean the same place in every scan with a chart that holds.

        `OutsideScan` for a point outside the scan, `NotFound` when the scan's chart does not hold.

        Args:
            point: three numbers in `space`: `ras` or `lps` mm, or `voxel` of the source file.
            scan: a stored scan's id, or the path of a file that need not be in the store.
        """
        lookup = self._lookup(encoder)
        source = self._source(lookup, scan)
        x, y, z = source.canonical(source.point_mm(_triple(point), space)).tolist()
        return x, y, z

    def similar(
        self,
        scan: str,
        label: str | int | None = None,
        k: int = 10,
        where: str | None = None,
        same_subject: SameSubject = "exclude",
        pooling: Pooling = "mean",
        encoder: str | None = None,
    ) -> pa.Table:
        """The scans that look most like a stored scan, or whose region of that label does: exact, the nearest first.

        Columns: `scan`, `subject`, `label`, `name`, `distance`, `patches`. Regions are compared when their names
        are the same, and without names when their numbers are: left is never compared with what is called right.

        Args:
            scan: a stored scan's id.
            label: name or number of a region of it; None compares whole scans.
            k: how many answers.
            where: SQL over `scans` that chooses which scans may answer.
            same_subject: what to do with other scans of the same subject.
            pooling: `mean` of the patches, whose distance is the card's; or `mean_sd`, where how far they are apart
                counts too: 1 - cosine of mean and standard deviation together, whatever the card's metric is.
            encoder: id, beginning of one, or name; by default the newest.
        """
        from isimed_index.similar import Likeness, similar

        return similar(self.snapshot, scan, Likeness(label, k, where, same_subject, pooling), encoder)

    def keep(self, matches: Matches, question: str) -> int:
        """Store an answer under a name, as rows of the view `matches`; how many they are.

        `UsageError` for an answer without rows, to a point of a file that is not stored, or under a name that is taken.
        """
        from isimed_index.kept import keep

        try:
            return keep(self._writing(), matches, question)
        finally:
            self.refresh()

    def sql(self, query: str, params: Mapping[str, Any] | None = None, timeout_s: float = 30.0) -> pa.Table:
        """One read-only statement over the views of this generation (scans, patches, labels, …)."""
        return self.snapshot.sql(query, params, timeout_s)

    def embeddings(
        self, where: str | None = None, encoder: str | None = None, output: str | None = None
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.floating[Any]]]]:
        """Patch ids (n,) and vectors (n, d) of the patches that `where`, SQL over `patches`, keeps; scan by scan.

        `output` names one of the encoder's outputs; by default the one that matches are found by.
        """
        import numpy as np

        snapshot = self.snapshot
        artefact = snapshot.encoder_artefact(encoder)
        wanted = output or str(snapshot.card(artefact)["match_output"])
        chosen = None if where is None else snapshot.matching("patches", where, ["patch"]).column("patch").to_numpy()
        for segment in snapshot.segments(artefact.fields["encoder"]):
            keep = np.ones(segment.rows, bool) if chosen is None else np.isin(segment.row_ids, chosen)
            if keep.any():
                yield segment.row_ids[keep], segment.vectors(wanted)[keep]

    def scans(self) -> pa.Table:
        """All scans, one row each."""
        return self.sql("SELECT * EXCLUDE (digest, artefact) FROM scans ORDER BY scan")

    def encoders(self) -> pa.Table:
        """All encoders, one row each."""
        return self.sql("SELECT * FROM encoders")

    def encoder(self, encoder: str | None = None) -> EncoderCard:
        """The card of an encoder: by id, beginning of one, or name; by default the newest."""
        from isimed_index.encoders.card import read_card

        return read_card(self.snapshot.encoder_path(encoder))

    def log(self) -> pa.Table:
        """All generations, oldest first."""
        return self.sql("SELECT * FROM generations ORDER BY generation")

    def info(self) -> dict[str, Any]:
        """What the store holds, in numbers.

        `awaited` are encoded scans without a chart: how many, and some by name. `calibrated` are the encoders whose
        answers have an error in mm, and from how many subjects it was measured.
        """
        from isimed_index.charting import NAMED, calibrated_from, uncharted

        snapshot = self.snapshot
        encoded = dict.fromkeys(artefact.fields["encoder"] for artefact in snapshot.artefacts("segment"))
        awaited = {encoder: uncharted(snapshot, encoder) for encoder in encoded}
        calibrated = {encoder: calibrated_from(snapshot, encoder) for encoder in encoded}
        return {
            "store": self._repository.storage.name,
            "generation": snapshot.generation,
            "scans": snapshot.table("scans").num_rows,
            "subjects": snapshot.table("subjects").num_rows,
            "labels": snapshot.table("labels").num_rows,
            "transforms": snapshot.table("transforms").num_rows,
            "patches": snapshot.manifest.rows,
            "segments": len(snapshot.artefacts("segment")),
            "encoders": [snapshot.card(artefact)["name"] for artefact in snapshot.artefacts("encoder")],
            "indexes": self._indexes(),
            "awaited": [
                {"encoder": encoder, "scans": len(scans), "named": scans[:NAMED]}
                for encoder, scans in awaited.items()
                if scans
            ],
            "calibrated": [
                {"encoder": encoder, "subjects": subjects} for encoder, subjects in calibrated.items() if subjects
            ],
            "bytes": sum(artefact.bytes for artefact in snapshot.manifest.artefacts),
        }

    def _indexes(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.sql("SELECT encoder, kind, rows, recall_at_10 FROM indexes").to_pylist()
        for row in rows:
            with suppress(NotFound, StoreDamaged, Incompatible):  # it is listed all the same; `check` tells more
                card = self.index_card(row["encoder"])
                row |= {"ms": card.ms, "memory_bytes": card.resident_bytes}
                row["recall"] = {stratum.name: stratum.recall for stratum in card.strata}
        return rows

    def index_card(self, encoder: str | None = None) -> IndexCard:
        """What is known of the index over an encoder's patches: its recall, and why it is laid out as it is.

        `explain` of it says so in words. `NotFound` where there is no index; `StoreDamaged` where it cannot be read.
        """
        from isimed_index.encoders.card import read_card
        from isimed_index.index.card import IndexCard

        found = self.snapshot.index_path(read_card(self.snapshot.encoder_path(encoder)).id)
        if found is None:
            raise NotFound("there is no index that can be read", next_step="isimed index")
        return IndexCard.read(found)

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

    # -- upkeep -----------------------------------------------------------------------------------------------------

    def delete(
        self, where: str, what: Literal["scans", "patches", "matches"] = "scans", dry_run: bool = False
    ) -> Deleted:
        """Delete scans, single patches, or rows of kept answers that an SQL condition over the view of that name keeps.

        Older generations still hold them until `gc` takes these; `purge` erases a patient.
        """
        from isimed_index.store.upkeep.delete import delete_matches, delete_patches, delete_scans

        verbs: dict[str, Callable[..., Deleted]] = {
            "scans": delete_scans,
            "patches": delete_patches,
            "matches": delete_matches,
        }
        if what not in verbs:
            raise UsageError(f"expected to delete {', '.join(verbs)}, found {what!r}", next_step="isimed delete --help")
        try:
            return verbs[what](self._writing(), where, dry_run=dry_run)
        finally:
            self.refresh()

    def delete_encoder(self, encoder: str, dry_run: bool = False) -> Deleted:
        """Delete an encoder (id, beginning of one, or name) with its embeddings, frame and indexes."""
        from isimed_index.store.upkeep.delete import delete_encoder

        try:
            return delete_encoder(self._writing(), encoder, dry_run=dry_run)
        finally:
            self.refresh()

    def compact(self, progress: Progress | None = None) -> Compacted:
        """Pack small segments and table pieces together, without deleted rows; no answer changes."""
        from isimed_index.store.upkeep.compact import compact

        try:
            return compact(self._writing(), progress=progress)
        finally:
            self.refresh()

    def gc(self, keep: int = 10, dry_run: bool = False) -> Collected:
        """Remove generations but the newest `keep`, tagged and pinned ones, and every file that none of these names."""
        from isimed_index.store.upkeep.collect import collect

        repository = self._writing()
        self.close()  # our own pin must not keep what it held
        return collect(repository, keep, dry_run=dry_run)

    def purge(
        self,
        subject: str,
        progress: Progress | None = None,
        report: FilePath | None = None,
        unknown: bool = False,
    ) -> Erasure:
        """Erase a subject from every generation, prove that it is gone, and build frames and indexes anew without it.

        `StoreLocked` while a reader or writer still holds an old generation: run it again when it has ended. A purge
        that fails or is stopped is finished by running it again. What fails after the proof, when frames and indexes
        are built, is a `StoreWarning`: `index` builds them.

        Args:
            subject: its id.
            progress: is told what is done.
            unknown: also when nothing knows the subject: erase what is left of all deleted scans.
            report: a file that gets the erasure as JSON as soon as it is proved, before anything is built anew.
        """
        from isimed_index.index.goal import Goal
        from isimed_index.indexing import derive_again, goals_asked_for
        from isimed_index.store.upkeep.purge import purge

        repository = self._writing()
        self.close()  # our own pin must not keep what is to be erased
        try:
            goals = goals_asked_for(repository)
            erased = purge(repository, subject, progress, unknown=unknown)
            if report is not None:
                try:
                    Path(report).write_text(json.dumps(erased.to_json(), indent=2) + "\n", encoding="utf-8")
                except OSError as error:  # the erasure cannot be had a second time
                    message = f"the subject is erased; the report could not be written: {error.strerror}"
                    warnings.warn(message, StoreWarning, stacklevel=2)
            for encoder in erased.index_again:
                try:
                    derive_again(repository, encoder, progress or Silent(), goals.get(encoder, Goal()))
                except Exception as error:  # noqa: BLE001 — the erasure is done, and has to be returned
                    message = f"the subject is erased; a frame or index was not built anew: {error}. Next: isimed index"
                    warnings.warn(message, StoreWarning, stacklevel=2)
            return erased
        finally:
            self.refresh()

    def tag(self, name: str, generation: int | None = None) -> Tag:
        """Name a generation (the pinned one by default), so that `gc` keeps it and `open(tag=…)` finds it."""
        from isimed_index.store.tags import set_tag

        return set_tag(self._writing().storage, name, self.generation if generation is None else generation)

    def untag(self, name: str) -> None:
        """Forget a tag; its generation stays until `gc` takes it."""
        from isimed_index.store.tags import remove_tag

        remove_tag(self._writing().storage, name)

    def tags(self) -> list[Tag]:
        """All tags, by name."""
        from isimed_index.store.tags import find_tag, tag_names

        return [find_tag(self._repository.storage, name) for name in tag_names(self._repository.storage)]

    def restore(self, generation: int | None = None, tag: str | None = None) -> int:
        """Commit a generation that equals an old one, and return its number; what came between stays in the history."""
        from isimed_index.store.upkeep.restore import restore

        if (generation is None) == (tag is None):
            raise UsageError("expected a generation or a tag to restore", next_step="isimed log, or isimed tag")
        try:
            return restore(self._writing(), generation, tag).generation
        finally:
            self.refresh()

    # -- exchange ---------------------------------------------------------------------------------------------------

    def export(
        self,
        out: FilePath,
        layout: Literal["parquet", "npy", "duckdb"] = "parquet",
        where: str | None = None,
        encoder: str | None = None,
        voxels: bool = False,
        vectors: bool = False,
        progress: Progress | None = None,
    ) -> Exported:
        """Write the pinned generation as a Parquet folder, a folder of NumPy arrays, or a DuckDB file.

        Args:
            out: a new path; it appears whole or not at all.
            where: SQL over `scans` that chooses which are exported.
            encoder: whose embeddings; None means those of all.
            voxels: put the scans' OME-Zarr trees into the Parquet folder, which `import_` then reads back whole.
            vectors: put the vectors into the DuckDB file.
        """
        from isimed_index.exchange import export

        if (voxels and layout != "parquet") or (vectors and layout != "duckdb"):
            raise UsageError("voxels go with parquet only, vectors with duckdb only", next_step="isimed export --help")
        if Path(out).resolve().is_relative_to(self.path.resolve()):
            raise UsageError("an export cannot lie inside the store", next_step="choose a path outside of it")
        chosen = export.Selection(self.snapshot, where, encoder)
        if layout == "parquet":
            return export.export_parquet(chosen, Path(out), voxels=voxels, progress=progress)
        if layout == "npy":
            return export.export_npy(chosen, Path(out), progress=progress)
        if layout == "duckdb":
            return export.export_duckdb(chosen, Path(out), vectors=vectors, progress=progress)
        raise UsageError(f"expected parquet, npy or duckdb, found {layout!r}", next_step="isimed export --help")

    def export_scan(
        self, scan: str, out: FilePath | None = None, labels: FilePath | None = None, force: bool = False
    ) -> ExportedScan:
        """Write one scan, its label map, or both as NIfTI: a NIfTI file that was not resampled comes back bit for bit.

        `changed` of the answer says what is not as in the file that was added.

        Args:
            scan: its id.
            out: .nii or .nii.gz for the voxels; it appears whole or not at all.
            labels: .nii or .nii.gz for the label map, on the same grid.
            force: replace files that are there.
        """
        from isimed_index.exchange import volume
        from isimed_index.scans.chunks import open_chunks

        if any(path.resolve().is_relative_to(self.path.resolve()) for path in (_path(out), _path(labels)) if path):
            raise UsageError("an export cannot lie inside the store", next_step="choose a path outside of it")
        stored = open_chunks(self.snapshot.chunks_path(scan), scan)
        return volume.export_scan(stored, scan, _path(out), _path(labels), force=force)

    def import_(
        self,
        path: FilePath,
        card: FilePath | None = None,
        space: Literal["ras", "lps"] = "ras",
        scans: FilePath | None = None,
        progress: Progress | None = None,
    ) -> Imported:
        """Read an exported Parquet folder back, or with a `card` the embeddings of another program.

        Args:
            path: the folder; or a table of embeddings, or a folder of arrays beside one.
            card: JSON that describes the foreign encoder.
            space: of the foreign positions.
            scans: table with shape and affine of foreign scans that the store lacks.
        """
        repository = self._writing()
        try:
            if card is None:
                from isimed_index.exchange.restore import import_parquet

                if space != "ras" or scans is not None:
                    raise UsageError("space and scans go with a card only", next_step="isimed import --help")
                return import_parquet(repository, Path(path), progress)
            from isimed_index.exchange.foreign import import_embeddings

            return import_embeddings(repository, Path(path), Path(card), space, _path(scans), progress)
        finally:
            self.refresh()

    def export_encoder(self, encoder: str | None, out: FilePath) -> EncoderCard:
        """Write an encoder (id, beginning of one, or name; None: the newest) into a new folder that can travel alone.

        It holds `card.json` and `weights.safetensors`, or `model.onnx`; no scan and no patient. Returns the card.
        """
        from isimed_index.exchange.encoders import export_encoder

        if Path(out).resolve().is_relative_to(self.path.resolve()):
            raise UsageError("an export cannot lie inside the store", next_step="choose a path outside of it")
        return export_encoder(self.snapshot, encoder, Path(out))

    def import_encoder(self, path: FilePath, card: FilePath | None = None, name: str | None = None) -> KeptEncoder:
        """Store an encoder from elsewhere under its id; one that is there already is left as it is.

        It is loaded and tried out first: nothing is stored of pickles, of weights that do not fit, and of code that
        `open(trust=…)` did not allow.

        Args:
            path: a folder that `export_encoder` wrote; or with `card`, a file .safetensors or .onnx.
            card: JSON that describes an encoder of another program.
            name: in the store; by default that of the card.
        """
        from isimed_index.exchange.encoders import import_encoder

        try:
            return import_encoder(self._writing(), Path(path), _path(card), name, self._trust)
        finally:
            self.refresh()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _lookup(self, encoder: str | None) -> Lookup:
        from isimed_index.lookup import Lookup

        if encoder not in self._lookups:
            self._lookups[encoder] = Lookup(self.snapshot, encoder, self._trust)
        return self._lookups[encoder]

    def _stored_encoder(self, encoder: FilePath | None) -> str | None:
        """An encoder's name or id; that of a folder is imported first, unless an encoder is called like it."""
        from isimed_index.exchange.encoders import holds_encoder, known_encoder

        named = None if encoder is None else str(encoder)
        if named is None or known_encoder(self.snapshot, named) or not holds_encoder(Path(named)):
            return named
        return self.import_encoder(named).id

    def _source(self, lookup: Lookup, scan: FilePath) -> Source:
        """A stored scan by id, or else a file: its stored copy where the content is known, or the file itself."""
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


def _triple(point: PointLike) -> tuple[float, float, float]:
    try:
        x, y, z = (float(value) for value in point)
    except (TypeError, ValueError):
        x = y = z = math.nan
    if not all(map(math.isfinite, (x, y, z))):
        raise UsageError(
            f"expected a point of three finite numbers, found {point!r}",
            next_step="give x, y, z such as (-12, -40, 88)",
        )
    return x, y, z


def _path(path: FilePath | None) -> Path | None:
    try:
        return None if path is None else Path(path)
    except TypeError:
        raise UsageError(
            f"expected a path, found {type(path).__name__}",
            next_step="give the path as text; what a table or TOML file would hold goes into one",
        ) from None


def _paths(paths: FilePath | Sequence[FilePath] | None) -> tuple[Path, ...]:
    return (Path(paths),) if isinstance(paths, str | Path) else tuple(map(Path, paths or ()))
