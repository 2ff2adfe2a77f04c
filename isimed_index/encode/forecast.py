"""What an encoding will take, said before it is run: a short measurement on up to three scans, and arithmetic.

scans to encode ─▶ middle, largest, smallest ─▶ read, count patches, encode some of them ─▶ ratios ─▶ all scans
"""

from __future__ import annotations

import math
import resource
import sys
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from isimed_index.encode.scan import AT_ONCE, IN_FULL, kept_patches, patch_rows, read_scan
from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.protocol import BATCH, Encoder, encode_grid
from isimed_index.encoders.runtimes.kind import Runtime
from isimed_index.errors import IsimedError
from isimed_index.grid import PatchGrid
from isimed_index.ingest.report import Refusal
from isimed_index.scans.prepare import Volume

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLES = 3  # scans that are measured at most
_BEGIN_S = 8.0  # after so long, from the first scan on, no other one is begun
_ENCODE_S = 2.0  # of each scan; the part that is begun then is ended
_HEADER_BYTES = 128  # of a .npy file
_WARM = 16  # patches that are encoded before the clock runs

MEASURED, EXTRAPOLATED, AT_MOST = "measured", "extrapolated", "upper bound"


@dataclass(frozen=True, slots=True)
class Size:
    """A scan as the catalogue knows it: voxels of the stored image, points of the patch lattice."""

    scan: str
    voxels: int
    points: int


@dataclass(frozen=True, slots=True)
class Probe:
    """What one worker needs to measure a job; plain values, so that it travels to any machine."""

    encoder: str  # path of the encoder directory
    device: str
    trust: tuple[str, ...]
    runtime: Runtime
    stride_vox: int
    scans: tuple[tuple[str, str], ...]  # id and path of the voxels, the most telling ones first


@dataclass(frozen=True, slots=True)
class Sample:
    """What was found of one scan: sizes, and seconds for reading it and for encoding some of its patches."""

    scan: str
    voxels: int  # of the stored image
    points: int  # of the patch lattice
    patches: int  # of these, those that hold enough foreground
    read_s: float  # read, decompress, resample, count
    encoded: int  # patches
    encode_s: float
    row_bytes: int  # of all its patches, without their vectors


@dataclass(frozen=True, slots=True)
class Measured:
    """What one worker measured."""

    samples: tuple[Sample, ...] = ()
    refused: Mapping[str, Refusal] = field(default_factory=dict)  # by scan, those that could not be read
    bare_patches_per_s: float | None = None  # of the network alone, on noise in memory
    load_s: float = 0.0  # until the encoder was ready
    bytes_a_voxel: float = 0.0  # of the stored image, at most while it is read and prepared
    process_bytes: int = 0  # the most that the process had, with one scan in it


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """What `index` would do, and what that would take; nothing of it was done.

    Rates and `seconds` are of all `processes` together. `seconds` are for encoding: what is built after it, the frame,
    the regions and the index, is not in them, nor in `bytes_written`. `basis` says of each number whether it is
    measured, extrapolated from the `measured_scans`, or an upper bound. None is what could not be measured. Damaged
    scans are those with missing files or files of another size, and those that could not be read to be measured.
    """

    encoder: str
    stride_mm: float | None = None
    to_encode: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    damaged: list[Refusal] = field(default_factory=list)
    runtime: str = ""
    precision: str = ""
    processes: int = 0
    patches: int = 0
    patches_per_s: float | None = None
    bare_patches_per_s: float | None = None
    trial_patches_per_s: dict[str, float] = field(default_factory=dict)
    bytes_written: int = 0
    seconds: float | None = None
    memory_bytes: int | None = None
    measured_scans: list[str] = field(default_factory=list)
    basis: dict[str, str] = field(default_factory=dict)


