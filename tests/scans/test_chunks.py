"""Chunks on disk: bit-exact, readable by plain Zarr, and never silently wrong."""

import json
import threading

import numpy as np
import pytest
import zarr

from isimed_index.errors import NotFound, StoreDamaged, UsageError
from isimed_index.grid import Box
from isimed_index.scans import LabelMap, Scan
from isimed_index.scans.chunks import open_chunks, write_absent, write_chunks

NAMES = {1: "left", 2: "right"}


@pytest.fixture
def scan(voxels, oblique):
    return Scan("a", voxels, oblique, 0.5, -1024.0, {"source_format": "NIfTI-1", "nonfinite_voxels": 3})


@pytest.fixture
def labels(voxels):
    return LabelMap((voxels > 0).astype(np.uint8) + (voxels > 900), NAMES)


@pytest.fixture
def directory(tmp_path, scan, labels):
    write_chunks(scan, labels, tmp_path / "a.zarr")
    return tmp_path / "a.zarr"


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_stored_type_round_trips_bit_for_bit(tmp_path, scan, dtype):
    voxels = np.random.default_rng(1).integers(0, 256, (70, 5, 66 * np.dtype(dtype).itemsize), np.uint8).view(dtype)
    if voxels.dtype.kind == "f":
        voxels = np.nan_to_num(voxels)
    typed = Scan("a", voxels, scan.affine)
    write_chunks(typed, None, tmp_path / "a.zarr")
    stored = open_chunks(tmp_path / "a.zarr")
    assert stored.voxels().dtype == voxels.dtype
    assert stored.voxels().tobytes() == voxels.tobytes()


def test_geometry_scaling_and_attributes_round_trip(directory, scan):
    stored = open_chunks(directory)
    assert stored.shape == scan.shape
    np.testing.assert_array_equal(stored.affine, scan.affine)
    assert (stored.slope, stored.intercept) == (0.5, -1024.0)
    assert stored.background == scan.background
    assert stored.attributes == scan.attributes
    np.testing.assert_array_equal(stored.values(), scan.values())
    again = Scan("a", stored.voxels(), stored.affine, stored.slope, stored.intercept)
    assert again.digest == scan.digest


def test_labels_and_their_names_round_trip(directory, labels):
    stored = open_chunks(directory)
    assert stored.label_names == NAMES
    np.testing.assert_array_equal(stored.labels(), labels.voxels)
    assert stored.labels().dtype == labels.voxels.dtype
    assert [stored.label_at((x, 2, 3)) for x in range(7)] == labels.voxels[:, 2, 3].tolist()


@pytest.mark.parametrize("outside", [(-1, 0, 0), (7, 0, 0), (0, 0, 6)])
def test_outside_of_the_scan_there_is_no_label(directory, outside):
    assert open_chunks(directory).label_at(outside) is None


def test_a_scan_without_labels_has_none(tmp_path, scan):
    write_chunks(scan, None, tmp_path / "a.zarr")
    stored = open_chunks(tmp_path / "a.zarr")
    assert stored.labels() is None
    assert stored.label_at((0, 0, 0)) is None
    assert stored.label_names == {}


@pytest.mark.parametrize(
    "box",
    [
        Box((1, 2, 3), (4, 5, 6)),
        Box((-3, 4, -1), (2, 12, 8)),
        Box((-9, -9, -9), (-4, -4, -4)),
        Box((7, 0, 0), (9, 2, 2)),
    ],
)
def test_boxes_are_padded_with_background(directory, scan, labels, box):
    window = tuple(slice(a + 10, b + 10) for a, b in zip(box.start, box.stop, strict=True))
    padded = np.pad(scan.voxels, 10, constant_values=scan.voxels.min())[window]
    stored = open_chunks(directory)
    np.testing.assert_array_equal(stored.voxels(box), padded)
    np.testing.assert_array_equal(stored.values(box), padded * 0.5 - 1024)
    np.testing.assert_array_equal(stored.labels(box), np.pad(labels.voxels, 10)[window])


def test_plain_zarr_reads_it_as_ome_zarr(directory, scan, labels):
    root = zarr.open_group(directory, mode="r", zarr_format=3)
    ome = root.attrs["ome"]
    assert ome["version"] == "0.5"
    (multiscale,) = ome["multiscales"]
    assert [axis["name"] for axis in multiscale["axes"]] == ["x", "y", "z"]
    assert {(axis["type"], axis["unit"]) for axis in multiscale["axes"]} == {("space", "millimeter")}
    (dataset,) = multiscale["datasets"]
    scale, translation = dataset["coordinateTransformations"]
    np.testing.assert_allclose(scale["scale"], scan.spacing_mm)
    np.testing.assert_allclose(translation["translation"], scan.affine[:3, 3])
    array = root[dataset["path"]]
    assert array.metadata.dimension_names == ("x", "y", "z")
    np.testing.assert_array_equal(array[...], scan.voxels)
    (name,) = root["labels"].attrs["ome"]["labels"]
    image_label = root[f"labels/{name}"].attrs["ome"]["image-label"]
    assert image_label["properties"] == [{"label-value": 1, "name": "left"}, {"label-value": 2, "name": "right"}]
    np.testing.assert_array_equal(root[f"labels/{name}/0"][...], labels.voxels)


