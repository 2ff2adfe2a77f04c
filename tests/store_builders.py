"""Small stores for tests: every kind of artefact, a few bytes each; also imported by the processes that tests start."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from isimed_index.index.card import row_ranges
from isimed_index.store import files
from isimed_index.store.manifest import Artefact, listed, load, manifest_name
from isimed_index.store.regions import StoredRegions, write_regions
from isimed_index.store.repository import Repository
from isimed_index.store.segment import LABEL_SHARES, write_segment
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal, Transaction

ENCODER = "3f2a90c1d4e5"
OTHER_ENCODER = "3f77aa00bb11"
LATTICE = {
    "scan": {"shape": [8, 8, 8], "affine": np.eye(4).tolist(), "source_affine": np.eye(4).tolist()},
    "shape": [9, 9, 9],
    "affine": np.diag([2.0, 3.0, 5.0, 1.0]).tolist(),
    "patch_vox": 4,
    "stride_vox": 2,
}
ROOT = Path(__file__).parents[1]


def scan_rows(scan: str, artefact: str, **columns: Any) -> pa.Table:
    """One row of the table `scans`."""
    row = {
        "scan": scan,
        "subject": scan.split("_")[0],
        **{f"n{axis}": 8 for axis in "xyz"},
        **{f"d{axis}_mm": 2.0 for axis in "xyz"},
        "digest": hashlib.sha256(scan.encode()).hexdigest(),
        "artefact": artefact,
        **columns,
    }
    return pa.Table.from_pylist([row])


def stage_scan(transaction: Transaction) -> Artefact:
    """Stand-in voxels."""
    path = transaction.stage("scan")
    (path / "zarr.json").write_text('{"zarr_format": 3}')
    (path / "0").mkdir()
    (path / "0" / "c").write_bytes(os.urandom(64))
    return transaction.add("scan", path)


def add_scan(repository: Repository, scan: str, **columns: Any) -> Snapshot:
    """Commit one scan."""
    with repository.transaction("add") as transaction:
        artefact = stage_scan(transaction)
        rows = scan_rows(scan, artefact.path, **columns)
        return transaction.commit(lambda head: Proposal([artefact], tables={"scans": rows}))


def card(encoder: str = ENCODER, name: str = "toy") -> dict[str, Any]:
    """A valid encoder card without weights."""
    return {
        "id": encoder,
        "name": name,
        "factory": "toy",
        "weights_sha256": None,
        "patch_vox": 4,
        "spacing_mm": 2.0,
        "outputs": {"position": {"dim": 3, "unit": "mm"}, "descriptor": {"dim": 4}},
        "match_output": "descriptor",
        "metric": "cosine",
        "training": {"method": "isimed"},
    }


def add_encoder(repository: Repository, encoder: str = ENCODER, name: str = "toy") -> Snapshot:
    """Commit one encoder."""
    with repository.transaction("pretrain") as transaction:
        path = transaction.stage("encoder")
        (path / "card.json").write_text(json.dumps(card(encoder, name)))
        artefact = transaction.add("encoder", path, encoder=encoder)
        return transaction.commit(lambda head: Proposal([artefact]))


def patch_rows(scan: str, n: int) -> pa.Table:
    """`n` patches along the diagonal of a scan."""
    steps = np.arange(n)
    return pa.table(
        {
            "scan": [scan] * n,
            **{axis: steps.astype(np.int32) for axis in "ijk"},
            "x_mm": (steps * 2).astype(np.float32),
            "y_mm": (steps * 3).astype(np.float32),
            "z_mm": (steps * 5).astype(np.float32),
            "foreground": np.full(n, 0.5, np.float32),
            LABEL_SHARES: pa.array([{1: 0.25, 7: 0.5}] * n, pa.map_(pa.int32(), pa.float32())),
        }
    )


def vectors(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Outputs of the toy encoder."""
    random = np.random.default_rng(seed)
    return {
        "position": random.normal(size=(n, 3)).astype(np.float32),
        "descriptor": random.normal(size=(n, 4)).astype(np.float16),
    }


