"""Which scans, or regions of the same name, are like one: against the definition, and whatever is done to the store."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from cohorts import COPIES, CROPPED, Cohort, Copy, add_random_encoder, head, rigid, tiny_scan, write_copy
from numpy.typing import NDArray

import isimed_index as isi
from isimed_index import regions as pooled_anew
from isimed_index.api import Store
from isimed_index.errors import NotFound, StoreDamaged, StoreWarning, UsageError
from isimed_index.frame import read_frame
from isimed_index.similar import Pooling, distances
from isimed_index.store.regions import MEAN, StoredRegions, described, living_regions, read_regions
from isimed_index.store.transaction import Proposal

ASKED, TWIN = COPIES[0].stem, COPIES[1].stem
BRAIN, WHITE = 3, 4  # which the cohort has names for; all other labels have none
COLUMNS = ["scan", "subject", "label", "name", "distance", "patches"]


@pytest.fixture(scope="module")
def whole(cohort: Cohort) -> Store:
    """The cohort as it is; not to be written to."""
    return isi.open(cohort.store, mode="r")


@pytest.fixture
def store(cohort: Cohort, tmp_path: Path) -> Store:
    """A copy of the indexed cohort that may be written to."""
    return isi.open(shutil.copytree(cohort.store, tmp_path / "store"))


def regions(store: Store) -> dict[tuple[int, int | None], tuple[bytes, bytes]]:
    """Every pooled vector that holds, by segment and label, bit for bit."""
    found = living_regions(store.snapshot, store.encoder().id)
    assert found is not None
    keys = zip(found.rows["segment"].to_pylist(), found.rows["label"].to_pylist(), strict=True)
    return {key: (found.mean[row].tobytes(), found.sd[row].tobytes()) for row, key in enumerate(keys)}


def segment_of(store: Store, scan: str) -> int:
    """The row id by which regions name a scan's segment."""
    return store.snapshot.segments_by_scan(store.encoder().id)[scan].first_row_id


def drop_derived(store: Store, kind: str) -> None:
    """Take all artefacts of a kind out of the newest generation."""
    with store._repository.transaction("test") as transaction:
        transaction.commit(lambda head: Proposal(drop=[artefact.path for artefact in head.artefacts(kind)]))
    store.refresh()


def scans_with_regions(store: Store) -> set[str]:
    return set(store.sql("SELECT DISTINCT scan FROM regions")["scan"].to_pylist())


def pooled(store: Store, scan: str, label: int | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of a scan's unit vectors, patch by patch, from what SQL and `embeddings` say."""
    if label is None:
        weights = store.sql("SELECT patch, foreground AS w FROM patches WHERE scan = $s", {"s": scan})
    else:
        query = (
            "SELECT patch, fraction AS w FROM patch_labels JOIN patches USING (patch) WHERE scan = $s AND label = $l"
        )
        weights = store.sql(query, {"s": scan, "l": label})
    weight = dict(zip(weights["patch"].to_pylist(), weights["w"].to_pylist(), strict=True))
    frame = store.snapshot.frame_path(store.encoder().id)
    assert frame is not None
    standard = read_frame(frame).standard
    mean: Any = 0.0
    square: Any = 0.0
    for patches, vectors in store.embeddings(f"scan = '{scan}'"):
        for patch, vector in zip(patches.tolist(), vectors, strict=True):
            z = (vector.astype(np.float64) - standard.centre) / standard.scale
            u = np.append(z, 1.0) / np.sqrt(z @ z + 1)
            mean = mean + weight.get(patch, 0.0) * u
            square = square + weight.get(patch, 0.0) * u**2
    total = sum(weight.values())
    return mean / total, np.sqrt(np.maximum(square / total - (mean / total) ** 2, 0))


def euclid(store: Store, a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The card's distance of two means: each put where a single patch with this direction would lie."""
    frame = store.snapshot.frame_path(store.encoder().id)
    assert frame is not None
    scale = read_frame(frame).standard.scale
    return float(np.linalg.norm(a[:-1] / a[-1] - b[:-1] / b[-1]) * scale)


@pytest.mark.parametrize("label", [None, WHITE])
def test_distances_are_those_of_the_definition(whole: Store, label: int | None):
    own = pooled(whole, ASKED, label)
    for pooling in ("mean", "mean_sd"):
        found = whole.similar(ASKED, label, same_subject="include", pooling=pooling)
        assert found.column_names == COLUMNS
        assert sorted(found["scan"].to_pylist()) == sorted({c.stem for c in (*COPIES, CROPPED)} - {ASKED})
        assert found["distance"].to_pylist() == sorted(found["distance"].to_pylist())
        for row in found.to_pylist():
            other = pooled(whole, row["scan"], label)
            if pooling == "mean":
                expected = euclid(whole, own[0], other[0])
            else:
                expected = 1 - np.concatenate(own) @ np.concatenate(other)
            assert row["distance"] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "mean_sd"])
