"""Our index beside hnswlib, usearch, LanceDB, Qdrant Edge and exact FAISS: the same vectors, queries and recall.

    pip install hnswlib usearch lancedb qdrant-edge-py
    python benchmarks/search/peers.py [--sizes 10000 100000 1000000] [--dim 1024] [--recall 0.98] [--only NAME ...]

Vectors follow places, as benchmarks/position_like.py makes them; queries are new draws. Every engine builds
with all cores, then is opened again in a process of its own that is held on one core. Of its settings the quickest
is taken whose recall@10 reaches the target; those settings are then timed in turn, a query at a time, round by round.
Ratios are taken within a round. Told for each:

    recall, p50, p99   of 200 queries; a row is right if it is no farther than the true tenth
    batch_per_s        queries a second when all 200 are asked in one call (LanceDB and Qdrant Edge have none: a loop)
    memory_bytes       of the search process after all queries, over that before opening: anonymous and mapped pages
    build_s            seconds to build and to write
    filters            the same under `r < share`, random, and `x < quantile`, one end of the body; the filter is
                       evaluated within each query. usearch has none

An engine that is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from position_like import position_like

RESULT = Path(__file__).parents[1] / "results" / "peers.json"
K, QUERIES, ROUNDS, SCANS = 10, 200, 5, 50
FILTERED_QUERIES = 60
SHARES = (0.001, 0.01, 0.1, 0.5)
Setting = dict[str, int]


@dataclass
class Task:
    """What an engine is given: vectors (n, d) float16 on disk, queries (m, d) float32, columns `r` and `x` (n,)."""

    folder: Path
    recall: float

    @property
    def vectors(self) -> NDArray[np.float16]:
        return np.load(self.folder / "vectors.npy", mmap_mode="r")  # type: ignore[no-any-return]

    def read(self, name: str) -> NDArray[Any]:
        """A smaller array: `queries`, `truth`, `centres`, `r` or `x`."""
        return np.load(self.folder / f"{name}.npy")  # type: ignore[no-any-return]

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """What filters ask for."""
        return {name: self.read(name) for name in "rx"}


class Engine:
    """One engine: `build` writes, `open` reads, `search` answers with row numbers; `settings` are tried."""

    package = ""
    filters = True
    settings: ClassVar[tuple[Setting, ...]] = ({},)
    chosen: ClassVar[Setting | None] = None  # where the engine settles it itself

    def __init__(self, task: Task) -> None:
        self.task = task
        self.place = task.folder / type(self).__name__

    def build(self) -> None: ...

    def open(self) -> None: ...

    def search(self, query: NDArray[np.float32], setting: Setting, kept: tuple[str, float] | None) -> NDArray[np.int64]:
        raise NotImplementedError

    def batch(self, queries: NDArray[np.float32], setting: Setting) -> None:
        """All queries at once, where the engine has a call for it."""
        for query in queries:
            self.search(query, setting, None)

    def described(self) -> str:
        return ""


class Ours(Engine):
    """`LiveIndex` as a store opens it, over float16 vectors in memory-mapped blocks."""

    package = "isimed-index"
    settings = tuple({"percent": n} for n in (10, 25, 50, 100, 200, 400))  # of the lists that the index is told to read
    chosen: ClassVar[Setting] = {"percent": 100}

    def build(self) -> None:
        from isimed_index.index.plan import build_index

        self.place.mkdir()
        build_index(self.place, self._blocks(), "l2", self.task.recall, centres=self.task.read("centres"))

    def open(self) -> None:
        from isimed_index.index.search import LiveIndex

        self.index = LiveIndex.open(self._blocks(), "l2", self.place)
        self.columns = self.task.columns()
        assert self.index.index is not None
        self.recipe = self.index.index.recipe

    def search(self, query: NDArray[np.float32], setting: Setting, kept: tuple[str, float] | None) -> NDArray[np.int64]:
        self._set(setting)
        among = None if kept is None else np.flatnonzero(self.columns[kept[0]] < kept[1])
        return self.index.search(query[None], K, among).row_ids[0]

    def batch(self, queries: NDArray[np.float32], setting: Setting) -> None:
        self._set(setting)
        self.index.search(queries, K)

    def _set(self, setting: Setting) -> None:
        assert self.index.index is not None
        probes = round(self.recipe.probes * setting["percent"] / 100)
        self.index.index.recipe = replace(self.recipe, probes=min(max(1, probes), self.recipe.lists))

    def described(self) -> str:
        from isimed_index.index.card import IndexCard

        return IndexCard.read(self.place).recipe.factory

    def _blocks(self) -> list[tuple[NDArray[np.int64], NDArray[np.float16]]]:
        vectors = self.task.vectors
        edges = np.linspace(0, len(vectors), SCANS + 1).astype(int)
        return [(np.arange(a, b), vectors[a:b]) for a, b in pairwise(edges)]


class Flat(Engine):
    """FAISS's exact search over float32."""

    package = "faiss-cpu"

    def build(self) -> None:
        import faiss

        vectors = self.task.vectors
        index = faiss.IndexFlatL2(vectors.shape[1])
        for part in np.array_split(vectors, 64):
            index.add(part.astype(np.float32))
        faiss.write_index(index, str(self.place))

    def open(self) -> None:
        import faiss

        self.index = faiss.read_index(str(self.place))
        self.columns = self.task.columns()

    def search(self, query: NDArray[np.float32], setting: Setting, kept: tuple[str, float] | None) -> NDArray[np.int64]:
        import faiss

        if kept is None:
            return self.index.search(query[None], K)[1][0]
        bits = np.packbits(self.columns[kept[0]] < kept[1], bitorder="little")
        selector = faiss.IDSelectorBitmap(bits)
        return self.index.search(query[None], K, params=faiss.SearchParameters(sel=selector))[1][0]

    def batch(self, queries: NDArray[np.float32], setting: Setting) -> None:
        self.index.search(queries, K)


