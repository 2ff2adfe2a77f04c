"""A plain DuckDB database file, for programs that know nothing of a store."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def write_database(file: Path, tables: Iterable[tuple[str, pa.Table]]) -> None:
    """Make a database at `file`, which does not exist yet; rows under a name that was there before are appended."""
    import duckdb

    there: set[str] = set()
    with duckdb.connect(str(file), config={"python_enable_replacements": "false"}) as connection:
        for name, rows in tables:
            quoted = '"' + name.replace('"', '""') + '"'
            connection.register("incoming", rows)
            if name in there:
                connection.execute(f"INSERT INTO {quoted} BY NAME SELECT * FROM incoming")
            else:
                connection.execute(f"CREATE TABLE {quoted} AS SELECT * FROM incoming")
                there.add(name)
            connection.unregister("incoming")
        connection.execute("CHECKPOINT")
