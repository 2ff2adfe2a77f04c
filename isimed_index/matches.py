"""Answers to a question: columns of equal length, rows as views, Arrow and pandas on request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa

SameSubject = Literal["include", "exclude", "only"]  # what to do with other scans of the subject that is asked about


class Row:
    """One match; a view of a row of `Matches`."""

    def __init__(self, columns: Mapping[str, Sequence[Any]], number: int) -> None:
        self._columns = columns
        self._number = number

    def __getattr__(self, name: str) -> Any:
        if name in self._columns:
            return self._columns[name][self._number]
        raise AttributeError(name)

    @property
    def xyz_mm(self) -> tuple[float, float, float]:
        """The match in patient RAS+ mm."""
        return self.x_mm, self.y_mm, self.z_mm

    def __repr__(self) -> str:
        return f"Row({', '.join(f'{name}={values[self._number]!r}' for name, values in self._columns.items())})"


@dataclass(frozen=True, slots=True)
class Asked:
    """What an answer belongs to: a point of a scan (None: of a file that is not stored), an encoder, a generation."""

    scan: str | None
    xyz_mm: tuple[float, float, float]  # RAS+
    encoder: str  # card id
    generation: int


@dataclass(frozen=True, slots=True)
class Matches:
    """The answers to one question, best first: columns of equal length, rows as views.

    `x_mm`, `y_mm`, `z_mm` are always RAS+ mm. Asked in another space, answers also have `x`, `y`, `z` in that one and
    its name in `space`. A label without a name reads `label 87`. `asked` says what was asked, and of what.
    """

    columns: dict[str, list[Any]]
    asked: Asked

    @property
    def source(self) -> str | None:
        """The scan that the point was given in, also where its file was given; None if its content is not stored."""
        return self.asked.scan

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, number: int) -> Row:
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return Row(self.columns, number)

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    def to_arrow(self) -> pa.Table:
        """The answers as an Arrow table."""
        import pyarrow as pa

        return pa.table({name: pa.array(values, _types().get(name)) for name, values in self.columns.items()})

    def to_pandas(self) -> Any:
        """The answers as a pandas data frame."""
        return self.to_arrow().to_pandas()


def _types() -> dict[str, Any]:
    import pyarrow as pa

    real = (
        *("x_mm", "y_mm", "z_mm", "x", "y", "z", "distance", "residual_mm", "cycle_mm"),
        *("error_mm", "error_95_mm", "confidence"),
    )
    text = ("scan", "subject", "label", "space")
    return (
        dict.fromkeys(real, pa.float64())
        | dict.fromkeys(text, pa.string())
        | {
            "in_view": pa.bool_(),
            "voxel": pa.list_(pa.float64(), 3),
            "patch": pa.int64(),
        }
    )