class Hnswlib(Engine):
    package = "hnswlib"
    settings = tuple({"ef": ef} for ef in (10, 14, 20, 28, 40, 56, 80, 113, 160, 226, 320, 640, 1280))

    def build(self) -> None:
        import hnswlib

        vectors = self.task.vectors
        index = hnswlib.Index("l2", vectors.shape[1])
        index.init_index(len(vectors), M=16, ef_construction=200)
        for part in np.array_split(np.arange(len(vectors)), 64):
            index.add_items(vectors[part[0] : part[-1] + 1].astype(np.float32), part)
        index.save_index(str(self.place))

    def open(self) -> None:
        import hnswlib

        self.index = hnswlib.Index("l2", self.task.vectors.shape[1])
        self.index.load_index(str(self.place))
        self.index.set_num_threads(1)
        self.columns = self.task.columns()

    def search(self, query: NDArray[np.float32], setting: Setting, kept: tuple[str, float] | None) -> NDArray[np.int64]:
        self.index.set_ef(max(setting["ef"], K))
        if kept is None:
            return self.index.knn_query(query, K)[0][0].astype(np.int64)
        mask = self.columns[kept[0]] < kept[1]
        try:
            return self.index.knn_query(query, K, filter=mask.__getitem__)[0][0].astype(np.int64)
        except RuntimeError:  # fewer than k were found
            return np.empty(0, np.int64)

    def batch(self, queries: NDArray[np.float32], setting: Setting) -> None:
        self.index.set_ef(max(setting["ef"], K))
        self.index.knn_query(queries, K)


class Usearch(Engine):
    package = "usearch"
    filters = False
    settings = tuple({"expansion": n} for n in (10, 14, 20, 28, 40, 56, 80, 113, 160, 226, 320, 640, 1280))

    def build(self) -> None:
        from usearch.index import Index

        vectors = self.task.vectors
        index = Index(ndim=vectors.shape[1], metric="l2sq", dtype="f16", connectivity=16, expansion_add=128)
        for part in np.array_split(np.arange(len(vectors)), 64):
            index.add(part, np.asarray(vectors[part[0] : part[-1] + 1]))
        index.save(str(self.place))

    def open(self) -> None:
        from usearch.index import Index

        self.index = Index.restore(str(self.place))

    def search(self, query: NDArray[np.float32], setting: Setting, kept: tuple[str, float] | None) -> NDArray[np.int64]:
        self.index.expansion_search = setting["expansion"]
        return self.index.search(query.astype(np.float16), K, threads=1).keys.astype(np.int64)

    def batch(self, queries: NDArray[np.float32], setting: Setting) -> None:
        self.index.expansion_search = setting["expansion"]
        self.index.search(queries.astype(np.float16), K, threads=1)


