"""What `Store.search` costs beside the bare FAISS call that it makes, and what opening takes.

    python benchmarks/search/end_to_end.py [--rows N] [--segments S] [--dim D] [--rounds R] [--out FILE.json]

A synthetic store: N patches in S scans of as many subjects, vectors that tell a place as those of an encoder do. It is
measured as it was written, a segment a scan, and packed by `compact`. In every round all calls take turns with the same
queries, and ratios are taken within a round; medians of all rounds are shown.

    faiss      the index file's own search for the k that are asked for, nothing else
    index      LiveIndex: more candidates from FAISS, ranked again by the stored vectors
    search     Store.search: that, and a table of scans, subjects and places
    where      Store.search with a condition that keeps half of the rows, evaluated before

`open` runs in a process of its own: seconds, processor seconds and resident memory of pinning, of the first search,
which opens the index and what it found, and of reading all places.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import isimed_index as isi
from isimed_index.encoders.card import EncoderCard
from isimed_index.index.card import row_ranges
from isimed_index.index.plan import build_index
from isimed_index.neighbours import Neighbours
from isimed_index.store.derived import commit_derived
from isimed_index.store.repository import Repository
from isimed_index.store.segment import write_segment
from isimed_index.store.transaction import Proposal

K = 10
BATCHES = (1, 256)
EDGE_MM = 200.0
OPEN = """
import json, os, resource, sys, time
import numpy as np, pyarrow, pyarrow.parquet, faiss
import isimed_index as isi
def now():
    pages = int(open("/proc/self/statm").read().split()[1])
    return time.perf_counter(), time.process_time(), pages * os.sysconf("SC_PAGE_SIZE") / 2**20
store, query = isi.open(sys.argv[1], mode="r"), np.load(sys.argv[2])
steps = {"start": now()}
store.snapshot
steps["pinned"] = now()
neighbours = store._lookup(None).neighbours
neighbours.places
steps["rows"] = now()
store.search(query, 10)
steps["first_search"] = now()
places = neighbours.places
places.centres_mm(np.arange(len(places)), places.owners(np.arange(len(places))))
steps["all_places"] = now()
print(json.dumps(steps))
"""


def card(dim: int) -> EncoderCard:
    """An encoder that nothing is encoded with."""
    return EncoderCard(
        name="synthetic",
        factory="toy",
        network={},
        weights_sha256=hashlib.sha256(b"").hexdigest(),
        patch_vox=32,
        stride_vox=4,
        spacing_mm=2.0,
        outputs={"descriptor": dim},
        match_output="descriptor",
        metric="cosine",
        training={"method": "isimed"},
    )


def write_store(path: Path, rows: int, segments: int, dim: int) -> Repository:
    """A store with an encoder, scans, and their segments, in two commits."""
    random = np.random.default_rng(0)
    waves, phase = random.normal(scale=2 * np.pi / EDGE_MM, size=(3, dim)), random.uniform(0, 2 * np.pi, dim)
    repository = Repository.create(path)
    with repository.transaction("pretrain") as transaction:
        directory = transaction.stage("encoder")
        (directory / "card.json").write_text(json.dumps(card(dim).to_json()))
        (directory / "weights.safetensors").write_bytes(b"")
        encoder = transaction.add("encoder", directory, encoder=card(dim).id)
        transaction.commit(lambda head: Proposal([encoder]))
    with repository.transaction("index") as transaction:
        added, scans = [], []
        for number in range(segments):
            size = rows // segments
            voxels = transaction.stage("scan")
            (voxels / "zarr.json").write_bytes(b"{}")
            scan = transaction.add("scan", voxels)
            name, digest = f"sub-{number:06}", hashlib.sha256(str(number).encode()).hexdigest()
            edges = {f"n{axis}": 100 for axis in "xyz"} | {f"d{axis}_mm": 2.0 for axis in "xyz"}
            scans.append({"scan": f"{name}_T1w", "subject": name, "digest": digest, "artefact": scan.path, **edges})
            xyz_mm = random.uniform(0, EDGE_MM, (size, 3))
            vectors = np.cos(xyz_mm @ waves + phase) + random.normal(scale=0.05, size=(size, dim))
            directory = transaction.stage("segment")
            fields = write_segment(directory, _patches(name, xyz_mm), {"descriptor": vectors.astype(np.float16)})
            (directory / "lattice.json").write_text("{}")
            own = {"encoder": card(dim).id, "grid": "32/4/2.0", "scan_artefact": scan.path, "task": digest}
            added += [scan, transaction.add("segment", directory, **fields, **own)]
        transaction.commit(lambda head: Proposal(added, tables={"scans": pa.Table.from_pylist(scans)}))
    return repository


def _patches(name: str, xyz_mm: NDArray[np.float64]) -> pa.Table:
    lattice = {axis: np.zeros(len(xyz_mm), np.int32) for axis in "ijk"}
    places = {f"{axis}_mm": xyz_mm[:, n].astype(np.float32) for n, axis in enumerate("xyz")}
    share = np.ones(len(xyz_mm), np.float32)
    return pa.table({"scan": [f"{name}_T1w"] * len(xyz_mm), **lattice, **places, "foreground": share})


def index_store(repository: Repository) -> None:
    """Build and commit the index that `isimed index` would."""
    with repository.transaction("index") as transaction:
        with repository.pin() as snapshot:
            neighbours = Neighbours(snapshot)
            blocks = neighbours.places.blocks("descriptor")
            covers = [list(ends) for ends in row_ranges([ids for ids, _ in blocks])]
        directory = transaction.stage("index")
        build_index(directory, blocks, "cosine")
        artefact = transaction.add("index", directory, encoder=neighbours.card.id, covers=covers)
        commit_derived(transaction, artefact, {"index": None})


def bare_search(repository: Repository) -> tuple[Callable[[NDArray[np.float32]], object], dict[str, Any]]:
    """FAISS's own search of the stored index, for K rows, and how the index is laid out."""
    import faiss

    with repository.pin() as snapshot:
        directory = snapshot.index_path(Neighbours(snapshot).card.id)
        assert directory is not None
        native = faiss.read_index(str(directory / "index.faiss"))
        recipe = json.loads((directory / "index.json").read_text(encoding="utf-8"))["recipe"]
    if recipe.get("probes"):
        faiss.ParameterSpace().set_index_parameter(native, "nprobe", recipe["probes"])
    return lambda queries: native.search(queries, K), recipe