def test_vectors_without_a_direction_are_like_nothing(pooling: Pooling):
    """1 - cosine is 1, as in lookups: less like than all that point anywhere near, also one another."""
    mean = np.array([[1, 0], [0.6, 0.8], [0, 0], [0, 0]], np.float32)
    sd = np.zeros_like(mean)
    made = {"metric": "cosine", "centre": [0.0, 0.0], "scale": 1.0}
    stored = StoredRegions(pa.table({"segment": [0, 1, 2, 3]}), mean, sd, made)
    np.testing.assert_allclose(distances(stored, 0, np.array([1, 2]), pooling), [0.4, 1.0], atol=1e-6)
    np.testing.assert_allclose(distances(stored, 2, np.array([0, 3]), pooling), [1.0, 1.0])


def test_the_head_with_less_of_it_is_the_least_like(whole: Store):
    found = whole.similar(ASKED, same_subject="include")
    assert found["scan"][-1].as_py() == CROPPED.stem
    assert found["distance"][-1].as_py() > 10 * found["distance"][-2].as_py()
    assert found["label"].null_count == found["name"].null_count == found.num_rows
    patches = whole.sql("SELECT scan, count(*) AS n FROM patches GROUP BY scan").to_pylist()
    assert (
        dict(zip(found["scan"].to_pylist(), found["patches"].to_pylist(), strict=True)).items()
        <= {row["scan"]: row["n"] for row in patches}.items()
    )


def test_which_scans_may_answer(whole: Store):
    assert TWIN not in whole.similar(ASKED)["scan"].to_pylist()
    assert whole.similar(ASKED, same_subject="only")["scan"].to_pylist() == [TWIN]
    assert whole.similar(ASKED, where="subject = 'sub-03'")["scan"].to_pylist() == ["sub-03_T1w"]
    assert whole.similar(ASKED, where="false").num_rows == 0
    assert whole.similar(ASKED, where="false").column_names == COLUMNS
    assert whole.similar(ASKED, k=2).equals(whole.similar(ASKED).slice(0, 2))


@pytest.mark.parametrize("label", [WHITE, "white matter", "4", "label 4", np.int32(WHITE)])
def test_a_region_by_name_or_number(whole: Store, label: Any):
    found = whole.similar(ASKED, label)
    assert set(found["label"].to_pylist()) == {WHITE}
    assert set(found["name"].to_pylist()) == {"white matter"}
    assert found.equals(whole.similar(ASKED, WHITE))
    assert not found["distance"].equals(whole.similar(ASKED, BRAIN)["distance"])


def renamed(store: Store, names: dict[tuple[str, int], str | None]) -> Store:
    """The store with other names of labels."""
    rows = store.snapshot.table("labels").to_pylist()
    for row in rows:
        row["name"] = names.get((row["scan"], row["label"]), row["name"])
    with store._repository.transaction("add") as transaction:
        table = pa.Table.from_pylist(rows, schema=store.snapshot.table("labels").schema)
        transaction.commit(lambda _: Proposal(rewrite={"labels": table}))
    store.refresh()
    return store


def test_left_is_never_compared_with_what_is_called_right(store: Store):
    sides: dict[tuple[str, int], str | None] = {(ASKED, BRAIN): "left", (ASKED, WHITE): "right"}
    for copy in (*COPIES[1:4], CROPPED):
        sides |= {(copy.stem, BRAIN): "right", (copy.stem, WHITE): "left"}  # numbered the other way round
    sides |= {(COPIES[4].stem, BRAIN): None, (COPIES[4].stem, WHITE): "left"}
    renamed(store, sides)
    with pytest.warns(StoreWarning, match=r"label 3 has a name in some .*: 1 region is left out.* to a new"):
        found = store.similar(ASKED, "left", same_subject="include")
    assert set(found["name"].to_pylist()) == {"left"}
    assert set(found["label"].to_pylist()) == {WHITE}
    assert found.num_rows == 5
    right = store.similar(ASKED, "right", same_subject="include")
    assert set(right["label"].to_pylist()) == {BRAIN}
    assert COPIES[4].stem not in right["scan"].to_pylist()
    with pytest.warns(StoreWarning, match="left out"):
        nameless = store.similar(COPIES[4].stem, BRAIN)
    assert nameless.num_rows == 0