def stage_segment(
    transaction: Transaction, head: Snapshot, scan: str, n: int, encoder: str = ENCODER, seed: int = 0
) -> Artefact:
    """A segment of a committed scan."""
    path = transaction.stage("segment")
    fields = write_segment(path, patch_rows(scan, n), vectors(n, seed))
    (path / "lattice.json").write_text(json.dumps(LATTICE), encoding="utf-8")
    scan_artefact = head.scan_row(scan)["artefact"]
    task = hashlib.sha256(f"{scan}/{encoder}".encode()).hexdigest()
    return transaction.add(
        "segment", path, encoder=encoder, grid="4/2", scan_artefact=scan_artefact, task=task, **fields
    )


def add_segment(repository: Repository, scan: str, n: int, encoder: str = ENCODER, seed: int = 0) -> Snapshot:
    """Commit one segment, beside those that the scan has."""
    with repository.pin() as pinned, repository.transaction("index") as transaction:
        artefact = stage_segment(transaction, pinned, scan, n, encoder, seed)
        return transaction.commit(lambda head: Proposal([artefact]))


def encode_again(repository: Repository, scan: str, n: int, seed: int) -> Snapshot:
    """Commit one segment in place of those that the scan has of the same encoder, as `index` does."""
    with repository.pin() as pinned, repository.transaction("index") as transaction:
        artefact = stage_segment(transaction, pinned, scan, n, seed=seed)
        voxels = artefact.fields["scan_artefact"]

        def propose(head: Snapshot) -> Proposal:
            old = [segment for segment in head.segments(ENCODER) if segment.scan_artefact == voxels]
            return Proposal([artefact], drop_segments=old)

        return transaction.commit(propose)


def content(snapshot: Snapshot) -> dict[str, dict[int, tuple[str, int, bytes]]]:
    """All that can be asked of a snapshot: rows of tables, and by row id each patch's scan, index and vectors."""
    scans = {
        row["scan"]: (row["subject"], row["nx"], row["digest"].encode()) for row in snapshot.table("scans").to_pylist()
    }
    patches = {}
    for segment in snapshot.segments():
        rows = segment.patches().to_pylist()
        outputs = [segment.vectors(name) for name in sorted(segment.outputs)]
        for number, (row_id, row) in enumerate(zip(segment.row_ids.tolist(), rows, strict=True)):
            assert row_id not in patches, "a row id stands twice"
            patches[row_id] = (row["scan"], row["i"], b"".join(vectors[number].tobytes() for vectors in outputs))
    return {"scans": scans, "patches": patches}


def add_frame(repository: Repository, scan: str, encoder: str = ENCODER) -> Snapshot:
    """Commit a frame in which canonical mm = patient mm × (1, 2, 3) + (10, 20, 30) for `scan` alone."""
    affine = np.hstack([np.diag([1.0, 2.0, 3.0]), [[10.0], [20.0], [30.0]]])
    cells = {f"a{row}{column}": [affine[row, column]] for row in range(3) for column in range(4)}
    with repository.transaction("index") as transaction:
        path = transaction.stage("frame")
        pq.write_table(pa.table({"scan": [scan], **cells}), path / "charts.parquet")
        artefact = transaction.add("frame", path, encoder=encoder)
        return transaction.commit(lambda head: Proposal([artefact]))


def add_index(repository: Repository, encoder: str = ENCODER) -> Snapshot:
    """Commit a stand-in index over all segments of an encoder."""
    ranges = row_ranges([segment.row_ids for segment in repository.snapshot().segments(encoder)])
    with repository.transaction("index") as transaction:
        path = transaction.stage("index")
        (path / "index.json").write_text(json.dumps({"recipe": {"factory": "Flat"}, "recall_at_10": 1.0}))
        (path / "index.faiss").write_bytes(bytes(256))
        artefact = transaction.add("index", path, encoder=encoder, covers=[list(ends) for ends in ranges])
        return transaction.commit(lambda head: Proposal([artefact]))