class LanceIvfSq(Engine):
    """LanceDB with lists and bytes; the candidates are ranked again by the table's vectors."""

    package = "lancedb"
    settings = tuple(
        {"probes": probes, "refine": refine} for probes in (2, 4, 8, 16, 32, 64, 128) for refine in (1, 2, 4)
    )

    def build(self) -> None:
        import lancedb
        import pyarrow as pa

        vectors, r, x = self.task.vectors, self.task.read("r"), self.task.read("x")
        dim = vectors.shape[1]

        def batches() -> Iterator[pa.RecordBatch]:
            for part in np.array_split(np.arange(len(vectors)), 64):
                rows = np.asarray(vectors[part[0] : part[-1] + 1]).astype(np.float32)
                column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), dim)
                yield pa.record_batch([pa.array(part), pa.array(r[part]), pa.array(x[part]), column], schema=schema)

        schema = pa.schema(
            [("id", pa.int64()), ("r", pa.float64()), ("x", pa.float64()), ("vector", pa.list_(pa.float32(), dim))]
        )
        table = lancedb.connect(self.place).create_table("t", batches(), schema=schema)
        table.create_index("vector", config=self._config(len(vectors)))
        for name in ("r", "x"):
            table.create_scalar_index(name)

    def _config(self, rows: int) -> Any:
        from lancedb.index import IvfSq

        return IvfSq(distance_type="l2", num_partitions=round(rows**0.5))

    def open(self) -> None:
        import lancedb

        self.table = lancedb.connect(self.place).open_table("t")

    def search(self, query: NDArray[np.float32], setting: Setting, kept: tuple[str, float] | None) -> NDArray[np.int64]:
        asked = self.table.search(query).select(["id", "_distance"]).limit(K).nprobes(setting["probes"])
        if setting["refine"] > 1:
            asked = asked.refine_factor(setting["refine"])
        if "ef" in setting:
            asked = asked.ef(setting["ef"])
        if kept is not None:
            asked = asked.where(f"{kept[0]} < {kept[1]!r}", prefilter=True)
        return asked.to_arrow()["id"].to_numpy()


class LanceHnswSq(LanceIvfSq):
    """LanceDB with graphs of bytes."""

    settings = tuple({"probes": probes, "ef": ef, "refine": 2} for probes in (1, 2) for ef in (20, 40, 80, 160, 320))

    def _config(self, rows: int) -> Any:
        from lancedb.index import HnswSq

        return HnswSq(distance_type="l2", num_partitions=1 if rows <= 100_000 else 2)


