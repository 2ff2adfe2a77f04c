"""How scans are best kept: size, and speed of writing and reading, by codec and by size of chunks and shards.

Volumes: real ones below the folder that ISIMED_TEST_DATA names, or else a phantom head. Every setting is written and
read in turn, round after round, so that other load falls on all alike; files are in the page cache. Speeds count
uncompressed bytes, of boxes those of the boxes. CRC-32C is on, as it is in a store. At the end: what the coarser levels
of a stored scan cost beside level 0.

Run from the repository: python benchmarks/codecs.py [ROUNDS]
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs
import zarr.storage
from numpy.typing import NDArray

from isimed_index.scans.chunks import write_chunks
from isimed_index.scans.read import read_scan
from isimed_index.scans.scan import Scan
from isimed_index.testing.templates import ellipsoid_head

OUT = Path(__file__).parent / "results" / "codecs.json"
BOXES, SIDE = 40, 64
FILES = (  # below ISIMED_TEST_DATA; what is not there is left out
    "ct/3DCT_lung_baseline.mha",
    "ct/TotalSegmentator_000*_0000.nii.gz",
    "ct/example_ct.nii.gz",
    "ct/example_seg.nii.gz",
    "odd/FLAIR.nrrd",
    "odd/norm.mgz",
    "ixi/t1/IXI0*_T1.nii.gz",
)
MOST_OF_A_PATTERN = 3

CODECS: dict[str, list[Any]] = {
    "none": [],
    "zstd 1": [zarr.codecs.ZstdCodec(level=1)],
    "zstd 3": [zarr.codecs.ZstdCodec(level=3)],
    "zstd 9": [zarr.codecs.ZstdCodec(level=9)],
}
for name, levels in {"zstd": (1, 3, 5, 9), "lz4": (5,)}.items():
    for level in levels:
        for shuffle in ("shuffle", "bitshuffle"):
            codec = zarr.codecs.BloscCodec(cname=name, clevel=level, shuffle=shuffle)
            CODECS[f"blosc {name} {level} {shuffle}"] = [codec]
SIZES = [(32, 256), (64, 64), (64, 128), (64, 256), (128, 256), (64, 512)]  # chunk and shard
STORED = "blosc zstd 1 shuffle"  # what a store uses, and sizes are compared with
MEASURED = ("ratio", "write_mb_s", "read_mb_s", "boxes_mb_s", "voxel_ms")
Setting = tuple[str, int, int]  # codec, chunk, shard


def volumes() -> Iterator[tuple[str, NDArray[Any]]]:
    """Names and stored voxels of what is measured."""
    folder = os.environ.get("ISIMED_TEST_DATA")
    found = [path for part in FILES for path in sorted(Path(folder).glob(part))[:MOST_OF_A_PATTERN]] if folder else []
    for path in found:
        yield path.relative_to(folder or ".").as_posix(), read_scan(path, "benchmark").voxels
    if not found:
        head = ellipsoid_head(2.0)
        yield "phantom", np.rint(head.values * 100).astype(np.int16)


def write(folder: Path, voxels: NDArray[Any], setting: Setting) -> float:
    """Write an array as a store does; seconds."""
    codec, chunk, shard = setting
    shards = tuple(min(shard, chunk * math.ceil(n / chunk)) for n in voxels.shape)
    began = time.perf_counter()
    array = zarr.create_array(
        store=zarr.storage.LocalStore(folder),
        shape=voxels.shape,
        dtype=voxels.dtype,
        chunks=(chunk,) * 3,
        shards=shards,
        compressors=[*CODECS[codec], zarr.codecs.Crc32cCodec()],
        config={"write_empty_chunks": True},
    )
    array[...] = voxels
    return time.perf_counter() - began


def read(folder: Path, voxels: NDArray[Any]) -> tuple[float, float, int, float]:
    """Read it whole, random boxes of it, and single voxels; seconds of each, and the bytes of the boxes."""
    array = zarr.open_array(zarr.storage.LocalStore(folder), mode="r")
    began = time.perf_counter()
    whole = np.asarray(array[...])
    of_whole = time.perf_counter() - began
    assert np.array_equal(whole, voxels)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, np.maximum(1, np.array(voxels.shape) - SIDE + 1), (BOXES, 3))
    size = 0
    began = time.perf_counter()
    for start in starts:
        size += np.asarray(array[tuple(slice(a, a + SIDE) for a in start)]).nbytes
    of_boxes = time.perf_counter() - began
    began = time.perf_counter()
    for start in starts:
        assert array[tuple(start)] == voxels[tuple(start)]
    return of_whole, of_boxes, size, (time.perf_counter() - began) / BOXES


def measure(voxels: NDArray[Any], settings: list[Setting], rounds: int) -> dict[Setting, Mapping[str, float]]:
    """Ratio and speeds in MB/s (medians) of every setting."""
    times: dict[Setting, list[tuple[float, ...]]] = {setting: [] for setting in settings}
    stored: dict[Setting, int] = {}
    for _ in range(rounds):
        for setting in settings:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch, "a.zarr")
                wrote = write(folder, voxels, setting)
                whole, boxes, of_boxes, voxel = read(folder, voxels)
                stored[setting] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            mb = voxels.nbytes / 1e6
            times[setting].append((mb / wrote, mb / whole, of_boxes / 1e6 / boxes, voxel * 1e3))
    found = {}
    for setting, each in times.items():
        speeds = [statistics.median(column) for column in zip(*each, strict=True)]
        names = MEASURED[1:]
        found[setting] = {
            "ratio": round(voxels.nbytes / stored[setting], 3),
            **{name: round(speed, 2) for name, speed in zip(names, speeds, strict=True)},
        }
    return found


def pyramid_cost(voxels: NDArray[Any], rounds: int) -> dict[str, float]:
    """Bytes and seconds of a scan with all its levels, over those of level 0 alone (medians)."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            alone = write(Path(scratch, "alone.zarr"), voxels, (STORED, 64, 256))
            began = time.perf_counter()
            write_chunks(Scan("benchmark", voxels, np.eye(4)), None, Path(scratch, "all.zarr"))
            times.append((alone, time.perf_counter() - began))
            sizes = [
                sum(path.stat().st_size for path in Path(scratch, name).rglob("*") if path.is_file())
                for name in ("alone.zarr", "all.zarr")
            ]
    alone, every = (statistics.median(column) for column in zip(*times, strict=True))
    return {"bytes": round(sizes[1] / sizes[0], 3), "seconds": round(every / alone, 2)}


