"""Files that break readers, each with what it is and what must become of it: `python tests/bad_files.py DIR`.

Every case has a folder of its own under DIR. What is read is noise of the case's own, so that no two are one scan, and
its voxels and places are known. The table in docs/reference/refusals.md is made of this list.
"""

from __future__ import annotations

import bz2
import gzip
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bad_dicom
import nibabel as nib
import numpy as np
from bad_case import GIB, RAS, SHAPE, Case, Truth, cut, edited, own, plain, zeros_deflate, zeros_gzip
from dicoms import grid

# -- NIfTI ------------------------------------------------------------------------------------------------------------


def nii(folder: Path, data: np.ndarray | None = None, affine: np.ndarray = RAS, **options: Any) -> Path:
    """A NIfTI file called after its case; `codes` of qform and sform, `suffix`, `kind`; other options are fields."""
    data = own(folder.name) if data is None else data
    kind, codes = options.pop("kind", nib.Nifti1Image), options.pop("codes", (1, 1))
    path = folder / (folder.name + options.pop("suffix", ".nii"))
    header = kind.header_class(endianness=options.pop("endian", "<"))
    header.set_data_dtype(data.dtype)
    image = kind(data, affine, header)
    image.set_qform(affine if codes[0] else None, codes[0])
    image.set_sform(affine if codes[1] else None, codes[1])
    for field, value in options.items():
        image.header[field] = value
    nib.save(image, path)
    return path


def gzipped(path: Path, tail: bytes = b"") -> Path:
    """Compress a file, and take the plain one away."""
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()) + tail)
    path.unlink()
    return packed


def header_then(path: Path, body: bytes, **header: Any) -> Path:
    """The gzipped header of a NIfTI file, then other members."""
    raw = path.read_bytes()[:352]
    path.unlink()
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(raw) + body)
    return packed


def scaled_by(factor: float) -> Callable[[str], Truth]:
    """The same voxels where lengths are in another unit."""
    return lambda name: (own(name), np.diag([factor, factor, factor, 1]) @ RAS)