def turns(calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call by round, each the mean of `repeats`; all calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            if turn:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - began) / repeats)
    return times


def measure(repository: Repository, rounds: int) -> dict[str, Any]:
    """Medians of milliseconds, and of ratios to FAISS within a round, by batch."""
    bare, recipe = bare_search(repository)
    report: dict[str, Any] = {"recipe": recipe}
    with isi.open(repository.path, mode="r") as store:
        vectors = np.concatenate([found for _, found in store.embeddings()])
        index = store._lookup(None).neighbours.index
        where = f"x_mm < {EDGE_MM / 2}"
        began = time.perf_counter()
        store.search(vectors[:1], K, where)
        report["where_first_ms"] = 1e3 * (time.perf_counter() - began)
        for batch in BATCHES:
            random = np.random.default_rng(batch)
            queries = vectors[random.choice(len(vectors), batch, replace=False)].astype(np.float32)
            queries += random.normal(scale=0.05, size=queries.shape).astype(np.float32)
            unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
            calls: dict[str, Callable[[], object]] = {
                "faiss": lambda unit=unit: bare(unit),  # type: ignore[misc]
                "index": lambda queries=queries: index.search(queries, K),  # type: ignore[misc]
                "search": lambda queries=queries: store.search(queries, K),  # type: ignore[misc]
                "where": lambda queries=queries: store.search(queries, K, where),  # type: ignore[misc]
            }
            times = turns(calls, rounds, max(1, 64 // batch))
            ms = {name: statistics.median(values) for name, values in times.items()}
            ratio = {
                name: statistics.median(a / b for a, b in zip(values, times["faiss"], strict=True))
                for name, values in times.items()
            }
            table = statistics.median(a - b for a, b in zip(times["search"], times["index"], strict=True))
            report[f"batch_{batch}"] = {"ms": ms, "to_faiss": ratio, "table_ms": table}
    return report


def opening(repository: Repository, dim: int) -> dict[str, float]:
    """Seconds, processor seconds and MiB of what a first search opens, step by step."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, np.random.default_rng(1).normal(size=(1, dim)).astype(np.float32))
        file.flush()
        command = [sys.executable, "-c", OPEN, str(repository.path), file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    steps: dict[str, tuple[float, float, float]] = json.loads(done.stdout)
    names = list(steps)
    report = {}
    for before, name in pairwise(names):
        for unit, one, other in zip(("s", "cpu_s", "mib"), steps[before], steps[name], strict=True):
            report[f"{name}_{unit}"] = other - one
    return report


def main() -> None:
    """Write the store, measure it as written and packed, and print or write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--segments", type=int, default=100)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    report: dict[str, Any] = {"date": date.today().isoformat(), "cpu": platform.processor(), "threads": threads}
    report |= {"rows": asked.rows, "segments": asked.segments, "dim": asked.dim, "rounds": asked.rounds}
    with tempfile.TemporaryDirectory() as folder:
        repository = write_store(Path(folder) / "c.isimed", asked.rows, asked.segments, asked.dim)
        index_store(repository)
        report["written"] = {"open": opening(repository, asked.dim), **measure(repository, asked.rounds)}
        with isi.open(repository.path) as store:
            store.compact()
        report["packed"] = {"open": opening(repository, asked.dim), **measure(repository, asked.rounds)}
    text = json.dumps(report, indent=1)
    if asked.out is not None:
        asked.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
