"""Arrays that are written without zarr-python: the very files that zarr-python writes."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
import zarr.codecs
import zarr.storage
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isimed_index.scans import arrays
from isimed_index.scans.arrays import CHUNK, SHARD, write_array, write_group

TYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


def by_zarr(directory: Path, voxels: np.ndarray[Any, Any]) -> Any:
    """What zarr-python makes of the same voxels."""
    group = zarr.create_group(store=zarr.storage.LocalStore(directory.parent))
    array = group.create_array(
        directory.name,
        shape=voxels.shape,
        dtype=voxels.dtype,
        chunks=(CHUNK,) * 3,
        shards=tuple(min(SHARD, CHUNK * math.ceil(n / CHUNK)) for n in voxels.shape),
        compressors=[zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), zarr.codecs.Crc32cCodec()],
        dimension_names=list("xyz"),
        config={"write_empty_chunks": True},
    )
    array[...] = voxels
    return array


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def voxels_of(shape: tuple[int, int, int], dtype: str, seed: int) -> np.ndarray[Any, Any]:
    """Numbers that compress, and in a corner zeros alone."""
    voxels = np.random.default_rng(seed).integers(0, 90, shape).astype(dtype)
    voxels[:CHUNK, :CHUNK, :CHUNK] = 0
    return voxels


edges = st.one_of(st.integers(1, 20), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 7]))
two_shards = st.sampled_from([SHARD, SHARD + 1, SHARD + CHUNK])


@settings(max_examples=12)
@given(
    sides=st.permutations(range(3)).flatmap(
        lambda order: st.tuples(st.one_of(edges, two_shards), edges, st.integers(1, 70)).map(
            lambda sides: (sides[order[0]], sides[order[1]], sides[order[2]])
        )
    ),
    dtype=st.sampled_from(TYPES),
    threads=st.sampled_from(["1", "2", "none"]),
)
@example((1, 1, 1), "u1", "1")
@example((SHARD + CHUNK + 1, 2 * CHUNK + 1, 3), "i2", "2")
def test_files_are_those_of_zarr_byte_for_byte(sides: tuple[int, int, int], dtype: str, threads: str):
    voxels = voxels_of(sides, dtype, 1)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZARR_THREADING__MAX_WORKERS", threads)
        ours, theirs = Path(folder) / "ours" / "0", Path(folder) / "theirs" / "0"
        write_array(ours, voxels, "xyz")
        by_zarr(theirs, voxels)
        found, expected = files(ours), files(theirs)
    assert found.keys() == expected.keys()
    assert found == expected


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_is_described_as_zarr_does(tmp_path: Path, dtype: str):
    voxels = voxels_of((3, 4, 5), dtype, 0)
    write_array(tmp_path / "ours", voxels, "xyz")
    by_zarr(tmp_path / "theirs" / "0", voxels)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs" / "0")


@pytest.mark.parametrize("order", ["C", "F", "big"])
def test_voxels_may_lie_in_memory_as_they_like(tmp_path: Path, order: str):
    voxels = voxels_of((70, 66, 40), "i2", 2)
    other = voxels.astype(">i2") if order == "big" else np.asarray(voxels, order=order)[:, ::-1][:, ::-1]  # type: ignore[call-overload]
    write_array(tmp_path / "0", other, "xyz")
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "0", mode="r")[...], voxels)


def test_a_group_is_described_as_zarr_does(tmp_path: Path):
    attributes = {"isimed": {"slope": 0.5, "intercept": -1e-300, "text": "µm", "list": [1, 2.5, None], "inf": math.inf}}
    write_group(tmp_path / "ours", attributes)
    zarr.create_group(store=zarr.storage.LocalStore(tmp_path / "theirs"), attributes=attributes)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


@pytest.mark.parametrize(("text", "threads"), [("3", 3), ("0", 1), ("null", None), ("", None)])
def test_the_environment_bounds_the_threads(monkeypatch: pytest.MonkeyPatch, text: str, threads: int | None):
    monkeypatch.setenv("ZARR_THREADING__MAX_WORKERS", text)
    monkeypatch.setattr(arrays, "cores", lambda: 5)  # a container's quota counts
    assert arrays._threads() == (threads or 5)


def test_writing_does_not_load_zarr(tmp_path: Path):
    script = (
        "import sys; sys.path[:] = sys.argv[2:]; import numpy as np; from pathlib import Path\n"
        "from isimed_index.scans.chunks import write_chunks; from isimed_index.scans.scan import Scan\n"
        "write_chunks(Scan('a', np.arange(60).reshape(3, 4, 5), np.eye(4)), None, Path(sys.argv[1]))\n"
        "print('zarr' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a"), *sys.path], check=True, capture_output=True, text=True
    )
    assert out.stdout == "False\n"
