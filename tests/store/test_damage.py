"""Every file of a store, damaged in every way: a typed error or the right answer, and a store that can be repaired.

`ISIMED_DAMAGE=all pytest tests/store/test_damage.py` also damages what is like another file of the same store.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from cohorts import write_nifti
from store_builders import ENCODER, add_encoder, add_frame, add_regions, add_segment, copy_of

import isimed_index as isi
from isimed_index.errors import NotFound, StoreDamaged, StoreWarning
from isimed_index.index.card import row_ranges
from isimed_index.index.plan import build_index
from isimed_index.index.search import LiveIndex
from isimed_index.register.align import Alignment
from isimed_index.register.reference import Reference, read_reference, write_reference
from isimed_index.register.rows import Registered, row_of
from isimed_index.scans.chunks import open_chunks
from isimed_index.scans.scan import Scan
from isimed_index.store import integrity
from isimed_index.store.files import FOLDERS, FORMAT, HEAD, MANIFESTS, TAGS
from isimed_index.store.manifest import listed, load, manifest_name
from isimed_index.store.regions import living_regions
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.sql import catalog
from isimed_index.store.tags import set_tag, tagged
from isimed_index.store.transaction import Proposal
from isimed_index.store.upkeep.audit import audit
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import delete_patches
from isimed_index.store.upkeep.repair import repair

EVERY = "ISIMED_DAMAGE" in os.environ
PATCHES = {"sub-01": 6, "sub-02": 5, "sub-03": 4}
OUTPUTS = ("position", "descriptor")
Answers = dict[str, tuple[Any, bool]]  # by question, and whether there was a warning


def write_images(folder: Path) -> Path:
    """Three scans with label maps."""
    for number, scan in enumerate(PATCHES):
        voxels = np.random.default_rng(number).integers(0, 900, (6, 5, 4)).astype(np.int16)
        write_nifti(folder / f"{scan}.nii.gz", voxels, np.diag([2.0, 2.0, 3.0, 1.0]))
        write_nifti(folder / f"{scan}_seg.nii.gz", (voxels > 400).astype(np.uint8), np.diag([2.0, 2.0, 3.0, 1.0]))
    return folder


def add_images(repository: Repository, images: list[Path]) -> None:
    isi.api.Store(repository).add(images, labels="{stem}_seg.nii.gz")


def add_transforms(repository: Repository) -> None:
    """Commit a mean image of two scans, their transforms to it, and a kept answer."""
    head = repository.snapshot()
    image = Scan("reference", np.arange(60, dtype=np.int16).reshape(5, 4, 3), np.diag([4.0, 4.0, 4.0, 1.0]), slope=0.1)
    made_from = tuple(head.voxels_of[scan] for scan in ("sub-01", "sub-02"))
    mean = Reference("a1b2c3d4e5f6", "mean", "rigid", 1, 4.0, made_from, image, image.voxels > 7)
    found = Alignment(np.diag([1.0, 1.0, 1.0, 1.0]), 0.5, 0.7, 0.9)
    rows = [row_of(Registered(s, head.voxels_of[s], found, np.ones(3), 1), mean.id, "rigid", "s") for s in PATCHES]
    match = {"question": "q", "rank": 1, "from_scan": "sub-01", "scan": "sub-02", "encoder": ENCODER, "generation": 3}
    match |= dict.fromkeys([f"{a}_mm" for a in ("from_x", "from_y", "from_z", "x", "y", "z")], 1.5) | {"time": "now"}
    with repository.transaction("register") as transaction:
        path = transaction.stage("reference")
        write_reference(path, mean)
        artefact = transaction.add("reference", path, reference=mean.id)
        tables = {"transforms": pa.Table.from_pylist(rows), "matches": pa.Table.from_pylist([match])}
        transaction.commit(lambda _: Proposal([artefact], tables=tables))


def reference(snapshot: Snapshot) -> Any:
    """The mean image and what it is made from; None when it was dropped."""
    for artefact in snapshot.artefacts("reference"):
        found = read_reference(snapshot.verified(artefact))
        return found.made_from, found.image.voxels.tolist(), found.compared.tolist()
    return None


def add_real_index(repository: Repository) -> None:
    """Commit a FAISS index over all segments."""
    segments = repository.snapshot().segments(ENCODER)
    covers = [list(ends) for ends in row_ranges([segment.row_ids for segment in segments])]
    with repository.transaction("index") as transaction:
        path = transaction.stage("index")
        build_index(path, [(segment.row_ids, segment.vectors("descriptor")) for segment in segments], "cosine")
        artefact = transaction.add("index", path, encoder=ENCODER, covers=covers)
        transaction.commit(lambda head: Proposal([artefact]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with every kind of file: packed and lone segments, a tombstone, a tag, two pieces of each table."""
    root = tmp_path_factory.mktemp("whole")
    write_images(root / "images")
    repository = Repository.create(root / "store")
    first, second, third = (root / "images" / f"{scan}.nii.gz" for scan in PATCHES)
    add_images(repository, [first])
    add_images(repository, [second])
    add_encoder(repository)
    for scan in ("sub-01", "sub-02"):
        add_segment(repository, scan, PATCHES[scan])
    set_tag(repository.storage, "v1", compact(repository).generation)
    add_images(repository, [third])
    add_segment(repository, "sub-03", PATCHES["sub-03"])
    delete_patches(repository, "scan = 'sub-01' AND i = 2")
    add_transforms(repository)
    add_frame(repository, "sub-01")
    add_real_index(repository)
    add_regions(repository)
    return root


