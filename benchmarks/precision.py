"""What 16 bits cost: vectors that are stored in float16, and networks that are run in bfloat16.

    python benchmarks/precision.py STORE [--encoder ID] [--where SQL] [--pairs N] [--out FILE.json]

STORE has an encoder and scans with label maps; it is copied, and nothing is written to it. The copy is encoded with
`--precision fp32` and then with `bf16`, and both times the landmarks of `isimed evaluate` are looked up.

`stored` compares the vectors of the first as they are stored (float16, positions float32) with what the network gave in
float32: their relative error, and of patches that are drawn at random the share of the exact ten nearest of other scans
that are the exact ten nearest still.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import isimed_index as isi
from isimed_index.encode import encode_volume, prepared
from isimed_index.encoders.runtime import load_encoder
from isimed_index.encoders.runtimes.kind import Runtime
from isimed_index.lattice import Standard
from isimed_index.scans.chunks import open_chunks
from isimed_index.store.repository import Repository

NEAREST = 10
QUERIES = 1000


def landmarks(store: isi.Store, where: str | None, pairs: int) -> dict[str, dict[str, float]]:
    """The errors in mm of every predictor."""
    rows = store.evaluate(label_where=where, pairs=pairs).to_arrow().to_pylist()
    return {
        row["predictor"]: {name: round(row[name], 3) for name in ("median_mm", "mean_mm", "p95_mm")} for row in rows
    }


def nearest(standard: Standard, vectors: NDArray[Any], scan: NDArray[np.int64], queries: NDArray[np.int64]) -> Any:
    """The ten nearest patches of other scans, (queries, 10), by the encoder's own metric."""
    unit = torch.from_numpy(standard.unit(vectors))
    likeness = unit[queries] @ unit.T
    likeness[torch.from_numpy(scan[queries])[:, None] == torch.from_numpy(scan)] = -2
    return likeness.topk(NEAREST).indices.numpy()


def stored(place: Path, encoder: str, runtime: str) -> dict[str, float]:
    """How far the stored vectors are from those of the network, and from giving its neighbours."""
    head = Repository.open(place).snapshot()
    network = load_encoder(head.encoder_path(encoder), "cpu", runtime=Runtime(runtime))
    output = network.card.match_output
    given, kept, scan = [], [], []
    for number, (name, segment) in enumerate(sorted(head.segments_by_scan(encoder).items())):
        chunks = open_chunks(head.chunks_path(name))
        volume = prepared(chunks.values(), chunks.affine, network.card)
        given.append(encode_volume(network, volume, network.card.stride_vox)[2][output])
        kept.append(np.asarray(segment.vectors(output)))
        scan.append(np.full(len(kept[-1]), number))
    exact, half, of = np.concatenate(given), np.concatenate(kept), np.concatenate(scan)
    queries = np.random.default_rng(0).permutation(len(of))[:QUERIES]
    standard = Standard.of(network.card.metric, exact)
    a, b = (nearest(standard, vectors, of, queries) for vectors in (exact, half))
    same = [len(set(x) & set(y)) / NEAREST for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    off = np.linalg.norm(exact - half.astype(np.float32), axis=1)
    return {
        "patches": len(of),
        "scans": len(given),
        "relative_error": float(f"{np.sqrt((off**2).mean() / (exact**2).sum(axis=1).mean()):.1e}"),
        "recall_at_10": round(float(np.mean(same)), 4),
        "same_nearest": round(float((a[:, 0] == b[:, 0]).mean()), 4),
    }


def main() -> int:
    """Print what was measured as JSON, and write it to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--encoder")
    parser.add_argument("--where", help="SQL over scans: which are encoded")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--runtime", default="openvino")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {"runtime": given.runtime, "landmarks": {}}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "copy.isimed"
        shutil.copytree(given.store, place)
        store = isi.open(place, mode="a")
        for precision in ("fp32", "bf16"):
            report = store.index(given.encoder, where=given.where, runtime=given.runtime, precision=precision)
            result["landmarks"][precision] = landmarks(store, given.where, given.pairs)
            if precision == "fp32":
                result |= {"encoder": report.encoder, "stored": stored(place, report.encoder, given.runtime)}
            print(json.dumps(result), flush=True)
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