def sheared() -> np.ndarray:
    """An affine whose axes are not at right angles."""
    return RAS @ np.array([[1, 0.3, 0, 0], [0, 1, 0.2, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def as_type(dtype: str) -> tuple[Callable[[Path], Any], Callable[[str], Truth]]:
    return (lambda f: nii(f, own(f.name, dtype=dtype))), (lambda name: (own(name, dtype=dtype), RAS))


def with_holes(name: str) -> np.ndarray:
    """Reals with NaN and infinities in them."""
    data = own(name, dtype=np.float32)
    data[0, 0, :3] = np.nan, np.inf, -np.inf
    return data


def filled(name: str) -> Truth:
    data = own(name, dtype=np.float32)
    holes = ~np.isfinite(with_holes(name))
    return np.where(holes, data[~holes].min(), data), RAS


def disagreeing(folder: Path) -> Path:
    path = nii(folder)
    return edited(path, 268, RAS[:3, 3] + 40, "<f4")  # the qform lies 69 mm away from the sform


def mirrored() -> np.ndarray:
    return RAS @ np.diag([-1, 1, 1, 1.0])


def extension(folder: Path) -> Path:
    """A header extension of 8 MiB before the voxels."""
    raw = nii(folder).read_bytes()
    size = 2**23
    block = np.array([size, 6], "<i4").tobytes() + bytes(size - 8)
    path = folder / f"{folder.name}.nii"
    path.write_bytes(raw[:348] + b"\1\0\0\0" + block + raw[352:])
    return edited(path, 108, 352.0 + size, "<f4")


def skipping(folder: Path) -> Path:
    """Voxels that begin 2 GB into a compressed file."""
    path = edited(nii(folder), 108, 2e9, "<f4")
    return header_then(path, zeros_gzip(2 * GIB))


_NIFTI = [
    Case("nii-header-cut", "ends inside its header", "ends inside its header", lambda f: cut(nii(f), 200)),
    Case("nii-data-cut", "voxels cut off", "truncated", lambda f: cut(nii(f), 700)),
    Case("nii-gzip-cut", "gzip stream cut off", "truncated or damaged",
         lambda f: cut(gzipped(nii(f)), 300)),
    Case("nii-gzip-checksum", "gzip check sum wrong", "truncated or damaged",
         lambda f: edited(p := gzipped(nii(f)), p.stat().st_size - 8, 0, "<i4")),
    Case("nii-gzip-garbage", "bytes that are no gzip behind a gzip file", "truncated or damaged",
         lambda f: gzipped(nii(f), b"garbage, not gzip")),
    Case("nii-garbage", "a few bytes behind the voxels", None,
         lambda f: (p := nii(f)).write_bytes(p.read_bytes() + b"garbage" * 9), plain),
    Case("nii-much-garbage", "100 MiB behind the voxels", "far more data",
         lambda f: os.truncate(nii(f), 100 * 2**20)),
    Case("nii-magic", "wrong magic word", "not a NIfTI file", lambda f: edited(nii(f), 344, list(b"XXX"), "u1")),
    Case("nii-empty", "no byte at all", "not a NIfTI file", lambda f: (f / f"{f.name}.nii").touch()),
    Case("nii-text", "a text file called .nii", "not a NIfTI file",
         lambda f: (f / f"{f.name}.nii").write_text("patient notes\n" * 99)),
    Case("nii-gzip-named-nii", "gzip under the name .nii", None,
         lambda f: gzipped(nii(f)).rename(f / f"{f.name}.nii"), plain),
    Case("nii-plain-named-gz", "not compressed, under the name .nii.gz", None,
         lambda f: nii(f).rename(f / f"{f.name}.nii.gz"), plain),
    Case("nii-gzip-twice", "compressed twice", "not a NIfTI file",
         lambda f: (p := gzipped(nii(f))).write_bytes(gzip.compress(p.read_bytes()))),
    Case("nii-dim-negative", "negative size", "the volume is empty", lambda f: edited(nii(f), 42, -7, "<i2")),
    Case("nii-dim-zero", "a size of nought", "the volume is empty", lambda f: edited(nii(f), 44, 0, "<i2")),
    Case("nii-dims-none", "nought dimensions", "the volume is empty", lambda f: edited(nii(f), 40, 0, "<i2")),
    Case("nii-dims-many", "99 dimensions", "7-D data", lambda f: edited(nii(f), 40, 99, "<i2")),
    Case("nii-claims-2-tib", "says it holds 2 TiB", "truncated",
         lambda f: edited(nii(f), 42, [32767, 32767, 1024], "<i2")),
    Case("nii-bomb", "4 GiB of zeros, as its header says, in 4 MB", "no image shrinks like that",
         lambda f: header_then(edited(nii(f), 42, [1024, 1024, 2000], "<i2"), zeros_gzip(4 * GIB))),
    Case("nii-bomb-behind", "4 GiB of zeros behind a small volume", "far more data",
         lambda f: gzipped(nii(f), zeros_gzip(4 * GIB))),
    Case("nii-bomb-before", "2 GB to pass over before a small volume", "far more data", skipping),
    Case("nii-bomb-4-d", "1000 small volumes that are 4 GiB of zeros", "1000 volumes",
         lambda f: header_then(edited(nii(f), 40, [4, 128, 128, 128, 1000], "<i2"), zeros_gzip(4 * GIB))),
    Case("nii-no-header", "the voxels (.img) of a pair alone", "its header (.hdr) is not beside it",
         lambda f: (f / f"{f.name}.img").write_bytes(own(f.name).tobytes())),
    Case("nii-no-voxels", "the header of a pair alone", "(.img) is not beside it",
         lambda f: (nii(f, kind=nib.Nifti1Pair, suffix=".hdr"), (f / f"{f.name}.img").unlink())),
    Case("nii-pair", "a sound pair", None, lambda f: nii(f, kind=nib.Nifti1Pair, suffix=".hdr"), plain),
    Case("nii-pair-cut", "a pair whose voxels are cut off", "truncated",
         lambda f: (nii(f, kind=nib.Nifti1Pair, suffix=".hdr"), cut(f / f"{f.name}.img", 99))),
    Case("nii-two", "NIfTI-2", None, lambda f: nii(f, kind=nib.Nifti2Image), plain),
    Case("nii-big-endian", "big endian", None,
         lambda f: nii(f, own(f.name, dtype=">i2"), endian=">"), plain),
    Case("nii-all-nan", "only NaN", "every voxel is NaN or infinite",
         lambda f: nii(f, np.full(SHAPE, np.nan, np.float32))),
    Case("nii-all-inf", "only infinities", "every voxel is NaN or infinite",
         lambda f: nii(f, np.full(SHAPE, np.inf, np.float32))),
    Case("nii-some-nan", "some NaN and infinities: they become the least value, and are counted", None,
         lambda f: nii(f, with_holes(f.name)), filled),
    Case("nii-constant", "one single value", "every voxel has the same value", lambda f: nii(f, np.full(SHAPE, 7.0))),
    Case("nii-huge-values", "values beyond 32-bit reals", "do not fit into 32-bit",
         lambda f: nii(f, own(f.name, dtype=np.float64) * 1e300)),
    Case("nii-complex", "complex voxels", "complex64 voxels",
         lambda f: nii(f, own(f.name).astype(np.complex64))),
    Case("nii-rgb", "colour voxels", "colour (RGB)",
         lambda f: nii(f, np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))),
    Case("nii-float128", "128-bit reals", "at most 64 bits",
         lambda f: edited(nii(f, np.zeros((*SHAPE[:2], 48), np.int16)), 70, [1536, 128], "<i2")),
    Case("nii-bool", "one bit a voxel", "at most 64 bits", lambda f: edited(nii(f), 70, [1, 1], "<i2")),
    Case("nii-datatype", "an unknown kind of voxel", "damaged", lambda f: edited(nii(f), 70, 999, "<i2")),
    Case("nii-int64", "64-bit integers", None, *as_type("i8")),
    Case("nii-uint64", "64-bit integers without a sign", None, *as_type("u8")),
    Case("nii-slope-nan", "scl_slope is NaN: 1", None, lambda f: edited(nii(f), 112, np.nan, "<f4"), plain),
    Case("nii-slope-zero", "scl_slope is 0: 1", None, lambda f: edited(nii(f), 112, [0, 99], "<f4"), plain),
    Case("nii-slope-inf", "scl_slope is infinite: 1", None, lambda f: edited(nii(f), 112, [np.inf, 0], "<f4"), plain),
    Case("nii-slope", "scl_slope and scl_inter", None, lambda f: edited(nii(f), 112, [-0.5, 7], "<f4"),
         lambda name: (own(name) * -0.5 + 7, RAS)),
    Case("nii-inter-nan", "scl_inter is NaN", "scl_inter is not a number",
         lambda f: edited(nii(f), 112, [2, np.nan], "<f4")),
    Case("nii-no-forms", "neither sform nor qform", "neither its sform nor its qform is set",
         lambda f: nii(f, codes=(0, 0))),
    Case("nii-sform-singular", "a singular sform; the qform does not take its place", "singular",
         lambda f: edited(nii(f), 280, np.ones(12), "<f4")),
    Case("nii-sform-nan", "NaN in the sform", "NaN or infinite", lambda f: edited(nii(f), 280, np.nan, "<f4")),
    Case("nii-qform-nan", "NaN in the only qform", "NaN or infinite",
         lambda f: edited(nii(f, codes=(1, 0)), 268, np.nan, "<f4")),
    Case("nii-qform-quaternion", "no rotation in the only qform", "qform",
         lambda f: edited(nii(f, codes=(1, 0)), 256, [2, 2, 2], "<f4")),
    Case("nii-forms-disagree", "sform and qform disagree: the sform decides", None, disagreeing, plain),
    Case("nii-left-handed", "left-handed axes", None, lambda f: nii(f, affine=mirrored()),
         lambda name: (own(name), mirrored())),
    Case("nii-shear", "axes that are not at right angles", None, lambda f: nii(f, affine=sheared(), codes=(0, 1)),
         lambda name: (own(name), sheared())),
    Case("nii-pixdim-zero", "voxels without length, placed by the sform", None,
         lambda f: edited(nii(f), 80, [0, 0, 0], "<f4"), plain),
    Case("nii-pixdim-zero-qform", "voxels without length, placed by the qform", "singular",
         lambda f: edited(nii(f, codes=(1, 0)), 80, [0, 0, 0], "<f4")),
    Case("nii-pixdim-negative", "voxels of negative length, placed by the qform", "qform",
         lambda f: edited(nii(f, codes=(1, 0)), 80, [-1, 2, 3], "<f4")),
    Case("nii-metres", "lengths in metres", None, lambda f: nii(f, xyzt_units=1), scaled_by(1e3)),
    Case("nii-micrometres", "lengths in micrometres", None, lambda f: nii(f, xyzt_units=3), scaled_by(1e-3)),
    Case("nii-unit-unknown", "no unit of length: mm", None, lambda f: nii(f, xyzt_units=0), plain),
    Case("nii-unit-damaged", "a unit of length that there is none of", "length unit is damaged",
         lambda f: edited(nii(f), 123, 7, "u1")),
    Case("nii-2-d", "a single picture", "a 2-D image", lambda f: nii(f, own(f.name, (7, 9)))),
    Case("nii-one-thick", "one voxel thick", "a 2-D image", lambda f: nii(f, own(f.name, (7, 1, 6)))),
    Case("nii-4-d", "four volumes, none chosen", "4 volumes", lambda f: nii(f, own(f.name, (*SHAPE, 4)))),
    Case("nii-4-d-of-one", "4-D with one volume", None, lambda f: nii(f, own(f.name)[..., None]), plain),
    Case("nii-5-d", "a displacement field", "5-D data", lambda f: nii(f, own(f.name, (*SHAPE, 1, 3)))),
    Case("nii-offset", "voxels that begin inside the header", "start at byte 16",
         lambda f: edited(nii(f), 108, 16, "<f4")),
    Case("nii-extension", "an extension of 8 MiB before the voxels", None, extension, plain),
    Case("nii-analyze", "Analyze 7.5", "which side of the patient is left",
         lambda f: nib.save(nib.AnalyzeImage(own(f.name), np.eye(4)), f / f"{f.name}.img")),
]  # fmt: skip

# -- NRRD -------------------------------------------------------------------------------------------------------------


def nrrd(folder: Path, old: str = "", new: str = "", body: bytes | None = None, suffix: str = ".nrrd") -> Path:
    """An NRRD file called after its case, with one piece of its header exchanged."""
    columns = " ".join("({:.17g},{:.17g},{:.17g})".format(*column) for column in grid()[:3, :3].T)
    header = (
        f"NRRD0005\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 7 9 6\n"
        f"space directions: {columns}\nkinds: domain domain domain\nendian: little\nencoding: raw\n"
        "space origin: ({:.17g},{:.17g},{:.17g})\n".format(*grid()[:3, 3])
    )
    assert old in header
    path = folder / (folder.name + suffix)
    data = own(folder.name).ravel(order="F").tobytes() if body is None else body
    path.write_bytes(header.replace(old, new).encode("latin-1") + b"\n" + data)
    return path


def detached(folder: Path, name: str, **parts: Any) -> Path:
    """A header whose voxels lie elsewhere."""
    return nrrd(folder, "encoding: raw\n", f"encoding: raw\ndata file: {name}\n", b"", ".nhdr")


_NRRD = [
    Case("nrrd-no-space", "no anatomical space", "does not say where the voxels lie",
         lambda f: nrrd(f, "space: left-posterior-superior\n")),
    Case("nrrd-scanner-space", "a space that is not the patient's", "does not say where the voxels lie",
         lambda f: nrrd(f, "left-posterior-superior", "scanner-xyz")),
    Case("nrrd-directions-none", "an axis of three without a direction", "does not say where the voxels lie",
         lambda f: _nrrd_none(f)),
    Case("nrrd-no-voxels", "the file with its voxels is missing", "is not beside it",
         lambda f: detached(f, "gone.raw")),
    Case("nrrd-list", "voxels in a list of files", "a list of files", lambda f: detached(f, "LIST")),
    Case("nrrd-escape", "voxels outside its folder", "not beside it", lambda f: detached(f, "../../etc/passwd")),
    Case("nrrd-escape-root", "voxels at an absolute path", "not beside it", lambda f: detached(f, "/dev/zero")),
    Case("nrrd-itself", "voxels that are the header itself", "names itself",
         lambda f: nrrd(f, "encoding", f"data file: {f.name}.nhdr\nencoding", suffix=".nhdr")),
    Case("nrrd-device", "voxels in a link to a device", "is not beside it",
         lambda f: ((f / "zero.raw").symlink_to("/dev/zero"), detached(f, "zero.raw"))),
    Case("nrrd-encoding", "an encoding that there is none of", "its encoding is", lambda f: nrrd(f, "raw", "zstd")),
    Case("nrrd-latin", "a header in another encoding, not ASCII", None,
         lambda f: nrrd(f, "type: short", "content: Müller für Grün\ntype: short"), plain),
    Case("nrrd-endless-header", "a header that does not end", "does not end",
         lambda f: nrrd(f, "space origin", "# " + "x" * 2**21 + "\nspace origin")),
    Case("nrrd-cut", "voxels cut off", "truncated", lambda f: nrrd(f, body=b"\0" * 99)),
    Case("nrrd-vector", "three numbers a voxel", "several numbers a voxel",
         lambda f: nrrd(f, "kinds: domain", "kinds: vector")),
    Case("nrrd-micrometres", "lengths in micrometres", "expected mm",
         lambda f: nrrd(f, "encoding", 'space units: "um" "um" "um"\nencoding')),
    Case("nrrd-bomb", "4 GiB of zeros in a gzip stream", "no image shrinks like that",
         lambda f: _nrrd_bomb(f, "gzip", zeros_gzip(4 * GIB))),
    Case("nrrd-bomb-bzip2", "4 GiB of zeros in a bzip2 stream", "no image shrinks like that",
         lambda f: _nrrd_bomb(f, "bzip2", bz2.compress(bytes(2**26)) * 64)),
    Case("nrrd-bomb-behind", "4 GiB of zeros behind a small volume", "far more data",
         lambda f: nrrd(f, "raw", "gzip", gzip.compress(own(f.name).tobytes(order="F")) + zeros_gzip(4 * GIB))),
    Case("nrrd-bomb-before", "4 GiB of zeros to pass over", "far more data",
         lambda f: nrrd(f, "encoding: raw", "encoding: gzip\nbyte skip: 4000000000", zeros_gzip(4 * GIB))),
]  # fmt: skip


def _nrrd_none(folder: Path) -> None:
    path = nrrd(folder)
    raw = path.read_bytes()
    at = raw.index(b"space directions: ") + len(b"space directions: ")
    path.write_bytes(raw[:at] + b"none" + raw[raw.index(b")", at) + 1 :])


def _nrrd_bomb(folder: Path, encoding: str, body: bytes) -> Path:
    path = nrrd(folder, "sizes: 7 9 6", "sizes: 1024 1024 2000", body)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"encoding: raw", f"encoding: {encoding}".encode(), 1))
    return path


