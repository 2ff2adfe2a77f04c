"""Which layout a folder has: each reader says whether a folder is a root of its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from isimed_index.errors import UsageError
from isimed_index.scans.discover import is_skipped
from isimed_index.scans.layouts import autopet, bids, brats, msd, totalsegmentator
from isimed_index.scans.layouts.found import Found

AUTO, FILES = "auto", "files"
_DEPTH = 2  # folders of archives that lie around a data set


@dataclass(frozen=True, slots=True)
class Layout:
    """One kind of data set: its name for `--layout`, what it is called, and its reader."""

    name: str
    title: str
    is_root: Callable[[Path], bool]
    read: Callable[[Path, int | None], Found]


LAYOUTS = (
    Layout("bids", "BIDS", bids.is_root, bids.read),
    Layout("msd", "Medical Segmentation Decathlon", msd.is_root, msd.read),
    Layout("brats", "BraTS", brats.is_root, brats.read),
    Layout("autopet", "autoPET", autopet.is_root, autopet.read),
    Layout("totalsegmentator", "TotalSegmentator", totalsegmentator.is_root, totalsegmentator.read),
)
CHOICES = (AUTO, FILES, *(layout.name for layout in LAYOUTS))


def roots(folder: Path, choice: str) -> list[tuple[Path, Layout]]:
    """The data sets that a folder is, or holds up to two folders deeper; none where files were asked for.

    `UsageError` when a layout was named and no folder has it.
    """
    if choice == FILES:
        return []
    layouts = [layout for layout in LAYOUTS if choice in (AUTO, layout.name)]
    found = list(_roots(folder, layouts, _DEPTH))
    if not found and choice != AUTO:
        raise UsageError(
            f"{folder.resolve().name} is not laid out as {layouts[0].title} is, and holds no folder that is",
            next_step="give the folder of the data set, or --layout files",
        )
    return found


def _roots(folder: Path, layouts: list[Layout], deeper: int) -> Iterator[tuple[Path, Layout]]:
    try:
        layout = next((layout for layout in layouts if layout.is_root(folder)), None)
        inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not is_skipped(path.name)]
    except OSError:
        return
    if layout is not None:
        yield folder, layout
    elif deeper:
        for path in inner:
            yield from _roots(path, layouts, deeper - 1)
