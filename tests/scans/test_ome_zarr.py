"""Stored scans are OME-Zarr 0.5 for everybody else: the published schemas, a validator, and other programs' readers."""

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zarr
from affines import affine_of
from referencing import Registry, Resource

from isimed_index.scans import LabelMap, Scan
from isimed_index.scans.chunks import open_chunks, write_chunks
from isimed_index.scans.pyramid import coarser_image, coarser_labels, levels
from isimed_index.space import apply_affine

SCHEMAS = Path(__file__).parents[1] / "data" / "ome-zarr-0.5"
DTYPES = ["u1", "i2", "u2", "f4"]
SHAPE, SPACING = (140, 70, 9), (0.5, 0.75, 4.0)
FACTORS = [(1, 1, 1), (2, 2, 1), (4, 4, 1)]


def blobs(dtype):
    """Smooth values of the type's own range, so that a wrong neighbour shows."""
    x, y, z = np.meshgrid(*[np.linspace(0, 3, n) for n in SHAPE], indexing="ij")
    smooth = np.sin(x * 2) * np.cos(y) + z / 3
    return (smooth * 50 + 120).astype(dtype) if dtype == "u1" else (smooth * 900).astype(dtype)


def made(folder, dtype="i2", names=None, affine=None):
    """A scan with labels written to `folder`, and both."""
    voxels = blobs(dtype)
    labels = LabelMap(np.digitize(voxels, np.quantile(voxels, [0.5, 0.8, 0.95])).astype(np.uint8), names or {})
    scan = Scan("a", voxels, np.diag([*SPACING, 1.0]) if affine is None else affine, 0.5, -1024.0)
    write_chunks(scan, labels, folder)
    return scan, labels


@pytest.fixture(params=DTYPES)
def stored(request, tmp_path):
    """A folder with a scan and its labels, for every type."""
    return tmp_path / "a.zarr", *made(tmp_path / "a.zarr", request.param, {1: "one", 2: "two", 3: "three"})


def pyramid_of(scan, labels):
    """All levels as they ought to be."""
    images, maps = [scan.voxels], [labels.voxels]
    for level in levels(scan.shape, scan.spacing_mm)[1:]:
        images.append(coarser_image(images[-1], level.step))
        maps.append(coarser_labels(maps[-1], level.step))
    assert len(images) == len(FACTORS)
    return images, maps


@pytest.mark.parametrize("names", [{1: "one", 3: "three"}, {}])
def test_the_published_schemas_hold_in_their_strict_form(tmp_path, names):
    from jsonschema import Draft202012Validator

    made(tmp_path / "a.zarr", names=names)
    schemas = {path.stem: json.loads(path.read_text()) for path in SCHEMAS.glob("*.schema")}
    registry = Registry().with_resources(
        (schema["$id"], Resource.from_contents(schema, default_specification=_draft())) for schema in schemas.values()
    )
    root, labels = (zarr.open_group(tmp_path / "a.zarr" / part, mode="r") for part in ("", "labels/anatomy"))
    for group, kinds in ((root, ["strict_image"]), (labels, ["strict_image", "strict_label"])):
        for kind in kinds:
            Draft202012Validator(schemas[kind], registry=registry).validate(dict(group.attrs))
    broken = dict(root.attrs) | {"ome": {**root.attrs["ome"], "version": "0.4"}}
    assert not Draft202012Validator(schemas["strict_image"], registry=registry).is_valid(broken)


def _draft():
    from referencing.jsonschema import DRAFT202012

    return DRAFT202012


@pytest.mark.parametrize("names", [{1: "one", 3: "three"}, {}])
def test_ome_zarr_models_takes_image_and_labels(tmp_path, names):
    v05 = pytest.importorskip("ome_zarr_models.v05")
    made(tmp_path / "a.zarr", names=names)
    root = zarr.open_group(tmp_path / "a.zarr", mode="r")
    image = v05.Image.from_zarr(root)
    assert [dataset.path for dataset in image.attributes.ome.multiscales[0].datasets] == ["0", "1", "2"]
    assert v05.Labels.from_zarr(root["labels"]).attributes.ome.labels == ["anatomy"]
    label = v05.ImageLabel.from_zarr(root["labels/anatomy"])
    assert {colour.label_value for colour in label.attributes.ome.image_label.colors} == set(names or range(4))


def test_ome_zarr_py_reads_every_level(stored):
    """It is not in the dev extra: its s3fs and our moto want different versions of botocore."""
    pytest.importorskip("ome_zarr", reason="pip install --no-deps ome-zarr==0.18.0 deprecated wrapt rangehttpserver")
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    folder, scan, labels = stored
    nodes = {str(node.zarr.path).removeprefix(str(folder)).strip("/"): node for node in Reader(parse_url(folder))()}
    for where, expected in zip(("", "labels/anatomy"), pyramid_of(scan, labels), strict=True):
        node = nodes[where]
        assert [axis["name"] for axis in node.metadata["axes"]] == ["x", "y", "z"]
        for array, level in zip(node.data, expected, strict=True):
            np.testing.assert_array_equal(array.compute(), level)


def test_zarr_alone_reads_every_level(stored):
    folder, scan, labels = stored
    root = zarr.open_group(folder, mode="r", zarr_format=3)
    for where, expected in zip(("", "labels/anatomy/"), pyramid_of(scan, labels), strict=True):
        for number, level in enumerate(expected):
            array = root[f"{where}{number}"]
            assert array.dtype == level.dtype
            np.testing.assert_array_equal(array[...], level)


