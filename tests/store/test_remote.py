"""A store in a bucket, against a real S3 server of this machine (moto's): nothing else was tried."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
from cohorts import COPIES, SPACING_MM, add_random_encoder, head, write_copy
from s3_server import BUCKET, S3Server
from store_builders import (
    ENCODER,
    LATTICE,
    add_encoder,
    add_frame,
    add_index,
    add_scan,
    add_segment,
    finish,
    patch_rows,
    scan_rows,
    stage_scan,
    start,
    vectors,
)
from typer.testing import CliRunner

import isimed_index
from isimed_cli.main import app
from isimed_index.errors import (
    Incompatible,
    MissingExtra,
    StoreDamaged,
    StoreLocked,
    StoreNotFound,
    StoreUnreachable,
    UsageError,
)
from isimed_index.store import files, segment
from isimed_index.store.place.bucket import Bucket
from isimed_index.store.place.remote import ObjectStorage, cache_of
from isimed_index.store.place.remote_claims import server_time
from isimed_index.store.place.storage import Storage, storage_of
from isimed_index.store.repository import Repository
from isimed_index.store.segment import write_segment
from isimed_index.store.tags import set_tag
from isimed_index.store.transaction import Proposal
from isimed_index.store.upkeep.collect import collect
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import delete_patches, delete_scans
from isimed_index.store.upkeep.purge import purge
from isimed_index.store.upkeep.restore import restore
from isimed_index.testing.conformance import StorageConformance

COUNTS = "SELECT scan, count(*) AS patches FROM patches GROUP BY scan ORDER BY scan"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, named by the environment, and an empty place for caches."""
    for name, value in {**server.environment, "ISIMED_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    return server


@pytest.fixture
def url(s3: S3Server) -> str:
    """A place in the bucket where nothing is yet."""
    return f"s3://{BUCKET}/{files.new_id()}/cohort.isimed"


def key(url: str, relative: str) -> str:
    return f"{url.removeprefix(f's3://{BUCKET}/')}/{relative}"


def elsewhere(url: str, tmp_path: Path) -> Repository:
    """The store as another machine opens it: with an empty cache."""
    found = ObjectStorage(url, tmp_path / "caches" / files.new_id())
    Repository.open(url)
    return Repository(found)


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def small_store(url: str | Path) -> Repository:
    repository = Repository.create(url)
    add_scan(repository, "sub-01_T1w")
    add_encoder(repository)
    add_segment(repository, "sub-01_T1w", 5)
    return repository


def whole_store(url: str) -> Repository:
    repository = Repository.create(url)
    add_scan(repository, "sub-01_T1w", modality="MR", age=40)
    add_scan(repository, "sub-02_ct", modality="CT")
    add_encoder(repository)
    add_segment(repository, "sub-01_T1w", 3)
    add_segment(repository, "sub-02_ct", 5)
    add_frame(repository, "sub-01_T1w")
    add_index(repository)
    return repository


class TestObjectStorage(StorageConformance):
    @pytest.fixture(autouse=True)
    def _place(self, s3: S3Server, tmp_path: Path):
        self.server = s3
        self.tmp_path = tmp_path

    def make(self) -> Storage:
        name = files.new_id()
        return ObjectStorage(f"s3://{BUCKET}/{name}", self.tmp_path / "caches" / name)

    def elsewhere(self, storage: Storage) -> Storage:
        return ObjectStorage(f"s3://{BUCKET}/{storage.name}", self.tmp_path / "caches" / files.new_id())

    def let_claims_run_out(self, storage: Storage) -> None:
        self.server.age(f"{storage.name}/", 601)


class TestWorkload:
    def test_all_verbs(self, url: str, tmp_path: Path):
        repository = whole_store(url)
        set_tag(repository.storage, "whole", 7)
        other = elsewhere(url, tmp_path)
        with other.pin() as seen:
            assert seen.generation == 7
            assert seen.sql(COUNTS).to_pylist() == [
                {"scan": "sub-01_T1w", "patches": 3},
                {"scan": "sub-02_ct", "patches": 5},
            ]
            assert (seen.chunks_path("sub-01_T1w") / "zarr.json").is_file()
            assert seen.frame_path(ENCODER) is not None
            assert seen.index_path(ENCODER) is not None
            np.testing.assert_array_equal(seen.segments()[1].vectors("position"), vectors(5)["position"])

        assert delete_patches(other, "i = 1").patches == 2
        assert delete_scans(other, "scan = 'sub-02_ct'").scans == ("sub-02_ct",)
        packed = compact(elsewhere(url, tmp_path))
        with repository.pin() as seen:
            assert seen.generation == packed.generation
            assert seen.sql(COUNTS).to_pylist() == [{"scan": "sub-01_T1w", "patches": 2}]
            assert seen.segments()[0].row_ids.tolist() == [0, 2]

        restored = restore(elsewhere(url, tmp_path), tag="whole")
        assert restored.sql(COUNTS).num_rows == 2
        gone = collect(repository, keep=1)
        assert gone.generations == tuple(set(range(packed.generation + 1)) - {7})
        assert {path.split("/")[0] for path in gone.artefacts} >= {"tables", "segments", "tombstones"}
        last = elsewhere(url, tmp_path).snapshot()
        assert last.sql(COUNTS).num_rows == 2
        for artefact in last.manifest.artefacts:
            last.verified(artefact)

    def test_the_api_takes_an_url(self, url: str):
        with isimed_index.create(url) as store:
            assert store.sql("SELECT count(*) AS n FROM scans").to_pylist() == [{"n": 0}]
        small_store(url + "-2")
        with isimed_index.open(url + "-2", mode="r") as store:
            assert store.info()["store"] == "cohort.isimed-2"
            assert store.sql(COUNTS).num_rows == 1
        with pytest.raises(UsageError, match="is a store already"):
            isimed_index.create(Path(url))  # which has one slash

    def test_damage_is_found_and_mended(self, s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        repository = small_store(url)
        add_frame(repository, "sub-01_T1w")
        assert isimed_index.api.check(url, read=1.0) == []
        frame = repository.snapshot().artefacts("frame")[0].path
        s3.delete(key(url, f"{frame}/charts.parquet"))
        monkeypatch.setenv("ISIMED_CACHE", str(tmp_path / "empty"))
        assert [found.artefact for found in isimed_index.api.check(url)] == [frame]
        assert isimed_index.api.repair(url).dropped == (frame,)

    def test_a_subject_is_erased(self, s3: S3Server, url: str):
        add_scan(small_store(url), "sub-02_ct")
        with isimed_index.open(url) as store:
            store.purge("sub-01")
        assert Repository.open(url).snapshot().scan_ids() == ["sub-02_ct"]
        contents = {name: bytes(found.value) for name, found in s3.objects().items() if name.startswith(key(url, ""))}
        assert not [name for name, content in contents.items() if b"sub-01" in content]
        assert len([name for name in contents if "/scans/" in name]) == 2  # of the one that stays

    def test_a_cache_that_remembers_a_subject_forgets_it(self, s3: S3Server, url: str, tmp_path: Path):
        mine = whole_store(url)
        checkpoints = mine.path / files.TMP / "pretrain-0123"
        checkpoints.mkdir()
        (checkpoints / "samples.json").write_text('["sub-01_T1w"]')
        other = elsewhere(url, tmp_path)
        delete_scans(other, "subject = 'sub-01'")
        collect(other, keep=1)
        assert [file for file in mine.path.rglob("*.parquet") if b"sub-01" in file.read_bytes()]
        done = purge(mine, "sub-01")
        assert (done.hits, done.index_again) == (0, (ENCODER,))
        assert not checkpoints.exists()
        assert not [file for file in mine.path.rglob("*") if file.is_file() and b"sub-01" in file.read_bytes()]
        assert any("other machines" in line for line in done.remains)
        assert any("versions" in line for line in done.remains)
        assert mine.snapshot().sql(COUNTS).to_pylist() == [{"scan": "sub-02_ct", "patches": 5}]

    def test_a_copied_directory_is_a_store(self, url: str, tmp_path: Path):
        local = small_store(tmp_path / "local")
        bucket = Bucket(url)
        for inside, file in files.tree_files(local.path):
            bucket.upload(inside, file)
        other = elsewhere(url, tmp_path)
        assert other.snapshot().sql(COUNTS).to_pylist() == [{"scan": "sub-01_T1w", "patches": 5}]
        add_scan(other, "sub-02_ct")
        assert collect(other, keep=1).generations == (0, 1, 2, 3)

    def test_the_command_line_takes_an_url(self, url: str):
        small_store(url)
        result = CliRunner().invoke(app, ["sql", COUNTS, "--store", url, "--json", "--quiet"])
        assert result.exit_code == 0, result.stderr
        assert [row["patches"] for row in json.loads(result.stdout)] == [5]
        result = CliRunner().invoke(app, ["sql", COUNTS, "--store", url + "-not"])
        assert result.exit_code == 10

    def test_nothing_is_fetched_twice(self, s3: S3Server, url: str, tmp_path: Path):
        small_store(url)
        with s3.counting() as first:
            Repository.open(url).snapshot().sql(COUNTS)
        assert first["GET"] < 5  # this process staged all that there is
        storage = ObjectStorage(url, tmp_path / "empty")
        with s3.counting() as cold:
            Repository(storage).snapshot().sql(COUNTS)
        with s3.counting() as warm:
            Repository(storage).snapshot().sql(COUNTS)
        assert cold["GET"] > 6
        assert (warm["GET"], warm["LIST"]) == (2, 1)  # HEAD.json, the manifests, the newest of them


class TestThreads:
    """Charts of a packed segment are fitted in many threads, and each of them wants all of it."""

    THREADS = 8

    @pytest.fixture
    def far(self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ObjectStorage, str, list[str]]:
        """A store as another machine sees it, slowly; its segment; and the objects that it gets, by key."""
        small_store(url)
        storage = ObjectStorage(url, tmp_path / "caches" / files.new_id())
        got: list[str] = []
        get = Bucket.get_range

        def slowly(bucket: Bucket, key: str, start: int, length: int) -> bytes:
            got.append(key)
            time.sleep(0.2)
            return get(bucket, key, start, length)

        monkeypatch.setattr(Bucket, "get_range", slowly)
        (artefact,) = Repository(storage).snapshot().artefacts("segment")
        return storage, artefact.path, got

    def at_once(self, fetch: Callable[[], Path]) -> list[Path | BaseException]:
        begin = threading.Barrier(self.THREADS)

        def one(_: int) -> Path | BaseException:
            begin.wait()
            try:
                return fetch()
            except BaseException as error:  # noqa: BLE001 — it is what is asked for
                return error

        with ThreadPoolExecutor(self.THREADS) as pool:
            return list(pool.map(one, range(self.THREADS)))

    def test_one_downloads_what_all_want(self, far: tuple[ObjectStorage, str, list[str]]):
        storage, path, got = far
        assert self.at_once(lambda: storage.fetch(path)) == [storage.root / path] * self.THREADS
        assert len(got) == len(set(got)) == storage.size(path)[1]
        assert storage.forget(path)
        assert storage.fetch(path).is_dir()

    def test_all_hear_of_a_failure_and_the_next_one_tries_again(
        self, far: tuple[ObjectStorage, str, list[str]], monkeypatch: pytest.MonkeyPatch
    ):
        storage, path, _ = far
        asked: list[int] = []

        def fails(*_: object) -> bytes:
            asked.append(1)
            time.sleep(0.2)
            raise StoreUnreachable("gone", next_step="look")

        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "get_range", fails)
            met = self.at_once(lambda: storage.fetch(path))
            assert {type(each) for each in met} == {StoreUnreachable}
            assert {(str(each), each.next_step) for each in met} == {("gone", "look")}
            assert len(asked) < self.THREADS  # who comes too late to hear of it tries for itself
        assert storage.fetch(path).is_dir()

    def test_one_that_is_interrupted_leaves_it_to_the_next(
        self, far: tuple[ObjectStorage, str, list[str]], monkeypatch: pytest.MonkeyPatch
    ):
        storage, path, _ = far
        sizes, asked = ObjectStorage._sizes, []

        def interrupted_once(place: ObjectStorage, relative: str) -> dict[str, int]:
            asked.append(relative)
            if len(asked) == 1:
                time.sleep(0.2)
                raise KeyboardInterrupt
            return sizes(place, relative)

        monkeypatch.setattr(ObjectStorage, "_sizes", interrupted_once)
        ends = self.at_once(lambda: storage.fetch(path))
        assert len(asked) == 2
        assert [type(each) for each in ends if isinstance(each, BaseException)] == [KeyboardInterrupt]

    def test_one_that_is_interrupted_at_any_line_hangs_nobody(self, url: str, tmp_path: Path):
        small_store(url)
        storage = ObjectStorage(url, tmp_path / "cache")
        (artefact,) = Repository(storage).snapshot().artefacts("segment")

        def fetch() -> None:
            storage.fetch(artefact.path)

        for line in itertools.count(1):
            storage.forget(artefact.path)
            if not interrupted_at(line, fetch, ObjectStorage.fetch.__code__):
                break
            other = threading.Thread(target=fetch, daemon=True)
            other.start()
            other.join(20)
            assert not other.is_alive()
            assert storage.at_hand(artefact.path)
        assert line > 5


def interrupted_at(line: int, do: Callable[[], None], where: CodeType) -> bool:
    """Ctrl-C as soon as `do` has begun so many lines of the function `where`; whether it came to that."""
    seen: set[int] = set()

    def watch(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if frame.f_code is not where:
            return None
        if event == "line" and frame.f_lineno not in seen:
            seen.add(frame.f_lineno)
            if len(seen) == line:
                raise KeyboardInterrupt
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        do()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


class TestKilledDownloads:
    """What they leave in the cache goes with the next process that downloads."""

    def test_only_what_nobody_wrote_to_for_a_day_goes(self, url: str, tmp_path: Path):
        small_store(url)
        storage = ObjectStorage(url, tmp_path / "cache")
        (artefact,) = Repository(storage).snapshot().artefacts("segment")
        drafts = tmp_path / "cache" / "tmp"
        folders = {"old": 90000, "slow": 100, "new": 100}  # s since something was written in it
        for name, age_s in folders.items():
            (drafts / f"{name}.fetch").mkdir(parents=True)
            aged(drafts / f"{name}.fetch" / "vectors", age_s)
            aged(drafts / f"{name}.fetch", 100 if name == "new" else 90000)
        aged(drafts / "table.fetch", 90000)
        aged(drafts / "others", 90000)
        storage.fetch(artefact.path)
        assert sorted(entry.name for entry in drafts.iterdir()) == ["new.fetch", "others", "slow.fetch"]


def aged(path: Path, age_s: float) -> None:
    """A file, or a folder that is there, as if it was written so long ago."""
    if not path.is_dir():
        path.touch()
    os.utime(path, times=(time.time() - age_s,) * 2)


class TestFromEmptyCaches:
    """Each command as on a machine of its own."""

    def test_add_here_index_there_and_ask_elsewhere(
        self, s3: S3Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        template, (one, other) = head(), (COPIES[0], COPIES[2])
        with isimed_index.create(url) as store:
            store.add([write_copy(tmp_path / "images", copy, template) for copy in (one, other)])
        add_random_encoder(url)
        artefact = Repository.open(url).snapshot().scan_row(other.stem)["artefact"]
        chunk = next(name for name in s3.objects() if name.startswith(key(url, artefact)) and "/c/" in name)
        whole = bytes(s3.objects()[chunk].value)

        monkeypatch.setenv("ISIMED_CACHE", str(tmp_path / "second"))
        s3.spoil(chunk, whole[:-1] + bytes([whole[-1] ^ 1]))
        with isimed_index.open(url) as store:
            report = store.index()
            assert (report.encoded, [refusal.name for refusal in report.refused]) == ([one.stem], [other.stem])
            s3.spoil(chunk, whole)
            report = store.index()
            assert (report.encoded, report.skipped, report.refused) == ([other.stem], [one.stem], [])

        monkeypatch.setenv("ISIMED_CACHE", str(tmp_path / "third"))
        place = np.array([10.0, 20.0, 30.0])
        with isimed_index.open(url, mode="r") as store:
            (found,) = store.lookup(one.moved(place), one.stem)
            assert found.scan == other.stem
            assert np.linalg.norm(found.xyz_mm - other.moved(place)) < SPACING_MM


class TestWriters:
    def test_two_machines_write_at_once(self, url: str, tmp_path: Path):
        Repository.create(url)
        machines = [elsewhere(url, tmp_path) for _ in range(2)]

        def write(number: int) -> None:
            for turn in range(4):
                add_scan(machines[number], f"sub-{number}{turn}_T1w")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, range(2)))
        head = elsewhere(url, tmp_path).snapshot()
        assert head.generation == 8
        assert sorted(head.scan_ids()) == sorted(f"sub-{number}{turn}_T1w" for number in range(2) for turn in range(4))
        assert all(head.chunks_path(scan).is_dir() for scan in head.scan_ids())

    def test_another_process_writes(self, url: str):
        repository = Repository.create(url)
        code = "import sys; from store_builders import *; add_scan(Repository.open(sys.argv[1]), 'sub-09_T1w')"
        finish(start(code, url))
        assert repository.snapshot().scan_ids() == ["sub-09_T1w"]

    def test_one_of_two_creates(self, url: str):
        def make(_: int) -> bool:
            try:
                Repository.create(url)
            except UsageError:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(make, range(4))).count(True) == 1
        assert Repository.open(url).head() == 0

    def test_a_lost_answer_is_no_conflict(self, s3: S3Server, url: str):
        repository = Repository.create(url)
        lost: list[str] = []

        def once(method: str, path: str) -> bool:
            hit = method == "PUT" and "/manifests/" in path and not lost
            lost.extend([path] * hit)
            return hit

        with s3.losing(once):
            snapshot = add_scan(repository, "sub-01_T1w")
        assert len(lost) == 1
        assert snapshot.generation == repository.head() == 1
        assert repository.snapshot().scan_ids() == ["sub-01_T1w"]

    def test_the_winner_of_a_conflict_is_not_taken_for_ours(self, s3: S3Server, url: str):
        """The first answer is lost *and* another was first: the write is not ours, and is done again."""
        repository, other = Repository.create(url), Repository.open(url)
        with repository.transaction("add") as transaction:
            artefact = stage_scan(transaction)
            calls = []

            def propose(head):
                calls.append(head.generation)
                if len(calls) == 1:
                    add_scan(other, "sub-02_T1w")
                return Proposal([artefact], tables={"scans": scan_rows("sub-01_T1w", artefact.path)})

            snapshot = transaction.commit(propose)
        assert calls == [0, 1]
        assert snapshot.scan_ids() == ["sub-02_T1w", "sub-01_T1w"]

    def test_a_service_without_conditional_writes_is_refused(
        self, s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch
    ):
        small_store(url)
        monkeypatch.setattr(s3, "ignores_conditions", True)
        for write in (
            lambda: Repository.create(url + "-2"),
            lambda: add_scan(Repository.open(url), "sub-02_T1w"),
            lambda: set_tag(Repository.open(url).storage, "v1", 1),
        ):
            with pytest.raises(Incompatible, match="ignores If-None-Match"):
                write()
        assert Repository.open(url).snapshot().scan_ids() == ["sub-01_T1w"]
        ours = [name for name in s3.objects() if name.startswith(key(url, "")[:26])]
        assert not any(f"/{files.TMP}/" in name or "-2/" in name for name in ours)

    def test_what_is_not_committed_is_removed(self, s3: S3Server, url: str):
        repository = Repository.create(url)
        with repository.transaction("add") as transaction:
            artefact = stage_scan(transaction)
            repository.storage.settle([artefact.path])
            assert repository.storage.size(artefact.path)[1] == 2
        assert repository.storage.names("scans") == repository.storage.names("intents") == []
        assert not list((repository.path / "scans").iterdir())

    def test_a_writer_that_slept_too_long_does_not_commit(self, url: str, tmp_path: Path):
        Repository.create(url)
        repository = Repository(ObjectStorage(url, tmp_path / "sleeper", ttl_s=0.5))
        with repository.transaction("add") as writer:
            artefact = stage_scan(writer)
            writer._claim._heartbeat.stop()
            time.sleep(0.6)
            with pytest.raises(StoreUnreachable, match="nothing was committed"):
                writer.commit(lambda head: Proposal([artefact]))
        assert repository.head() == 0

    def test_a_claim_is_renewed(self, s3: S3Server, url: str, tmp_path: Path):
        storage = ObjectStorage(url, tmp_path / "cache2", ttl_s=5.0)
        claim = storage.claim("leases", "reader")
        s3.age(key(url, "leases/"), 60)
        for _ in range(100):
            if storage.claims("leases")[0][2]:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("it was not written again")
        claim.release()


