"""DICOM series with known truth, in every transfer syntax that is read, under names and ids that must not leak."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from affines import affine_of
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

PHI = {
    "PatientName": "Mustermann^Erika",
    "PatientID": "MRN-4711-0815",
    "PatientBirthDate": "19640812",
    "PatientAddress": "Heidestrasse 17, Koeln",
    "ReferringPhysicianName": "Frankenstein^Victor",
    "InstitutionName": "Charite Sankt Nimmerlein",
    "AccessionNumber": "ACC99887766",
    "StudyDate": "20240229",
    "StudyTime": "112233",
    "StudyID": "STUDY-4242",
    "StudyDescription": "Kopf Mustermann",
    "SeriesDescription": "t1 Mustermann",
    "ProtocolName": "Protokoll Erika",
    "DeviceSerialNumber": "SN-135790",
    "StationName": "STATION77",
    "PatientComments": "kennt Dr. Frankenstein",
    "BodyPartExamined": "ERIKA",
    "ManufacturerModelName": "Mustermann 3000",
}
NATIVE = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": "1.2.840.10008.1.2.1",
    "deflated": "1.2.840.10008.1.2.1.99",
    "big-endian": "1.2.840.10008.1.2.2",
}
GDCM = {  # the name of the syntax in GDCM, and whether it keeps every bit
    "jpeg-baseline": ("JPEGBaselineProcess1", False),
    "jpeg-lossless": ("JPEGLosslessProcess14", True),
    "jpeg-lossless-sv1": ("JPEGLosslessProcess14_1", True),
    "jpeg-ls": ("JPEGLSLossless", True),
    "jpeg-2000-lossless": ("JPEG2000Lossless", True),
    "jpeg-2000": ("JPEG2000", False),
}
SYNTAXES = [*NATIVE, "rle", *GDCM]
CT, MR, PT = (f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2", "4", "128"))
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
ROOT = "1.2.826.0.1.3680043.10.999."


def grid(turns=(8, -12, 15), spacing=(0.7, 0.9, 2.5), origin=(-40.0, 95.0, -60.0)) -> np.ndarray:
    """An oblique affine (column, row, slice) → LPS mm, right-handed as the slices of a series are."""
    return affine_of(turns, spacing, (1, 1, 1), (0, 1, 2), origin)


def noise(shape=(7, 9, 6), dtype=np.int16, low=-900, high=2000, seed=5) -> np.ndarray:
    """Voxels (column, row, slice) of odd shape, so that no two axes can be confused."""
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(max(low, info.min), min(high, info.max), shape).astype(dtype)


def smooth(shape=(48, 40, 6), dtype=np.uint8, stored: int | None = None) -> np.ndarray:
    """Waves of odd shape that can be compressed; GDCM's encoders write beyond their buffer when noise gets longer."""
    axes = np.meshgrid(*[np.linspace(0, 3, n) for n in shape], indexing="ij")
    values = np.sin(axes[0] + 2 * axes[1] + axes[2])
    high = 2 ** (stored or 8 * np.dtype(dtype).itemsize) - 1
    return np.rint(0.4 * high * values + (0 if np.dtype(dtype).kind == "i" else 0.5 * high)).astype(dtype)


def write_series(
    folder: Path,
    voxels: np.ndarray,
    lps: np.ndarray | None = None,
    *,
    syntax: str = "explicit",
    sop_class: str = MR,
    series: str | None = None,
    study: str | None = None,
    scaling: Sequence[tuple[float, float]] | None = None,
    shuffle: int = 0,
    stored: int | None = None,
    preamble: bool = True,
    **tags: Any,
) -> list[Path]:
    """Write voxels (column, row, slice) as one file a slice, named and numbered in no order; paths by slice."""
    lps = grid() if lps is None else lps
    rng = np.random.default_rng(shuffle)
    numbers = rng.permutation(voxels.shape[2])
    series, study = series or generate_uid(ROOT), study or generate_uid(ROOT)
    frame_of_reference = generate_uid(ROOT)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(voxels.shape[2]):
        dataset = _dataset(voxels, sop_class, series, study, stored)
        dataset.FrameOfReferenceUID = frame_of_reference
        place(dataset, dataset, dataset, lps, k)
        if scaling is not None:
            dataset.RescaleSlope, dataset.RescaleIntercept = scaling[k % len(scaling)]
        dataset.InstanceNumber = int(numbers[k]) + 1
        for tag, value in tags.items():
            setattr(dataset, tag, value)
        dataset.PixelData = np.ascontiguousarray(voxels[:, :, k].T).tobytes()
        path = folder / f"{series}.{numbers[k]}"  # no suffix, and a UID in the name, as archives do
        save(dataset, path, syntax, preamble=preamble)
        paths.append(path)
    return paths


