"""Which volume of a file: what was asked for, and where it lies among the others."""

from __future__ import annotations

from dataclasses import dataclass

from isimed_index.errors import ScanRefused

COPY_AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a file: the number, from 0, of the volume to take of several.

    `if_several`: a file with one volume has that one taken, whatever the number: a data set has files of both kinds.
    `labels` says of a label map how many voxels its scan has. A map that claims as many is no bomb, however well it is
    compressed. `analyze_axes` are the directions, as the user states them, of the axes of files that do not say them.
    """

    volume: int | None = None
    labels: int | None = None
    analyze_axes: str | None = None
    if_several: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One volume of a file: its shape, its number, from 0, among `count`, and how they lie.

    `interleaved`: the first voxels of all volumes come first; else one volume comes after the other.
    """

    shape: tuple[int, int, int]
    number: int = 0
    count: int = 1
    interleaved: bool = False

    @property
    def attributes(self) -> dict[str, str | float | int]:
        """What is kept of the choice; nothing where there was none."""
        return {"volume": self.number, "volumes": self.count} if self.count > 1 else {}


def checked_part(dims: tuple[int, ...], wanted: Wanted, interleaved: bool = False) -> Part:
    """The 3-D volume that is asked for of data with three axes or four, of which the last (or first) counts volumes.

    Axes of one beyond the fourth are left out. `ScanRefused` for other data, for several volumes of which none is
    chosen, and for a number that no volume has.
    """
    while len(dims) > 4 and dims[-1] == 1:
        dims = dims[:-1]
    if not dims or min(dims) < 1:
        raise ScanRefused(f"the volume is empty: its shape is {times(dims)}", next_step=COPY_AGAIN)
    if len(dims) > 4:
        raise ScanRefused(
            f"expected a 3-D volume, found {len(dims)}-D data of shape {times(dims)}",
            next_step="split it into files of one volume each",
        )
    count, *shape = dims if interleaved else (*dims[3:], *dims[:3]) if len(dims) > 3 else (1, *dims)
    if len(shape) < 3 or min(shape) == 1:
        raise ScanRefused(
            f"expected a 3-D volume, found a 2-D image of shape {times(dims)}", next_step="give the whole volume"
        )
    number = checked_number(count, wanted, f"4-D data of shape {times(dims)}")
    return Part((shape[0], shape[1], shape[2]), number, count, interleaved)


def checked_number(count: int, wanted: Wanted, what: str) -> int:
    """The number, from 0, of the volume that is asked for of `count`; `ScanRefused` where it is not there or untold."""
    if wanted.labels is not None and count > 1:
        raise ScanRefused(f"expected a 3-D label map, found {what}", next_step="give one 3-D label map")
    if wanted.volume is None and count > 1:
        raise ScanRefused(
            f"expected a 3-D volume, found {what}: {count} volumes",
            next_step=f"take one of them with isimed add --volume N, where N is 0 to {count - 1}",
        )
    number = 0 if count == 1 and wanted.if_several else wanted.volume or 0
    if not 0 <= number < count:
        holds = f"it has {count} volumes, numbered 0 to {count - 1}" if count > 1 else "it has one volume, number 0"
        raise ScanRefused(f"{holds}: there is no volume {number}", next_step="give another number to --volume")
    return number


def times(shape: tuple[int, ...]) -> str:
    """Such as `256×256×180`."""
    return "×".join(map(str, shape))
