"""Encode scans patch by patch with Dask: one task per scan; workers stage segments, the caller commits them.

The same graph runs on threads, on processes of this machine (a `LocalCluster`) and on any scheduler address.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.protocol import Encoder, Vectors, encode_grid, halved
from isimed_index.encoders.runtimes.kind import NATIVE, Runtime
from isimed_index.errors import IsimedError, RuntimeMismatch, UsageError
from isimed_index.grid import PatchGrid
from isimed_index.lattice import Lattice, ScanGeometry, Standard, build_lattice, lattice_affine, write_geometry
from isimed_index.scans.prepare import Volume, prepare, resample_labels
from isimed_index.space import Affine

if TYPE_CHECKING:
    from isimed_index.encoders.runtimes.trial import Choice, Job

MIN_FOREGROUND = 0.15  # patches with less of it are air and are not stored
_WORKERS = 2  # encodings at once on threads: one reads while the other computes
_CONNECT_S = 10.0  # how long a scheduler may take to answer
_LOADING = threading.Lock()  # threads of a worker share one encoder, and load it once


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """What one worker needs to encode one scan; plain values, so that it travels to any machine."""

    key: str  # see `task_key`
    scan: str
    chunks: str  # path of the scan's zarr group
    encoder: str  # path of the encoder directory
    segment: str  # path of a staged, empty segment directory
    stride_vox: int
    device: str
    trust: tuple[str, ...] = ()  # code outside of this library that the encoder may run
    runtime: Runtime = NATIVE


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a worker reports: the fields of the staged segment, or the error that stopped this scan alone."""

    task: EncodeTask
    fields: dict[str, Any]
    error: IsimedError | None = None


def grid_key(card: EncoderCard, stride_vox: int) -> str:
    """The lattice that patches of this encoder are laid on, as a short text."""
    return f"patch{card.patch_vox}-stride{stride_vox}-spacing{card.spacing_mm:g}mm-fg{MIN_FOREGROUND:g}"


def task_key(scan_digest: str, card: EncoderCard, stride_vox: int, precision: str = "fp32") -> str:
    """Hash of everything that decides a segment's content: a rerun skips the keys that are committed.

    The runtime is no part of it, because each gives the same vectors; a precision is.
    """
    decides = [scan_digest, card.id, grid_key(card, stride_vox)]
    text = json.dumps(decides if precision == "fp32" else [*decides, precision])
    return hashlib.sha256(text.encode()).hexdigest()


def stride_in_voxels(card: EncoderCard, stride_mm: float | None) -> int:
    """A lattice step in mm → voxels of the working grid; `UsageError` unless it is a whole number of them."""
    if stride_mm is None:
        return card.stride_vox
    voxels = round(stride_mm / card.spacing_mm) if math.isfinite(stride_mm) else 0
    if voxels < 1 or abs(voxels * card.spacing_mm - stride_mm) > 1e-6:
        raise UsageError(
            f"expected a stride that is a multiple of the encoder's spacing {card.spacing_mm:g} mm, "
            f"found {stride_mm:g} mm",
            next_step=f"for example --stride {card.stride_vox * card.spacing_mm:g}",
        )
    return voxels


def prepared(values: NDArray[np.float32], affine: Affine, card: EncoderCard) -> Volume:
    """The working volume that this encoder was trained on: its spacing, its intensity scaling."""
    return prepare(values, affine, card.spacing_mm, card.intensity)


def encode_volume(
    encoder: Encoder, volume: Volume, stride_vox: int
) -> tuple[PatchGrid, NDArray[np.int64], Vectors, NDArray[np.float32]]:
    """All patches of a working volume that hold enough foreground.

    Returns the grid, the numbers (n,) of the patches kept, their vectors {output: (n, d)} and foreground shares (n,).
    """
    x, y, z = volume.values.shape
    grid = PatchGrid((x, y, z), encoder.card.patch_vox, stride_vox, volume.affine)
    share = grid.foreground_fraction(volume.foreground)
    numbers = np.flatnonzero(share >= MIN_FOREGROUND)
    return grid, numbers, encode_grid(encoder, volume, grid, numbers), share[numbers]


def volume_lattice(encoder: Encoder, volume: Volume, stride_vox: int, standard: Standard) -> Lattice:
    """The lattice of a volume that is not in the store."""
    grid, numbers, vectors, _ = encode_volume(encoder, volume, stride_vox)
    unit = standard.unit(vectors[encoder.card.match_output])
    return build_lattice(unit, grid.ijk(numbers), grid.lattice_shape, lattice_affine(grid))


