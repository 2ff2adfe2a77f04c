"""FreeSurfer volumes (.mgh, .mgz), read without guessing.

`nibabel` parses the header and makes the affine; a header whose `goodRASFlag` is not set does not say where its voxels
lie and is refused (nibabel and FreeSurfer would assume a coronal scan).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from isimed_index.errors import ScanRefused
from isimed_index.scans.part import COPY_AGAIN, Wanted, checked_part
from isimed_index.scans.volume import Volume3D, checked_type, open_source, read_voxels, turned_volume
from isimed_index.space import checked_affine

_HEADER_BYTES = 284  # the voxels begin here; what follows them (TR, flip angle, …) is not used


def load(path: Path, wanted: Wanted) -> Volume3D:
    """Read one file; raises `ScanRefused` without the file's name, which the caller adds."""
    from nibabel.freesurfer.mghformat import MGHHeader
    from nibabel.spatialimages import HeaderDataError

    with open_source(path) as source:
        block = source.stream.read(_HEADER_BYTES)
        if len(block) < _HEADER_BYTES or block[:4] != b"\x00\x00\x00\x01":
            raise ScanRefused("this is not an MGH file", next_step="convert the image to .nii.gz")
        try:
            header = MGHHeader(block.ljust(MGHHeader.template_dtype.itemsize, b"\0"), check=False)
            dtype = checked_type(np.dtype(header.get_data_dtype()).newbyteorder(">"))
        except (KeyError, ValueError, HeaderDataError) as error:
            raise ScanRefused("the header is damaged", next_step=COPY_AGAIN) from error
        part = checked_part(tuple(int(n) for n in header["dims"]), wanted)
        if block[28:30] == b"\0\0":  # nibabel sets the flag together with its default
            raise ScanRefused(
                "the header does not say where the voxels lie: its goodRASFlag is not set",
                next_step="set the orientation with mri_convert",
            )
        with np.errstate(all="ignore"):  # what overflows is no finite number, and is refused
            affine = checked_affine(header.get_affine())
        voxels = read_voxels(source, part, dtype, wanted)
    return turned_volume(voxels, affine, {"source_format": "MGH", "affine_source": "RAS matrix", **part.attributes})