def write_enhanced(path: Path, voxels: np.ndarray, lps: np.ndarray | None = None, **options: Any) -> Path:
    """Write voxels (column, row, slice) as one enhanced MR file; frames in shuffled order, some groups shared.

    `frame_tags` gives each frame further groups: a list of {sequence: {tag: value}}.
    """
    lps = grid() if lps is None else lps
    frame_tags = options.get("frame_tags") or [{}] * voxels.shape[2]
    places = options.get("places", range(voxels.shape[2]))
    dataset = _dataset(voxels, ENHANCED_MR, options.get("series") or generate_uid(ROOT), generate_uid(ROOT), None)
    order = np.random.default_rng(1).permutation(voxels.shape[2])
    dataset.NumberOfFrames = voxels.shape[2]
    shared, per_frame = Dataset(), []
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Items([Dataset()]), Items([Dataset()])
    for frame in order:
        own = Dataset()
        own.PlanePositionSequence = Items([Dataset()])
        place(
            own.PlanePositionSequence[0],
            shared.PlaneOrientationSequence[0],
            shared.PixelMeasuresSequence[0],
            lps,
            list(places)[frame],
        )
        if "scaling" in options:
            own.PixelValueTransformationSequence = Items([Dataset()])
            slope, intercept = options["scaling"][frame % len(options["scaling"])]
            own.PixelValueTransformationSequence[0].RescaleSlope = slope
            own.PixelValueTransformationSequence[0].RescaleIntercept = intercept
        for group, values in frame_tags[frame].items():
            item = Dataset()
            for tag, value in values.items():
                setattr(item, tag, value)
            setattr(own, group, Items([item]))
        per_frame.append(own)
    dataset.SharedFunctionalGroupsSequence = Items([shared])
    dataset.PerFrameFunctionalGroupsSequence = Items(per_frame)
    dataset.PixelData = np.ascontiguousarray(voxels[:, :, order].transpose(2, 1, 0)).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    save(dataset, path, options.get("syntax", "explicit"))
    return path


def place(position: Dataset, orientation: Dataset, measures: Dataset, lps: np.ndarray, k: float) -> None:
    """Say where slice `k` of a grid lies."""
    columns, rows = np.linalg.norm(lps[:3, 0]), np.linalg.norm(lps[:3, 1])
    decimals = [*(lps[:3, 0] / columns), *(lps[:3, 1] / rows)]
    position.ImagePositionPatient = [_decimal(number) for number in lps[:3, 3] + k * lps[:3, 2]]
    orientation.ImageOrientationPatient = [_decimal(number) for number in decimals]
    measures.PixelSpacing = [_decimal(rows), _decimal(columns)]


def _decimal(number: float) -> str:
    """A number as a decimal string, which may have 16 characters."""
    return f"{number:.13f}"[:16]


def save(dataset: Dataset, path: Path, syntax: str, *, preamble: bool = True) -> None:
    """Write a data set in a transfer syntax by its short name."""
    uid = NATIVE.get(syntax, ExplicitVRLittleEndian)
    dataset.file_meta.TransferSyntaxUID = uid
    if syntax == "big-endian":
        size = dataset.BitsAllocated // 8
        dataset.PixelData = np.frombuffer(dataset.PixelData, f"<u{size}").astype(f">u{size}").tobytes()
    if syntax == "rle":
        dataset.compress(RLELossless, generate_instance_uid=False)
    dataset["PixelData"].VR = "OW" if dataset.BitsAllocated > 8 and syntax != "rle" else "OB"
    if not preamble:  # as old archives wrote it: the data set alone
        del dataset.file_meta
        pydicom.dcmwrite(path, dataset, enforce_file_format=False, implicit_vr=True, little_endian=True)
        return
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    if syntax in GDCM:
        _recode(path, GDCM[syntax][0])


def _dataset(voxels: np.ndarray, sop_class: str, series: str, study: str, stored: int | None) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid(ROOT)
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    for tag, value in PHI.items():
        setattr(dataset, tag, value)
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = series, study
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Modality = "OT"
    dataset.Columns, dataset.Rows = voxels.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = 8 * voxels.dtype.itemsize
    dataset.BitsStored = stored or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(voxels.dtype.kind == "i")
    return dataset


def _recode(path: Path, name: str) -> None:
    """Compress a file in place."""
    import gdcm

    dataset = pydicom.dcmread(path)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    compressed = pydicom.dcmread(path)  # its pixels only: GDCM rewrites functional groups as well
    dataset["PixelData"] = compressed["PixelData"]
    dataset.file_meta.TransferSyntaxUID = compressed.file_meta.TransferSyntaxUID
    dataset.save_as(path)
