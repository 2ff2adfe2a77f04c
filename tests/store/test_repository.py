"""Create, open, history, and what happens when manifests are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from store_builders import add_scan, finish, start, whole_store

from isimed_index.errors import Incompatible, NotFound, StoreDamaged, StoreNotFound, StoreWarning, UsageError
from isimed_index.store import files
from isimed_index.store.manifest import manifest_name, seal
from isimed_index.store.place.storage import LocalStorage
from isimed_index.store.repository import Repository
from isimed_index.store.transaction import Proposal


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE = [flip, truncate, empty, zero, Path.unlink]


def test_a_new_store_is_empty_and_opens(tmp_path: Path) -> None:
    Repository.create(tmp_path / "deep" / "c.isimed")
    opened = Repository.open(tmp_path / "deep" / "c.isimed")
    assert opened.head() == 0
    assert opened.snapshot().artefacts("scan") == []
    assert opened.snapshot().table("scans").num_rows == 0


def test_create_takes_an_empty_folder_and_completes_a_creation_cut_short(tmp_path: Path) -> None:
    (tmp_path / "c" / "manifests").mkdir(parents=True)
    Repository.create(tmp_path / "c")
    (tmp_path / "c" / files.FORMAT).unlink()
    assert Repository.create(tmp_path / "c").head() == 0


def test_create_refuses_a_store(tmp_path: Path) -> None:
    Repository.create(tmp_path / "c")
    with pytest.raises(UsageError, match="c is a store already"):
        Repository.create(tmp_path / "c")


def test_create_refuses_a_folder_with_other_things_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        Repository.create(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        Repository.create(tmp_path / "thesis.txt")


def test_create_refuses_the_remains_of_a_store(tmp_path: Path) -> None:
    add_scan(Repository.create(tmp_path / "c"), "s")
    for name in (files.FORMAT, files.HEAD):
        (tmp_path / "c" / name).unlink()
    with pytest.raises(UsageError, match="not empty"):
        Repository.create(tmp_path / "c")


def test_of_many_creators_at_once_one_succeeds(tmp_path: Path) -> None:
    barrier = Barrier(4)

    def create(_: int) -> bool:
        barrier.wait()
        try:
            Repository.create(tmp_path / "c")
        except UsageError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(create, range(4))) == 1
    assert Repository.open(tmp_path / "c").head() == 0


@pytest.mark.parametrize("step", ["a folder", "the first manifest", "FORMAT.json"])
def test_a_creation_cut_short_is_no_store_and_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    class Killed(BaseException):
        pass

    real = {"mkdir": Path.mkdir, "publish": LocalStorage.publish}

    def mkdir(path: Path, *args: Any, **options: Any) -> None:
        if step == "a folder" and path.name == files.INTENTS:
            raise Killed
        real["mkdir"](path, *args, **options)

    def publish(storage: LocalStorage, relative: str, content: bytes) -> None:
        if (step == files.FORMAT) == (relative == files.FORMAT):
            (storage.root / files.TMP / "x.draft").write_bytes(content[:9])  # what a killed process leaves of it
            raise Killed
        real["publish"](storage, relative, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        patch.setattr(LocalStorage, "publish", publish)
        with pytest.raises(Killed):
            Repository.create(tmp_path / "c")
    assert (tmp_path / "c" / files.MANIFESTS).is_dir()
    with pytest.raises(StoreNotFound):
        Repository.open(tmp_path / "c")
    add_scan(Repository.create(tmp_path / "c"), "s")
    assert Repository.open(tmp_path / "c").snapshot().scan_ids() == ["s"]


def test_to_the_later_of_two_creators_it_is_a_store_and_no_folder_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").mkdir()
    real = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path == tmp_path / "c":  # another process is faster, just before the look inside
            monkeypatch.setattr(Path, "iterdir", real)
            add_scan(Repository.create(path), "s")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UsageError, match="c is a store already"):
        Repository.create(tmp_path / "c")
    assert Repository.open(tmp_path / "c").snapshot().scan_ids() == ["s"]


def test_open_beside_a_creator_finds_no_store_or_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        try:
            return real(path)
        finally:
            if path.name == files.FORMAT:  # made and committed to by another process, just after it was looked for
                monkeypatch.setattr(Path, "read_bytes", real)
                add_scan(Repository.create(tmp_path / "c"), "s")

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(StoreNotFound):
        Repository.open(tmp_path / "c")
    assert Repository.open(tmp_path / "c").snapshot().scan_ids() == ["s"]


def test_open_says_when_there_is_no_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StoreNotFound) as caught:
            Repository.open(path)
        assert str(tmp_path) not in str(caught.value).replace(path.name, "")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_format_file_is_found(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    add_scan(Repository.create(tmp_path / "c"), "s")
    damage(tmp_path / "c" / files.FORMAT)
    with pytest.raises(StoreDamaged, match=r"FORMAT\.json"):
        Repository.open(tmp_path / "c")


def test_a_newer_store_is_incompatible(tmp_path: Path) -> None:
    Repository.create(tmp_path / "c")
    form = json.loads((tmp_path / "c" / files.FORMAT).read_text())
    (tmp_path / "c" / files.FORMAT).write_bytes(seal({**form, "format_version": 2}))
    with pytest.raises(Incompatible, match="version 2"):
        Repository.open(tmp_path / "c")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_head_opens_the_last_good_generation_and_says_so(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    repository = Repository.create(tmp_path / "c")
    good = add_scan(repository, "a")
    add_scan(repository, "b")
    damage(repository.path / manifest_name(2))
    with pytest.warns(StoreWarning, match="generation 2 .* reading generation 1"):
        snapshot = Repository.open(tmp_path / "c").snapshot()
    assert snapshot.manifest == good.manifest
    assert snapshot.scan_ids() == ["a"]
    assert snapshot.behind


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.filterwarnings("ignore::isimed_index.errors.StoreWarning")
def test_nothing_is_committed_on_a_damaged_head(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    repository = Repository.create(tmp_path / "c")
    add_scan(repository, "a")
    damage(repository.path / manifest_name(1))
    with pytest.raises(StoreDamaged, match="nothing can be added"):
        add_scan(repository, "b")


@pytest.mark.parametrize("damage", DAMAGE)
def test_when_all_manifests_are_bad_the_store_is_damaged(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    repository = Repository.create(tmp_path / "c")
    add_scan(repository, "a")
    for generation in (0, 1):
        damage(repository.path / manifest_name(generation))
    with pytest.raises(StoreDamaged):
        repository.snapshot()


def test_a_missing_folder_of_manifests_is_damage(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "c")
    (repository.path / manifest_name(0)).unlink()
    (repository.path / files.MANIFESTS).rmdir()
    with pytest.raises(StoreDamaged):
        repository.snapshot()


def test_a_manifest_under_another_number_is_damage(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "c")
    add_scan(repository, "a")
    (repository.path / manifest_name(1)).rename(repository.path / manifest_name(7))
    with pytest.raises(StoreDamaged, match="holds generation 1"):
        repository.snapshot(7)


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_head_hint_is_only_a_hint(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    repository = Repository.create(tmp_path / "c")
    add_scan(repository, "a")
    damage(repository.path / files.HEAD)
    assert repository.snapshot().generation == 1  # and no warning, which would be an error


def test_a_stale_head_hint_hides_nothing(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "c")
    add_scan(repository, "a")
    (repository.path / files.HEAD).write_bytes(seal({"generation": 0}))
    assert repository.snapshot().generation == 1


def test_old_generations_can_be_pinned(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    assert repository.snapshot(1).scan_ids() == ["sub-01_T1w"]
    assert repository.snapshot(2).scan_ids() == ["sub-01_T1w", "sub-02_ct"]
    with pytest.raises(NotFound, match="no generation 99"):
        repository.snapshot(99)


def test_history(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    history = repository.generations()
    assert [line.generation for line in history] == list(range(8))
    assert [line.verb for line in history] == ["create", "add", "add", "pretrain", "index", "index", "index", "index"]
    assert [line.rows for line in history] == [0, 0, 0, 0, 3, 8, 8, 8]
    flip(repository.path / manifest_name(3))
    with pytest.warns(StoreWarning, match="left out of the history"):
        assert len(repository.generations()) == 7


def test_history_stays_in_order_when_the_clock_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository.create(tmp_path / "c")
    before = add_scan(repository, "a").manifest.time
    monkeypatch.setattr("isimed_index.store.transaction.utc_now", lambda: "1999-01-01T00:00:00.000000Z")
    assert add_scan(repository, "b").manifest.time == before


def test_opening_loads_no_heavy_package(tmp_path: Path) -> None:
    whole_store(tmp_path / "c")
    code = (
        "import sys; from pathlib import Path; from isimed_index.store.repository import Repository\n"
        "snapshot = Repository.open(Path(sys.argv[1])).snapshot(); snapshot.artefacts('segment')\n"
        "heavy = {'duckdb', 'pyarrow', 'zarr', 'numpy', 'jsonschema', 'torch', 'pandas'} & set(sys.modules)\n"
        "print(snapshot.generation, sorted(heavy))"
    )
    assert finish(start(code, str(tmp_path / "c"))).split(maxsplit=1) == ["7", "[]\n"]


def test_a_proposal_without_change_makes_no_generation(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "c")
    with repository.transaction("add") as transaction:
        assert transaction.commit(lambda head: Proposal()).generation == 0
    assert repository.head() == 0
