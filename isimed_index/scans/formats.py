"""Which reader a file gets: by its suffix, and by its first bytes where that says nothing."""

from __future__ import annotations

from pathlib import Path

from isimed_index.errors import ScanRefused
from isimed_index.scans import analyze, metaimage, mgh, nifti, nrrd
from isimed_index.scans.part import Wanted
from isimed_index.scans.volume import Volume3D, check_regular


def _load_pair(path: Path, wanted: Wanted) -> Volume3D:
    return analyze.load(path, wanted) if analyze.is_analyze(path) else nifti.load(path, wanted)


_READERS = {
    ".nii": nifti.load,
    ".nii.gz": nifti.load,
    ".hdr": _load_pair,
    ".hdr.gz": _load_pair,
    ".nrrd": nrrd.load,
    ".nhdr": nrrd.load,
    ".mha": metaimage.load,
    ".mhd": metaimage.load,
    ".mgh": mgh.load,
    ".mgz": mgh.load,
}
SUFFIXES = tuple(_READERS)
_DATA_SUFFIXES = (".img", ".img.gz")  # the voxels of a pair; its header is the file that is read


def load(path: Path, wanted: Wanted) -> Volume3D:
    """Read one volume of a file; raises `ScanRefused` without the file's name, which the caller adds."""
    check_regular(path)
    if is_pair_data(path):
        header = header_beside(path)
        if header is None:
            raise ScanRefused("its header (.hdr) is not beside it", next_step="copy both files of the pair")
        path = header
    return _READERS.get(suffix_of(path), nifti.load)(path, wanted)


def is_pair_data(path: Path) -> bool:
    """Whether a file is by its name the voxels of a header and data pair (.img)."""
    return path.name.lower().endswith(_DATA_SUFFIXES)


def header_beside(data: Path) -> Path | None:
    """The header of the pair that an .img file belongs to, if there is one."""
    stem = data.name[: data.name.lower().rindex(".img")]
    beside = (data.with_name(stem + suffix) for suffix in (".hdr", ".HDR", ".hdr.gz"))
    return next((header for header in beside if header.is_file()), None)


def suffix_of(path: Path) -> str:
    """The longest image suffix that the file's name ends in, in lower case; empty when it has none."""
    name = path.name.lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")