class TestLock:
    @pytest.fixture
    def place(self, s3: S3Server, url: str, tmp_path: Path) -> ObjectStorage:
        return ObjectStorage(url, tmp_path / "holder", ttl_s=10.0)

    def test_a_lost_answer_does_not_lose_it(self, s3: S3Server, url: str, place: ObjectStorage, tmp_path: Path):
        lost: list[str] = []

        def once(method: str, path: str) -> bool:
            hit = method == "PUT" and path.endswith("/collect.lock") and not lost
            lost.extend([path] * hit)
            return hit

        lock = key(url, "tmp/collect.lock")
        with place.exclusive("collect"):
            with s3.losing(once):
                wait_until(lambda: bool(lost))
            s3.age(lock, 60)
            before = s3.objects()[lock].last_modified
            wait_until(lambda: s3.objects()[lock].last_modified > before)  # it beats on
            with pytest.raises(StoreLocked), ObjectStorage(url, tmp_path / "other", ttl_s=10.0).exclusive("collect"):
                pass
        assert place.names("tmp") == []

    def test_a_write_that_was_done_and_failed_does_not_lose_it(
        self, s3: S3Server, url: str, place: ObjectStorage, monkeypatch: pytest.MonkeyPatch
    ):
        """As when the service is gone for good after it took the write."""
        swap = Bucket.swap

        def done_and_failed(self: Bucket, *arguments):
            swap(self, *arguments)
            raise StoreUnreachable("gone")

        with place.exclusive("collect"):
            lock = place._locks["collect"]
            lock._heartbeat.stop()
            with monkeypatch.context() as patched:
                patched.setattr(Bucket, "swap", done_and_failed)
                with pytest.raises(StoreUnreachable):
                    lock.renew()
            lock.renew()  # meets its own write and adopts it
            written = s3.objects()[key(url, "tmp/collect.lock")].value
            lock.renew()
            assert s3.objects()[key(url, "tmp/collect.lock")].value != written
            assert place.held("collect")

    def test_one_that_was_taken_over_is_lost(self, s3: S3Server, url: str, place: ObjectStorage):
        name = key(url, "tmp/collect.lock")
        with place.exclusive("collect"):
            lock = place._locks["collect"]
            lock._heartbeat.stop()
            assert place.held("collect")
            s3.spoil(name, b"of another")
            for _ in range(2):
                lock.renew()
                assert not place.held("collect")
        assert bytes(s3.objects()[name].value) == b"of another"
        assert not place.held("collect")

    def test_one_that_was_not_renewed_in_time_is_not_relied_on(self, place: ObjectStorage):
        with place.exclusive("collect"):
            lock = place._locks["collect"]
            lock._heartbeat.stop()
            lock._written_s -= 0.91 * lock._ttl_s  # as after a sleep
            assert not place.held("collect")
            lock.renew()  # which nobody else has taken: so the service says by taking the write
            assert place.held("collect")