@pytest.fixture(scope="module")
def alike(whole: Path) -> set[Path]:
    """What stands for nothing of its own: all of the second of two equal adds and encodings, manifests in between."""
    if EVERY:
        return set()
    storage = Repository.open(whole / "store").storage
    held = [{artefact.path for artefact in load(storage, number).artefacts} for number in range(6)]
    made = (held[2] - held[1]) | (held[5] - held[4])
    assert {path.split("/")[0] for path in made} == {"scans", "tables", "segments"}
    *_, before, head = numbers = listed(storage)
    between = {*numbers} - {0, 1, tagged(storage, "v1").generation, before, head}
    files = [manifest_name(number) for number in between]
    return {whole / "store" / path for path in (*made, *files, *(f"{file}.copy" for file in files))}


def search(snapshot: Snapshot) -> Any:
    segments = snapshot.segments(ENCODER)
    blocks = [(segment.row_ids, segment.vectors("descriptor")) for segment in segments]
    live = LiveIndex.open(blocks, "cosine", snapshot.index_path(ENCODER))
    hits = live.search(np.eye(4, dtype=np.float32), 3)
    return hits.row_ids.tolist(), np.round(hits.distances, 5).tolist()


def pooled(snapshot: Snapshot) -> Any:
    found = living_regions(snapshot, ENCODER)
    return None if found is None else (found.rows.to_pylist(), found.mean.tolist(), found.sd.tolist(), found.made)


def rows(name: str) -> Callable[[Snapshot], Any]:
    return lambda snapshot: snapshot.table(name).to_pylist()


def view(name: str) -> Callable[[Snapshot], Any]:
    """What SQL is given under a name, without the process that it runs in."""
    return lambda snapshot: catalog._VIEWS[name](snapshot).to_pylist()


QUESTIONS: dict[str, Callable[[Snapshot], Any]] = {
    "scans": rows("scans"),
    "subjects": rows("subjects"),
    "labels": rows("labels"),
    "transforms": rows("transforms"),
    "matches": rows("matches"),
    **{
        name: view(name)
        for name in ("patches", "patch_labels", "regions", "encoders", "segments", "indexes", "generations")
    },
    "reference": reference,
    "sql": lambda snapshot: snapshot.sql("SELECT count(*) AS n, max(cx_mm) AS far FROM patches").to_pylist(),
    "vectors": lambda snapshot: [
        segment.vectors(output).tolist() for segment in snapshot.segments(ENCODER) for output in OUTPUTS
    ],
    "lattices": lambda snapshot: [segment.lattice() for segment in snapshot.segments(ENCODER)],
    "card": lambda snapshot: snapshot.card(snapshot.encoder_artefact("toy")),
    "voxels": lambda snapshot: [
        (stored.voxels().tolist(), stored.labels().tolist(), stored.affine.tolist())
        for stored in (open_chunks(snapshot.chunks_path(scan)) for scan in snapshot.scan_ids())
    ],
    "search": search,
    "pooled": pooled,
}