def test_another_spelling_is_left_out_but_told(store: Store):
    renamed(store, {(ASKED, BRAIN): "Left-Lung", (CROPPED.stem, BRAIN): "left lung", (COPIES[1].stem, BRAIN): "right"})
    with pytest.warns(StoreWarning, match="call 'left lung' is not taken for 'Left-Lung', and left out"):
        assert not store.similar(ASKED, "Left-Lung").num_rows


def test_a_name_comes_before_the_number_that_it_looks_like(store: Store):
    renamed(store, {(ASKED, BRAIN): f"label {WHITE}", (CROPPED.stem, BRAIN): f"label {WHITE}"})
    assert set(store.similar(ASKED, f"label {WHITE}")["label"].to_pylist()) == {BRAIN}


def test_two_labels_of_one_name_are_told_apart_by_number(store: Store):
    renamed(store, {(ASKED, BRAIN): "tissue", (ASKED, WHITE): "tissue", (CROPPED.stem, WHITE): "tissue"})
    with pytest.raises(UsageError, match=r"labels 3 and 4 of scan .* are all called 'tissue'"):
        store.similar(ASKED, "tissue")
    found = store.similar(ASKED, BRAIN)
    assert [(row["scan"], row["label"]) for row in found.to_pylist()] == [(CROPPED.stem, WHITE)]


def test_what_cannot_be_asked(whole: Store, tmp_path: Path):
    with pytest.raises(NotFound, match="did you mean 'white matter'"):
        whole.similar(ASKED, "White Mater")
    with pytest.raises(NotFound, match="no label 99; the nearest are"):
        whole.similar(ASKED, 99)
    with pytest.raises(NotFound, match="no label '-1'; the nearest are"):
        whole.similar(ASKED, "-1")
    with pytest.raises(NotFound, match="no label 'label 87'; the nearest are"):
        whole.similar(ASKED, "label 87")  # as lookups call one without a name
    for wrong_scan in (None, 3, tmp_path / "one.nii.gz"):
        with pytest.raises(UsageError, match=r"expected the id of a stored scan, found (None|3|the path 'one.nii.gz')"):
            whole.similar(wrong_scan)  # type: ignore[arg-type]
    with pytest.raises(NotFound, match="no scan 'sub-99'"):
        whole.similar("sub-99")
    with pytest.raises(NotFound, match="did you mean 'white matter'\\?"):
        whole.similar(ASKED, "White_Matter")
    for wrong in ({"k": 0}, {"pooling": "max"}, {"same_subject": "all"}, {"label": True}, {"label": 3.0}):
        with pytest.raises(UsageError, match="expected"):
            whole.similar(ASKED, **wrong)
    store = isi.create(tmp_path / "c")
    store.add(tiny_scan(tmp_path / "one.nii.gz"))
    with pytest.raises(NotFound, match="no encoder yet"):
        store.similar("one")
    asked = add_random_encoder(store.path)
    add_random_encoder(store.path, "newest", seed=1)
    store.refresh()
    with pytest.raises(NotFound, match="not encoded") as caught:
        store.similar("one", encoder="random")
    assert caught.value.next_step == f"isimed index --encoder {asked}"  # by itself it takes the newest


def test_a_scan_without_labels(store: Store, tmp_path: Path):
    bare = write_copy(tmp_path / "bare", Copy("sub-09_T1w", "RAS", rigid((4, 3, -5), (9, 9, 9))), head())
    store.add(bare)
    store.index(where="scan = 'sub-09_T1w'")
    assert store.similar("sub-09_T1w").num_rows == 6
    with pytest.raises(NotFound, match="has no labels, so it has no regions"):
        store.similar("sub-09_T1w", "brain")
    assert "sub-09_T1w" not in store.similar(ASKED, "brain")["scan"].to_pylist()