class QdrantEdge(Engine):
    """Qdrant in the process: graph and bytes in memory, ranked again by the stored vectors."""

    package = "qdrant-edge-py"
    settings = tuple({"ef": ef} for ef in (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512))

    def _config(self) -> Any:
        from qdrant_edge import (
            Distance,
            EdgeConfig,
            EdgeVectorParams,
            HnswIndexConfig,
            ScalarQuantizationConfig,
            ScalarType,
        )

        return EdgeConfig(
            vectors=EdgeVectorParams(
                size=self.task.vectors.shape[1],
                distance=Distance.Euclid,
                on_disk=True,
                hnsw_config=HnswIndexConfig(m=16, ef_construct=100, full_scan_threshold=10_000),
                quantization_config=ScalarQuantizationConfig(type=ScalarType.Int8, always_ram=True),
            )
        )

    def build(self) -> None:
        from qdrant_edge import EdgeShard, PayloadSchemaType, Point, UpdateOperation

        self.place.mkdir()
        shard = EdgeShard.create(str(self.place), self._config())
        for name in ("r", "x"):
            shard.update(UpdateOperation.create_field_index(name, PayloadSchemaType.Float))
        vectors, r, x = self.task.vectors, self.task.read("r"), self.task.read("x")
        for part in np.array_split(np.arange(len(vectors)), max(1, len(vectors) // 1000)):
            rows = np.asarray(vectors[part[0] : part[-1] + 1]).astype(np.float32).tolist()
            points = [
                Point(int(n), row, {"r": float(r[n]), "x": float(x[n])}) for n, row in zip(part, rows, strict=True)
            ]
            shard.update(UpdateOperation.upsert_points(points))
        shard.optimize()
        shard.flush()
        shard.close()

    def open(self) -> None:
        from qdrant_edge import EdgeShard

        self.shard = EdgeShard.load(str(self.place))

    def search(self, query: NDArray[np.float32], setting: Setting, kept: tuple[str, float] | None) -> NDArray[np.int64]:
        from qdrant_edge import FieldCondition, Filter, Query, QueryRequest, RangeFloat, SearchParams

        only = None if kept is None else Filter(must=[FieldCondition(kept[0], range=RangeFloat(lt=kept[1]))])
        request = QueryRequest(
            limit=K, query=Query.Nearest(query.tolist()), filter=only, params=SearchParams(hnsw_ef=setting["ef"])
        )
        return np.array([point.id for point in self.shard.query(request)], np.int64)


ENGINES: dict[str, type[Engine]] = {
    "isimed-index": Ours,
    "FAISS Flat": Flat,
    "hnswlib": Hnswlib,
    "usearch": Usearch,
    "LanceDB IVF_SQ": LanceIvfSq,
    "LanceDB IVF_HNSW_SQ": LanceHnswSq,
    "Qdrant Edge": QdrantEdge,
}
MODULES = {"isimed-index": "isimed_index", "faiss-cpu": "faiss", "qdrant-edge-py": "qdrant_edge"}


def resident() -> dict[str, int]:
    """Bytes of this process that are in memory: its own, and of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def build(engine: type[Engine], task: Task, pipe: Connection) -> None:
    """Build in a process of its own, with all cores."""
    start = time.perf_counter()
    engine(task).build()
    pipe.send(time.perf_counter() - start)


def serve(engine: type[Engine], task: Task, pipe: Connection) -> None:
    """Open on one core, and answer: tune, time, tell the memory."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    opened = engine(task)
    queries = task.read("queries")
    before = resident()
    opened.open()
    pipe.send(opened.described())
    asked: dict[str, Callable[..., Any]] = {
        "tune": lambda kept, truth: tuned(opened, queries, truth, kept),
        "time": lambda setting, kept, many: timed(opened, queries[:many], setting, kept),
        "batch": lambda setting: per_second(opened, queries, setting),
        "memory": lambda: {name: now - before[name] for name, now in resident().items()},
    }
    while (order := pipe.recv()) is not None:
        name, *rest = order
        pipe.send(asked[name](*rest))


def tuned(
    engine: Engine, queries: NDArray[np.float32], truth: NDArray[np.float64], kept: tuple[str, float] | None
) -> tuple[Setting, float, list[tuple[float, float]]]:
    """The quickest setting that reaches the recall, or that of the best; its recall; of all: recall, ms.

    Under a filter the first setting that reaches it.
    """
    vectors, found = engine.task.vectors, []
    columns = engine.task.columns()
    least = min(K, len(vectors) if kept is None else int((columns[kept[0]] < kept[1]).sum()))
    for setting in engine.settings if kept is None or engine.chosen is None else (engine.chosen,):
        times, right = [], []
        for query, limit in zip(queries[: len(truth)], truth, strict=True):
            start = time.perf_counter()
            rows = engine.search(query, setting, kept)
            times.append(time.perf_counter() - start)
            rows = np.unique(rows[rows >= 0])
            far = ((vectors[rows].astype(np.float64) - query) ** 2).sum(axis=1)
            right.append((far <= limit * (1 + 1e-6)).sum() / least)
        found.append((statistics.median(times), float(np.mean(right)), setting))
        if kept is not None and found[-1][1] >= engine.task.recall:
            break  # settings do ever more, and under a filter some take minutes
    reached = [one for one in found if one[1] >= engine.task.recall]
    best = min(reached, key=lambda one: one[0]) if reached else max(found, key=lambda one: one[1])
    if engine.chosen is not None:
        best = next(one for one in found if one[2] == engine.chosen)
    return best[2], round(best[1], 4), [(round(recall, 4), round(1e3 * s, 4)) for s, recall, _ in found]


def timed(
    engine: Engine, queries: NDArray[np.float32], setting: Setting, kept: tuple[str, float] | None
) -> tuple[float, float]:
    """Milliseconds of a query alone: p50 and p99."""
    times = []
    for query in queries:
        start = time.perf_counter()
        engine.search(query, setting, kept)
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.quantile(times, 0.5)), float(np.quantile(times, 0.99))


def per_second(engine: Engine, queries: NDArray[np.float32], setting: Setting) -> float:
    """Queries a second, all of them at once."""
    start = time.perf_counter()
    engine.batch(queries, setting)
    return len(queries) / (time.perf_counter() - start)


def true_tenth(task: Task, kept: tuple[str, float] | None, many: int) -> NDArray[np.float64]:
    """Squared distances (m,) of the true K-th rows, or of the last where there are fewer, in float64."""
    queries, vectors = task.read("queries")[:many].astype(np.float64), task.vectors
    rows = np.arange(len(vectors)) if kept is None else np.flatnonzero(task.read(kept[0]) < kept[1])
    best = np.full((len(queries), K), np.inf)
    for part in np.array_split(rows, max(1, len(rows) // 20_000)):
        block = vectors[part].astype(np.float32)
        rough = (block.astype(np.float64) ** 2).sum(axis=1) - 2 * (queries.astype(np.float32) @ block.T)
        near = np.argpartition(rough, min(4 * K, len(part) - 1), axis=1)[:, : 4 * K]
        far = ((block[near].astype(np.float64) - queries[:, None]) ** 2).sum(axis=2)
        best = np.sort(np.concatenate([best, far], axis=1), axis=1)[:, :K]
    return best[:, min(K, len(rows)) - 1]


def asked(pipe: Connection, *order: Any) -> Any:
    """An answer of an engine's process."""
    pipe.send(order)
    return pipe.recv()


def measure(rows: int, dim: int, recall: float, names: list[str]) -> dict[str, Any]:
    """All engines on `rows` vectors."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        task = Task(Path(place), recall)
        rng = np.random.default_rng(3)
        vectors, points = position_like(rows, dim, 0)
        np.save(task.folder / "vectors.npy", vectors)
        np.save(task.folder / "centres.npy", points.astype(np.float32))
        np.save(task.folder / "queries.npy", position_like(QUERIES, dim, 1)[0].astype(np.float32))
        np.save(task.folder / "r.npy", rng.uniform(size=rows))
        np.save(task.folder / "x.npy", points[:, 0])
        del vectors, points
        np.save(task.folder / "truth.npy", true_tenth(task, None, QUERIES))
        filters = {f"{column} {share:g}": (column, cut(task, column, share)) for column in "rx" for share in SHARES}
        truths = {name: true_tenth(task, kept, FILTERED_QUERIES) for name, kept in filters.items()}
        told: dict[str, Any] = {}
        pipes: dict[str, Connection] = {}
        for name in names:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=build, args=(ENGINES[name], task, theirs))
            process.start()
            theirs.close()
            told[name] = {"build_s": round(ours.recv(), 1), "version": version(ENGINES[name].package)}
            process.join()
            print(rows, name, told[name], file=sys.stderr, flush=True)
        for name in names:
            pipes[name], theirs = spawn.Pipe()
            spawn.Process(target=serve, args=(ENGINES[name], task, theirs), daemon=True).start()
            theirs.close()
            told[name]["kind"] = pipes[name].recv()
            told[name]["setting"], told[name]["recall"], told[name]["curve"] = asked(
                pipes[name], "tune", None, task.read("truth")
            )
            print(rows, name, told[name], file=sys.stderr, flush=True)
        turns(told, pipes, {None: (None, QUERIES)}, {name: {None: told[name]["setting"]} for name in names})
        for name in names:
            own = asked(pipes[name], "memory")
            told[name]["memory_bytes"] = own | {"of_float32": round(sum(own.values()) / (4 * rows * dim), 4)}
            if ENGINES[name].filters:
                told[name]["filters"] = {}
        with_filters = {name: pipe for name, pipe in pipes.items() if ENGINES[name].filters}
        for label, kept in filters.items():
            settings = {}
            for name, pipe in with_filters.items():
                settings[name], recall_of, _ = asked(pipe, "tune", kept, truths[label])
                told[name]["filters"][label] = {"recall": recall_of, "setting": settings[name]}
            turns(
                told,
                with_filters,
                {label: (kept, FILTERED_QUERIES)},
                {name: {label: settings[name]} for name in settings},
            )
            print(rows, label, {n: told[n]["filters"][label] for n in settings}, file=sys.stderr, flush=True)
        for pipe in pipes.values():
            pipe.send(None)
    return {"rows": rows, "dim": dim, "engines": told}


def cut(task: Task, column: str, share: float) -> float:
    """Below this lies the share of the rows."""
    return float(np.quantile(task.read(column), share))


def turns(
    told: dict[str, Any],
    pipes: dict[str, Connection],
    kept: dict[str | None, tuple[tuple[str, float] | None, int]],
    settings: dict[str, dict[str | None, Setting]],
) -> None:
    """Time all engines in turn; medians over rounds of p50, p99 and the ratio of p50 to ours go into `told`."""
    for label, (condition, many) in kept.items():
        rounds = [
            {name: asked(pipe, "time", settings[name][label], condition, many) for name, pipe in pipes.items()}
            for _ in range(ROUNDS)
        ]
        for name in pipes:
            at = told[name] if label is None else told[name]["filters"][label]
            at["p50_ms"], at["p99_ms"] = (round(statistics.median(one[name][n] for one in rounds), 4) for n in (0, 1))
            if "isimed-index" in pipes:
                ratios = [one[name][0] / one["isimed-index"][0] for one in rounds]
                at["to_ours"] = round(statistics.median(ratios), 2)
    together = [
        {name: asked(pipe, "batch", told[name]["setting"]) for name, pipe in pipes.items()}
        for _ in range(ROUNDS if None in kept else 0)
    ]
    for name in pipes if together else ():
        told[name]["batch_per_s"] = round(statistics.median(one[name] for one in together))
        if "isimed-index" in pipes:
            ratios = [one["isimed-index"] / one[name] for one in together]
            told[name]["batch_ours_to_this"] = round(statistics.median(ratios), 2)


def plot(sizes: list[dict[str, Any]], path: Path) -> None:
    """Recall against queries a second, a panel a size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(sizes), figsize=(4.2 * len(sizes), 3.6), squeeze=False, sharey=True)
    for panel, size in zip(axes[0], sizes, strict=True):
        for (name, engine), marker in zip(size["engines"].items(), "osD^vP*", strict=False):
            points = sorted(engine["curve"])
            panel.plot([p[0] for p in points], [1e3 / p[1] for p in points], marker=marker, ms=4, lw=1, label=name)
        panel.set(title=f"{size['rows']:,} × {size['dim']}", xlabel="recall@10", yscale="log", xlim=(0.8, 1.005))
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("queries a second, one core, one at a time")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    """Measure, write the result after each size, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--recall", type=float, default=0.98)
    parser.add_argument("--only", nargs="+", choices=list(ENGINES))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    modules = {name: MODULES.get(engine.package, engine.package) for name, engine in ENGINES.items()}
    wanted = [name for name in ENGINES if name in (given.only or ENGINES)]
    names = [name for name in wanted if importlib.util.find_spec(modules[name])]
    print(f"not installed: {', '.join(set(wanted) - set(names)) or 'none'}", file=sys.stderr)
    report: dict[str, Any] = {"date": date.today().isoformat(), "cpu": platform.processor(), "sizes": []}
    for rows in given.sizes:
        report["sizes"].append(measure(rows, given.dim, given.recall, names))
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        plot(report["sizes"], given.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
