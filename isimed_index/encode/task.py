"""A task, the encoding of one scan: what decides its result, and what a worker reports of it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.runtimes.kind import NATIVE, Runtime
from isimed_index.errors import IsimedError, UsageError

MIN_FOREGROUND = 0.15  # patches with less of it are air and are not stored
_STRIDE = re.compile(r"-stride(\d+)-", re.ASCII)
STARTS = 2  # how often a task may begin and not end before it is taken for what ended its workers


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """What one worker needs to encode one scan; plain values, so that it travels to any machine."""

    number: int  # within its run
    key: str  # see `task_key`
    scan: str
    chunks: str  # path of the scan's zarr group
    encoder: str  # path of the encoder directory
    bench: str  # path of a staged folder, the same for all tasks of a run: each attempt makes a folder of its own there
    stride_vox: int
    device: str
    trust: tuple[str, ...] = ()  # code outside of this library that the encoder may run
    runtime: Runtime = NATIVE
    version: str = ""  # of this library, that of the worker has to be the same; empty: any
    starts: int = STARTS  # beginnings in all, after which it is reported instead of begun once more

    @property
    def name(self) -> str:
        """A name that no other task has, in this run or another one."""
        return f"encode-{Path(self.bench).name}-{self.number}"


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a worker reports: the fields of the staged segment and where it lies, or what stopped this scan alone."""

    task: EncodeTask
    fields: dict[str, Any]
    error: IsimedError | None = None
    staged: str = ""  # path of the folder with the segment; empty when there is an error
    suspect: bool = False  # it began before and its worker did not live to report: not begun again


def grid_key(card: EncoderCard, stride_vox: int) -> str:
    """The lattice that patches of this encoder are laid on, as a short text."""
    return f"patch{card.patch_vox}-stride{stride_vox}-spacing{card.spacing_mm:g}mm-fg{MIN_FOREGROUND:g}"


def stride_of_grid(grid: str) -> int | None:
    """The stride in voxels that a `grid_key` names; None of another text, which an import may have."""
    named = _STRIDE.search(grid)
    return None if named is None else int(named[1])


def task_key(scan_digest: str, card: EncoderCard, stride_vox: int, precision: str = "fp32") -> str:
    """Hash of everything that decides a segment's content: a rerun skips the keys that are committed.

    The runtime is no part of it, because each gives the same vectors; a precision is.
    """
    decides = [scan_digest, card.id, grid_key(card, stride_vox)]
    text = json.dumps(decides if precision == "fp32" else [*decides, precision])
    return hashlib.sha256(text.encode()).hexdigest()


def stride_in_voxels(card: EncoderCard, stride_mm: float | None) -> int:
    """A lattice step in mm → voxels of the working grid.

    `UsageError` unless it is a whole number of them, and no wider than a patch: of what lies between two patches that
    do not touch, nothing would be known.
    """
    if stride_mm is None:
        return card.stride_vox
    voxels = round(stride_mm / card.spacing_mm) if math.isfinite(stride_mm) else 0
    if voxels < 1 or abs(voxels * card.spacing_mm - stride_mm) > 1e-6:
        raise UsageError(
            f"expected a stride that is a multiple of the encoder's spacing {card.spacing_mm:g} mm, "
            f"found {stride_mm:g} mm",
            next_step=f"for example --stride {card.stride_vox * card.spacing_mm:g}",
        )
    if voxels > card.patch_vox:
        raise UsageError(
            f"expected a stride of at most {card.patch_vox * card.spacing_mm:g} mm, which is how wide a patch is, "
            f"found {stride_mm:g} mm: patches would not touch, and nothing would describe what lies between them",
            next_step=f"--stride {card.stride_vox * card.spacing_mm:g}, the encoder's own",
        )
    return voxels
