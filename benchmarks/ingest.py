"""How fast scans come in, against the least that any program must do: decode, then write an array.

    ceiling    nibabel or pydicom decodes, zarr writes with our codec and chunks; no geometry, no metadata, no hash, no
               label, no pyramid, no flush to the disk; one process
    add        `isimed add` of the same files into a new store, with 1 and with 2 workers; and with 1 whose codecs have
               one thread, which is what each of 2 workers has on 2 cores: alone, a worker compresses on all cores
    memory     resident memory of an add of 200 scans, scan by scan, and its slope; and the peak of a worker over one
               large volume

Times are those of whole processes after their libraries are loaded; all kinds are run in turn, several rounds, and the
median of each round's own ratio is told, so that a machine that is busy for a while does not matter much. Run from the
repository: python benchmarks/ingest.py [--rounds 5] [--scale 1] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import zarr
import zarr.storage
from scipy import ndimage

import isimed_index as isi
from isimed_index.progress import Silent
from isimed_index.scans import arrays, chunks
from isimed_index.scans.scan import Scan

ONE_CORE = "1 of one codec thread"
MEMORY_SCANS = 200
SHAPES = {"nifti_gz": (256, 256, 160), "nifti": (256, 256, 160), "dicom": (512, 512, 60)}
FILES = {"nifti_gz": 32, "nifti": 96, "dicom": 48}


def volume(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Anatomy-like int16 voxels: smooth blobs with the noise of a scanner, so that codecs have something to do."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=[max(2, n // 16 + 1) for n in shape])
    smooth = ndimage.zoom(coarse, [n / m for n, m in zip(shape, coarse.shape, strict=True)], order=1)
    noise = rng.normal(size=shape).astype(np.float32)
    return np.where(smooth > 0, smooth * 400 + noise * 12, noise * 2 - 1000).astype(np.int16)


def write_files(folder: Path, kind: str, scale: float) -> list[Path]:
    """The files of one kind; what is given to `add` and to the ceiling alike."""
    count = max(4, round(FILES[kind] * scale))
    paths = []
    base = volume(SHAPES[kind], 0)
    for n in range(count):
        voxels = np.roll(base, 7 * n, axis=0)
        voxels[0, 0, 0] = n
        if kind == "dicom":
            paths.append(write_dicom(folder / kind / f"series{n}", voxels, n))
        else:
            path = folder / kind / (f"scan{n:03d}.nii" + (".gz" if kind == "nifti_gz" else ""))
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.diag([-0.8, -0.8, 1.0, 1.0])), path)
            paths.append(path)
    return paths


def write_dicom(folder: Path, voxels: np.ndarray, number: int) -> Path:
    """A CT series, a file a slice, uncompressed."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    folder.mkdir(parents=True)
    root = f"1.2.826.0.1.3680043.10.999.{number}"
    for k in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        meta.MediaStorageSOPInstanceUID = f"{root}.{k + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_ = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID, slice_.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        slice_.SeriesInstanceUID, slice_.StudyInstanceUID = root, f"{root}.0"
        slice_.FrameOfReferenceUID = f"{root}.0.1"
        slice_.PatientID, slice_.PatientName, slice_.Modality = f"patient{number}", "Bench^Mark", "CT"
        slice_.Rows, slice_.Columns = voxels.shape[1], voxels.shape[0]
        slice_.PixelSpacing, slice_.ImageOrientationPatient = [0.8, 0.8], [1, 0, 0, 0, 1, 0]
        slice_.ImagePositionPatient = [-200, -200, 2.0 * k]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
        slice_.RescaleSlope, slice_.RescaleIntercept = 1, 0
        slice_.PixelData = np.ascontiguousarray(voxels[:, :, k].T).tobytes()
        pydicom.dcmwrite(folder / f"{k:04d}.dcm", slice_, enforce_file_format=True)
    return folder


def decoded(path: Path) -> np.ndarray:
    """The voxels of a file or series, by the same library and with no thought of where they lie."""
    if path.is_file():
        return np.asanyarray(nib.load(path).dataobj)
    import pydicom

    slices = [pydicom.dcmread(file) for file in path.iterdir()]
    slices.sort(key=lambda slice_: float(slice_.ImagePositionPatient[2]))
    return np.stack([slice_.pixel_array for slice_ in slices], axis=-1)


@cache
def codecs() -> tuple[Any, ...]:
    """Those that a scan is stored with."""
    with tempfile.TemporaryDirectory() as folder:
        chunks.write_chunks(Scan("a", volume((8, 8, 8), 0), np.eye(4)), None, Path(folder))
        stored: tuple[Any, ...] = zarr.open_array(Path(folder) / "0").compressors
        return stored


