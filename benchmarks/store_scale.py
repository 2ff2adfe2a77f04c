"""How commit, opening and SQL grow with a store: synthetic scans and patches, real commits, medians, growth exponents.

    scans     10 … 100,000, one segment each: manifests as large as real ones, voxels and vectors of most never written
    rows      10,000 … 100,000,000 patch rows in packed segments with real Parquet files; memory of the SQL process

An exponent of 1 is linear growth; it is fitted to the larger half of the sizes. Run from the repository:
python benchmarks/store_scale.py [--scans 10,100,1000] [--rows 10000,100000] [--out FILE.json]
python benchmarks/store_scale.py --plot FILE.png --out FILE.json     draws what FILE.json holds
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from isimed_index.store.files import new_id
from isimed_index.store.manifest import Artefact, Manifest, manifest_name, seal, utc_now
from isimed_index.store.repository import Repository
from isimed_index.store.segment import write_segment
from isimed_index.store.sql import sandbox
from isimed_index.store.transaction import Proposal, Transaction
from isimed_index.store.upkeep.compact import compact

ROUNDS = 9
CARD = {
    "id": "0123456789abcdef",
    "name": "synthetic",
    "factory": "toy",
    "weights_sha256": None,
    "patch_vox": 32,
    "spacing_mm": 2.0,
    "outputs": {"descriptor": {"dim": 2}},
    "match_output": "descriptor",
    "metric": "cosine",
    "training": {"method": "isimed"},
}
LATTICE = {"scan": {}, "shape": [64, 64, 64], "affine": np.eye(4).tolist(), "patch_vox": 32, "stride_vox": 4}
OPEN = """
import sys, time
from pathlib import Path
from isimed_index.store.repository import Repository
times = []
for _ in range(int(sys.argv[2])):
    began = time.perf_counter()
    Repository.open(Path(sys.argv[1])).pin().close()
    times.append(time.perf_counter() - began)
