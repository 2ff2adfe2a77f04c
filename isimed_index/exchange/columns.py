"""Vectors as columns of a table, and tables brought to one schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import EncoderMismatch

if TYPE_CHECKING:
    import pyarrow as pa

_LISTS = "give one list of as many float numbers in every row"


def vector_column(vectors: NDArray[np.floating[Any]]) -> pa.FixedSizeListArray:
    """Vectors (n, d), float16 or float32, as a column of lists of d numbers of that type."""
    import pyarrow as pa

    values = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])


def vectors_of(column: pa.ChunkedArray, name: str) -> NDArray[np.floating[Any]]:
    """A column of lists of equal length → (n, d), of the column's type; `EncoderMismatch` when it is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise EncoderMismatch(f"column {name}: expected lists of floating numbers, found {kind}", next_step=_LISTS)
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    values = pc.list_flatten(column)
    if len(lengths) > 1 or None in lengths or values.null_count:
        raise EncoderMismatch(
            f"column {name}: expected vectors of one length without gaps, found lengths {lengths[:5]}",
            next_step=_LISTS,
        )
    dim = lengths[0] if lengths else (kind.list_size if pa.types.is_fixed_size_list(kind) else 0)
    vectors: NDArray[np.floating[Any]] = values.to_numpy().reshape(len(column), dim)
    return vectors


def no_shares(values: NDArray[Any]) -> int:
    """How many of some numbers are no share from 0 to 1; NaN is none."""
    return int(np.count_nonzero(~((values >= 0) & (values <= 1))))


def shaped(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly the columns of `schema`; those that it lacks are null."""
    import pyarrow as pa

    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