# -- MetaImage and MGH ------------------------------------------------------------------------------------------------


def mha(folder: Path, old: str = "", new: str = "", body: bytes | None = None, suffix: str = ".mha") -> Path:
    """A MetaImage called after its case, with one piece of its header exchanged."""
    spacing = np.linalg.norm(grid()[:3, :3], axis=0)
    words = {
        "TransformMatrix": (grid()[:3, :3] / spacing).T.ravel(),
        "Offset": grid()[:3, 3],
        "ElementSpacing": spacing,
    }
    numbers = "".join(f"{key} = {' '.join(f'{word:.17g}' for word in some)}\n" for key, some in words.items())
    header = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        f"{numbers}DimSize = 7 9 6\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    assert old in header
    path = folder / (folder.name + suffix)
    data = own(folder.name).ravel(order="F").tobytes() if body is None else body
    path.write_bytes(header.replace(old, new).encode("latin-1") + data)
    return path


def mha_bomb(folder: Path, size: str, before: bytes = b"") -> Path:
    body = b"\x78\xda" + before + zeros_deflate(4 * GIB)
    path = mha(folder, "DimSize = 7 9 6", f"DimSize = {size}", body)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"CompressedData = False", b"CompressedData = True", 1))
    return path


def mgh(folder: Path, *edits: tuple[int, Any, str], suffix: str = ".mgh") -> Path:
    path = folder / f"{folder.name}{suffix}"
    nib.save(nib.MGHImage(own(folder.name), RAS), path)
    for at, values, dtype in edits:
        edited(path, at, values, dtype)
    return path