class LosesItsLock(ObjectStorage):
    """A place whose lock is lost after it was asked for it so often."""

    asked = 0
    lost_after = 0

    def held(self, name: str) -> bool:
        assert super().held(name)
        self.asked += 1
        return self.asked <= self.lost_after


class TestCollect:
    @pytest.mark.parametrize("lost_after", [0, 1, 3, 4, 6, 7])
    def test_one_that_lost_its_lock_stops(self, url: str, tmp_path: Path, lost_after: int):
        """3 manifests are taken away, 3 removed, then 2 artefacts: what is away when it stops, the next one returns."""
        repository = Repository.create(url)
        add_scan(repository, "sub-01_T1w")
        delete_scans(repository, "true")
        add_scan(repository, "sub-02_T1w")
        place = LosesItsLock(url, tmp_path / "loser")
        place.lost_after = lost_after
        before = {folder: len(place.names(folder)) for folder in ("manifests", "scans", "tables")}
        with pytest.raises(StoreLocked, match="nothing more was removed"):
            collect(Repository(place), keep=1)
        gone = max(0, lost_after - 3)
        assert sum(before[folder] - len(place.names(folder)) for folder in ("scans", "tables")) == max(0, gone - 3)
        assert len(place.names("manifests")) + len(place.names("tmp")) == before["manifests"] - min(gone, 3)
        other = elsewhere(url, tmp_path)
        collect(other, keep=1)
        assert (other.storage.names("tmp"), len(other.storage.names("manifests"))) == ([], 1)
        assert other.snapshot().scan_ids() == ["sub-02_T1w"]

    def test_what_dead_processes_wrote_for_a_moment_goes(self, s3: S3Server, url: str):
        storage = Repository.create(url).storage
        names = ("old.clock", "old.probe", "old.other", "new.clock", "new.probe")
        for name in names:
            storage.replace(f"tmp/{name}", b"")
        s3.age(key(url, "tmp/old"), 601)
        storage.sweep()
        assert storage.names("tmp") == ["new.clock", "new.probe", "old.other"]

    def test_what_a_living_writer_uploaded_stays(self, url: str, tmp_path: Path):
        repository = Repository.create(url)
        with repository.transaction("add") as writer:
            artefact = stage_scan(writer)
            repository.storage.settle([artefact.path])
            assert collect(elsewhere(url, tmp_path)).artefacts == ()
            writer.commit(lambda head: Proposal([artefact]))
        elsewhere(url, tmp_path).snapshot().verified(artefact)

    def test_what_a_dead_writer_uploaded_goes(self, s3: S3Server, url: str, tmp_path: Path):
        repository = Repository.create(url)
        writer = repository.transaction("add").__enter__()
        artefact = stage_scan(writer)
        repository.storage.settle([artefact.path])
        writer._claim._heartbeat.stop()
        s3.age(key(url, "intents/"), 601)
        assert collect(elsewhere(url, tmp_path)).artefacts == (artefact.path,)
        assert repository.storage.names("scans") == repository.storage.names("intents") == []

    def test_a_reader_keeps_its_generation(self, url: str, tmp_path: Path):
        repository = Repository.create(url)
        add_scan(repository, "sub-01_T1w")
        with elsewhere(url, tmp_path).pin() as reader:
            delete_scans(repository, "true")
            add_scan(repository, "sub-02_T1w")
            assert reader.generation not in collect(repository, keep=1).generations
            assert reader.chunks_path("sub-01_T1w").is_dir()

    def test_a_collector_that_died_is_followed_by_another(self, s3: S3Server, url: str):
        repository = Repository.create(url)
        storage = repository.storage
        storage.replace("tmp/collect.lock", b"of a dead one")
        with pytest.raises(StoreLocked):
            collect(repository)
        s3.age(key(url, "tmp/"), 601)
        collect(repository)
        assert storage.names("tmp") == []