def main() -> int:
    """Print a table of geometric means over all volumes and write every number to benchmarks/results/codecs.json."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    settings = [(codec, 64, 256) for codec in CODECS]
    settings += [(STORED, chunk, shard) for chunk, shard in SIZES if (chunk, shard) != (64, 256)]
    results, costs = [], []
    for name, voxels in volumes():
        said = {"volume": name, "dtype": voxels.dtype.name, "shape": list(voxels.shape)}
        for (codec, chunk, shard), found in measure(voxels, settings, rounds).items():
            results.append({**said, "codec": codec, "chunk": chunk, "shard": shard, **found})
        costs.append({**said, **pyramid_cost(voxels, rounds)})
        print(costs[-1], file=sys.stderr)
    OUT.write_text(
        json.dumps({"rounds": rounds, "results": results, "levels": costs}, indent=1) + "\n", encoding="utf-8"
    )
    print(f"{'codec':26} chunk shard  ratio  write   read  boxes MB/s  voxel ms")
    for codec, chunk, shard in settings:
        rows = [row for row in results if (row["codec"], row["chunk"], row["shard"]) == (codec, chunk, shard)]
        ratio, *speeds, voxel = (statistics.geometric_mean(row[key] for row in rows) for key in MEASURED)
        shown = " ".join(f"{speed:6.0f}" for speed in speeds)
        print(f"{codec:26} {chunk:5} {shard:5} {ratio:6.2f} {shown} {voxel:14.1f}")
    means = [statistics.geometric_mean(cost[key] for cost in costs) for key in ("bytes", "seconds")]
    print(f"all levels over level 0: bytes {means[0]:.2f}, seconds {means[1]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
