"""One stored scan, or its label map, back as a NIfTI file.

    stored voxels, RAS ─▶ turned as in the file that they came from ─▶ its geometry and scaling ─▶ .nii, .nii.gz

Stored numbers are written as they are, so that nothing is rounded: a NIfTI file that was not resampled comes back
bit for bit, with its slope, its qform and its sform. The header holds geometry and scaling, no texts.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import NotFound, StoreDamaged, UsageError
from isimed_index.exchange.folder import becoming
from isimed_index.scans import nifti_header
from isimed_index.space import Affine, orientation

if TYPE_CHECKING:
    from isimed_index.scans.chunks import StoredScan

SUFFIXES = (".nii", ".nii.gz")
_TOLERANCE_MM = 1e-3
_ZLIB_LEVEL = 6


@dataclass(frozen=True, slots=True)
class ExportedScan:
    """What was written: base names, the grid of the files, and what is not as in the scan's own file.

    `changed` is empty where voxels, scaling and geometry are those of the file that was added.
    """

    scan: str
    out: str | None
    labels: str | None
    shape: tuple[int, int, int]
    dtype: str  # of the stored voxels
    orientation: str
    changed: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """How stored arrays (x, y, z; RAS) become those of the file, and what is known of its header."""

    turn: NDArray[np.float64]  # (3, 2), as nibabel's apply_orientation takes it
    affine: Affine  # of the turned voxels
    kept: str | None  # geometry and scaling of the NIfTI header that the scan came from
    version: int


def export_scan(
    stored: StoredScan, scan: str, out: Path | None = None, labels: Path | None = None, *, force: bool = False
) -> ExportedScan:
    """Write the voxels of a scan to `out`, its label map to `labels`, or both; each appears whole or not at all.

    Errors: `UsageError` for a suffix other than .nii and .nii.gz and, unless `force`, for a path that is taken;
    `NotFound` when the scan is stored without voxels or has no label map.
    """
    targets = [path for path in (out, labels) if path is not None]
    if not targets:
        raise UsageError("expected a file for the voxels or the labels, found none", next_step="give --out FILE.nii.gz")
    for path in targets:
        if not path.name.lower().endswith(SUFFIXES):
            raise UsageError(
                f"{path.name} is no name of a NIfTI file: expected one that ends in .nii or .nii.gz",
                next_step="scans are exported as NIfTI only: name it FILE.nii.gz",
            )
    if len({path.absolute() for path in targets}) < len(targets):
        raise UsageError("voxels and labels cannot be one file", next_step="give two names")
    grid = _grid(stored)
    voxels = _turned(stored.voxels(), grid)
    header = _header(grid, voxels.shape, stored.slope, stored.intercept)
    with ExitStack() as files:
        drafts = {path: files.enter_context(becoming(path, a_file=True, replace=force)) for path in targets}
        if out is not None:
            _write(drafts[out], voxels, header, zipped=_is_zipped(out))
        if labels is not None:
            found = stored.labels()
            if found is None:
                raise NotFound(f"scan {scan!r} has no label map", next_step="leave out the file for labels")
            header["scl_slope"], header["scl_inter"] = 1.0, 0.0  # labels are not scaled as their scan is
            _write(drafts[labels], _turned(found, grid), header, zipped=_is_zipped(labels))
    return ExportedScan(
        scan,
        None if out is None else out.name,
        None if labels is None else labels.name,
        voxels.shape,
        voxels.dtype.name,
        orientation(grid.affine),
        tuple(_changes(stored, grid)),
    )


def _is_zipped(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _grid(stored: StoredScan) -> _Grid:
    """The file's own order of axes; the stored one for a scan that was resampled, whose grid was in no file."""
    import nibabel as nib

    plain = nib.orientations.axcodes2ornt("RAS")
    codes = stored.attributes.get("source_orientation")
    if codes is None or _is_resampled(stored):
        return _Grid(plain, stored.affine, None, 1)
    turn = nib.orientations.ornt_transform(plain, nib.orientations.axcodes2ornt(tuple(str(codes))))
    affine = stored.affine @ nib.orientations.inv_ornt_aff(turn, stored.shape)
    kept = stored.attributes.get("source_header")
    version = 2 if str(stored.attributes.get("source_format")).startswith("NIfTI-2") else 1
    return _Grid(turn, affine, None if kept is None else str(kept), version)


def _is_resampled(stored: StoredScan) -> bool:
    return "source_affine" in stored.attributes  # kept of those alone whose stored affine does not tell it


def _turned(voxels: NDArray[Any], grid: _Grid) -> Any:
    import nibabel as nib

    return nib.orientations.apply_orientation(voxels, grid.turn)


def _header(grid: _Grid, shape: tuple[int, int, int], slope: float, intercept: float) -> Any:
    """The header; `StoreDamaged` when what was kept of the file's own does not go with what is stored."""
    if grid.kept is None:
        return nifti_header.made(grid.affine, shape, slope, intercept)
    try:
        header = nifti_header.put_back(grid.kept, grid.version)
    except (ValueError, TypeError, AttributeError) as error:
        raise _unlike() from error
    apart = (np.abs(nifti_header.affine_of(header) - grid.affine) * [*shape, 1.0]).sum(axis=1).max()
    if not apart <= _TOLERANCE_MM or nifti_header.scaling_of(header) != (slope, intercept):
        raise _unlike()
    return header


def _unlike() -> StoreDamaged:
    return StoreDamaged(
        "the geometry that was kept of the scan's file is not that of its stored voxels",
        next_step="isimed check, then isimed repair",
    )


def _write(path: Path, turned: NDArray[Any], header: Any, *, zipped: bool) -> None:
    """Header, no extensions, and the voxels, x fastest; slice by slice, so that no second copy is needed."""
    dtype = turned.dtype.newbyteorder("<")
    header.set_data_shape(turned.shape)
    header.set_data_dtype(dtype)
    header["vox_offset"] = header.sizeof_hdr + 4
    header["magic"] = header.single_magic
    with _opened(path, zipped) as file:
        file.write(header.binaryblock + b"\0\0\0\0")
        for z in range(turned.shape[2]):
            file.write(turned[:, :, z].astype(dtype, copy=False).tobytes(order="F"))


@contextmanager
def _opened(path: Path, zipped: bool) -> Iterator[BinaryIO]:
    """A new file; zipped, it holds neither a name nor a time."""
    with path.open("xb") as raw:
        if not zipped:
            yield raw
            return
        with gzip.GzipFile("", "wb", _ZLIB_LEVEL, raw, mtime=0) as packed:
            yield packed  # type: ignore[misc]


def _changes(stored: StoredScan, grid: _Grid) -> Iterator[str]:
    said = stored.attributes
    if _is_resampled(stored):
        yield "it was resampled when it was added: this is the stored grid, in RAS order"
    if "gantry_tilt_degrees" in said:
        yield f"its slices were tilted by {said['gantry_tilt_degrees']} degrees and are straightened"
    if "nonfinite_voxels" in said:
        yield f"{said['nonfinite_voxels']} voxels that were no finite numbers hold the least value"
    if "photometric" in said:
        yield "its values were inverted (MONOCHROME1)"
    if grid.kept is None and not _is_resampled(stored) and str(said.get("source_format")).startswith("NIfTI"):
        yield "an earlier version added it: a qform is written as the sform that it stands for"