class TestDamage:
    @contextmanager
    def damaged(self, url: str, tmp_path: Path) -> Iterator[str]:
        """The one object of a table, to be spoiled within; then the store must be found damaged."""
        repository = Repository.create(url)
        add_scan(repository, "sub-01_T1w")
        table = repository.snapshot().artefacts("table")[0].path
        yield table
        seen = elsewhere(url, tmp_path).snapshot()
        for _ in range(2):  # the bad copy in the cache is not believed the second time
            with pytest.raises(StoreDamaged):
                seen.table("scans")

    def test_a_truncated_object(self, s3: S3Server, url: str, tmp_path: Path):
        with self.damaged(url, tmp_path) as table:
            content = bytes(s3.objects()[key(url, table)].value)
            s3.spoil(key(url, table), content[:-1])

    def test_a_changed_object(self, s3: S3Server, url: str, tmp_path: Path):
        with self.damaged(url, tmp_path) as table:
            content = bytearray(s3.objects()[key(url, table)].value)
            content[len(content) // 2] ^= 1
            s3.spoil(key(url, table), bytes(content))

    def test_a_missing_object(self, s3: S3Server, url: str, tmp_path: Path):
        with self.damaged(url, tmp_path) as table:
            s3.delete(key(url, table))

    def test_a_missing_object_of_several(self, s3: S3Server, url: str, tmp_path: Path):
        repository = small_store(url)
        found = repository.snapshot().segments()[0]
        s3.delete(key(url, f"{found.path}/position.npy"))
        with pytest.raises(StoreDamaged, match="in 3 files, expected"):
            elsewhere(url, tmp_path).snapshot().segments()[0].vectors("position")
        with pytest.raises(StoreDamaged, match="in 3 files, expected"):
            restore(elsewhere(url, tmp_path), generation=self.next(repository).generation - 1)

    @staticmethod
    def next(repository: Repository):
        return add_scan(repository, "sub-09_T1w")

    def test_a_damaged_copy_is_fetched_again(self, url: str, tmp_path: Path):
        small_store(url)
        other = elsewhere(url, tmp_path)
        path = other.snapshot().segments()[0].verified() / "position.npy"
        path.write_bytes(path.read_bytes()[:-4])
        np.testing.assert_array_equal(other.snapshot().segments()[0].vectors("position"), vectors(5)["position"])

    def test_a_damaged_manifest(self, s3: S3Server, url: str, tmp_path: Path):
        repository = small_store(url)
        newest = key(url, f"manifests/{3:020d}.json")
        s3.spoil(newest, bytes(s3.objects()[newest].value)[:-20])
        with pytest.warns(UserWarning, match="generation 3 of the store is damaged"):
            assert elsewhere(url, tmp_path).snapshot().generation == 2
        with pytest.raises(StoreDamaged), warnings.catch_warnings(action="ignore"):
            add_scan(repository, "sub-03_T1w")


class TestUnreachable:
    def test_the_server_is_down(self, s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch):
        repository = small_store(url)
        snapshot = repository.snapshot()
        snapshot.table("scans")
        snapshot.storage.forget(snapshot.segments()[0].path)
        monkeypatch.setattr("isimed_index.store.place.bucket._RETRIES", 1)
        monkeypatch.setenv("AWS_ENDPOINT_URL", self.closed_port())
        down = ObjectStorage(url, repository.path)
        asked = [
            lambda: Repository.open(url),
            lambda: Repository.create(url + "-2"),
            lambda: Repository(down).snapshot(),
            lambda: Repository(down).pin(),
            lambda: add_scan(Repository(down), "sub-03_T1w"),
            lambda: type(snapshot)(down, snapshot.manifest).segments()[0].vectors("position"),
            lambda: collect(Repository(down)),
        ]
        for ask in asked:
            with pytest.raises(StoreUnreachable) as caught:
                ask()
            line = caught.value.line()
            assert "store_unreachable" in line
            assert "AWS_ENDPOINT_URL" in caught.value.next_step
            for secret in (*s3.environment.values(), "127.0.0.1", BUCKET):
                assert secret not in line.replace("AWS_ENDPOINT_URL, AWS_REGION", "")

    @staticmethod
    def closed_port() -> str:
        server = S3Server()
        server.stop()
        return server.url

    def test_a_server_that_fails(self, s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("isimed_index.store.place.bucket._RETRIES", 1)
        repository = Repository.create(url)
        with (
            s3.losing(lambda method, path: "/HEAD.json" not in path and method == "PUT" and "/scans/" in path),
            pytest.raises(StoreUnreachable, match="503"),
        ):
            add_scan(repository, "sub-01_T1w")
        assert repository.head() == 0
        assert repository.storage.names("intents") == []

    def test_no_bucket(self, s3: S3Server):
        for ask in (Repository.open, Repository.create):
            with pytest.raises(StoreNotFound, match="there is no bucket nobody-made-it"):
                ask("s3://nobody-made-it/store")

    def test_no_store(self, url: str):
        with pytest.raises(StoreNotFound, match=r"there is no store at cohort\.isimed"):
            Repository.open(url)

    def test_no_credentials_are_sent_in_the_clear(self, s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://example.invalid:9000")
        with pytest.raises(UsageError, match="plain http"):
            Repository.open(url)


class TestRanges:
    """Rows of a large segment without the rest of it; every segment counts as large here."""

    ROWS = 20_000

    @pytest.fixture
    def far(self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
        monkeypatch.setattr(segment, "_WHOLE_BYTES", 0)
        repository = Repository.create(url)
        add_scan(repository, "sub-01_T1w")
        add_encoder(repository)
        with repository.transaction("index") as transaction:
            path = transaction.stage("segment")
            fields = write_segment(path, patch_rows("sub-01_T1w", self.ROWS), vectors(self.ROWS))
            (path / "lattice.json").write_text(json.dumps(LATTICE), encoding="utf-8")
            scan = repository.snapshot().scan_row("sub-01_T1w")["artefact"]
            artefact = transaction.add(
                "segment", path, encoder=ENCODER, grid="4/2", scan_artefact=scan, task="0" * 64, **fields
            )
            transaction.commit(lambda head: Proposal([artefact]))
        return elsewhere(url, tmp_path)

    def test_few_rows_are_few_bytes(self, s3: S3Server, far: Repository):
        found = far.snapshot().segments()[0]
        for rows in ([0], [19_999, 3, 4, 3], [5, 10_000], [], list(range(0, 20_000, 7))):
            with s3.counting() as made:
                got = found.vectors_at("position", np.array(rows, dtype=np.int64))
            np.testing.assert_array_equal(got, vectors(self.ROWS)["position"][rows])
            assert made["GET"] <= 3
            assert not found.storage.at_hand(found.path)
        assert found.vectors_at("descriptor", np.array([7])).dtype == np.float16

    def test_the_dead_are_left_out(self, far: Repository):
        delete_patches(far, "i IN (1, 10000)")
        for _ in range(2):
            far.storage.forget(far.snapshot().segments()[0].path)
            found = far.snapshot().segments()[0]
            rows = np.array([0, 1, 2, 9_999, found.rows - 1])
            got = found.vectors_at("position", rows)
            np.testing.assert_array_equal(got, found.vectors("position")[rows])
            np.testing.assert_array_equal(found.vectors_at("position", rows), got)  # now from the cache
            compact(far)

    def test_positions_that_are_not(self, far: Repository):
        found = far.snapshot().segments()[0]
        for rows in ([-1], [self.ROWS], [[1]]):
            with pytest.raises(UsageError):
                found.vectors_at("position", np.array(rows))

    @pytest.mark.parametrize("spoilt", ["header", "values", "end", "all"])
    def test_what_can_be_seen_of_damage_is(self, s3: S3Server, far: Repository, url: str, spoilt: str):
        found = far.snapshot().segments()[0]
        name = key(url, f"{found.path}/position.npy")
        content = bytearray(s3.objects()[name].value)
        if spoilt == "header":
            content[:128] = content[:128].replace(b"20000", b"20001")
        elif spoilt == "values":
            content[128:132] = b"\xff\xff\xff\xff"
        elif spoilt == "end":
            content = content[:200]
        if spoilt == "all":
            s3.delete(name)
        else:
            s3.spoil(name, bytes(content))
        with pytest.raises(StoreDamaged):
            found.vectors_at("position", np.array([0, 500]))


class TestCache:
    def test_only_the_user_can_read_it(self, url: str):
        repository = Repository.create(url)
        add_scan(repository, "sub-01_T1w")
        assert stat.S_IMODE(repository.path.stat().st_mode) == 0o700

    def test_each_store_has_its_own(self, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        ours = cache_of("s3://bucket/store")
        assert ours == cache_of("s3://bucket/store/") != cache_of("s3://bucket/other")
        assert ours.parent == tmp_path / "cache"
        monkeypatch.setenv("AWS_ENDPOINT_URL", "https://elsewhere.example")
        assert cache_of("s3://bucket/store") != ours
        monkeypatch.delenv("ISIMED_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_of("s3://bucket/store").parent == tmp_path / "xdg" / "isimed"

    def test_names_that_leave_it_are_refused(self, s3: S3Server, url: str, tmp_path: Path):
        repository = small_store(url)
        path = repository.snapshot().segments()[0].path
        s3.add_name(key(url, f"{path}/lattice.json"), key(url, f"{path}/../../../escaped"))
        with pytest.raises((StoreDamaged, StoreUnreachable)):
            elsewhere(url, tmp_path).snapshot().segments()[0].verified()
        assert not list(tmp_path.rglob("escaped"))

    def test_large_objects_come_in_parts(self, s3: S3Server, url: str, tmp_path: Path):
        storage = storage_of(url)
        path = f"indexes/{files.new_id()}"
        storage.prepare(["indexes"])
        (storage.root / path).mkdir()
        content = np.random.default_rng(0).bytes((40 << 20) + 17)
        (storage.root / path / "index.faiss").write_bytes(content)
        with s3.counting() as sent:
            storage.settle([path])
        assert sent["PUT"] == 3  # parts of 16 MiB
        other = ObjectStorage(url, tmp_path / "empty")
        with s3.counting() as got:
            assert (other.fetch(path) / "index.faiss").read_bytes() == content
        assert got["GET"] == 3


class TestPlaces:
    @pytest.mark.parametrize("place", ["s3://", "s3:///x", "s3://UPPER/x", "s3://b?/x", "s3://bucket/a\nb"])
    def test_what_is_no_url_is_refused(self, place: str):
        with pytest.raises(UsageError, match="expected s3://BUCKET/PREFIX"):
            storage_of(place)

    def test_both_kinds_of_slashes(self, s3: S3Server):
        for place in ("s3://bucket/a/store", Path("s3://bucket/a/store"), "s3://bucket/a/store/"):
            found = storage_of(place)
            assert (found.name, found.root) == ("store", cache_of("s3://bucket/a/store"))
        assert storage_of("s3://bucket").name == "bucket"

    def test_it_can_be_sent_to_another_process(self, url: str):
        storage = Repository.create(url).storage
        again = pickle.loads(pickle.dumps(storage))
        assert (again.root, again.name, again.names("manifests")) == (
            storage.root,
            storage.name,
            storage.names("manifests"),
        )

    def test_the_clock_is_that_of_the_service(self, url: str):
        bucket = Bucket(url)
        assert server_time(bucket) <= server_time(bucket)
        assert bucket.list("") == []

    def test_without_the_extra(self, url: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "obstore", None)
        monkeypatch.setitem(sys.modules, "obstore.store", None)
        with pytest.raises(MissingExtra) as caught:
            Repository.open(url)
        assert caught.value.next_step == "pip install 'isimed-index[s3]'"

    def test_a_local_store_does_not_load_obstore(self, tmp_path: Path):
        code = (
            "import sys; from store_builders import *; whole_store(Path(sys.argv[1])); print('obstore' in sys.modules)"
        )
        assert finish(start(code, str(tmp_path / "store"))).strip() == "False"
