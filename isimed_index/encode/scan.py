"""What a worker does with one scan: read, prepare, encode, stage.

    thread 1   read, prepare │ ENCODE │ stage, read, prepare  … │ ENCODE │ …
    thread 2   read, prepare  …       │ ENCODE │ stage, read, prepare  … │ …

Two threads of a process take turns at the network, which has all cores, or the GPU, to itself: two passes at once
would contend for caches. While it computes, the other thread reads the next scan. No more scans are in memory.
"""

from __future__ import annotations

import os
import platform
import shutil
import threading
import uuid
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.encode.task import MIN_FOREGROUND, Encoded, EncodeTask, grid_key
from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.protocol import Encoder, Vectors, encode_grid, halved
from isimed_index.encoders.runtimes.kind import Runtime
from isimed_index.errors import IsimedError, RuntimeMismatch, WorkerFailed
from isimed_index.grid import PatchGrid
from isimed_index.lattice import Lattice, ScanGeometry, Standard, build_lattice, lattice_affine, write_geometry
from isimed_index.scans.prepare import Volume, prepare, resample_labels
from isimed_index.space import Affine
from isimed_index.store.place.faults import fault_of

if TYPE_CHECKING:
    import pyarrow as pa

_MORE_MEMORY = (
    "give each worker more memory, or run fewer of them (--scheduler processes:N), then run the same command again"
)
IN_FULL = ("position",)  # outputs that are stored in 32 bits
AT_ONCE = 2  # scans that a process works on: one is computed, one read
_ENTERING = threading.BoundedSemaphore(AT_ONCE)  # a Dask worker may have more threads than that
_COMPUTING = threading.Lock()
_LOADING = threading.Lock()  # threads of a worker share one encoder, and load it once


def prepared(values: NDArray[np.float32], affine: Affine, card: EncoderCard) -> Volume:
    """The working volume that this encoder was trained on: its spacing, its intensity scaling."""
    return prepare(values, affine, card.spacing_mm, card.intensity)


def encode_volume(
    encoder: Encoder, volume: Volume, stride_vox: int
) -> tuple[PatchGrid, NDArray[np.int64], Vectors, NDArray[np.float32]]:
    """All patches of a working volume that hold enough foreground.

    Returns the grid, the numbers (n,) of the patches kept, their vectors {output: (n, d)} and foreground shares (n,).
    """
    grid, numbers, share = kept_patches(encoder.card, volume, stride_vox)
    with _COMPUTING:
        vectors = encode_grid(encoder, volume, grid, numbers)
    return grid, numbers, vectors, share


def kept_patches(
    card: EncoderCard, volume: Volume, stride_vox: int
) -> tuple[PatchGrid, NDArray[np.int64], NDArray[np.float32]]:
    """The grid of a working volume, and of the patches that hold enough foreground numbers (n,) and shares (n,)."""
    x, y, z = volume.values.shape
    grid = PatchGrid((x, y, z), card.patch_vox, stride_vox, volume.affine)
    share = grid.foreground_fraction(volume.foreground)
    numbers = np.flatnonzero(share >= MIN_FOREGROUND)
    return grid, numbers, share[numbers]


def volume_lattice(encoder: Encoder, volume: Volume, stride_vox: int, standard: Standard) -> Lattice:
    """The lattice of a volume that is not in the store."""
    grid, numbers, vectors, _ = encode_volume(encoder, volume, stride_vox)
    unit = standard.unit(vectors[encoder.card.match_output])
    return build_lattice(unit, grid.ijk(numbers), grid.lattice_shape, lattice_affine(grid))


def encode_scan(task: EncodeTask) -> Encoded:
    """Read, prepare, encode and stage one scan; runs in a worker.

    What is wrong with this scan, or with the machine of this worker, is reported; an error of the encoder or the
    device, which concerns every scan, is raised.
    """
    with _ENTERING:
        mark = Path(task.bench) / f"{task.number}.begun"
        try:
            begun = _mark(mark, task)
            if begun >= task.starts:
                return Encoded(task, {}, _ended_workers(begun), suspect=True)
            directory = Path(task.bench) / f"{task.number}-{uuid.uuid4().hex}"
            directory.mkdir()
        except OSError as error:
            return Encoded(task, {}, _failure(task, error))
        try:
            with _LOADING:
                encoder = _encoder(task.encoder, task.device, task.trust, task.runtime)
            done = _attempt(task, encoder, directory)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            with suppress(OSError):
                mark.unlink()
        if done.error is not None:
            shutil.rmtree(directory, ignore_errors=True)  # where a disk is full, that helps the others
        return done


