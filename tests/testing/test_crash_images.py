"""The recorder of crash images knows what a power cut may take away, and what it may not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from isimed_index.testing.crash import Recorder

Tree = dict[str, bytes | None]


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@pytest.fixture
def after(tmp_path: Path) -> Callable[[Callable[[Path], None]], list[Tree]]:
    """The trees that a crash after an acknowledged change may leave."""

    def run(change: Callable[[Path], None]) -> list[Tree]:
        with Recorder(tmp_path) as recorder:
            change(tmp_path)
            recorder.acknowledge()
        return [dict(image.content) for image in recorder.images() if image.acknowledged]

    return run


def test_what_is_not_flushed_may_be_lost_empty_short_or_zeros(after: Callable[..., list[Tree]]) -> None:
    found = after(lambda root: (root / "a").write_bytes(b"1234"))
    assert {} in found
    assert {tree["a"] for tree in found if tree} == {b"1234", b"", b"12", bytes(4)}


def test_what_is_flushed_stays(after: Callable[..., list[Tree]]) -> None:
    def change(root: Path) -> None:
        (root / "a").write_bytes(b"1234")
        sync(root / "a")
        sync(root)

    assert after(change) == [{"a": b"1234"}]


def test_a_flushed_file_has_no_name_until_its_folder_is_flushed(after: Callable[..., list[Tree]]) -> None:
    def change(root: Path) -> None:
        (root / "a").write_bytes(b"1234")
        sync(root / "a")

    assert sorted(after(change), key=len) == [{}, {"a": b"1234"}]


def test_a_rename_happens_whole_or_not_at_all(tmp_path: Path, after: Callable[..., list[Tree]]) -> None:
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    found = after(lambda root: (root / "a").replace(root / "b"))
    assert sorted(found, key=len) == [{"b": b"new"}, {"a": b"new", "b": b"old"}]


def test_a_removed_name_may_come_back_and_a_link_may_be_alone(tmp_path: Path, after: Callable[..., list[Tree]]) -> None:
    (tmp_path / "a").write_bytes(b"1")

    def change(root: Path) -> None:
        os.link(root / "a", root / "b")
        (root / "a").unlink()

    found = after(change)
    one = {"a": b"1"}
    for tree in (one, {"b": b"1"}, {**one, "b": b"1"}, {}):
        assert tree in found


def test_each_change_may_be_the_only_one(after: Callable[..., list[Tree]]) -> None:
    def change(root: Path) -> None:
        for name in "abc":
            (root / name).mkdir()
        (root / "a" / "x").write_bytes(b"")

    found = after(change)
    for tree in ({"a": None}, {"b": None}, {"c": None}, {"a": None, "a/x": b""}, {"a": None, "c": None, "a/x": b""}):
        assert tree in found


def test_images_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with Recorder(tmp_path / "store") as recorder:
        (tmp_path / "store" / "a").mkdir()
        (tmp_path / "store" / "a" / "x").write_bytes(b"1")
    assert recorder.prefixes > 1
    for number, image in enumerate(recorder.images()):
        folder = tmp_path / str(number)
        folder.mkdir()
        image.write(folder)
        found = {
            path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes()
            for path in folder.rglob("*")
        }
        assert found == dict(image.content)