def add_regions(repository: Repository, encoder: str = ENCODER) -> Snapshot:
    """Commit stand-in vectors of each encoded scan, and of its label 7, in place of those that there are."""
    head = repository.snapshot()
    segments = [segment for segment in head.segments(encoder) if segment.rows]
    rows = pa.concat_tables(
        pa.table(
            {
                "segment": [segment.first_row_id] * 2,
                "rows": [segment.rows] * 2,
                "label": [None, 7],
                "patches": [segment.rows] * 2,
                "weight": [segment.rows / 2] * 2,
                "foreground": [0.5] * 2,
            }
        )
        for segment in segments
    )
    random = np.random.default_rng(7)
    mean, sd = (random.normal(size=(rows.num_rows, 4)).astype(np.float32) for _ in range(2))
    covers = [list(ends) for ends in row_ranges([segment.row_ids for segment in segments])]
    with repository.transaction("index") as transaction:
        path = transaction.stage("region")
        write_regions(path, StoredRegions(rows, mean, sd, {"metric": "cosine", "centre": [0.0] * 4, "scale": 1.0}))
        artefact = transaction.add("region", path, encoder=encoder, covers=covers)
        old = head.newest("region", encoder)
        return transaction.commit(lambda _: Proposal([artefact], drop=[old.path] if old else []))


def orphans(repository: Repository) -> set[str]:
    """What is in the store and belongs to nobody; the empty files of its own locks do not count."""
    storage = repository.storage
    named = {artefact.path for number in listed(storage) for artefact in load(storage, number).artefacts}
    folders = [*files.FOLDERS.values(), files.INTENTS, files.LEASES, files.TMP]
    found = {f"{folder}/{entry.name}" for folder in folders for entry in (repository.path / folder).iterdir()}
    return found - named - {f"{files.TMP}/{name}.lock" for name in ("collect", "publish", "repair")}


def whole_store(path: Path) -> Repository:
    """Two scans, an encoder, a segment of each scan (3 and 5 patches), a frame for the first, an index."""
    repository = Repository.create(path)
    add_scan(repository, "sub-01_T1w", modality="MR", age=40)
    add_scan(repository, "sub-02_ct", modality="CT", weight_kg=71.5)
    add_encoder(repository)
    add_segment(repository, "sub-01_T1w", 3)
    add_segment(repository, "sub-02_ct", 5)
    add_frame(repository, "sub-01_T1w")
    add_index(repository)
    return repository


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another Python process that sees the library and this module; it runs `code` with `arguments` in sys.argv[1:]."""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "cli", "schemas", "tests"))
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What a process printed; it must have ended well."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def forge(repository: Repository, change: Callable[[Artefact], Artefact | None], **fields: Any) -> None:
    """Publish a generation in which every artefact of the newest is what `change` makes of it (None: left out)."""
    head = repository.snapshot().manifest
    made = tuple(new for artefact in head.artefacts if (new := change(artefact)) is not None)
    forged = replace(head, generation=head.generation + 1, parent=None, artefacts=made, **fields)
    repository.storage.publish(manifest_name(forged.generation), forged.to_bytes())


def without_copies(repository: Repository) -> Repository:
    """The store as it was before published documents had copies."""
    for copy in repository.path.rglob("*.copy"):
        copy.unlink()
    return repository


def copy_of(path: Path) -> Path:
    """The copy of a published document."""
    return path.with_name(f"{path.name}.copy")


def lose(path: Path) -> None:
    """Damage a published document and its copy."""
    for file in (path, copy_of(path)):
        flip(file)


def flip(path: Path, at: int = -2) -> None:
    """Flip one bit of a file, or of the first file of a folder."""
    file = path if path.is_file() else min(found for found in path.rglob("*") if found.is_file())
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
