"""Groups and sharded arrays on disk, as Zarr v3 has them, written without zarr-python, which reads them.

    <group>/zarr.json          attributes
    <array>/zarr.json          shape, type, codecs
    <array>/c/<i>/<j>/<k>      a shard: chunk │ chunk │ … │ index: where each chunk begins, how long it is, its CRC-32C

A chunk is Blosc's bytes and their CRC-32C; one that juts out of the array is filled up with zeros. Every shard is
written, even one of zeros alone, its chunks in Morton order. All files are those that zarr-python writes, byte for byte
(the tests hold one against the other). It takes half as long again, for a task of its event loop, a thread and three
copies for every codec of every chunk; and loading it would be a third of a worker's start.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from isimed_index.limits import cores

CHUNK = 64  # voxels along each side
SHARD = 256  # at most
# The variable that bounds the threads of zarr-python as well.
_THREADS = "ZARR_THREADING__MAX_WORKERS"
_CODEC = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 0}
_NOT_THERE = np.iinfo(np.uint64).max
_Triple = tuple[int, int, int]

# Blosc's own threads are one set for the whole process; here each chunk has one of ours. zarr-python switches them off.
blosc.use_threads = False


def write_group(directory: Path, attributes: Mapping[str, Any]) -> None:
    """Make a group in `directory`, which is new or empty; `FileExistsError` where it is neither."""
    _describe(directory, {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"})


def write_array(directory: Path, voxels: NDArray[Any], axes: Sequence[str]) -> None:
    """Write `voxels` (three axes, integer or real) into `directory`, which is new or empty.

    As many threads compress as there are cores, or as the environment allows; what is needed beside the voxels are the
    compressed chunks of one shard, and a copy of one chunk a thread.
    """
    shard = tuple(min(SHARD, CHUNK * math.ceil(n / CHUNK)) for n in voxels.shape)
    _describe(directory, _description(voxels, shard, axes))
    threads = _threads() if max(voxels.shape) > CHUNK else 1
    with ThreadPoolExecutor(threads, thread_name_prefix="chunks") as pool:  # starts none until it is given work
        _write_shards(directory, voxels, shard, pool.map if threads > 1 else map)


def _describe(directory: Path, description: Mapping[str, Any]) -> None:
    """Write what describes a group or an array; `FileExistsError` where there is one."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "zarr.json").open("xb") as stream:
        stream.write(json.dumps(description, indent=2).encode())


def _description(voxels: NDArray[Any], shard: Sequence[int], axes: Sequence[str]) -> dict[str, Any]:
    """What is said of an array: Zarr v3 core, with the codecs `sharding_indexed`, `bytes`, `blosc` and `crc32c`."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    size = voxels.dtype.itemsize
    inner = {
        "chunk_shape": [CHUNK] * 3,
        "codecs": [
            little if size > 1 else {"name": "bytes"},
            {"name": "blosc", "configuration": {"typesize": size, **_CODEC}},
            {"name": "crc32c"},
        ],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "shape": list(voxels.shape),
        "data_type": voxels.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": voxels.dtype.type(0).item(),
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        "attributes": {},
        "dimension_names": list(axes),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _threads() -> int:
    """How many threads may compress."""
    allowed = os.environ.get(_THREADS, "")
    return max(1, int(allowed)) if allowed.isdecimal() else cores()


def _write_shards(
    directory: Path, voxels: NDArray[Any], shard: Sequence[int], in_turn: Callable[..., Iterator[bytes]]
) -> None:
    """Write every shard; `in_turn` is `map`, or does what it does with threads."""
    inside: _Triple = tuple(side // CHUNK for side in shard)  # type: ignore[assignment]
    little = voxels.dtype.newbyteorder("<")
    codec = blosc.Blosc(_CODEC["cname"], _CODEC["clevel"], blosc.SHUFFLE, typesize=little.itemsize)

    def packed(start: Sequence[int]) -> bytes:
        """The chunk that begins at a voxel."""
        block = voxels[tuple(slice(first, first + CHUNK) for first in start)]
        whole = (np.empty if block.shape == (CHUNK,) * 3 else np.zeros)((CHUNK,) * 3, little)
        whole[tuple(map(slice, block.shape))] = block
        return _checked(codec.encode(whole))

    for index in product(*[range(math.ceil(n / side)) for n, side in zip(voxels.shape, shard, strict=True)]):
        first = [number * side for number, side in zip(index, shard, strict=True)]
        starts = {at: [start + CHUNK * step for start, step in zip(first, at, strict=True)] for at in _morton(inside)}
        there = [at for at, start in starts.items() if all(map(int.__lt__, start, voxels.shape))]
        path = directory.joinpath("c", *map(str, index))
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_shard(path, inside, there, in_turn(packed, [starts[at] for at in there]))


def _write_shard(path: Path, inside: _Triple, there: Sequence[_Triple], chunks: Iterable[bytes]) -> None:
    """One shard: its chunks, in the order in which they are there, and the index."""
    index = np.full((*inside, 2), _NOT_THERE, "<u8")
    offset = 0
    with path.open("wb") as stream:
        for at, packed in zip(there, chunks, strict=True):
            stream.write(packed)
            index[at] = offset, len(packed)
            offset += len(packed)
        stream.write(_checked(index.tobytes()))


def _checked(content: bytes) -> bytes:
    """Bytes with their CRC-32C behind them."""
    return content + int(google_crc32c.value(content)).to_bytes(4, "little")


@cache
def _morton(shape: _Triple) -> list[_Triple]:
    """All chunks of a shard in Morton order: bits of x, y and z by turns, of an axis as many as it has."""
    bits = [(n - 1).bit_length() for n in shape]

    def code(at: _Triple) -> int:
        places = [(n >> bit) & 1 for bit in range(max(bits)) for n, most in zip(at, bits, strict=True) if bit < most]
        return sum(one << place for place, one in enumerate(places))

    return sorted(product(*map(range, shape)), key=code)  # type: ignore[arg-type]
