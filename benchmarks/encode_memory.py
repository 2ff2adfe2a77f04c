"""Whether `isimed index` takes as much memory for the five hundredth scan as for the fiftieth.

    scans      synthetic, 48 to 80 voxels of 2 mm along each edge, with an ellipsoid of noise: no two alike in size,
               in shape or in what of them is foreground, as patients are; made and added by another process
    index      this process, on threads, with an untrained network of the preset `tiny`, every 16 mm
    memory     resident, after each 50 scans and at its highest, while they are encoded; and at the end of each phase:
               fitting the frame holds the vectors of all scans, and so grows with the store
    shapes     how many shapes of input the network was given: runtimes keep what they prepare for each

A leak of one working volume a scan would be 100 MiB per 100 scans, of one scan's vectors about 0.1.
Run from the repository: python benchmarks/encode_memory.py [--scans 500] [--runtime torch] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nib
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from scipy import ndimage

import isimed_index as isi
from isimed_index.config import pretrain_config
from isimed_index.encoders import runtime as running
from isimed_index.encoders.networks import build_network
from isimed_index.encoders.protocol import Encoder
from isimed_index.encoders.runtime import NetworkEncoder, write_encoder
from isimed_index.encoders.runtimes.kind import NAMES, Maps, Run
from isimed_index.pretrain.trainer import new_card
from isimed_index.progress import Silent

EDGES, SPACING_MM, STRIDE_MM = (48, 80), 2.0, 16.0
EVERY = 50  # scans


def make_store(folder: Path, scans: int) -> None:
    """A store of ellipsoids of noise, of the sizes that heads and necks have."""
    files = folder / "files"
    files.mkdir()
    for number in range(scans):
        rng = np.random.default_rng(number)
        size = rng.integers(*EDGES, 3, endpoint=True)
        at = np.indices(size) - (size[:, None, None, None] - 1) / 2
        inside = ((at / (size * rng.uniform(0.3, 0.5, 3))[:, None, None, None]) ** 2).sum(axis=0) < 1
        noise = ndimage.zoom(rng.uniform(200, 900, (16, 16, 16)), size / 16, order=1)
        image = nib.Nifti1Image((inside * noise).astype(np.int16), np.diag([SPACING_MM] * 3 + [1.0]))
        nib.save(image, files / f"scan{number:04d}.nii")
    isi.create(folder / "store").add(files)


def make_encoder(folder: Path) -> Path:
    """The folder of an untrained encoder."""
    torch.manual_seed(0)
    card = new_card(pretrain_config("tiny"), "untrained", "tiny")
    folder.mkdir()
    write_encoder(folder, card, build_network(card.factory, card.outputs, card.network).state_dict())
    return folder


class Watch(Silent):
    """Notes the resident memory of this process and its children: after each scan, and at the end of each phase."""

    def __init__(self) -> None:
        self.mib: list[float] = []  # by scan; those of one commit have the same
        self.phases: dict[str, int] = {}
        self._task = ""
        self._process = psutil.Process()

    def start(self, task: str, total: int | None, unit: str) -> None:
        """A phase begins."""
        self._task = task

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more scans, where scans are encoded."""
        if self._task == "encode":
            self.mib.extend([self._now()] * n)

    def finish(self) -> None:
        """The phase is over."""
        self.phases[self._task] = round(self._now())

    def _now(self) -> float:
        everyone = [self._process, *self._process.children(recursive=True)]
        return sum(process.memory_info().rss for process in everyone) / 2**20


class Shapes:
    """A run that notes the shapes of what it is given."""

    seen: ClassVar[set[tuple[int, ...]]] = set()

    def __init__(self, run: Run) -> None:
        self._run = run

    def __call__(self, values: NDArray[np.float32]) -> Maps:
        """What the run gives."""
        self.seen.add(values.shape)
        return self._run(values)


def noting(load: Callable[..., Encoder]) -> Callable[..., Encoder]:
    """A loader of encoders that note the shapes of what their networks are given."""

    def loaded(*given: Any, **named: Any) -> Encoder:
        encoder = load(*given, **named)
        assert isinstance(encoder, NetworkEncoder)
        encoder._run = Shapes(encoder._run)
        return encoder

    return loaded


def measured(scans: int, runtime: str) -> dict[str, Any]:
    """Memory over an index of so many scans; its growth is that from the fiftieth scan on."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        maker = multiprocessing.get_context("spawn").Process(target=make_store, args=(folder, scans))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"the store could not be made: exit code {maker.exitcode}")
        running.load_encoder = noting(running.load_encoder)
        began = time.perf_counter()
        report = isi.open(folder / "store").index(
            make_encoder(folder / "encoder"), stride_mm=STRIDE_MM, runtime=runtime, progress=watch
        )
        seconds = time.perf_counter() - began
    first = min(EVERY, len(watch.mib) // 2)
    settled = np.array(watch.mib[first:])
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0])
    return {
        "scans": len(report.encoded),
        "patches": report.patches,
        "runtime": report.runtime,
        "shapes": len(Shapes.seen),
        "cores": os.cpu_count(),
        "seconds": round(seconds, 1),
        f"mib_every_{EVERY}_scans": [round(value) for value in watch.mib[EVERY - 1 :: EVERY]],
        "highest_mib_while_encoding": round(max(watch.mib)),
        "growth_mib_per_100_scans": round(100 * slope, 2),
        "last_over_first": round(watch.mib[-1] / watch.mib[first - 1], 3),
        "mib_after_each_phase": watch.phases,
    }


def main() -> int:
    """Print what was measured as JSON, and write it to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=500)
    parser.add_argument("--runtime", default="torch", choices=NAMES)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result = measured(given.scans, given.runtime)
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