def test_tensorstore_reads_every_level(stored):
    """Another implementation of Zarr 3, sharding, Blosc and CRC-32C, in C++."""
    tensorstore = pytest.importorskip("tensorstore")
    folder, scan, labels = stored
    for where, expected in zip(("", "labels/anatomy/"), pyramid_of(scan, labels), strict=True):
        for number, level in enumerate(expected):
            at = {"driver": "file", "path": str(folder / f"{where}{number}")}
            array = tensorstore.open({"driver": "zarr3", "kvstore": at}, open=True).result()
            assert array.domain.labels == ("x", "y", "z")
            found = array.read().result()
            assert found.dtype == level.dtype
            np.testing.assert_array_equal(found, level)


def test_scale_and_translation_place_the_centres_of_coarse_voxels(tmp_path):
    """The centre of a coarse voxel is the mean of the places of those that it stands for, told by level 0 alone."""
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-20, 30, 5)
    made(tmp_path / "a.zarr", affine=affine)
    root = zarr.open_group(tmp_path / "a.zarr", mode="r")
    for group in (root, root["labels/anatomy"]):
        (multiscale,) = group.attrs["ome"]["multiscales"]
        placed = []
        for dataset in multiscale["datasets"]:
            scale, translation = dataset["coordinateTransformations"]
            placed.append((np.array(scale["scale"]), np.array(translation["translation"])))
        assert [tuple(scale / placed[0][0]) for scale, _ in placed] == FACTORS
        for factor, (scale, translation) in zip(FACTORS, placed, strict=True):
            for index in np.random.default_rng(1).integers(0, 9, (20, 3)):
                members = np.array(list(np.ndindex(factor))) + index * factor
                centres = members * placed[0][0] + placed[0][1]
                np.testing.assert_allclose(index * scale + translation, centres.mean(axis=0), atol=1e-9)


def test_oblique_affines_of_all_levels_are_kept_beside_it(tmp_path):
    affine = affine_of((8, -12, 15), SPACING, (1, 1, 1), (0, 1, 2), (40, 95, -60))
    made(tmp_path / "a.zarr", affine=affine)
    said = zarr.open_group(tmp_path / "a.zarr", mode="r").attrs["isimed"]["levels"]
    assert [level["path"] for level in said] == ["0", "1", "2"]
    assert said[0]["affine"] == affine.tolist()
    for factor, level in zip(FACTORS, said, strict=True):
        members = np.array(list(np.ndindex(factor))) + np.array([3, 2, 1]) * factor
        expected = apply_affine(affine, members).mean(axis=0)
        np.testing.assert_allclose(apply_affine(np.array(level["affine"]), [3, 2, 1]), expected, atol=1e-9)


def test_reading_does_not_need_the_coarser_levels(tmp_path):
    """A store of before the pyramid has none, and is read the same."""
    import shutil

    scan, labels = made(tmp_path / "a.zarr", names={1: "one"})
    for part in ("1", "2", "labels/anatomy/1", "labels/anatomy/2"):
        shutil.rmtree(tmp_path / "a.zarr" / part)
    stored = open_chunks(tmp_path / "a.zarr")
    np.testing.assert_array_equal(stored.voxels(), scan.voxels)
    np.testing.assert_array_equal(stored.labels(), labels.voxels)


@pytest.mark.parametrize("part", ["1/c/0/0/0", "2/zarr.json", "labels/anatomy/1/c/0/0/0"])
@pytest.mark.parametrize("how", ["lost", "changed"])
def test_check_finds_a_damaged_coarser_level(tmp_path, part, how):
    import nibabel as nib

    import isimed_index

    voxels = blobs("i2")
    for name, data in (("a.nii.gz", voxels), ("a_seg.nii.gz", (voxels > 0).astype(np.uint8))):
        nib.save(nib.Nifti1Image(data, np.diag([*SPACING, 1.0])), tmp_path / name)
    with isimed_index.create(tmp_path / "s.isimed") as store:
        store.add(tmp_path / "a.nii.gz", labels="{stem}_seg.nii.gz")
        damaged = store.snapshot.chunks_path("a") / part
    assert not isimed_index.check(tmp_path / "s.isimed", read=1)
    if how == "lost":
        damaged.unlink()
    else:
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    found = isimed_index.check(tmp_path / "s.isimed", read=1)
    assert [(finding.kind, finding.severity, finding.scans) for finding in found] == [
        ("artefact_size" if how == "lost" else "artefact_hash", "damage", ("a",))
    ]


def test_writing_takes_little_memory_beside_the_volume(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 1000, (300, 300, 300)).astype(np.int16)
    scan = Scan("a", voxels, np.eye(4))
    tracemalloc.start()
    write_chunks(scan, None, tmp_path / "a.zarr")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * voxels.nbytes  # and the volume itself: less than three times it


def test_level_shapes_follow_one_another(tmp_path):
    scan, labels = made(tmp_path / "a.zarr")
    root = zarr.open_group(tmp_path / "a.zarr", mode="r")
    shapes = [root[str(number)].shape for number in range(3)]
    assert shapes == [(140, 70, 9), (70, 35, 9), (35, 18, 9)]
    assert all(fine != coarse for fine, coarse in pairwise(shapes))
    assert labels.voxels.shape == scan.shape
