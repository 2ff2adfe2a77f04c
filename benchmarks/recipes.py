"""Is the index that was chosen the quickest that a sweep finds, and what does it cost under filters?

Vectors are a smooth map of points in a box with noise, as embeddings that follow position are. For each size: what
`build_index` chooses and promises; the best of a sweep over projections, codes, lists and rows ranked again, for the
same recall, both timed in turn; and single queries under random and spatial filters against exact search.

    OMP_NUM_THREADS=1 python benchmarks/recipes.py --sizes 30000x1024 100000x128
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray
from position_like import position_like

from isimed_index.index.exact import ExactIndex
from isimed_index.index.goal import Samples
from isimed_index.index.plan import build_index
from isimed_index.index.recall import RecallTest
from isimed_index.index.recipe import Recipe, ram_bytes
from isimed_index.index.search import LiveIndex
from isimed_index.index.spectrum import Axes
from isimed_index.index.strata import Filters
from isimed_index.index.trials import Trained
from isimed_index.index.tune import Tuned, live, tune

RESULT = Path(__file__).parent / "results" / "recipes.json"
SCANS = 50
QUERIES = 60
ROUNDS = 5


def sweep(exact: ExactIndex, target: float) -> list[tuple[Recipe, Tuned]]:
    """Every recipe of a grid at its quickest setting, the quickest first."""
    samples = Samples.draw(exact, 0)
    sample = exact.vectors(samples.training)
    trained = Trained(exact, RecallTest.prepare(exact, samples.tuners), sample, Axes.of(sample))
    lists = 1 << round(float(np.log2(2 * np.sqrt(len(exact)))))
    found = []
    for dims in (8, 16, 32, 64):
        for code in ("SQ8", "SQ4"):
            for count in (lists // 2, lists):
                tuned = tune(
                    trained.build(Recipe(f"PCA{dims},IVF{count},{code}", count, 1)), exact, trained.test, target
                )
                if tuned.ms is not None:
                    found.append((tuned.index.recipe, tuned))
    return sorted(found, key=lambda one: one[1].ms or 0.0)


def single_ms(index: LiveIndex, queries: NDArray[np.float32], among: NDArray[np.int64] | None = None) -> list[float]:
    """Milliseconds of each query, asked alone: the best of three."""
    times = []
    for query in queries:
        tries = []
        for _ in range(3):
            start = time.perf_counter()
            index.search(query[None], 10, among)
            tries.append(1e3 * (time.perf_counter() - start))
        times.append(min(tries))
    return times


def measure(n: int, dim: int, target: float) -> dict[str, object]:
    """One size."""
    vectors, places = position_like(n, dim, 0)
    blocks = list(zip(np.array_split(np.arange(n), SCANS), np.array_split(vectors, SCANS), strict=True))
    exact = ExactIndex(blocks, "l2")
    fresh = position_like(QUERIES, dim, 1)[0].astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        card = build_index(Path(folder), blocks, "l2", target, centres=places.astype(np.float32))
        build_s = time.perf_counter() - start
        chosen = LiveIndex.open(blocks, "l2", Path(folder))
    print(card.explain(), flush=True)
    best = live(exact, sweep(exact, target)[0][1].index)
    rounds = [(np.median(single_ms(chosen, fresh)), np.median(single_ms(best, fresh))) for _ in range(ROUNDS)]
    truth = exact.search(fresh, 10).distances[:, -1:]
    assert best.index is not None
    result: dict[str, object] = {
        "rows": n,
        "dim": dim,
        "build_s": round(build_s, 1),
        "chosen": card.recipe.factory,
        "chosen_ms": round(float(np.median([a for a, _ in rounds])), 4),
        "chosen_recall_of_new_queries": round(float(np.mean(chosen.search(fresh, 10).distances <= truth)), 4),
        "swept": best.index.recipe.factory,
        "swept_ms": round(float(np.median([b for _, b in rounds])), 4),
        "swept_recall_of_new_queries": round(float(np.mean(best.search(fresh, 10).distances <= truth)), 4),
        "chosen_over_swept": round(float(np.median([a / b for a, b in rounds])), 3),
        "memory_of_float32_flat": round(card.resident_bytes / ram_bytes(Recipe("Flat"), n, dim), 4),
        "exact_ms": round(float(np.median(single_ms(live_exact(exact), fresh[:9]))), 2),
    }
    plain = single_ms(chosen, fresh)
    result["p99_ms"] = {"all": round(float(np.quantile(plain, 0.99)), 3)}
    result["recall"] = {"all": card.recall_at_10}
    for one in Filters(exact, np.sort(np.random.default_rng(5).choice(n, QUERIES, replace=False)), 5):
        name = f"{one.shape} {one.share:g}"
        result["recall"][name] = round(one.test.recall(chosen), 4)  # type: ignore[index]
        taken = single_ms(chosen, one.test.queries, one.test.among)
        result["p99_ms"][name] = round(float(np.quantile(taken, 0.99)), 3)  # type: ignore[index]
    return result


def live_exact(exact: ExactIndex) -> LiveIndex:
    """Exact search alone."""
    return LiveIndex(exact.blocks, exact.metric)


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["30000x1024", "100000x128"])
    parser.add_argument("--min-recall", type=float, default=0.98)
    given = parser.parse_args()
    faiss.omp_set_num_threads(1)
    sizes = [tuple(int(part) for part in size.split("x")) for size in given.sizes]
    results = [measure(n, dim, given.min_recall) for n, dim in sizes]
    report = {"machine": platform.processor() or platform.machine(), "faiss": faiss.__version__, "sizes": results}
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