def most_telling(sizes: Sequence[Size]) -> list[Size]:
    """Up to three scans of different size: the middle one, the largest and the smallest."""
    ordered = sorted(sizes, key=lambda size: (size.voxels, size.scan))
    places = dict.fromkeys((len(ordered) // 2, len(ordered) - 1, 0)) if ordered else {}
    return [ordered[place] for place in places]


def lattice_points(card: EncoderCard, shape: tuple[int, int, int], stride_vox: int) -> int:
    """Patches that a working volume of `shape` has, those without foreground included."""
    return len(PatchGrid(shape, card.patch_vox, stride_vox, np.eye(4)))


def measure(probe: Probe) -> Measured:
    """Read a few scans, encode some patches of each; runs in a worker, writes nothing that stays, takes some seconds.

    A scan that cannot be read is reported; an error of the encoder, which concerns every scan, is raised.
    """
    from isimed_index.encoders.runtime import load_encoder
    from isimed_index.encoders.runtimes.trial import pace_of

    began = time.perf_counter()
    encoder = load_encoder(Path(probe.encoder), probe.device, probe.trust, probe.runtime)
    load_s = time.perf_counter() - began
    bare = pace_of(encoder, probe.stride_vox)
    samples: list[Sample] = []
    refused: dict[str, Refusal] = {}
    bytes_a_voxel = 0.0
    for scan, chunks in probe.scans:
        if samples and time.perf_counter() - began > _BEGIN_S:
            break
        try:
            if not samples:  # also loads what reading needs; the first time is not the pace
                bytes_a_voxel = _bytes_a_voxel(Path(chunks), encoder.card, probe.stride_vox)
                began = time.perf_counter()
            read = _timed_read(scan, Path(chunks), encoder.card, probe.stride_vox)
        except IsimedError as error:
            refused[scan] = Refusal.of(scan, error)
        else:
            samples.append(_sample(scan, read, encoder, warm=bool(samples)))
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Measured(tuple(samples), refused, bare, load_s, bytes_a_voxel, peak)


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """A scan that was read and prepared, with its patches, and how long that took."""

    voxels: int
    volume: Volume
    grid: PatchGrid
    numbers: NDArray[np.int64]
    rows: pa.Table
    seconds: float


def _timed_read(scan: str, chunks: Path, card: EncoderCard, stride_vox: int) -> _Read:
    began = time.perf_counter()
    volume, geometry, labels = read_scan(chunks, card)
    grid, numbers, share = kept_patches(card, volume, stride_vox)
    rows = patch_rows(scan, grid, numbers, share, labels)
    return _Read(math.prod(geometry.shape), volume, grid, numbers, rows, time.perf_counter() - began)


def _sample(scan: str, read: _Read, encoder: Encoder, *, warm: bool) -> Sample:
    with TemporaryDirectory(prefix="isimed-") as folder:
        from isimed_index.store.segment import PATCHES, write_segment

        write_segment(Path(folder), read.rows, {"none": np.empty((len(read.numbers), 0), np.float16)})
        row_bytes = (Path(folder) / PATCHES).stat().st_size
    encoded, encode_s = _some(encoder, read.volume, read.grid, read.numbers, warm=warm)
    return Sample(
        scan,
        read.voxels,
        len(read.grid),
        len(read.numbers),
        read.seconds,
        encoded,
        encode_s,
        row_bytes,
    )


def _some(
    encoder: Encoder, volume: Volume, grid: PatchGrid, numbers: NDArray[np.int64], *, warm: bool
) -> tuple[int, float]:
    """Encode parts of a scan, here and there, for a few seconds; returns the patches of these, and the seconds."""
    split = getattr(encoder, "parts", None)
    parts: list[NDArray[np.int64]] = (
        [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]
        if split is None
        else split(grid, numbers)
    )
    if parts and not warm:
        encode_grid(encoder, volume, grid, parts[0][:_WARM])  # the first pass compiles, and is checked
    encoded, seconds = 0, 0.0
    for place in np.random.default_rng(0).permutation(len(parts)).tolist():
        began = time.perf_counter()
        encode_grid(encoder, volume, grid, parts[place])
        seconds += time.perf_counter() - began
        encoded += len(parts[place])
        if seconds >= _ENCODE_S:
            break
    return encoded, seconds


def _bytes_a_voxel(chunks: Path, card: EncoderCard, stride_vox: int) -> float:
    """The most bytes that arrays and objects take while a scan is read and prepared, for each voxel of it."""
    ours = not tracemalloc.is_tracing()
    if ours:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        read = _timed_read("", chunks, card, stride_vox)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        if ours:
            tracemalloc.stop()
    return (peak - before) / read.voxels


def foresee(
    plan: IndexPlan, card: EncoderCard, sizes: Sequence[Size], measured: Measured, *, processes: int, overlap: bool
) -> IndexPlan:
    """`plan` with its numbers: what `measured` says of a few of the scans `sizes`, for all of them.

    `overlap`: a process reads a scan while it computes another one.
    """
    samples = {sample.scan: sample for sample in measured.samples}
    rate = _ratio((sample.encoded, sample.encode_s) for sample in samples.values())
    share = _ratio((sample.patches, sample.points) for sample in samples.values())
    unknown = sum(size.points for size in sizes if size.scan not in samples)
    known = sum(sample.patches for sample in samples.values())
    patches = known + round(unknown * (1.0 if share is None else share))
    reading = _ratio((sample.read_s, sample.voxels) for sample in samples.values())
    seconds = None
    if reading is not None and (rate is not None or not patches):
        read_s = reading * sum(size.voxels for size in sizes)
        encode_s = patches / rate if rate else 0.0
        seconds = measured.load_s + _wall(read_s, encode_s, len(sizes), processes, overlap=overlap)
    together = MEASURED if processes == 1 else EXTRAPOLATED
    counted = MEASURED if not unknown else AT_MOST if share is None else EXTRAPOLATED
    found = replace(
        plan,
        processes=processes,
        patches=patches,
        patches_per_s=None if rate is None else rate * processes,
        bare_patches_per_s=None if measured.bare_patches_per_s is None else measured.bare_patches_per_s * processes,
        bytes_written=_bytes(card, patches, len(sizes), list(samples.values())),
        seconds=seconds,
        memory_bytes=_memory(card, sizes, measured, processes, overlap=overlap),
        measured_scans=list(samples),
    )
    basis = {
        "patches": counted,
        "patches_per_s": together,
        "bare_patches_per_s": together,
        "bytes_written": AT_MOST if counted == AT_MOST else EXTRAPOLATED,
        "seconds": EXTRAPOLATED,
        "memory_bytes": EXTRAPOLATED,
    }
    return replace(found, basis={name: how for name, how in basis.items() if getattr(found, name) is not None})


def _ratio(pairs: Iterator[tuple[float, float]]) -> float | None:
    """The sum of the first numbers over that of the second; None where that one is 0."""
    above, below = (math.fsum(column) for column in zip((0.0, 0.0), *pairs, strict=True))
    return above / below if below else None


def _wall(read_s: float, encode_s: float, scans: int, processes: int, *, overlap: bool) -> float:
    """Seconds from first to last scan: where reading and encoding overlap, the longer one, and one scan of the other.

    Scans are shared out evenly; each process has as many as the one that has most.
    """
    most = math.ceil(scans / processes)
    shared = most / scans if scans else 0.0
    if not overlap or not most:
        return shared * (read_s + encode_s)
    return shared * (max(read_s, encode_s) + min(read_s, encode_s) / most)


def vector_bytes(outputs: Mapping[str, int]) -> int:
    """Bytes of the vectors of one patch as they are stored."""
    return sum(dim * (4 if name in IN_FULL else 2) for name, dim in outputs.items())


def _bytes(card: EncoderCard, patches: int, scans: int, samples: Sequence[Sample]) -> int:
    """Bytes of vectors and rows; of scans without one patch nothing is known of the rows, which are small."""
    rows = _ratio((sample.row_bytes, sample.patches) for sample in samples) or 0.0
    return round(patches * (vector_bytes(card.outputs) + rows)) + scans * len(card.outputs) * _HEADER_BYTES


def _memory(
    card: EncoderCard, sizes: Sequence[Size], measured: Measured, processes: int, *, overlap: bool
) -> int | None:
    """Bytes of all processes at most: what one had without its scan, and the largest scan as often as it may have it.

    Each scan counts as if it were being read, which is when it takes most, and with vectors for all of its lattice.
    """
    if not measured.samples:
        return None
    had = measured.bytes_a_voxel * max(sample.voxels for sample in measured.samples)
    largest = measured.bytes_a_voxel * max(size.voxels for size in sizes)
    vectors = max(size.points for size in sizes) * sum(card.outputs.values()) * (4 + 2)  # as computed, and as stored
    at_once = min(AT_ONCE if overlap else 1, math.ceil(len(sizes) / processes))
    one = max(0.0, measured.process_bytes - had) + at_once * (largest + vectors)
    return round(min(processes, len(sizes)) * one)