def test_imported_patches_do_not_tell_labels(cohort: Cohort, whole: Store, tmp_path: Path):
    """Not the label is too small: nothing is known of where it is."""
    whole.export(tmp_path / "out", "npy", where=f"scan IN ('{ASKED}', 'sub-02_T1w')")
    folder = tmp_path / "out" / whole.encoder().id
    (folder / "embedding.npy").unlink()
    theirs = json.loads((folder / "card.json").read_text())
    fields = {key: theirs[key] for key in ("patch_vox", "stride_vox", "spacing_mm", "metric", "match_output")}
    described = {**fields, "name": "theirs", "outputs": {"descriptor": {"dim": 16}}}
    (tmp_path / "theirs.json").write_text(json.dumps(described))
    store = isi.create(tmp_path / "store")
    store.add([cohort.file(COPIES[0]), cohort.file(COPIES[2])], labels="{stem}_seg.nii.gz")
    store.import_(folder, card=tmp_path / "theirs.json")
    store.index()
    assert store.similar(ASKED)["scan"].to_pylist() == ["sub-02_T1w"]
    with pytest.raises(NotFound, match="not stored which labels the patches of scan 'sub-01_ses-1_T1w' show"):
        store.similar(ASKED, BRAIN)


def test_a_region_too_small(tmp_path: Path):
    """Two voxels of a label of their own: half a cell of the lattice or less; the scan's id would end an SQL text."""
    template = head()
    x, y, z = (n // 2 for n in template.labels.shape)
    template.labels[x : x + 2, y, z] = 99
    store = isi.create(tmp_path / "c")
    store.add(write_copy(tmp_path, Copy("o'neil", "RAS", rigid()), template), labels="{stem}_seg.nii.gz")
    add_random_encoder(store.path)
    store.refresh()
    store.index(stride_mm=16)
    weights = "SELECT label, sum(fraction) AS w FROM patch_labels GROUP BY label"
    weight = {row["label"]: row["w"] for row in store.sql(weights).to_pylist()}
    assert 0 < weight[99] < 1
    pooled_labels = store.sql("SELECT label FROM regions WHERE label IS NOT NULL")["label"].to_pylist()
    assert set(pooled_labels) == {label for label, w in weight.items() if w >= 1}
    for label, said in ((99, "too little of label 99"), ("liver", "no label 'liver'")):
        with pytest.raises(NotFound, match=said) as caught:
            store.similar("o'neil", label)
        assert caught.value.next_step is not None
        _, query, _ = caught.value.next_step.split('"')
        assert store.sql(query).num_rows > 1


def test_the_view_tells_of_every_vector(whole: Store):
    rows = whole.sql("SELECT * FROM regions ORDER BY scan, label NULLS FIRST").to_pylist()
    assert len(rows) == len(regions(whole))
    assert {row["encoder"] for row in rows} == {whole.encoder().id}
    query = (
        "SELECT scan, label, any_value(name) AS name, count(*) AS patches, sum(fraction) AS weight, "
        "sum(fraction * foreground) / sum(fraction) AS foreground FROM patch_labels JOIN patches USING (patch) "
        "JOIN labels USING (scan, label) GROUP BY scan, label HAVING weight >= 1 "
        "UNION ALL SELECT scan, NULL, NULL, count(*), sum(foreground), sum(foreground * foreground) / sum(foreground) "
        "FROM patches GROUP BY scan ORDER BY scan, label NULLS FIRST"
    )
    expected = whole.sql(query).to_pylist()
    assert [(row["scan"], row["label"], row["name"], row["patches"]) for row in rows] == [
        (row["scan"], row["label"], row["name"], row["patches"]) for row in expected
    ]
    for name in ("weight", "foreground"):
        np.testing.assert_allclose([row[name] for row in rows], [row[name] for row in expected], rtol=1e-5)


def test_new_scans_are_pooled_and_the_others_stay_bit_for_bit(store: Store, tmp_path: Path):
    before = regions(store)
    generation = store.generation
    store.index()
    assert store.generation == generation
    store.add(write_copy(tmp_path / "new", Copy("sub-09_T1w", "IRP", rigid((4, 3, -5), (9, 9, 9))), head()))
    store.index()
    after = regions(store)
    assert before.items() < after.items()
    assert len({segment for segment, _ in after}) == 7
    assert len(store.snapshot.artefacts("region")) == 1


def test_what_another_process_commits_meanwhile_is_seen(store: Store, monkeypatch: pytest.MonkeyPatch):
    """While the first process pools, a second one indexes, and a scan is deleted behind both."""
    write, calls = pooled_anew.write_regions, []

    def slow_write(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            with isi.open(store.path) as other:
                other.index()
                other.delete(f"scan = '{TWIN}'")
        write(*args)

    store.delete("scan = 'sub-02_T1w'")
    monkeypatch.setattr(pooled_anew, "write_regions", slow_write)
    store.index()
    assert len(calls) == 3  # the second process's, and the first's that began again
    [artefact] = store.snapshot.artefacts("region")
    assert len(set(read_regions(store.path / artefact.path).rows["segment"].to_pylist())) == 4
    assert scans_with_regions(store) == {ASKED, "sub-03_T1w", "sub-04_T1w", CROPPED.stem}


def test_a_frame_that_is_dropped_meanwhile_takes_what_was_pooled_by_it(store: Store, monkeypatch: pytest.MonkeyPatch):
    """As by a purge, which drops what was measured with the subject: the run makes both again from what is left."""
    write, calls = pooled_anew.write_regions, []

    def slow_write(directory: Path, made: StoredRegions) -> None:
        calls.append(made.made)
        if len(calls) == 1:
            with isi.open(store.path) as other:
                other.delete(f"scan = '{TWIN}'")
                drop_derived(other, "frame")
        write(directory, made)

    drop_derived(store, "region")
    monkeypatch.setattr(pooled_anew, "write_regions", slow_write)
    store.index()
    assert len(calls) == 2
    assert calls[0]["centre"] != calls[1]["centre"]
    frame = store.snapshot.frame_path(store.encoder().id)
    assert frame is not None
    [artefact] = store.snapshot.artefacts("region")
    found = read_regions(store.path / artefact.path)
    assert found.made["centre"] == read_frame(frame).standard.centre.tolist()
    assert scans_with_regions(store) == {ASKED, "sub-02_T1w", "sub-03_T1w", "sub-04_T1w", CROPPED.stem}


def test_what_is_deleted_answers_no_more_and_old_answers_stay_by_tag(store: Store):
    before = store.similar(ASKED, same_subject="include")
    old = regions(store)
    store.tag("paper")
    store.delete(f"scan = '{TWIN}'")
    assert TWIN not in scans_with_regions(store)
    assert TWIN not in store.similar(ASKED, same_subject="include")["scan"].to_pylist()
    store.delete("scan = 'sub-02_T1w' AND patch % 2 = 0", "patches")  # its vectors are of patches that are gone
    assert "sub-02_T1w" not in scans_with_regions(store)
    with pytest.warns(StoreWarning, match=rf"1 encoded scan has .* isimed index --encoder {store.encoder().id}"):
        left = store.similar(ASKED)["scan"].to_pylist()
    assert set(left) == {"sub-03_T1w", "sub-04_T1w", CROPPED.stem}
    with pytest.raises(NotFound, match="no vector of the whole scan yet"):
        store.similar("sub-02_T1w")
    store.index()
    assert "sub-02_T1w" in store.similar(ASKED)["scan"].to_pylist()
    mean, _ = pooled(store, "sub-02_T1w", None)
    found = regions(store)[segment_of(store, "sub-02_T1w"), None][0]
    np.testing.assert_allclose(np.frombuffer(found, "f4"), mean, atol=1e-5)
    now = regions(store)
    store.compact()
    assert regions(store) == now
    with isi.open(store.path, tag="paper") as tagged:
        assert tagged.similar(ASKED, same_subject="include").equals(before)
    store.restore(tag="paper")
    assert regions(store) == old
    assert store.similar(ASKED, same_subject="include").equals(before)


def test_a_new_standard_has_all_pooled_again(store: Store):
    before = regions(store)
    drop_derived(store, "frame")
    store.delete(f"scan IN ('{TWIN}', '{CROPPED.stem}')")
    store.index()
    after = regions(store)
    assert after.keys() < before.keys()
    assert not before.items() & after.items()
    mean, _ = pooled(store, ASKED, WHITE)
    found = after[segment_of(store, ASKED), WHITE][0]
    np.testing.assert_allclose(np.frombuffer(found, "f4"), mean, atol=1e-5)


def test_a_purge_leaves_no_vector_of_the_subject_in_any_file(store: Store):
    every = regions(store)
    gone = {
        s.first_row_id for s in store.snapshot.segments() if store.snapshot.scan_of[s.scan_artefact] == "sub-02_T1w"
    }
    theirs = [vector for (segment, _), pair in every.items() if segment in gone for vector in pair]
    assert theirs
    before = {made.path for made in store.snapshot.artefacts("region")}
    erased = store.purge("sub-02")
    assert before <= set(erased.artefacts)
    for file in (found for found in store.path.rglob("*") if found.is_file()):
        content = file.read_bytes()
        assert not any(vector in content for vector in theirs), file.name
    assert scans_with_regions(store) == {c.stem for c in (*COPIES, CROPPED)} - {"sub-02_T1w"}
    assert store.similar(ASKED).num_rows == 3
    assert not [finding for finding in isi.check(store.path, read=1.0) if finding.severity == "damage"]


def test_damaged_regions_are_refused_and_made_again(store: Store):
    before = regions(store)
    [artefact] = store.snapshot.artefacts("region")
    file = store.path / artefact.path / MEAN
    file.write_bytes(file.read_bytes()[:-40])
    store.refresh()
    with pytest.raises(StoreDamaged, match="region"):
        store.similar(ASKED)
    with pytest.raises(StoreDamaged, match="region"):
        store.sql("FROM regions")
    with pytest.warns(StoreWarning, match="pooled again"):
        store.index()
    assert regions(store) == before


def test_nothing_of_torch_is_loaded(cohort: Cohort):
    code = "import sys, isimed_index as isi; isi.open(sys.argv[1], mode='r').similar(sys.argv[2])"
    code += "; print('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(cohort.store), ASKED], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "False\n"


# -- real heads ------------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.timeout(600)
def test_regions_of_real_heads_find_themselves_in_others(real_data: Path, tmp_path: Path):
    for image in sorted((real_data / "ixi" / "t1").glob("*.nii.gz"))[::36]:
        shutil.copy(image, tmp_path)
        seg = next((real_data / "ixi" / "seg").glob(image.name.split("_T1")[0] + "*"))
        shutil.copy(seg, tmp_path / image.name.replace(".nii.gz", "_seg.nii.gz"))
    store = isi.create(tmp_path / "cohort.isimed")
    names_at = real_data / "ixi" / "labels.tsv"
    store.add(sorted(tmp_path.glob("*_T1.nii.gz")), labels="{stem}_seg.nii.gz", label_names=names_at)
    add_random_encoder(store.path)
    store.index()
    found = living_regions(store.snapshot, store.encoder().id)
    assert found is not None
    rows = described(store.snapshot, store.encoder().id, found.rows)
    labels, scans = np.array([label or 0 for label in rows["label"].to_pylist()]), found.rows["segment"].to_numpy()
    names = dict(zip(labels.tolist(), rows["name"].to_pylist(), strict=True))  # of the deep structures alone
    hits, mirrored, chances = [], [], []
    for row in np.flatnonzero(labels):
        others = np.flatnonzero((labels > 0) & (scans != scans[row]))
        nearest = labels[others[distances(found, int(row), others, "mean").argmin()]]
        hits.append(nearest == labels[row])
        chances.append((labels[others] == labels[row]).mean())
        if (name := names[labels[row]]) is not None:
            mirrored.append(names[nearest] == mirror(name))
    scores = [float(np.mean(shares)) for shares in (hits, chances, mirrored)]
    print("{} heads: hit@1 {:.3f}, by chance {:.3f}; the mirror image {:.3f}".format(len(set(scans)), *scores))
    assert scores[0] > 10 * scores[1]
    assert scores[2] < 0.02
    thalami = store.similar(store.snapshot.scan_ids()[0], "left thalamus")
    assert set(thalami["name"].to_pylist()) == {"left thalamus"}
    assert set(thalami["label"].to_pylist()) == {60}


def mirror(name: str) -> str:
    """The name of the same structure on the other side; of one in the middle, none."""
    swapped = " ".join({"left": "right", "right": "left"}.get(word, word) for word in name.split())
    return swapped if swapped != name else ""
