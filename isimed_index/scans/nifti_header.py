"""The part of a NIfTI header that says where voxels lie and what they are worth: kept word for word, and put back.

A scan is stored by its affine alone, which is all that is asked of it. But a qform comes back bit for bit only from its
own quaternion, a header may hold a qform beside its sform, and lengths in metres are not millimetres: so what was read
stays with the scan, and an export writes it again. Nothing else of a header is kept; its texts may name the patient.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from isimed_index.space import Affine, spacing_mm

_WHOLE = ("qform_code", "sform_code")
_REAL = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "scl_slope", "scl_inter")
_ROWS = ("srow_x", "srow_y", "srow_z")
_PIXDIM = 4  # qfac and the three edges
_SPACE_UNIT = 7  # the bits of xyzt_units that are about lengths
_MM, _SCANNER = 2, 1
_MOST_OF_NIFTI_1 = 32767  # voxels along an axis
_QFORM_TOLERANCE_MM = 1e-4
_UNITS = {1: 1e3, 2: 1.0, 3: 1e-3}  # mm of one; by the bits of xyzt_units, 0 as mm


def kept(header: Any) -> str:
    """The geometry and scaling of a header as JSON; numbers that are not finite are null."""
    fields: dict[str, Any] = {name: int(header[name]) for name in _WHOLE}
    fields |= {name: _number(header[name]) for name in _REAL}
    fields |= {name: [_number(value) for value in header[name]] for name in _ROWS}
    fields["pixdim"] = [_number(value) for value in header["pixdim"][:_PIXDIM]]
    fields["xyzt_units"] = int(header["xyzt_units"]) & _SPACE_UNIT
    return json.dumps(fields)


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def put_back(said: str, version: int) -> Any:
    """A new little-endian header of NIfTI-1 or -2 with nothing but what `kept` took from one of that version."""
    header = _empty(version)
    for name, value in json.loads(said).items():
        if name == "pixdim":
            header["pixdim"][:_PIXDIM] = [math.nan if one is None else one for one in value]
        elif name in _ROWS:
            header[name] = [math.nan if one is None else one for one in value]
        else:
            header[name] = math.nan if value is None else value
    return header


def made(affine: Affine, shape: tuple[int, int, int], slope: float, intercept: float) -> Any:
    """A new little-endian header for an affine in mm, NIfTI-1 where the shape fits it.

    The affine is the sform. It is the qform too where that can say it: a quaternion cannot say shear.
    """
    header = _empty(1 if max(shape) <= _MOST_OF_NIFTI_1 else 2)
    header["pixdim"][1:_PIXDIM] = spacing_mm(affine)
    header.set_sform(affine, _SCANNER)
    header.set_qform(affine, _SCANNER)
    reach = np.array([*shape, 1.0])
    if not (np.abs(header.get_qform() - affine) * reach).sum(axis=1).max() <= _QFORM_TOLERANCE_MM:
        header["qform_code"] = 0
    header["xyzt_units"] = _MM
    header["scl_slope"], header["scl_inter"] = slope, intercept
    return header


def affine_of(header: Any) -> Affine:
    """The affine in mm that a header of `put_back` or `made` says, its sform before its qform."""
    matrix = header.get_sform() if int(header["sform_code"]) > 0 else _qform(header)
    mm = _UNITS.get(int(header["xyzt_units"]) & _SPACE_UNIT, 1.0)
    return np.asarray(np.diag([mm, mm, mm, 1.0]) @ matrix, dtype=np.float64)


def scaling_of(header: Any) -> tuple[float, float]:
    """Slope and intercept that a header says; 1 and 0 where it says none."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    return (1.0, 0.0) if slope == 0 or not math.isfinite(slope) else (slope, intercept)


def _qform(header: Any) -> Affine:
    header = header.copy()
    header["pixdim"][0] = header["pixdim"][0] or 1  # NIfTI standard: qfac 0 means 1
    matrix: Affine = header.get_qform()
    return matrix


def _empty(version: int) -> Any:
    import nibabel as nib

    return (nib.Nifti1Header if version == 1 else nib.Nifti2Header)(endianness="<")