print(times)
"""


def scan_row(number: int, artefact: str) -> dict[str, Any]:
    """A row of `scans`."""
    return {
        "scan": f"sub-{number:06}_T1w",
        "subject": f"sub-{number:06}",
        **{f"n{axis}": 256 for axis in "xyz"},
        **{f"d{axis}_mm": 1.0 for axis in "xyz"},
        "digest": hashlib.sha256(str(number).encode()).hexdigest(),
        "artefact": artefact,
        "modality": "MR",
        "split": "train" if number % 5 else "test",
    }


def with_encoder(path: Path) -> Repository:
    """An empty store with a synthetic encoder."""
    repository = Repository.create(path)
    with repository.transaction("pretrain") as transaction:
        directory = transaction.stage("encoder")
        (directory / "card.json").write_text(json.dumps(CARD))
        artefact = transaction.add("encoder", directory, encoder=CARD["id"])
        transaction.commit(lambda head: Proposal([artefact]))
    return repository


def with_scans(path: Path, count: int) -> Repository:
    """A store whose manifest names `count` scans and a segment of each; only their table is on disk."""
    repository = with_encoder(path)
    blank = {"bytes": 1, "files": 1, "sha256": "a" * 64}
    scans = [Artefact("scan", f"scans/{new_id()}.zarr", **blank) for _ in range(count)]
    with repository.transaction("add") as transaction:
        rows = pa.Table.from_pylist([scan_row(n, scan.path) for n, scan in enumerate(scans)])
        head = transaction.commit(lambda head: Proposal(scans, tables={"scans": rows}))
    segments = [
        Artefact("segment", f"segments/{new_id()}", **blank, fields=segment_fields(number, scan))
        for number, scan in enumerate(scans)
    ]
    manifest = Manifest(
        head.generation + 1,
        (head.generation, head.manifest.sha256),
        new_id(),
        utc_now(),
        "index",
        next_row_id=1000 * count,
        artefacts=(*head.manifest.artefacts, *segments),
    )
    repository.storage.publish(manifest_name(manifest.generation), manifest.to_bytes())
    repository.storage.replace("HEAD.json", seal({"generation": manifest.generation}))
    return repository


def segment_fields(number: int, scan: Artefact) -> dict[str, Any]:
    """What a manifest says of a segment."""
    return {
        "rows": 1000,
        "first_row_id": 1000 * number,
        "encoder": CARD["id"],
        "grid": "32/4/2.0",
        "scan_artefact": scan.path,
        "task": hashlib.sha256(str(number).encode()).hexdigest(),
        "outputs": {"descriptor": {"dim": 64, "dtype": "float16"}, "position": {"dim": 3, "dtype": "float32"}},
    }


def add_one(repository: Repository, number: int) -> None:
    """One durable commit of one scan."""
    with repository.transaction("add") as transaction:
        path = transaction.stage("scan")
        (path / "zarr.json").write_bytes(b"{}")
        artefact = transaction.add("scan", path)
        rows = pa.Table.from_pylist([scan_row(number, artefact.path)])
        transaction.commit(lambda head: Proposal([artefact], tables={"scans": rows}))


def with_rows(path: Path, count: int) -> Repository:
    """A store with `count` patch rows in segments of 100,000 (fewer where `count` is smaller), packed."""
    repository = with_encoder(path)
    size = min(100_000, count)
    with repository.transaction("index") as transaction:
        for number in range(count // size):
            add_segment(transaction, number, size)
    compact(repository)
    return repository


def add_segment(transaction: Transaction, number: int, size: int) -> None:
    """One scan and its segment of `size` rows."""
    scan = transaction.stage("scan")
    (scan / "zarr.json").write_bytes(b"{}")
    voxels = transaction.add("scan", scan)
    row = scan_row(number, voxels.path)
    steps = np.arange(size)
    ijk = {axis: (steps // 64**n % 64).astype(np.int32) for n, axis in enumerate("ijk")}
    places = {f"{axis}_mm": (ijk[name] * 8.0).astype(np.float32) for axis, name in zip("xyz", "ijk", strict=True)}
    share = (steps % 97 / 97).astype(np.float32)
    table = pa.table({"scan": pa.array([row["scan"]] * size), **ijk, **places, "foreground": share})
    path = transaction.stage("segment")
    fields = write_segment(path, table, {"descriptor": np.ones((size, 2), np.float16)})
    (path / "lattice.json").write_text(json.dumps(LATTICE))
    own = {"encoder": CARD["id"], "grid": "32/4/2.0", "scan_artefact": voxels.path, "task": row["digest"]}
    segment = transaction.add("segment", path, **fields, **own)
    transaction.commit(lambda head: Proposal([voxels, segment], tables={"scans": pa.Table.from_pylist([row])}))


def seconds(act: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Wall times of some calls."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return times


def opening(path: Path, rounds: int) -> list[float]:
    """Wall times of opening and pinning, in a process that has done it once before."""
    out = subprocess.run([sys.executable, "-c", OPEN, str(path), str(rounds + 1)], check=True, capture_output=True)
    times: list[float] = json.loads(out.stdout)[1:]
    return times


def of_scans(count: int) -> dict[str, float]:
    """Opening, commit and SQL of a store with so many scans."""
    with tempfile.TemporaryDirectory() as folder:
        repository = with_scans(Path(folder) / "c", count)
        opened = sorted(opening(repository.path, 100 if count <= 10_000 else ROUNDS))
        commits = [seconds(lambda n=n: add_one(repository, count + n), 1)[0] for n in range(ROUNDS)]  # type: ignore[misc]
        snapshot = repository.snapshot()
        query = "SELECT split, count(*) FROM scans GROUP BY split"
        listed = seconds(lambda: snapshot.segments(CARD["id"]))
        first = seconds(lambda: repository.snapshot().sql(query))
        again = seconds(lambda: snapshot.sql(query))
        return {
            "scans": count,
            "open_ms": 1e3 * statistics.median(opened),
            "open_p99_ms": 1e3 * opened[math.ceil(0.99 * len(opened)) - 1],
            "commit_ms": 1e3 * statistics.median(commits),
            "segments_ms": 1e3 * statistics.median(listed),
            "sql_scans_ms": 1e3 * statistics.median(again),
            "sql_scans_new_snapshot_ms": 1e3 * statistics.median(first),
            "manifest_bytes": (repository.path / manifest_name(snapshot.generation)).stat().st_size,
        }


def of_rows(count: int) -> dict[str, float]:
    """SQL over so many patch rows: first on a fresh snapshot, then again on the same, and the memory that it took."""
    with tempfile.TemporaryDirectory() as folder:
        repository = with_rows(Path(folder) / "c", count)
        snapshot = repository.snapshot()
        query = "SELECT scan, avg(foreground) FROM patches WHERE x_mm BETWEEN 100 AND 120 GROUP BY scan"
        first = seconds(lambda: snapshot.sql(query, timeout_s=600), 1)
        again = seconds(lambda: snapshot.sql(query, timeout_s=600), 3)
        begun = seconds(lambda: snapshot.sql("SELECT * FROM patches LIMIT 10"), 3)
        counted = seconds(lambda: snapshot.sql("SELECT count(*) FROM patches", timeout_s=600), 1)
        sandbox._end_all()  # so that the peak of the processes that answered is known
        size = sum((repository.path / s.path / "patches.parquet").stat().st_size for s in snapshot.segments()[:1])
        return {
            "rows": count,
            "sql_patches_first_ms": 1e3 * first[0],
            "sql_patches_ms": 1e3 * statistics.median(again),
            "sql_limit_10_ms": 1e3 * statistics.median(begun),
            "sql_count_ms": 1e3 * counted[0],
            "peak_of_sql_process_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
            "peak_of_own_process_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "parquet_bytes_of_one_segment": size,
        }


def exponents(lines: list[dict[str, float]], over: str) -> dict[str, float]:
    """The slope of log(time) over log(size), by column, over the larger half of the sizes."""
    half = lines[len(lines) // 2 :] if len(lines) > 2 else lines
    x = np.log([line[over] for line in half])
    return {
        name: round(float(np.polyfit(x, np.log([line[name] for line in half]), 1)[0]), 2)
        for name in lines[0]
        if name.endswith("_ms") and len(half) > 1
    }


def draw(result: dict[str, Any], out: Path) -> None:
    """Times over sizes, both logarithmic."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for over, axis in zip(("scans", "rows"), axes, strict=True):
        lines = result[over]
        for name in (name for name in lines[0] if name.endswith("_ms")):
            label = f"{name[:-3].replace('_', ' ')} (exponent {result[f'{over}_exponents'][name]:g})"
            axis.loglog([line[over] for line in lines], [line[name] for line in lines], "o-", label=label)
        axis.set(xlabel=over if over == "scans" else "patch rows", ylabel="ms")
        axis.legend(fontsize=7)
    figure.savefig(out, dpi=110)


def main() -> int:
    """Print one JSON line a size and the exponents; write all of it to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", default="10,100,1000,10000,100000")
    parser.add_argument("--rows", default="10000,100000,1000000,10000000,100000000")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if given.plot:
        draw(json.loads(given.out.read_text(encoding="utf-8")), given.plot)
        return 0
    result: dict[str, Any] = {"date": utc_now()[:10], "rounds": ROUNDS}
    for over, sizes, measure in (("scans", given.scans, of_scans), ("rows", given.rows, of_rows)):
        lines = []
        for size in filter(None, sizes.split(",")):
            lines.append({name: round(value, 2) for name, value in measure(int(size)).items()})
            print(json.dumps(lines[-1]), flush=True)
        if lines:
            result[over] = lines
            result[f"{over}_exponents"] = exponents(lines, over)
            print(json.dumps(result[f"{over}_exponents"]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
