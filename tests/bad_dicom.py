"""DICOM files that break readers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from bad_case import GIB, LPS, RAS, SHAPE, Case, Truth, cut, own, plain, zeros_deflate
from dicoms import CT, ROOT, grid, write_enhanced, write_series
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid


def series(folder: Path, shape: tuple[int, ...] = SHAPE, **options: Any) -> list[Path]:
    return write_series(folder, own(folder.name, shape), **options)


def change(path: Path, **tags: Any) -> Path:
    """Set tags of a file; None deletes one."""
    dataset = pydicom.dcmread(path, force=True)
    for tag, value in tags.items():
        if value is None:
            delattr(dataset, tag)
        else:
            setattr(dataset, tag, value)
    dataset.save_as(path)
    return path


def every(folder: Path, **tags: Any) -> None:
    for path in series(folder):
        change(path, **tags)


def one(folder: Path, number: int = 2, **tags: Any) -> None:
    change(series(folder)[number], **tags)


def duplicate(folder: Path) -> None:
    """The same slice twice under two SOPInstanceUIDs."""
    path = series(folder)[2]
    copy = folder / "again"
    copy.write_bytes(path.read_bytes())
    change(copy, SOPInstanceUID=generate_uid(ROOT))


def uneven(folder: Path) -> None:
    path = series(folder)[2]
    place = LPS[:3, :3] @ (RAS[:3, 3] + 2.4 * RAS[:3, 2])
    change(path, ImagePositionPatient=[f"{number:.9f}"[:16] for number in place])


def tilted(folder: Path) -> None:
    """A gantry tilted by more than half a slice a slice."""
    lps = grid((0, 0, 0))
    lps[1, 2] = 60.0
    series(folder, lps=lps)


def other(folder: Path, sop_class: str, **tags: Any) -> None:
    """One object that is no slice."""
    for path in series(folder, (7, 9, 2)):
        change(path, SOPClassUID=sop_class, **tags)


def deflated_bomb(folder: Path) -> None:
    """A deflated data set with 2 GiB of zeros in its last element."""
    path = series(folder, (7, 9, 2), syntax="deflated")[0]
    raw = path.read_bytes()
    at = 144 + int.from_bytes(raw[140:144], "little")
    inner = zlib.decompress(raw[at:], -15)
    deflate = zlib.compressobj(9, wbits=-15)
    head = deflate.compress(inner) + deflate.flush(zlib.Z_FULL_FLUSH)
    for one_path in folder.iterdir():
        one_path.unlink()
    path.write_bytes(raw[:at] + head + zeros_deflate(2 * GIB) + zlib.compressobj(9, wbits=-15).flush())


def frame_bomb(syntax: str, sizes: Callable[[bytes], list[int]]) -> Callable[[Path], None]:
    """Images of 30000 × 30000 pixels, in the header and in the code stream, out of some hundred bytes."""

    def write(folder: Path) -> None:
        voxels = np.zeros((16, 16, 2), np.uint8)
        voxels[0, 0] = 1
        for path in write_series(folder, voxels, syntax=syntax):
            dataset = pydicom.dcmread(path)
            dataset.Rows = dataset.Columns = 30000
            data = bytearray(dataset.PixelData)
            for at in sizes(bytes(data)):
                big = at[1] if isinstance(at, tuple) else 2
                where = at[0] if isinstance(at, tuple) else at
                data[where : where + big] = (30000).to_bytes(big, "big")
            dataset.PixelData = bytes(data)
            dataset["PixelData"].is_undefined_length = True
            dataset.save_as(path)

    return write


def _jpeg_sizes(marker: bytes) -> Callable[[bytes], list[Any]]:
    return lambda data: [(data.index(marker) + 5, 2), (data.index(marker) + 7, 2)]


def _jpeg2000_sizes(data: bytes) -> list[Any]:
    at = data.index(b"\xff\x4f\xff\x51")
    return [(at + 8, 4), (at + 12, 4), (at + 24, 4), (at + 28, 4)]


def nested(folder: Path) -> None:
    """Five thousand sequences, one in the other."""
    path = series(folder, (7, 9, 2))[0]
    for file in folder.iterdir():
        if file != path:
            file.unlink()
    raw = path.read_bytes()
    at = 144 + int.from_bytes(raw[140:144], "little")
    opened = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    path.write_bytes(raw[:at] + opened * 5000)


def dicomdir(folder: Path) -> None:
    """An index of files beside the series."""
    series(folder)
    dataset = Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(ROOT)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    dataset.FileSetID = "EXPORT"
    dataset.DirectoryRecordSequence = []
    pydicom.dcmwrite(folder / "DICOMDIR", dataset, enforce_file_format=True)


def inverted(name: str) -> Truth:
    return (2**15 - 1) - (own(name).astype(float) + 2**15), RAS


def rescaled(folder: Path) -> None:
    series(folder, scaling=[(2, -10), (1, 5)])


def rescaled_truth(name: str) -> Truth:
    values = own(name).astype(float)
    values[..., 0::2] = values[..., 0::2] * 2 - 10
    values[..., 1::2] += 5
    return values, RAS


def encrypted(folder: Path) -> None:
    """Everything behind the file meta information is noise."""
    rng = np.random.default_rng(4)
    for path in series(folder, (7, 9, 2)):
        raw = path.read_bytes()
        path.write_bytes(raw[:400] + rng.bytes(len(raw) - 400))


def two_series(folder: Path) -> None:
    """Slices of two series of different size in one folder, and one picture of a screen."""
    write_series(folder, own(folder.name))
    write_series(folder, own(folder.name + "2", (8, 8, 4)), shuffle=3)
    write_series(folder, own(folder.name, (7, 9, 1)), sop_class="1.2.840.10008.5.1.4.1.1.7", shuffle=4)


CASES = [
    Case("dicom-sound", "a sound series", None, series, plain),
    Case("dicom-dicomdir", "a series and its index (DICOMDIR), which is passed over", None, dicomdir, plain),
    Case("dicom-implicit", "implicit VR, without preamble", None, lambda f: series(f, preamble=False), plain),
    Case("dicom-rescaled", "another rescale slope in every slice", None, rescaled, rescaled_truth),
    Case("dicom-missing-slice", "a slice is missing", "1 slice is missing", lambda f: series(f)[2].unlink()),
    Case("dicom-duplicate-slice", "a slice is there twice", "7 images at 6 places", duplicate),
    Case("dicom-uneven", "uneven spacing", "unevenly spaced", uneven),
    Case("dicom-orientations", "two orientations", "different directions",
         lambda f: one(f, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])),
    Case("dicom-sizes", "two sizes of images", "different sizes",
         lambda f: one(f, Rows=3, PixelData=bytes(3 * 7 * 2))),
    Case("dicom-localizer", "localizers", "localizer",
         lambda f: every(f, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
    Case("dicom-secondary", "secondary captures", "secondary capture",
         lambda f: other(f, "1.2.840.10008.5.1.4.1.1.7")),
    Case("dicom-report", "a structured report", "of the SOP class 'Basic Text SR Storage'",
         lambda f: other(f, "1.2.840.10008.5.1.4.1.1.88.11")),
    Case("dicom-rtstruct", "radiotherapy structures", "RT Structure Set",
         lambda f: other(f, "1.2.840.10008.5.1.4.1.1.481.3")),
    Case("dicom-seg", "a segmentation", "Segmentation Storage", lambda f: other(f, "1.2.840.10008.5.1.4.1.1.66.4")),
    Case("dicom-ultrasound", "another kind of image", "of the SOP class",
         lambda f: other(f, "1.2.840.10008.5.1.4.1.1.6.1")),
    Case("dicom-no-position", "no ImagePositionPatient", "ImagePositionPatient",
         lambda f: every(f, ImagePositionPatient=None)),
    Case("dicom-no-orientation", "no ImageOrientationPatient", "ImageOrientationPatient",
         lambda f: every(f, ImageOrientationPatient=None)),
    Case("dicom-no-series", "no SeriesInstanceUID", "no SeriesInstanceUID",
         lambda f: every(f, SeriesInstanceUID=None), lines=6),
    Case("dicom-no-pixels", "no pixel data", "no integer pixel data", lambda f: every(f, PixelData=None)),
    Case("dicom-pixels-cut", "pixel data cut off", "truncated",
         lambda f: cut(p := series(f)[2], p.stat().st_size - 60)),
    Case("dicom-pixels-short", "fewer pixels than rows and columns", "truncated",
         lambda f: one(f, PixelData=bytes(60))),
    Case("dicom-syntax", "a transfer syntax that is not that of the data", "damaged, or no sound DICOM",
         lambda f: [_syntax(path, "1.2.840.10008.1.2.4.70") for path in series(f)]),
    Case("dicom-syntax-unknown", "video", "compressed by a method that is not read",
         lambda f: [_syntax(path, "1.2.840.10008.1.2.4.100") for path in series(f)]),
    Case("dicom-encrypted", "noise behind the file header", "no DICOM file, or", encrypted, lines=2),
    Case("dicom-text", "a text file called .dcm", "no DICOM file, or",
         lambda f: (f / "a.dcm").write_text("notes\n" * 99)),
    Case("dicom-empty", "no byte at all, called .dcm", "no DICOM file, or", lambda f: (f / "a.dcm").touch()),
    Case("dicom-spacing-zero", "PixelSpacing of 0", "pixel spacing is 0", lambda f: every(f, PixelSpacing=[0, 0])),
    Case("dicom-slope-zero", "RescaleSlope of 0", "rescale slope is 0",
         lambda f: every(f, RescaleSlope=0, RescaleIntercept=0)),
    Case("dicom-tilt", "a gantry tilted beyond 45 degrees", "off the normal", tilted),
    Case("dicom-monochrome1-mr", "MONOCHROME1 in MR: inverted within its bits", None,
         lambda f: every(f, PhotometricInterpretation="MONOCHROME1"), inverted),
    Case("dicom-monochrome1-ct", "MONOCHROME1 in CT", "MONOCHROME1 in a CT image",
         lambda f: [change(path, PhotometricInterpretation="MONOCHROME1") for path in series(f, sop_class=CT)]),
    Case("dicom-colour", "colour", "colour image",
         lambda f: every(f, PhotometricInterpretation="RGB", SamplesPerPixel=3)),
    Case("dicom-one-bit", "one bit a pixel", "1 bits stored in 1",
         lambda f: every(f, BitsAllocated=1, BitsStored=1, HighBit=0)),
    Case("dicom-64-bits", "64 bits a pixel", "64 bits stored in 64",
         lambda f: every(f, BitsAllocated=64, BitsStored=64, HighBit=63)),
    Case("dicom-32-bits", "32 bits a pixel", None, lambda f: write_series(f, own(f.name, dtype=np.int32)),
         lambda name: (own(name, dtype=np.int32), RAS)),
    Case("dicom-single", "one slice alone", "found a single image", lambda f: series(f, (7, 9, 1))),
    Case("dicom-burned-in", "BurnedInAnnotation is YES", "text burned into the image",
         lambda f: every(f, BurnedInAnnotation="YES")),
    Case("dicom-two-patients", "files of two patients in one series", "two patients",
         lambda f: one(f, PatientID="ANOTHER")),
    Case("dicom-echoes", "two echoes in one series, none chosen", "2 volumes", lambda f: _echoes(f)),
    Case("dicom-frames", "2³¹ frames claimed", "frames", lambda f: _frames(f)),
    Case("dicom-nested", "5000 sequences one in the other", "damaged, or no sound DICOM", nested),
    Case("dicom-bomb-deflated", "2 GiB of zeros in a deflated data set", "no image shrinks like that", deflated_bomb),
    Case("dicom-bomb-rle", "30000 × 30000 pixels in some hundred bytes of RLE", "no image shrinks like that",
         frame_bomb("rle", lambda data: [])),
    Case("dicom-bomb-jpeg", "the same in lossless JPEG", "no image shrinks like that",
         frame_bomb("jpeg-lossless-sv1", _jpeg_sizes(b"\xff\xc3"))),
    Case("dicom-bomb-jpeg-ls", "the same in JPEG-LS", "no image shrinks like that", frame_bomb("jpeg-ls",
         _jpeg_sizes(b"\xff\xf7"))),
    Case("dicom-bomb-jpeg-2000", "the same in JPEG 2000", "no image shrinks like that",
         frame_bomb("jpeg-2000-lossless", _jpeg2000_sizes)),
]  # fmt: skip


def _syntax(path: Path, uid: str) -> None:
    """State another transfer syntax; the data stays what it is."""
    raw = path.read_bytes()
    old = b"1.2.840.10008.1.2.1\0"
    assert raw.count(old) == 1
    new = uid.encode() + b"\0" * (len(uid) % 2)
    at = raw.index(old)
    meta = int.from_bytes(raw[140:144], "little") + len(new) - len(old)
    head = raw[:140] + meta.to_bytes(4, "little") + raw[144 : at - 2] + len(new).to_bytes(2, "little")
    path.write_bytes(head + new + raw[at + len(old) :])


def _echoes(folder: Path) -> None:
    uid, study, frame = (generate_uid(ROOT) for _ in range(3))
    for number, echo in enumerate((2.46, 4.92)):
        voxels = own(f"{folder.name}{number}")
        tags = {"EchoTime": echo, "FrameOfReferenceUID": frame}
        write_series(folder / str(number), voxels, series=uid, study=study, **tags)


def _frames(folder: Path) -> None:
    change(write_enhanced(folder / "e.dcm", own(folder.name)), NumberOfFrames=2**31 - 1)