def _mark(mark: Path, task: EncodeTask) -> int:
    """Note that an attempt begins, in a file that outlives a worker that is killed; returns how many began before.

    A scheduler knows which tasks a dead worker had been given, not which of them it was at.
    """
    if task.version not in ("", here := version("isimed-index")):
        raise WorkerFailed(
            f"expected isimed-index {task.version} on every worker, found {here} on {platform.node()}",
            next_step="install the same version there, then run the same command again",
        )
    try:
        with mark.open("ab") as file:  # opened to be read, on a network file system it could be an older one
            begun = file.tell()
            if begun < task.starts:
                file.write(b".")
    except FileNotFoundError:
        raise WorkerFailed(
            f"the worker on {platform.node()} does not see the folder of the store that it was told to write to",
            next_step="mount the store there under the same path, then run the same command again",
        ) from None
    return begun


def _attempt(task: EncodeTask, encoder: Encoder, directory: Path) -> Encoded:
    """One attempt, written into a folder that is no other attempt's.

    A worker that was given up for lost, and yet writes on, so cannot touch what another one wrote and is committed.
    """
    try:
        volume, scan, labels = read_scan(Path(task.chunks), encoder.card)
        return Encoded(task, _stage(task, directory, encoder, volume, scan, labels), staged=str(directory))
    except RuntimeMismatch:
        raise
    except (IsimedError, OSError, MemoryError) as error:
        return Encoded(task, {}, _failure(task, error))


def read_scan(chunks: Path, card: EncoderCard) -> tuple[Volume, ScanGeometry, NDArray[Any] | None]:
    """A stored scan as an encoder wants it: working volume, geometry, and the labels (x, y, z) of that volume."""
    from isimed_index.scans.chunks import open_chunks

    stored = open_chunks(chunks)
    volume = prepared(stored.values(), stored.affine, card)
    scan = ScanGeometry.of(stored.shape, stored.affine, stored.attributes)
    labels = stored.labels()
    if labels is not None:
        labels = resample_labels(labels, stored.affine, card.spacing_mm)
    return volume, scan, labels


def _failure(task: EncodeTask, error: Exception) -> IsimedError:
    """What stopped a scan; what a worker's machine refused says which machine that was."""
    if isinstance(error, IsimedError):
        return error
    if isinstance(error, MemoryError):
        return WorkerFailed(f"the worker on {platform.node()} ran out of memory", next_step=_MORE_MEMORY)
    fault = fault_of(error, Path(task.bench).parents[1])
    if fault is not None:
        return fault
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
    return WorkerFailed(
        f"the worker on {platform.node()} could not write the segment ({reason})",
        next_step="see to that machine's disk and mounts, then run the same command again",
    )


def _ended_workers(begun: int) -> WorkerFailed:
    return WorkerFailed(
        f"its encoding began {begun} times, and its worker was ended each time before it was done, as the system does "
        "where memory runs out",
        next_step=_MORE_MEMORY,
    )


def _stage(
    task: EncodeTask,
    directory: Path,
    encoder: Encoder,
    volume: Volume,
    scan: ScanGeometry,
    labels: NDArray[Any] | None,
) -> dict[str, Any]:
    from isimed_index.store.segment import write_segment

    grid, numbers, vectors, share = encode_volume(encoder, volume, task.stride_vox)
    # Positions are millimetres up to a metre, where float16 would round to half a millimetre; the rest is relative.
    outputs = {name: v if name in IN_FULL else halved(name, v) for name, v in vectors.items()}
    fields = write_segment(directory, patch_rows(task.scan, grid, numbers, share, labels), outputs)
    write_geometry(directory, grid, scan)
    return {
        **fields,
        "encoder": encoder.card.id,
        "grid": grid_key(encoder.card, task.stride_vox),
        "task": task.key,
        "runtime": task.runtime.record(),
    }


def patch_rows(
    scan: str, grid: PatchGrid, numbers: NDArray[np.int64], share: NDArray[np.float32], labels: NDArray[Any] | None
) -> pa.Table:
    """What is stored of the patches `numbers` (n,) beside their vectors: where they are and what they show."""
    import pyarrow as pa

    from isimed_index.store.segment import LABEL_SHARES

    ijk, centres = grid.ijk(numbers).astype(np.int32), grid.centres_mm(numbers).astype(np.float32)
    columns: dict[str, Any] = {"scan": pa.array([scan] * len(numbers), pa.string())}
    columns |= {axis: ijk[:, n] for n, axis in enumerate("ijk")}
    columns |= {f"{axis}_mm": centres[:, n] for n, axis in enumerate("xyz")}
    columns["foreground"] = share.astype(np.float32)
    if labels is not None:
        rows, label, fraction = grid.label_fractions(labels, numbers)
        ends = np.searchsorted(rows, np.arange(len(numbers) + 1)).astype(np.int32)
        columns[LABEL_SHARES] = pa.MapArray.from_arrays(ends, label.astype(np.int32), fraction)
    return pa.table(columns)


@lru_cache(maxsize=2)
def _encoder(directory: str, device: str, trust: tuple[str, ...], runtime: Runtime) -> Encoder:
    from isimed_index.encoders.runtime import load_encoder

    return load_encoder(Path(directory), device, trust, runtime)