def test_arrays_are_sharded_and_few_files_are_written(tmp_path, oblique):
    voxels = np.random.default_rng(0).integers(0, 50, (300, 65, 10)).astype(np.int16)
    write_chunks(Scan("a", voxels, oblique), None, tmp_path / "a.zarr")
    array = zarr.open_array(tmp_path / "a.zarr" / "0", mode="r")
    assert array.chunks == (64, 64, 64)
    assert array.shards == (256, 128, 64)
    files = sorted(path.relative_to(tmp_path / "a.zarr").as_posix() for path in (tmp_path / "a.zarr").rglob("c/*/*/*"))
    assert files == ["0/c/0/0/0", "0/c/1/0/0", "1/c/0/0/0", "2/c/0/0/0", "3/c/0/0/0"]
    np.testing.assert_array_equal(open_chunks(tmp_path / "a.zarr").voxels(), voxels)


def test_nothing_names_the_scan_or_its_file(directory):
    for path in directory.rglob("zarr.json"):
        json.loads(path.read_text())
        assert str(directory) not in path.read_text()
        assert '"id"' not in path.read_text()


def test_an_existing_scan_is_not_overwritten(directory, scan):
    before = open_chunks(directory).voxels()
    with pytest.raises(FileExistsError):
        write_chunks(scan, None, directory)
    np.testing.assert_array_equal(open_chunks(directory).voxels(), before)


def test_labels_of_another_shape_are_a_usage_error(tmp_path, scan):
    with pytest.raises(UsageError, match="labels of shape"):
        write_chunks(scan, LabelMap(scan.voxels[1:]), tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


def damaged(read):
    with pytest.raises(StoreDamaged, match=r"a\.zarr") as caught:
        read()
    assert caught.value.next_step


@pytest.mark.parametrize("lost", ["zarr.json", "0/zarr.json", "0/c/0/0/0", "labels/anatomy/zarr.json"])
def test_a_lost_file_is_damage(directory, lost):
    (directory / lost).unlink()
    damaged(lambda: open_chunks(directory))


def test_an_empty_shard_that_is_lost_is_damage_too(tmp_path, oblique):
    voxels = np.zeros((260, 4, 4), np.uint8)
    voxels[0, 0, 0] = 1
    write_chunks(Scan("a", voxels, oblique), None, tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "0" / "c" / "1" / "0" / "0").unlink()
    damaged(lambda: open_chunks(tmp_path / "a.zarr"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"zarr_format": 3, "node_type": "group", "attributes": {}}'])
def test_malformed_metadata_is_damage(directory, text):
    (directory / "zarr.json").write_text(text)
    damaged(lambda: open_chunks(directory))


def test_a_directory_that_is_not_there_is_damage(tmp_path):
    damaged(lambda: open_chunks(tmp_path / "a.zarr"))


@pytest.mark.parametrize("where", [0.1, 0.5, 0.99])
def test_one_changed_byte_is_damage_and_never_a_wrong_voxel(directory, where):
    shard = directory / "0" / "c" / "0" / "0" / "0"
    raw = bytearray(shard.read_bytes())
    raw[int(len(raw) * where)] ^= 0xFF
    shard.write_bytes(raw)
    stored = open_chunks(directory)
    damaged(stored.voxels)
    damaged(lambda: stored.values(Box((0, 0, 0), (2, 2, 2))))


@pytest.mark.parametrize("keep", [0, 10, 0.7])
@pytest.mark.parametrize("opened", ["before", "after"])
def test_a_truncated_shard_is_damage(directory, keep, opened):
    stored = open_chunks(directory)
    shard = directory / "labels" / "anatomy" / "0" / "c" / "0" / "0" / "0"
    raw = shard.read_bytes()
    shard.write_bytes(raw[: keep if keep >= 1 else int(len(raw) * keep)])
    damaged(lambda: (stored if opened == "before" else open_chunks(directory)).labels())
    damaged(lambda: (stored if opened == "before" else open_chunks(directory)).label_at((1, 1, 1)))


def test_a_shard_that_is_lost_after_opening_is_damage(directory):
    stored = open_chunks(directory)
    (directory / "0" / "c" / "0" / "0" / "0").unlink()
    damaged(stored.voxels)


def test_many_threads_read_the_same_scan(directory, scan):
    stored = open_chunks(directory)
    found = []
    threads = [threading.Thread(target=lambda: found.append(stored.voxels())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all((voxels == scan.voxels).all() for voxels in found)


def test_a_scan_without_voxels_says_so_and_invents_none(tmp_path, oblique):
    write_absent((7, 8, 9), oblique, {"source_orientation": "PSR"}, tmp_path / "a.zarr")
    stored = open_chunks(tmp_path / "a.zarr", "sub-01")
    assert stored.absent
    assert stored.shape == (7, 8, 9)
    np.testing.assert_array_equal(stored.affine, oblique)
    assert stored.attributes == {"source_orientation": "PSR"}
    for ask in (stored.voxels, stored.values, lambda: stored.values(Box((0, 0, 0), (1, 1, 1)))):
        with pytest.raises(NotFound, match="voxels of scan 'sub-01' are not in this store"):
            ask()
    assert stored.labels() is None
    assert stored.label_at((0, 0, 0)) is None
    (tmp_path / "a.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(StoreDamaged):
        open_chunks(tmp_path / "a.zarr")


def test_a_scan_whose_voxels_are_lost_is_damaged_and_not_absent(directory):
    import shutil

    shutil.rmtree(directory / "0")
    with pytest.raises(StoreDamaged):
        open_chunks(directory)