def mgz_bomb(folder: Path) -> Path:
    raw = mgh(folder, (4, [1024, 1024, 2000, 1], ">i4")).read_bytes()
    (folder / f"{folder.name}.mgh").unlink()
    path = folder / f"{folder.name}.mgz"
    path.write_bytes(gzip.compress(raw[:284]) + zeros_gzip(4 * GIB))
    return path


_META = [
    Case("mha-sound", "a sound file", None, mha, plain),
    Case("mha-no-place", "no TransformMatrix", "does not say where the voxels lie",
         lambda f: mha(f, "TransformMatrix", "Nothing")),
    Case("mha-list", "voxels in a list of files", "a list of files", lambda f: mha(f, "LOCAL", "LIST", suffix=".mhd")),
    Case("mha-escape", "voxels outside its folder", "not beside it",
         lambda f: mha(f, "LOCAL", "../../etc/passwd", suffix=".mhd")),
    Case("mha-itself", "voxels that are the header itself", "names itself",
         lambda f: mha(f, "LOCAL", f"{f.name}.mhd", suffix=".mhd")),
    Case("mha-latin", "a header in another encoding, not ASCII", None,
         lambda f: mha(f, "ObjectType", "Comment = Jürgen Groß\nObjectType"), plain),
    Case("mha-cut", "voxels cut off", "truncated", lambda f: mha(f, body=b"\0" * 99)),
    Case("mha-spacing-zero", "voxels without length", "singular",
         lambda f: mha(f, "ElementSpacing = ", "ElementSpacing = 0 0 0\nUnused = ")),
    Case("mha-bomb", "4 GiB of zeros in a zlib stream", "no image shrinks like that",
         lambda f: mha_bomb(f, "1024 1024 2000")),
    Case("mha-bomb-behind", "4 GiB of zeros behind a small volume", "far more data", lambda f: mha_bomb(f, "7 9 6")),
    Case("mgh-sound", "a sound file", None, mgh, plain),
    Case("mgh-cut", "voxels cut off", "truncated", lambda f: cut(mgh(f), 400)),
    Case("mgh-unplaced", "goodRASFlag is 0", "goodRASFlag", lambda f: mgh(f, (28, 0, ">i2"))),
    Case("mgh-dims-negative", "negative size", "the volume is empty", lambda f: mgh(f, (4, -7, ">i4"))),
    Case("mgh-bomb", "4 GiB of zeros in .mgz", "no image shrinks like that", mgz_bomb),
]  # fmt: skip

