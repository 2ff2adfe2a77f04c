"""What every implementation of a protocol must do, as test classes: subclass, say how to make one, run pytest.

class TestMyIndex(IndexConformance):
    def make(self, blocks, metric):
        return MyIndex(blocks, metric)
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.protocol import Encoder, Vectors, encode_grid
from isimed_index.errors import EncoderMismatch, StoreLocked, UsageError
from isimed_index.grid import PatchGrid
from isimed_index.index.protocol import NO_ROW, Block, Hits, Index, Metric
from isimed_index.scans.prepare import Volume
from isimed_index.store import files
from isimed_index.store.place.storage import Storage

_METRICS: tuple[Metric, ...] = ("l2", "cosine")


def brute_force(
    blocks: Sequence[Block], metric: Metric, queries: ArrayLike, k: int, among: Sequence[int] | None = None
) -> Hits:
    """The slow, obvious oracle: every distance in double precision, sorted by distance and row id."""
    asked = np.asarray(queries, dtype=np.float64)
    row_ids = np.full((len(asked), k), NO_ROW, dtype=np.int64)
    distances = np.full((len(asked), k), np.inf, dtype=np.float32)
    allowed = None if among is None else set(among)
    for number, query in enumerate(asked):
        ranked = sorted(
            (np.float32(distance(query, vector, metric)), int(row_id))
            for ids, vectors in blocks
            for row_id, vector in zip(ids, vectors, strict=True)
            if allowed is None or int(row_id) in allowed
        )[:k]
        for place, (far, row_id) in enumerate(ranked):
            row_ids[number, place], distances[number, place] = row_id, far
    return Hits(row_ids, distances)


def distance(query: NDArray[np.float64], vector: ArrayLike, metric: Metric) -> float:
    """Euclidean distance, or 1 - cosine (1 where a vector is zero), of two vectors (d,)."""
    other = np.asarray(vector, dtype=np.float64)
    if metric == "l2":
        return float(np.linalg.norm(query - other))
    lengths = float(np.linalg.norm(query) * np.linalg.norm(other))
    return max(0.0, 1.0 - float(query @ other) / lengths) if lengths > 0 else 1.0


class IndexConformance:
    """The contract of `Index`, for implementations that are exact on a few hundred rows."""

    tolerance = 2e-3  # of distances; float32 products of vectors of length ~10 cancel to about this

    def make(self, blocks: Sequence[Block], metric: Metric) -> Index:
        """Return the index under test over `blocks`."""
        raise NotImplementedError

    def test_finds_the_nearest_rows(self) -> None:
        for metric in _METRICS:
            blocks, queries = self.data()
            for k in (1, 10):
                self.check(self.make(blocks, metric).search(queries, k), blocks, metric, queries, k)

    def test_a_stored_vector_finds_itself(self) -> None:
        for metric in _METRICS:
            blocks, _ = self.data()
            row_ids, vectors = blocks[1]
            hits = self.make(blocks, metric).search(vectors[:5], 1)
            assert hits.row_ids[:, 0].tolist() == row_ids[:5].tolist()
            np.testing.assert_allclose(hits.distances, 0, atol=self.tolerance)

    def test_shapes_and_types(self) -> None:
        blocks, queries = self.data()
        hits = self.make(blocks, "l2").search(queries, 3)
        assert (hits.row_ids.shape, hits.row_ids.dtype) == ((len(queries), 3), np.dtype(np.int64))
        assert (hits.distances.shape, hits.distances.dtype) == ((len(queries), 3), np.dtype(np.float32))
        assert self.make(blocks, "l2").search(queries[:0], 3).row_ids.shape == (0, 3)

    def test_more_asked_than_there_is(self) -> None:
        blocks, queries = self.data()
        total = sum(len(row_ids) for row_ids, _ in blocks)
        hits = self.make(blocks, "l2").search(queries, total + 7)
        assert hits.found.sum(axis=1).tolist() == [total] * len(queries)
        self.check(hits, blocks, "l2", queries, total + 7)

    def test_a_filter_is_kept_and_filled(self) -> None:
        rng = np.random.default_rng(3)
        for metric in _METRICS:
            blocks, queries = self.data()
            index = self.make(blocks, metric)
            every = np.concatenate([row_ids for row_ids, _ in blocks])
            for share in (0.01, 0.1, 0.5, 0.99):
                among = rng.permutation(every)[: max(1, int(share * every.size))]
                hits = index.search(queries, 10, among)
                assert hits.found.sum(axis=1).tolist() == [min(10, among.size)] * len(queries)
                self.check(hits, blocks, metric, queries, 10, among.tolist())

    def test_a_filter_along_one_axis_is_filled(self) -> None:
        blocks, queries = self.data()
        every = np.concatenate([row_ids for row_ids, _ in blocks])
        height = np.concatenate([vectors[:, 0] for _, vectors in blocks])
        among = every[np.argsort(height)[: every.size // 10]]
        self.check(self.make(blocks, "l2").search(queries, 10, among), blocks, "l2", queries, 10, among.tolist())

    def test_filters_of_strange_rows(self) -> None:
        blocks, queries = self.data()
        index = self.make(blocks, "l2")
        first = int(blocks[0][0][0])
        assert not index.search(queries, 4, []).found.any()
        assert not index.search(queries, 4, [1, 2**40]).found.any()
        twice = index.search(queries, 4, np.array([2**40, first, first, 1]))
        assert twice.row_ids.tolist() == [[first, NO_ROW, NO_ROW, NO_ROW]] * len(queries)
        assert np.isinf(twice.distances[:, 1:]).all()

    def test_equal_vectors_are_all_found(self) -> None:
        for metric in _METRICS:
            row_ids = np.arange(5, 45, dtype=np.int64)
            vectors = np.ones((40, 4), dtype=np.float32)
            hits = self.make([(row_ids, vectors)], metric).search(np.ones((1, 4)), 40)
            assert sorted(hits.row_ids[0].tolist()) == row_ids.tolist()

    def test_a_zero_vector_has_no_direction(self) -> None:
        vectors = np.array([[0, 0], [0, 3], [4, 0]], dtype=np.float32)
        hits = self.make([(np.arange(3, dtype=np.int64), vectors)], "cosine").search([[0, 0], [1, 0]], 3)
        np.testing.assert_allclose(hits.distances, [[1, 1, 1], [0, 1, 1]], atol=1e-6)
        assert hits.row_ids[1, 0] == 2

    def test_refuses_what_does_not_fit(self) -> None:
        blocks, queries = self.data()
        index = self.make(blocks, "l2")
        refused: list[tuple[ArrayLike, int]] = [
            (queries[:, :3], 1),
            (queries[0], 1),
            (queries, 0),
            (np.full_like(queries, np.nan), 1),
        ]
        for asked, k in refused:
            try:
                index.search(asked, k)
            except UsageError:
                continue
            raise AssertionError(f"queries {np.shape(asked)} with k = {k} were not refused")

    @staticmethod
    def data() -> tuple[list[Block], NDArray[np.float32]]:
        """Three blocks of vectors (n, 8), the row ids with gaps between and within them, and queries (25, 8)."""
        rng = np.random.default_rng(7)
        starts = (1_000, 1_500, 90_000)
        blocks: list[Block] = []
        for start, size in zip(starts, (150, 40, 210), strict=True):
            row_ids = start + np.arange(size, dtype=np.int64) * (2 if start == 1_500 else 1)
            blocks.append((row_ids, rng.normal(0, 4, (size, 8)).astype(np.float32)))
        return blocks, rng.normal(0, 4, (25, 8)).astype(np.float32)

    def check(
        self,
        hits: Hits,
        blocks: Sequence[Block],
        metric: Metric,
        queries: NDArray[np.float32],
        k: int,
        among: Sequence[int] | None = None,
    ) -> None:
        """Compare hits with brute force: the distances, that they are those of the rows, and that no row repeats."""
        truth = brute_force(blocks, metric, queries, k, among)
        assert hits.found.tolist() == truth.found.tolist()
        np.testing.assert_allclose(hits.distances, truth.distances, atol=self.tolerance)
        vectors = {int(row_id): vector for ids, block in blocks for row_id, vector in zip(ids, block, strict=True)}
        for query, row_ids, distances in zip(queries, hits.row_ids.tolist(), hits.distances.tolist(), strict=True):
            kept = [row_id for row_id in row_ids if row_id != NO_ROW]
            assert len(set(kept)) == len(kept)
            assert among is None or set(kept) <= set(among)
            own = [distance(query.astype(np.float64), vectors[row_id], metric) for row_id in kept]
            np.testing.assert_allclose(distances[: len(kept)], own, atol=self.tolerance)


class EncoderConformance:
    """The contract of `Encoder`, and of `GridEncoder` where the encoder under test is one."""

    tolerance = 1e-4  # of vectors whose values are of order one; others are compared relative to their largest

    def make(self) -> Encoder:
        """Return the encoder under test."""
        raise NotImplementedError

    def test_the_card_says_what_is_returned(self) -> None:
        encoder = self.make()
        self.check(encoder.encode(self.patches(encoder, 5)), encoder.card, 5)

    def test_no_patches(self) -> None:
        encoder = self.make()
        self.check(encoder.encode(self.patches(encoder, 0)), encoder.card, 0)

    def test_a_vector_depends_on_its_patch_alone(self) -> None:
        encoder = self.make()
        patches = self.patches(encoder, 4)
        before = patches.copy()
        together = encoder.encode(patches)
        self.same(together, encoder.encode(patches))
        for number in range(4):
            self.same({name: y[[number]] for name, y in together.items()}, encoder.encode(patches[[number]]))
        np.testing.assert_array_equal(patches, before)

    def test_other_patches_have_other_vectors(self) -> None:
        encoder = self.make()
        patches = self.patches(encoder, 1)
        vector = encoder.encode(patches)[encoder.card.match_output]
        others = {"another patch": self.patches(encoder, 2)[1:]}
        others |= {f"its mirror image along axis {axis}": np.flip(patches, axis + 1) for axis in range(3)}
        for what, other in others.items():
            far = np.abs(encoder.encode(np.ascontiguousarray(other))[encoder.card.match_output] - vector).max()
            assert far > self.tolerance * np.abs(vector).max(), f"{what} has the same vector"

    def test_refuses_patches_of_another_size(self) -> None:
        encoder = self.make()
        edge = encoder.card.patch_vox
        for shape in ((edge + 1, edge, edge), (edge, edge, edge - 1)):
            try:
                encoder.encode(np.zeros((2, *shape), np.float32))
            except EncoderMismatch:
                continue
            raise AssertionError(f"patches of shape {shape} were not refused")

    def test_a_grid_is_encoded_as_its_patches_are(self) -> None:
        """Any lattice, any selection in any order, patches that stick out of the volume included."""
        encoder = self.make()
        edge, stride = encoder.card.patch_vox, encoder.card.stride_vox
        volume = self.volume((edge + 9, edge + 4, edge - 3))
        for step in sorted({max(1, stride // 2), stride, stride + 1, 2 * stride}):
            grid = PatchGrid((edge + 9, edge + 4, edge - 3), edge, step, volume.affine)
            drawn = np.random.default_rng(step).choice(len(grid), min(20, len(grid)), replace=False)
            numbers = np.concatenate([[len(grid) - 1, 0], drawn]).astype(np.int64)
            expected = encoder.encode(grid.extract(volume.values, numbers, volume.background))
            found = encode_grid(encoder, volume, grid, numbers)
            self.check(found, encoder.card, len(numbers))
            self.same(found, expected)
            self.check(encode_grid(encoder, volume, grid, numbers[:0]), encoder.card, 0)

    def test_refuses_a_grid_of_other_patches(self) -> None:
        encoder = self.make()
        edge = encoder.card.patch_vox
        volume = self.volume((edge, edge, edge))
        try:
            encode_grid(encoder, volume, PatchGrid((edge, edge, edge), edge + 4, 4, volume.affine), np.array([0]))
        except EncoderMismatch:
            return
        raise AssertionError("a grid of other patches was not refused")

    @staticmethod
    def patches(encoder: Encoder, n: int) -> NDArray[np.float32]:
        """Patches (n, x, y, z) of noise within −1…1 on a slope, no two alike."""
        edge = encoder.card.patch_vox
        values = np.random.default_rng(3).uniform(-1, 1, (n, edge, edge, edge))
        return (values * np.linspace(0.2, 1, edge)).astype(np.float32)

    @staticmethod
    def volume(shape: tuple[int, int, int]) -> Volume:
        """A volume (x, y, z) of noise within −1…1."""
        values = np.random.default_rng(4).uniform(-1, 1, shape).astype(np.float32)
        return Volume(values, np.diag([2.0, 2.0, 2.0, 1.0]), -1.0, values > -0.8)

    @staticmethod
    def check(found: Vectors, card: EncoderCard, n: int) -> None:
        """Names, shapes and types are those that the card says."""
        assert set(found) == set(card.outputs)
        for name, dim in card.outputs.items():
            assert found[name].shape == (n, dim), f"{name}: {found[name].shape}"
            assert found[name].dtype == np.float32
            assert np.isfinite(found[name]).all()

    def same(self, found: Vectors, expected: Vectors) -> None:
        """Two sets of vectors agree."""
        for name, vectors in expected.items():
            scale = max(1.0, float(np.abs(vectors).max(initial=0)))
            np.testing.assert_allclose(found[name], vectors, rtol=0, atol=self.tolerance * scale, err_msg=name)


class StorageConformance:
    """The contract of `Storage`."""

    def make(self) -> Storage:
        """Return an empty storage whose folders are made, another one at each call."""
        raise NotImplementedError

    def elsewhere(self, storage: Storage) -> Storage:
        """The same storage as another machine sees it."""
        raise NotImplementedError

    def let_claims_run_out(self, storage: Storage) -> None:
        """Let as much time pass as a claim lives on after its process; nothing where it ends with it."""

    def test_what_is_published_is_read_and_listed(self) -> None:
        storage = self.make()
        storage.publish("manifests/1.json", b"one")
        storage.publish("manifests/0.json", b"")
        other = self.elsewhere(storage)
        assert (other.read("manifests/1.json"), other.read("manifests/0.json")) == (b"one", b"")
        assert other.names("manifests") == ["0.json", "1.json"]
        assert other.exists("manifests/1.json")
        assert not other.exists("manifests/2.json")
        assert not other.exists("manifests/1")

    def test_what_is_missing_is_not_found(self) -> None:
        storage = self.make()
        for ask in (
            partial(storage.read, "manifests/1.json"),
            partial(storage.size, "segments/none"),
            partial(storage.size, "tables/none.parquet"),
            partial(storage.read_range, "segments/none/a.npy", 0, 4),
            partial(storage.move, "manifests/1.json", "tmp/1.json"),
        ):
            try:
                ask()
            except FileNotFoundError:
                continue
            raise AssertionError(f"{ask} found something")
        with suppress(FileNotFoundError):
            assert storage.names("nowhere") == []

    def test_what_is_there_is_not_published_again(self) -> None:
        storage = self.make()
        storage.publish("tags/v1.json", b"first")
        assert not _won(self.elsewhere(storage), "tags/v1.json", b"second")
        assert storage.read("tags/v1.json") == b"first"

    def test_one_of_many_threads_publishes(self) -> None:
        with ThreadPoolExecutor(8) as pool:
            self.check_race(pool, writers=8, rounds=10)

    def test_one_of_several_processes_publishes(self) -> None:
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            self.check_race(pool, writers=4, rounds=10)

    def check_race(self, pool: Executor, writers: int, rounds: int) -> None:
        """Of several writers of one name, one succeeds, and its content is what is read."""
        storage = self.make()
        for turn in range(rounds):
            name = f"manifests/{turn}.json"
            contents = [f"writer {number}".encode() for number in range(writers)]
            won = list(pool.map(partial(_won, storage, name), contents))
            assert won.count(True) == 1
            assert storage.read(name) == contents[won.index(True)]

    def test_a_file_is_replaced(self) -> None:
        storage = self.make()
        for content in (b"1", b"22", b""):
            storage.replace("HEAD.json", content)
            assert self.elsewhere(storage).read("HEAD.json") == content

    def test_files_and_folders_are_removed(self) -> None:
        storage = self.make()
        folder, file = self.stage(storage)
        storage.settle([folder, file])
        storage.publish("tags/v1.json", b"{}")
        for path in (folder, file, "tags/v1.json", "tags/never.json"):
            storage.remove(path)
            for one in (storage, self.elsewhere(storage)):
                assert not one.exists(path)
                assert path.split("/")[1] not in one.names(path.split("/")[0])

    def test_a_removal_spares_names_that_begin_alike(self) -> None:
        storage = self.make()
        for name in ("v1.json", "v1.json.old", "v1"):
            storage.publish(f"tags/{name}", b"{}")
        storage.remove("tags/v1.json")
        assert storage.names("tags") == ["v1", "v1.json.old"]

    def test_files_and_folders_are_moved(self) -> None:
        storage = self.make()
        folder, _ = self.stage(storage)
        storage.settle([folder])
        storage.publish("manifests/7.json", b"seven")
        storage.move("manifests/7.json", "tmp/expired-7.json")
        storage.move(folder, "quarantine/bad")
        other = self.elsewhere(storage)
        assert other.read("tmp/expired-7.json") == b"seven"
        assert other.read("quarantine/bad/inner/deep.bin") == bytes(range(256)) * 3
        assert other.names("manifests") == other.names("segments") == []

    def test_artefacts_come_back_as_they_were_staged(self) -> None:
        storage = self.make()
        staged = self.stage(storage)
        storage.settle(staged)
        storage.settle(staged)  # a commit that is tried again settles again
        other = self.elsewhere(storage)
        for path in staged:
            here, there = storage.fetch(path), other.fetch(path)
            assert files.tree_digest(there) == files.tree_digest(here)
            assert other.size(path) == files.tree_size(here)
            assert other.at_hand(path)

    def test_many_fetch_at_once(self) -> None:
        storage = self.make()
        folder, _ = self.stage(storage)
        storage.settle([folder])
        other = self.elsewhere(storage)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: files.tree_digest(other.fetch(folder)), range(8)))
        assert set(found) == {files.tree_digest(storage.fetch(folder))}

    def test_a_part_of_a_file_is_read(self) -> None:
        storage = self.make()
        folder, file = self.stage(storage)
        storage.settle([folder, file])
        for one in (storage, self.elsewhere(storage)):
            assert one.read_range(f"{folder}/inner/deep.bin", 250, 10) == bytes(range(250, 256)) + bytes(range(4))
            assert one.read_range(f"{folder}/inner/deep.bin", 760, 100) == bytes(range(248, 256))
            assert one.read_range(file, 0, 0) == b""

    def test_a_claim_is_seen_until_it_is_released(self) -> None:
        storage = self.make()
        claim = storage.claim("leases", "reader")
        claim.note({"generation": 3})
        claim.note({"generation": 4})
        other = self.elsewhere(storage)
        assert other.claims("leases") == [("reader", b'{"generation":3}\n{"generation":4}\n', True)]
        other.sweep()
        assert [name for name, _, _ in other.claims("leases")] == ["reader"]
        claim.release()
        claim.release()
        assert other.claims("leases") == []
        assert other.claims("intents") == []

    def test_the_claim_of_a_dead_process_is_dead_and_swept(self) -> None:
        storage = self.make()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_hold, args=(storage, theirs))
        process.start()
        try:
            assert ours.poll(60)
            assert [alive for _, _, alive in storage.claims("intents")] == [True]
        finally:
            process.kill()
            process.join()
        self.let_claims_run_out(storage)
        assert [(notes, alive) for _, notes, alive in storage.claims("intents")] == [(b'{"staged":"here"}\n', False)]
        storage.sweep()
        assert storage.claims("intents") == []

    def test_a_lock_is_held_by_one(self) -> None:
        storage = self.make()
        other = self.elsewhere(storage)
        with storage.exclusive("collect"):
            try:
                with other.exclusive("collect"):
                    raise AssertionError("two hold the lock")
            except StoreLocked:
                pass
            with other.exclusive("another"):
                pass
        with other.exclusive("collect"):
            pass

    @staticmethod
    def stage(storage: Storage) -> tuple[str, str]:
        """A sealed folder of several files, one of them empty, and a sealed file."""
        folder, file = f"segments/{files.new_id()}", f"tables/{files.new_id()}.parquet"
        (storage.root / folder / "inner").mkdir(parents=True)
        (storage.root / folder / "inner" / "deep.bin").write_bytes(bytes(range(256)) * 3)
        (storage.root / folder / "empty.json").write_bytes(b"")
        (storage.root / file).parent.mkdir(exist_ok=True)
        (storage.root / file).write_bytes(b"rows")
        for path in (folder, file):
            storage.seal(path)
        return folder, file


def _won(storage: Storage, name: str, content: bytes) -> bool:
    try:
        storage.publish(name, content)
    except FileExistsError:
        return False
    return True


def _hold(storage: Storage, ready: Any) -> None:
    """Take a claim and never release it."""
    claim = storage.claim("intents", "writer")
    claim.note({"staged": "here"})
    ready.send(True)
    time.sleep(600)
