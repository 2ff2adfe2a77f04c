"""One DICOM file: known by its content, read with every failure turned into a reason that holds nothing of its header.

pydicom decodes values when they are asked for and raises what it likes, with values of the header in its messages and
warnings. So whatever is done with a data set is done inside `open_dicom`, which keeps both in.
"""

from __future__ import annotations

import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from isimed_index.errors import ScanRefused
from isimed_index.scans.volume import check_credible, check_regular, named_damage

SUFFIXES = (".dcm", ".dicom", ".ima")  # of files that ought to be DICOM; most have none, so names decide nothing
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_MOST_INFLATED_BYTES = 2**29  # pydicom holds it three times
_VRS = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT OB OW PN SH SL SQ SS ST TM UI UL UN US UT".split())
# Warnings are switched off for the whole process while a data set is read; only one thread may do so at a time.
_QUIET = threading.RLock()


def is_dicom(path: Path) -> bool:
    """Whether the first bytes of a file are those of DICOM: `DICM` at byte 128, or a first element without preamble."""
    try:
        if not path.is_file():  # a pipe would wait for ever
            return False
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    if start[128:132] == b"DICM":
        return True
    # Old files begin with their first element: group 0002 or 0008, little endian, with a VR or a short even length.
    if len(start) < 132 or start[:2] not in (b"\x02\x00", b"\x08\x00") or start[3:4] != b"\x00":
        return False
    length = int.from_bytes(start[4:8], "little")
    return start[4:6] in _VRS or (length <= 128 and length % 2 == 0)


class Elements:
    """The elements of a data set that have one of some keywords, as a data set has them, each of them decoded once.

    pydicom's own look-up by keyword is what reading a header would spend most of its time with.
    """

    def __init__(self, dataset: Any, keywords: tuple[str, ...]) -> None:
        known = _keywords(keywords)
        self._dataset = dataset
        tags = dataset.keys()  # a data set itself gives its elements
        self._tags = {keyword: tag for tag in tags if (keyword := known.get(int(tag))) is not None}
        self._read: dict[str, Any] = {}

    def __contains__(self, keyword: str) -> bool:
        return keyword in self._tags

    def __getitem__(self, keyword: str) -> Any:
        """The element itself; `KeyError` when there is none."""
        if keyword not in self._read:
            self._read[keyword] = self._dataset[self._tags[keyword]]
        return self._read[keyword]

    def get(self, keyword: str, default: Any = None) -> Any:
        """The value of an element."""
        return self[keyword].value if keyword in self._tags else default


@cache
def _keywords(keywords: tuple[str, ...]) -> Mapping[int, str]:
    from pydicom.datadict import tag_for_keyword

    return {tag: keyword for keyword in keywords if (tag := tag_for_keyword(keyword)) is not None}


@cache
def _tags(keywords: tuple[str, ...]) -> list[Any]:
    from pydicom.tag import Tag

    return [Tag(number) for number in _keywords(keywords)]


@contextmanager
def open_dicom(path: Path, keywords: tuple[str, ...] | None = None) -> Iterator[Any]:
    """The data set of a file: only `keywords` and no pixels, or all of it with None; `ScanRefused` when anything fails.

    One thread at a time.
    """
    import pydicom

    check_regular(path)
    with named_damage():
        _check_inflated(path)
        with _QUIET, warnings.catch_warnings(), _silent():
            warnings.simplefilter("ignore")
            try:
                tags = None if keywords is None else _tags(keywords)
                yield pydicom.dcmread(path, force=True, stop_before_pixels=tags is not None, specific_tags=tags)
            except (ScanRefused, OSError):
                raise
            except Exception as error:  # noqa: BLE001 -- pydicom and its decoders raise anything, and quote the header
                raise ScanRefused(
                    f"it is damaged, or no sound DICOM ({type(error).__name__})",
                    next_step="copy or export it again",
                ) from None


@contextmanager
def _silent() -> Iterator[None]:
    """pydicom logs what it warns of, values included."""
    import logging

    logger = logging.getLogger("pydicom")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _check_inflated(path: Path) -> None:
    """Refuse a deflated data set that is a bomb: pydicom inflates it whole."""
    with path.open("rb") as file:
        start = file.read(2048)
        if start[128:132] != b"DICM" or _DEFLATED not in start:
            return
        file.seek(144 + int.from_bytes(start[140:144], "little"))  # behind the file meta information
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        size = 0
        while not inflate.eof and (packed := inflate.unconsumed_tail or file.read(2**16)):
            size += len(inflate.decompress(packed, 2**24))
            check_credible(path.stat().st_size, size)
            if size > _MOST_INFLATED_BYTES:
                raise ScanRefused("it inflates to more than 512 MiB", next_step="export it without deflation")