def ask(path: Path, *, sql: bool = True) -> Answers:
    """Each question's answer in a process that knows nothing yet, and whether there was a warning."""
    integrity._verify_hash.cache_clear()
    head, unlike = answer(lambda: Repository.open(path).snapshot())
    given = {
        name: answer(lambda question=question: question(head)) if isinstance(head, Snapshot) else (head, False)
        for name, question in QUESTIONS.items()
        if sql or name != "sql"  # it runs in a process of its own, which takes as long as all else
    }
    given["tagged"] = answer(lambda: rows("scans")(Repository.open(path).pin(tag="v1")))
    return {name: (found, told or unlike) for name, (found, told) in given.items()}


def answer(question: Callable[[], Any]) -> tuple[Any, bool]:
    """What a question is answered, or the error that it ends in, and whether there was a warning."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = question()
        except (StoreDamaged, NotFound) as error:
            found = type(error)
    assert all(issubclass(warning.category, StoreWarning) for warning in told)
    return found, bool(told)


def earlier(path: Path, truth: Answers) -> dict[str, list[Any]]:
    """What may be said with a warning: by the generation before the newest, or of a part that is damaged."""
    snapshot = Repository.open(path).snapshot(Repository.open(path).head() - 1)
    before = {name: [question(snapshot)] for name, question in QUESTIONS.items()}
    history = truth["generations"][0]
    before["indexes"].append([{**row, "kind": None, "recall_at_10": None} for row in truth["indexes"][0]])
    before["generations"] += [history[:left] + history[left + 1 :] for left in range(len(history))]
    return {**before, "tagged": []}


@pytest.fixture(scope="module")
def answers(whole: Path) -> tuple[Answers, dict[str, list[Any]]]:
    """The right answers, and those that may be given with a warning."""
    truth = ask(whole / "store")
    return truth, earlier(whole / "store", truth)


def zeroed(content: bytes) -> bytes:
    start = len(content) // 2 // 512 * 512  # a small page, so that it is not the whole of a small file
    return content[:start] + bytes(len(content[start : start + 512])) + content[start + 512 :]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGE: dict[str, Callable[[bytes], bytes] | None] = {"page": zeroed, "bit": flipped, "cut": cut, "missing": None}
DOCUMENTS = (FORMAT, MANIFESTS, TAGS)
PLACES = (FORMAT, HEAD, MANIFESTS, TAGS, *FOLDERS.values())


def test_every_place_of_a_store_is_damaged(whole: Path):
    assert {entry.name for entry in (whole / "store").iterdir()} == {
        *PLACES,
        f"{FORMAT}.copy",
        "intents",
        "leases",
        "tmp",
    }
    for empty in ("intents", "leases"):
        assert not list((whole / "store" / empty).iterdir())
    assert all(list((whole / "store").rglob(f"{place}/**/*")) for place in FOLDERS.values())


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("place", PLACES)
def test_a_damaged_file_never_gives_a_wrong_answer_and_is_repaired(
    whole: Path,
    answers: tuple[Answers, dict[str, list[Any]]],
    alike: set[Path],
    tmp_path: Path,
    place: str,
    damage: str,
):
    truth, past = answers
    root = whole / "store" / place
    files = sorted(root.rglob("*") if root.is_dir() else [root])
    for number, file in enumerate(file for file in files if not alike & {file, *file.parents}):
        if file.is_dir() or (damage != "missing" and not file.stat().st_size):
            continue
        store = shutil.copytree(whole / "store", tmp_path / str(number))
        broken = store / file.relative_to(whole / "store")
        if damage == "missing":
            broken.unlink()
        else:
            broken.write_bytes(DAMAGE[damage](file.read_bytes()))
            assert broken.read_bytes() != file.read_bytes()
        allowed = {name: [StoreDamaged, answer] for name, (answer, _) in truth.items()}
        excused = past
        if place == TAGS and damage == "missing":  # of what no other file speaks
            allowed["tagged"].append(NotFound)
        elif place in DOCUMENTS:  # it has a copy, or is one
            allowed = {name: [answer] for name, (answer, _) in truth.items()}
            excused = {name: [] for name in past}
        for name, (found, told) in ask(store, sql=damage == "bit").items():
            assert found in [*allowed[name], *(excused[name] if told else [])], f"{name}: {file.relative_to(whole)}"
        if (number + list(DAMAGE).index(damage)) % 2:  # every file in two of four ways
            assert_repaired(store, broken, truth, whole / "images")
        shutil.rmtree(store)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("place", DOCUMENTS)
def test_a_document_that_is_damaged_with_its_copy_never_gives_a_wrong_answer(
    whole: Path,
    answers: tuple[Answers, dict[str, list[Any]]],
    alike: set[Path],
    tmp_path: Path,
    place: str,
    damage: str,
):
    truth, past = answers
    root = whole / "store" / place
    for number, file in enumerate(sorted({*root.glob("*.json")} - alike if root.is_dir() else [root])):
        store = shutil.copytree(whole / "store", tmp_path / str(number))
        broken = store / file.relative_to(whole / "store")
        for one in (broken, copy_of(broken)):
            one.unlink() if damage == "missing" else one.write_bytes(DAMAGE[damage](one.read_bytes()))
        allowed = {name: [StoreDamaged, answer] for name, (answer, _) in truth.items()}
        if damage == "missing":  # of what no other file speaks, and a collector might have taken
            allowed["tagged"] += [NotFound] if place == TAGS else []
            allowed["generations"] += past["generations"] if place == MANIFESTS else []
        for name, (found, told) in ask(store, sql=False).items():
            assert found in [*allowed[name], *(past[name] if told else [])], f"{name}: {file.relative_to(whole)}"
        assert_repaired(store, broken, truth, whole / "images")
        shutil.rmtree(store)


def assert_repaired(store: Path, broken: Path, truth: Answers, images: Path) -> None:
    """After a repair an audit finds no damage, and what can be made again makes the store what it was."""
    in_encoder = broken.parent.parent.name == "encoders"
    done = repair(store)
    integrity._verify_hash.cache_clear()
    repository = Repository.open(store)
    found = audit(repository, read=1.0)
    damage = any(finding.severity == "damage" for finding in found)
    assert damage == in_encoder == any("encoder" in line for line in done.lost)
    again = repair(repository, found)
    assert not again.committed
    assert not again.quarantined
    if in_encoder:
        return
    if done.add_again:
        add_images(repository, [images])
    head = repository.snapshot()
    encoded = {head.scan_of[segment.scan_artefact] for segment in head.segments(ENCODER)}
    lacking = {*done.add_again, *done.encode_again}
    assert set(PATCHES) - encoded == lacking
    for scan in sorted(lacking):
        head = add_segment(repository, scan, PATCHES[scan])
    for name in ("scans", "subjects", "labels", "transforms", "matches"):
        if name in ("transforms", "matches") and done.add_again:
            continue  # their rows went with the scan
        if name in ("scans", "subjects") or name not in done.rows_lost:
            assert unordered(QUESTIONS[name](head), "artefact") == unordered(truth[name][0], "artefact")
    if "sub-01" not in lacking:  # when it is encoded again, the patch that was deleted from it is there again
        made = ("patch", "cx_mm", "cy_mm", "cz_mm")
        assert unordered(QUESTIONS["patches"](head), *made) == unordered(truth["patches"][0], *made)
        assert unordered(QUESTIONS["patch_labels"](head), "patch") == unordered(truth["patch_labels"][0], "patch")
    assert sorted(QUESTIONS["voxels"](head)) == sorted(truth["voxels"][0])


def unordered(table: list[dict[str, Any]], *without: str) -> list[str]:
    return sorted(str({key: value for key, value in row.items() if key not in without}) for row in table)


def test_a_flipped_bit_of_an_index_that_is_mapped_is_found_where_the_store_says_where_it_is(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isimed_index.index.faiss_index.MAPPED_FROM", 0)
    shutil.copytree(whole / "store", tmp_path / "store")
    right = search(Repository.open(whole / "store").snapshot())
    (path,) = (tmp_path / "store").glob("indexes/*/index.faiss")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.warns(StoreWarning, match="does not match its hash"):
        assert search(Repository.open(tmp_path / "store").snapshot()) == right
