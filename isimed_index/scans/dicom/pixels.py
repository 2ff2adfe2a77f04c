"""The voxels of a series: every file decoded once, in the order of its slices.

imagecodecs (libjpeg-turbo, CharLS, OpenJPEG) decodes JPEG, JPEG-LS and JPEG 2000, pydicom itself the rest. pydicom's
plug-ins are not used: which of them is installed would decide the last bit of a lossy image, and so a scan's digest;
and GDCM ends the process on damaged data. Before a frame is decoded, the size that its own code stream states is held
against the header's, because a decoder allocates what the stream says.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import ScanRefused
from isimed_index.scans.dicom.files import open_dicom
from isimed_index.scans.dicom.frames import NOT_A_VOLUME, PixelType
from isimed_index.scans.dicom.series import Series
from isimed_index.scans.dicom.slices import MOST_TILT_DEGREES, Slice, Stack, arrange, upright
from isimed_index.scans.dicom.volumes import chosen
from isimed_index.scans.part import Wanted
from isimed_index.scans.volume import Volume3D, check_credible, checked_count, named_damage, turned_volume
from isimed_index.space import Affine

_BASE = "1.2.840.10008.1.2"
_PLAIN = ("", ".1", ".1.99", ".2", ".5")  # implicit, explicit, deflated, big endian, RLE
_LITTLE_ENDIAN = ("", ".1", ".1.99")  # the bytes of their values are those of an array
_CODECS = {
    ".4.50": "jpeg8",  # baseline
    ".4.51": "jpeg8",  # extended, 12 bits
    ".4.57": "jpeg8",  # lossless
    ".4.70": "jpeg8",
    ".4.80": "jpegls",
    ".4.81": "jpegls",
    ".4.90": "jpeg2k",
    ".4.91": "jpeg2k",
}
_NOTABLE_OFF_LINE_MM = 1e-3


def load(series: Series, wanted: Wanted) -> Volume3D:
    """Read one volume of a series; raises `ScanRefused` without its name, which the caller adds."""
    slices, choice = chosen(series.slices, wanted)
    stack = arrange(slices)
    rows, columns = stack.slices[0].shape
    checked_count((len(stack.slices), rows, columns))
    scalings = {(item.slope, item.intercept) for item in stack.slices}
    one_scaling = len(scalings) == 1
    dtype = np.dtype(f"{'i' if series.pixels.signed else 'u'}{series.pixels.allocated // 8}")
    with named_damage():
        packed = sum(series.files[file].stat().st_size for file in {item.file for item in stack.slices})
    check_credible(packed, len(stack.slices) * rows * columns * dtype.itemsize)
    voxels = np.empty((len(stack.slices), rows, columns), dtype if one_scaling else np.float32)
    _fill(voxels, stack, series)
    slope, intercept = scalings.pop() if one_scaling else (1.0, 0.0)

    attributes = {"source_format": "DICOM", "affine_source": "ImagePositionPatient", **series.facts, **choice}
    if series.pixels.inverted:
        attributes["photometric"] = "MONOCHROME1, inverted"
    if stack.off_line_mm > _NOTABLE_OFF_LINE_MM:
        attributes["slices_off_line_mm"] = stack.off_line_mm
    affine = stack.affine
    if stack.tilt_degrees > MOST_TILT_DEGREES:
        attributes["gantry_tilt_degrees"] = round(stack.tilt_degrees, 4)
        voxels, affine = _straightened(voxels, stack)
    return turned_volume(voxels.transpose(2, 1, 0), affine, attributes, slope, intercept)


def _fill(voxels: NDArray[Any], stack: Stack, series: Series) -> None:
    """Decode every file once and put its frames where they belong."""
    wanted: dict[int, list[tuple[int, Slice]]] = {}
    for place, item in enumerate(stack.slices):
        wanted.setdefault(item.file, []).append((place, item))
    rescale = voxels.dtype == np.float32
    for file, items in wanted.items():
        with open_dicom(series.files[file]) as dataset:
            for place, item in items:
                frame = _frame(dataset, item.frame, series.pixels, item.shape)
                if rescale:
                    voxels[place] = frame * np.float64(item.slope) + item.intercept
                else:
                    voxels[place] = frame


def _frame(dataset: Any, frame: int, pixels: PixelType, shape: tuple[int, int]) -> NDArray[Any]:
    """Stored values (rows, columns) of one frame, MONOCHROME1 turned into MONOCHROME2."""
    from pydicom.pixels.decoders.base import get_decoder

    syntax = _syntax(dataset)
    if "PixelData" not in dataset:
        raise ScanRefused("it has no integer pixel data", next_step=NOT_A_VOLUME)
    if (int(dataset.Rows), int(dataset.Columns), int(dataset.BitsAllocated)) != (*shape, pixels.allocated):
        raise ScanRefused("its files changed while they were read", next_step="add it again")
    if syntax in _CODECS:
        decoded = _decompressed(dataset, frame, pixels, shape, _CODECS[syntax])
    else:
        _check_length(dataset, syntax)
        if syntax in _LITTLE_ENDIAN:
            decoded = _native(dataset.PixelData, frame, pixels, shape)
        else:
            plugin = "pydicom" if syntax == ".5" else ""
            decoded, _ = get_decoder(_BASE + syntax).as_array(dataset, index=frame, raw=True, decoding_plugin=plugin)
    if not pixels.inverted:
        return np.asarray(decoded)
    least = -(2 ** (pixels.stored - 1)) if pixels.signed else 0
    return np.asarray((2 * least + 2**pixels.stored - 1) - decoded.astype(np.int64))


def _syntax(dataset: Any) -> str:
    """The end of the transfer syntax of a data set, by its encoding where its file does not state it."""
    from pydicom.uid import UID

    stated = str(dataset.file_meta.get("TransferSyntaxUID", None) or "")
    if not stated:
        implicit, little = dataset.original_encoding
        return "" if implicit else ".1" if little else ".2"
    syntax = stated.removeprefix(_BASE)
    if not stated.startswith(_BASE) or syntax not in (*_PLAIN, *_CODECS):
        known = UID(stated).name if stated.startswith("1.2.840.10008.") and UID(stated).name != stated else "unknown"
        raise ScanRefused(
            f"its images are compressed by a method that is not read: {known}", next_step="export it uncompressed"
        )
    return syntax


def _check_length(dataset: Any, syntax: str) -> None:
    """Native pixel data is as long as the header says, or longer by padding."""
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    expected = frames * int(dataset.Rows) * int(dataset.Columns) * int(dataset.BitsAllocated) // 8
    if syntax != ".5" and len(dataset.PixelData) < expected:
        raise ScanRefused("its pixel data is truncated", next_step="copy or export it again")


def _native(data: bytes, frame: int, pixels: PixelType, shape: tuple[int, int]) -> NDArray[Any]:
    """One uncompressed frame (rows, columns): what pydicom's decoder makes of it, at a tenth of its price.

    The bits that hold no value (overlays, once) are cleared, or repeat the sign.
    """
    dtype = np.dtype(f"<{'i' if pixels.signed else 'u'}{pixels.allocated // 8}")
    count = math.prod(shape)
    values = np.frombuffer(data, dtype, count, frame * count * dtype.itemsize).reshape(shape)
    unused = pixels.allocated - pixels.stored
    return (values << unused) >> unused if unused else values


def _decompressed(dataset: Any, frame: int, pixels: PixelType, shape: tuple[int, int], codec: str) -> NDArray[Any]:
    """One compressed frame (rows, columns); a stream of another size, or that breaks off, is refused undecoded."""
    import imagecodecs
    from pydicom.encaps import get_frame

    stream = get_frame(dataset.PixelData, frame, number_of_frames=int(dataset.get("NumberOfFrames", 1) or 1))
    if code_stream_shape(stream) != shape:
        raise ScanRefused("its compressed images are not of the size that its header says", next_step="export it again")
    if not stream.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ScanRefused("its compressed images break off before their end", next_step="copy or export it again")
    decoded: NDArray[Any] = getattr(imagecodecs, f"{codec}_decode")(stream)
    if decoded.shape != shape or decoded.dtype.itemsize > pixels.allocated // 8 or decoded.dtype.kind not in "iu":
        raise ScanRefused("its compressed images are not of the type that its header says", next_step="export it again")
    if not pixels.signed and decoded.dtype.kind == "i" and decoded.size and int(decoded.min()) < 0:
        raise ScanRefused(  # stored as the header says, -1000 would become 64536
            "its header says that its values are not negative (PixelRepresentation 0), and its compressed images hold "
            f"negative ones: found {int(decoded.min())}",
            next_step="export it again",
        )
    if not pixels.signed or decoded.dtype.kind == "i":
        return decoded
    # The stream knows no sign: the highest of the bits stored is the sign.
    unused = 64 - pixels.stored
    return (decoded.astype(np.int64) << unused) >> unused


def code_stream_shape(stream: bytes) -> tuple[int, int] | None:
    """Rows and columns by the first frame header of a JPEG, JPEG-LS or JPEG 2000 code stream; None without one."""
    if stream[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000: SOC, SIZ
        x1, y1, x0, y0 = (int.from_bytes(stream[at : at + 4], "big") for at in (8, 12, 16, 20))
        return y1 - y0, x1 - x0
    at = 2
    while stream[:2] == b"\xff\xd8" and at + 9 <= len(stream) and stream[at] == 0xFF:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
        elif (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return int.from_bytes(stream[at + 5 : at + 7], "big"), int.from_bytes(stream[at + 7 : at + 9], "big")
        else:
            at += 2 + length
    return None


def _straightened(voxels: NDArray[Any], stack: Stack) -> tuple[NDArray[np.float32], Affine]:
    """A sheared stack (slices, rows, columns) on the upright grid, linear within slices; outside is the least value."""
    affine, offsets, (more_columns, more_rows) = upright(stack)
    count, rows, columns = voxels.shape
    checked_count((count, rows + more_rows, columns + more_columns))
    first = stack.slices[0]
    least = float(voxels.min() if first.slope > 0 or voxels.dtype == np.float32 else voxels.max())
    grid = np.full((count, rows + more_rows, columns + more_columns), least, np.float32)
    for source, target, (column, row) in zip(voxels, grid, offsets, strict=True):
        along_rows = _shifted(source.astype(np.float32), row, rows + more_rows, least)
        target[...] = _shifted(along_rows.T, column, columns + more_columns, least).T
    return grid, affine


def _shifted(values: NDArray[np.float32], offset: float, length: int, outside: float) -> NDArray[np.float32]:
    """Lines 0 … length - 1, where line i is that of `values` at i + offset, between two of them linearly."""
    whole = math.floor(offset)
    part = np.float32(offset - whole)
    padded = np.full((length + 1, *values.shape[1:]), outside, np.float32)
    start = max(0, -whole)
    stop = min(length + 1, len(values) - whole)
    if start < stop:
        padded[start:stop] = values[start + whole : stop + whole]
    return np.asarray(padded[:-1] * (1 - part) + padded[1:] * part, dtype=np.float32)