def ceiling(paths: list[Path], out: Path) -> None:
    """Decode and write; nothing else."""
    for number, path in enumerate(paths):
        voxels = decoded(path)
        shards = tuple(min(arrays.SHARD, arrays.CHUNK * -(-n // arrays.CHUNK)) for n in voxels.shape)
        group = zarr.create_group(store=zarr.storage.LocalStore(out / str(number)))
        array = group.create_array(
            "0",
            shape=voxels.shape,
            dtype=voxels.dtype,
            chunks=(arrays.CHUNK,) * 3,
            shards=shards,
            compressors=codecs(),
        )
        array[...] = voxels


def added(paths: list[Path], out: Path, workers: int) -> None:
    """What a user runs."""
    done = isi.create(out / "store").add(paths, workers=workers, surrogate_key=out / "key")
    assert len(done.added) == len(paths), done.refused


def timed(kind: str, paths: list[Path]) -> float:
    """Seconds of one way to take the files in, in this process, whose libraries are loaded by taking in one of them."""
    with tempfile.TemporaryDirectory() as folder:
        act: Callable[[list[Path], Path], None] = (
            ceiling if kind == "ceiling" else lambda files, out: added(files, out, 2 if kind == "2" else 1)
        )
        (Path(folder) / "first").mkdir()
        if kind == "ceiling":
            ceiling(paths[:1], Path(folder) / "first")
        else:
            added(paths[:1], Path(folder) / "first", 1)
        (Path(folder) / "out").mkdir()
        began = time.perf_counter()
        act(paths, Path(folder) / "out")
        return time.perf_counter() - began


class Watch(Silent):
    """Notes the resident memory of this process and its workers after each scan."""

    def __init__(self) -> None:
        self.mib: list[float] = []
        self._process = psutil.Process()

    def advance(self, n: int = 1, note: str = "") -> None:
        """One more scan."""
        everyone = [self._process, *self._process.children()]
        self.mib.append(sum(process.memory_info().rss for process in everyone) / 2**20)


def memory_of_many(folder: Path, workers: int) -> dict[str, Any]:
    """Resident memory over 200 scans, and how much it grows from the fiftieth to the last."""
    base = volume((96, 96, 64), 0)
    for n in range(MEMORY_SCANS):
        base[0, 0, 0] = n
        path = folder / "many" / f"scan{n:03d}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(base, np.eye(4)), path)
    watch = Watch()
    isi.create(folder / f"store{workers}").add(folder / "many", workers=workers, progress=watch)
    settled = np.array(watch.mib[50:])
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0])
    return {
        "scans": len(watch.mib),
        "workers": workers,
        "mib_every_10_scans": [round(value) for value in watch.mib[::10]],
        "growth_mib_per_100_scans": round(100 * slope, 2),
        "last_over_fiftieth": round(watch.mib[-1] / watch.mib[49], 3),
    }


def memory_of_one(folder: Path, suffix: str) -> dict[str, Any]:
    """The peak over one large volume, beyond what the process held before, in sizes of that volume."""
    small, large = folder / "small.nii", folder / f"large{suffix}"
    nib.save(nib.Nifti1Image(volume((32, 32, 32), 1), np.eye(4)), small)
    voxels = volume((512, 512, 400), 2)
    nib.save(nib.Nifti1Image(voxels, np.diag([-0.8, -0.8, 1.0, 1.0])), large)
    size = voxels.nbytes
    del voxels
    script = (
        "import sys, threading, time, psutil; from pathlib import Path; import isimed_index as isi\n"
        "store = isi.create(sys.argv[1]); store.add(sys.argv[2])\n"
        "me = psutil.Process(); before = peak = me.memory_info().rss\n"
        "def watch():\n"
        "    global peak\n"
        "    while True:\n"
        "        peak = max(peak, me.memory_info().rss); time.sleep(0.002)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "store.add(sys.argv[3]); print(before, peak)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(folder / f"store{suffix}"), str(small), str(large)],
        check=True,
        capture_output=True,
        text=True,
    )
    before, peak = map(int, out.stdout.split())
    return {
        "format": suffix,
        "volume_mib": round(size / 2**20),
        "peak_over_volume": round((peak - before) / size, 2),
    }


def run(kind: str, files: str) -> float:
    """`timed` in a process of its own."""
    command = [sys.executable, __file__, "--time", kind, "--files", files]
    threads = {"ZARR_THREADING__MAX_WORKERS": "1"} if kind == ONE_CORE else {}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **threads})
    return float(out.stdout)


def throughput(folder: Path, name: str, rounds: int, scale: float) -> dict[str, Any]:
    """Times of all kinds in turn, and the medians of the ratios within a round."""
    paths = write_files(folder, name, scale)
    voxels_mb = len(paths) * np.prod(SHAPES[name]) * 2 / 1e6
    times: dict[str, list[float]] = {"ceiling": [], "1": [], ONE_CORE: [], "2": []}
    files = folder / f"{name}.json"
    files.write_text(json.dumps(list(map(str, paths))))
    for turn in range(rounds):
        kinds = list(times)
        for kind in kinds[turn % 4 :] + kinds[: turn % 4]:
            times[kind].append(run(kind, str(files)))
    of = {kind: np.array(values) for kind, values in times.items()}
    shutil.rmtree(folder / name)
    return {
        "files": len(paths),
        "voxels_mb": round(float(voxels_mb)),
        "seconds": {kind: [round(value, 3) for value in values] for kind, values in times.items()},
        "mb_per_s": {kind: round(float(voxels_mb / np.median(values))) for kind, values in of.items()},
        "of_the_ceiling": round(statistics.median(of["ceiling"] / of["1"]), 2),
        "two_workers_over_one": round(statistics.median(of["1"] / of["2"]), 2),
        "two_workers_over_one_core": round(statistics.median(of[ONE_CORE] / of["2"]), 2),
    }


def main() -> int:
    """Print what was measured as JSON, and write it to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of files")
    parser.add_argument("--only", choices=[*SHAPES, "memory"], action="append")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--time", help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.time:
        print(timed(given.time, [Path(path) for path in json.loads(given.files.read_text())]))
        return 0
    result: dict[str, Any] = {"cores": os.cpu_count(), "rounds": given.rounds}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in SHAPES:
            if name in (given.only or SHAPES):
                result[name] = throughput(folder, name, given.rounds, given.scale)
                print(json.dumps({name: result[name]}), flush=True)
        if "memory" in (given.only or ["memory"]):
            result["memory"] = {
                "many": [memory_of_many(folder, workers) for workers in (1, 2)],
                "one": [memory_of_one(folder, suffix) for suffix in (".nii.gz", ".nii")],
            }
            print(json.dumps({"memory": result["memory"]}), flush=True)
    result["load_at_the_end"] = [round(value, 1) for value in os.getloadavg()]
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