def encode_scan(task: EncodeTask) -> Encoded:
    """Read, prepare, encode and stage one scan; runs in a worker.

    An `IsimedError` of the scan is reported; one of the encoder or the device, which concerns every scan, is raised.
    """
    from isimed_index.scans.chunks import open_chunks

    with _LOADING:
        encoder = _encoder(task.encoder, task.device, task.trust, task.runtime)
    try:
        stored = open_chunks(Path(task.chunks))
        volume = prepared(stored.values(), stored.affine, encoder.card)
        scan = ScanGeometry.of(stored.shape, stored.affine, stored.attributes)
        labels = stored.labels()
        if labels is not None:
            labels = resample_labels(labels, stored.affine, encoder.card.spacing_mm)
        return Encoded(task, _stage(task, encoder, volume, scan, labels))
    except RuntimeMismatch:
        raise
    except IsimedError as error:
        return Encoded(task, {}, error)


def _stage(
    task: EncodeTask, encoder: Encoder, volume: Volume, scan: ScanGeometry, labels: NDArray[Any] | None
) -> dict[str, Any]:
    import pyarrow as pa

    from isimed_index.store.segment import LABEL_SHARES, write_segment

    grid, numbers, vectors, share = encode_volume(encoder, volume, task.stride_vox)
    ijk, centres = grid.ijk(numbers).astype(np.int32), grid.centres_mm(numbers).astype(np.float32)
    columns: dict[str, Any] = {"scan": pa.array([task.scan] * len(numbers), pa.string())}
    columns |= {axis: ijk[:, n] for n, axis in enumerate("ijk")}
    columns |= {f"{axis}_mm": centres[:, n] for n, axis in enumerate("xyz")}
    columns["foreground"] = share.astype(np.float32)
    if labels is not None:
        rows, label, fraction = grid.label_fractions(labels, numbers)
        ends = np.searchsorted(rows, np.arange(len(numbers) + 1)).astype(np.int32)
        columns[LABEL_SHARES] = pa.MapArray.from_arrays(ends, label.astype(np.int32), fraction)
    directory = Path(task.segment)
    # Positions are millimetres up to a metre, where float16 would round to half a millimetre; the rest is relative.
    outputs = {name: v if name == "position" else halved(name, v) for name, v in vectors.items()}
    fields = write_segment(directory, pa.table(columns), outputs)
    write_geometry(directory, grid, scan)
    return {
        **fields,
        "encoder": encoder.card.id,
        "grid": grid_key(encoder.card, task.stride_vox),
        "task": task.key,
        "runtime": task.runtime.record(),
    }


@lru_cache(maxsize=2)
def _encoder(directory: str, device: str, trust: tuple[str, ...], runtime: Runtime) -> Encoder:
    from isimed_index.encoders.runtime import load_encoder

    return load_encoder(Path(directory), device, trust, runtime)


Workers = dict[str, Any]  # the keyword arguments that send `dask.compute` to them


@contextmanager
def workers(scheduler: str = "threads") -> Iterator[Workers]:
    """Threads, processes of this machine, or the workers of a scheduler address."""
    if scheduler == "threads":
        yield {"scheduler": "threads", "num_workers": _WORKERS}
        return
    from distributed import Client, LocalCluster

    if scheduler == "processes":
        with LocalCluster(threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
            yield {"scheduler": client}
    elif ":" in scheduler:
        try:
            client = Client(scheduler, timeout=_CONNECT_S)
        except (OSError, ValueError) as error:
            raise UsageError(f"no Dask scheduler answers at {scheduler!r}", next_step="dask scheduler") from error
        with client:
            yield {"scheduler": client}
    else:
        raise UsageError(
            f"expected the scheduler threads, processes or an address, found {scheduler!r}",
            next_step="--scheduler tcp://host:8786",
        )


def choose_on(job: Job, where: Workers) -> Choice:
    """The runtime for a job, chosen on one of the workers that will do it: this machine may be unlike them."""
    import dask

    chosen: Choice = dask.compute(dask.delayed(_choose)(job), **where)[0]
    return chosen


def _choose(job: Job) -> Choice:
    from isimed_index.encoders.runtimes.trial import choose

    return choose(job)


def encode_groups(groups: Iterator[Sequence[EncodeTask]], where: Workers) -> Iterator[list[Encoded]]:
    """Encode group after group, each as one Dask graph; a group is ready to be committed when it is yielded."""
    import dask

    for group in groups:
        # Dask computes one key once: the segment's own name is one that no other task, here or elsewhere, has.
        keys = [f"encode-{Path(task.segment).name}-{task.key[:8]}" for task in group]
        graph = [dask.delayed(encode_scan)(task, dask_key_name=key) for task, key in zip(group, keys, strict=True)]
        yield list(dask.compute(*graph, **where))