# -- names, folders, links --------------------------------------------------------------------------------------------


def named(name: str) -> Callable[[Path], None]:
    """A sound file under an odd name."""

    def write(folder: Path) -> None:
        nii(folder).rename(folder / name)

    return write


def unreadable(folder: Path) -> None:
    nii(folder).chmod(0)


_NAMES = [
    Case("name-folder", "a folder called x.nii.gz, with a file in it", None,
         lambda f: ((f / "x.nii.gz").mkdir(), nii(f).rename(f / "x.nii.gz" / "y.nii")), plain),
    Case("name-link-loop", "a link that leads to itself", "cannot be read",
         lambda f: (f / "loop.nii.gz").symlink_to("loop.nii.gz")),
    Case("name-link-broken", "a link that leads nowhere", "cannot be read",
         lambda f: (f / "b.nii.gz").symlink_to("gone")),
    Case("name-link", "a link to a file elsewhere", None,
         lambda f: ((f / ".there").mkdir(), nii(f).rename(f / ".there" / "t.nii"),
         (f / "l.nii").symlink_to(".there/t.nii")),
         plain),
    Case("name-device", "a link to a device without end", "cannot be read",
         lambda f: (f / "z.nii.gz").symlink_to("/dev/zero")),
    Case("name-pipe", "a named pipe", "cannot be read", lambda f: os.mkfifo(f / "pipe.nii")),
    Case("name-pipe-dicom", "a named pipe called .dcm", "cannot be read", lambda f: os.mkfifo(f / "pipe.dcm")),
    Case("name-unreadable", "no permission to read it", "cannot be read", unreadable),
    Case("name-spaces", "spaces in its name", None, named("  a  b .nii"), plain),
    Case("name-unicode", "letters beyond ASCII", None, named("Größe 磁気 \U0001f9e0 é.nii"), plain),
    Case("name-dash", "a leading dash", None, named("--help.nii"), plain),
    Case("name-long", "255 bytes", None, named("n" * 251 + ".nii"), plain),
    Case("name-dots", "only dots before the suffix", None, named("x...nii"), plain),
    Case("name-capitals", "a suffix in capitals", None, named("A.NII"), plain),
    Case("name-quotes", "quotes and signs that shells and SQL know", None, named("a'b\"c;$(d)%s{e}.nii"), plain),
    Case("name-newline", "a line break", "characters that cannot be shown", named("a\nb.nii")),
    Case("name-escape", "a terminal's escape code", "characters that cannot be shown", named("\x1b[31mred.nii")),
    Case("name-bytes", "bytes that are no text", "characters that cannot be shown", named("a\udcff\udcfe.nii")),
]  # fmt: skip

CASES = [*_NIFTI, *_NRRD, *_META, *bad_dicom.CASES, *_NAMES]


def write_all(folder: Path) -> None:
    """Every case in a folder of its own."""
    for case in CASES:
        write_one(case, folder)


def write_one(case: Case, folder: Path) -> Path:
    """One case; returns its folder."""
    own_folder = folder / case.name
    own_folder.mkdir(parents=True)
    case.write(own_folder)
    return own_folder


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
