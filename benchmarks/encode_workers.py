"""What a second worker is worth: the same scans encoded by one Dask worker with one thread, and by several such.

    python benchmarks/encode_workers.py [--workers 1,2] [--preset default] [--scans N] [--rounds N] [--out FILE.json]

Each worker is a process that computes on one thread, so that n of them have n cores. A cluster is warm when it is
timed: its workers have loaded the encoder. Rounds are interleaved; `speedup` is the median over rounds of the seconds
of the first number of workers over those of another. `index` also has a coordinator, which commits what they encode.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import LocalCluster
from encode import index_seconds, kept_encoder, made_store


def seconds_with(workers: int, store: Path, place: Path, encoder: Path) -> float:
    """To encode the store with so many workers, by the clock, once they are warm."""
    with LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        options = {"scheduler": cluster.scheduler_address, "runtime": "torch"}
        index_seconds(store, place, encoder, options)
        return index_seconds(store, place, encoder, options)[0]


def main() -> int:
    """Print the figures as JSON, and write them where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--scans", type=int, default=12)
    parser.add_argument("--spacing", type=float, default=1.5, help="of the heads, in mm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    numbers = [int(number) for number in given.workers.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        store = made_store(place, None, given.scans, given.spacing)
        encoder = kept_encoder(place / "encoder", given.preset)
        rounds = [[seconds_with(number, store, place, encoder) for number in numbers] for _ in range(given.rounds)]
    found = np.array(rounds)  # (rounds, numbers)
    speedup = found[:, :1] / found
    result: dict[str, Any] = {
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "preset": given.preset,
        "scans": given.scans,
        "workers": numbers,
        "seconds": np.median(found, axis=0).round(2).tolist(),
        "speedup": np.median(speedup, axis=0).round(2).tolist(),
        "speedup_of_each_round": speedup.round(2).tolist(),
    }
    print(json.dumps(result))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
