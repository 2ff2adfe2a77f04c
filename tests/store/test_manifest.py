"""Manifests survive a round trip and nothing else survives at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ulid import ULID

from isimed_index.errors import Incompatible, StoreDamaged
from isimed_index.store import files, manifest
from isimed_index.store.manifest import Artefact, Manifest

# The machine that runs this may be busy: time says nothing about these properties.
settings.register_profile("manifests", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PROPERTY = settings.get_profile("manifests")

ULIDS = st.integers(0, 2**128 - 1).map(lambda number: str(ULID.from_int(number)))
SHAS = st.binary(min_size=32, max_size=32).map(bytes.hex)
COUNTS = st.integers(0, 2**63 - 1)
TEXTS = st.text(max_size=8)
VALUES = (
    st.none()
    | st.booleans()
    | COUNTS
    | TEXTS
    | st.lists(TEXTS, max_size=2)
    | st.dictionaries(TEXTS, COUNTS, max_size=2)
)
EMPTY, HELLO = (hashlib.sha256(content).hexdigest() for content in (b"", b"hello"))
OWN = ("kind", "path", "bytes", "files", "sha256")


@st.composite
def artefacts(draw: st.DrawFn) -> Artefact:
    kind = draw(st.sampled_from(sorted(files.FOLDERS)))
    path = f"{files.FOLDERS[kind]}/{draw(ULIDS)}{files.SUFFIXES.get(kind, '')}"
    fields = draw(st.dictionaries(TEXTS.filter(lambda key: key not in OWN), VALUES, max_size=3))
    return Artefact(kind, path, draw(COUNTS), draw(COUNTS), draw(SHAS), fields)


MANIFESTS = st.builds(
    Manifest,
    generation=COUNTS,
    parent=st.none() | st.tuples(COUNTS, SHAS),
    write_id=ULIDS,
    time=TEXTS,
    verb=TEXTS,
    next_row_id=COUNTS,
    artefacts=st.lists(artefacts(), max_size=3).map(tuple),
)


@PROPERTY
@given(MANIFESTS)
def test_round_trip(written: Manifest) -> None:
    assert Manifest.from_bytes(written.to_bytes(), "m") == written


@PROPERTY
@given(MANIFESTS, st.data())
def test_a_flipped_bit_is_found(written: Manifest, data: st.DataObject) -> None:
    content = bytearray(written.to_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(StoreDamaged):
        Manifest.from_bytes(bytes(content), "m")


@PROPERTY
@given(MANIFESTS, st.data())
def test_a_truncation_is_found(written: Manifest, data: st.DataObject) -> None:
    content = written.to_bytes()
    with pytest.raises(StoreDamaged):
        Manifest.from_bytes(content[: data.draw(st.integers(0, len(content) - 1))], "m")


@PROPERTY
@given(MANIFESTS)
def test_the_seal_is_the_hash_that_a_child_names(written: Manifest) -> None:
    assert json.loads(written.to_bytes())["sha256"] == written.sha256


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b'"text"', b"{}", b'{"sha256": 1}', b"\xff\xfe", bytes(100), b"[" * 100_000]
)
def test_what_is_not_a_sealed_document_is_damage(content: bytes) -> None:
    with pytest.raises(StoreDamaged, match="m\\.json"):
        manifest.unseal(content, "m.json")


@pytest.mark.parametrize(
    "path",
    [
        "scans/../../etc/passwd",
        "/etc/passwd",
        "segments/01M82GTZAH4W0ZQ6JDSQ19N5AN",
        "scans/x.zarr",
        "scans/01M82GTZAH4W0ZQ6JDSQ19N5AN.zarr/../..",
    ],
)
def test_a_sealed_path_that_leaves_its_folder_is_damage(path: str) -> None:
    evil = Manifest(0, None, "w", "t", "add", 0, (Artefact("scan", path, 1, 1, "0" * 64),))
    with pytest.raises(StoreDamaged, match="outside its folder"):
        Manifest.from_bytes(evil.to_bytes(), "m")


def test_a_sealed_document_that_is_no_manifest_is_damage() -> None:
    with pytest.raises(StoreDamaged, match="not a manifest"):
        Manifest.from_bytes(manifest.seal({"format_version": 1, "generation": 3}), "m")


def test_a_newer_manifest_is_incompatible() -> None:
    newer = Manifest(0, None, "w", "t", "add", 0, format_version=2)
    with pytest.raises(Incompatible):
        Manifest.from_bytes(newer.to_bytes(), "m")


def test_tree_digest_is_what_the_spec_says(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"hello")
    (tmp_path / "a.npy").write_bytes(b"")
    lines = [f"{name}\0{size}\0{sha256}\n" for name, size, sha256 in (("a.npy", 0, EMPTY), ("b/x", 5, HELLO))]
    expected = files.TreeDigest(5, 2, hashlib.sha256("".join(lines).encode()).hexdigest())
    assert files.tree_digest(tmp_path) == expected


def test_tree_digest_knows_a_renamed_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    before = files.tree_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert files.tree_digest(tmp_path).sha256 != before.sha256
