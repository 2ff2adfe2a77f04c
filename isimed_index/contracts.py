"""The contracts of `isimed_schemas` in use: schema validation, Arrow columns, and which formats this version reads.

The JSON files of that package are the source; nothing here repeats them. `jsonschema` and `pyarrow` load on use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from isimed_index.errors import Incompatible, IsimedError, StoreDamaged, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1  # the newest store format that this version reads and the one it writes
FEATURES = frozenset(
    {"matches", "packed-segments", "regions", "tombstones", "transforms"}
)  # optional parts of the format that this version knows

SchemaName = Literal["format", "manifest", "card", "tag", "artefact"]
TableName = Literal[
    "scans", "subjects", "labels", "transforms", "matches", "patches", "charts", "regions", "tombstones"
]
ViewName = Literal["patches", "patch_labels", "regions", "encoders", "segments", "indexes", "generations"]
Metric = Literal["cosine", "l2"]  # how vectors are compared; the card's schema lists the same


def document(name: str) -> Any:
    """A JSON document of the contracts by its path in `isimed_schemas`, such as `tables/scans.json`."""
    return json.loads(files("isimed_schemas").joinpath(name).read_text(encoding="utf-8"))


@lru_cache
def schema(name: SchemaName) -> dict[str, Any]:
    """The JSON Schema of one kind of document; `artefact` is one entry of a manifest."""
    if name == "artefact":
        manifest = schema("manifest")
        return {"$schema": manifest["$schema"], "$defs": manifest["$defs"], **manifest["$defs"]["artefact"]}
    loaded: dict[str, Any] = document(f"{name}.schema.json")
    return loaded


@lru_cache
def _validator(name: SchemaName) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(schema(name))


def validate(name: SchemaName, found: Any, error: type[IsimedError] = StoreDamaged) -> None:
    """Raise `error`, naming the first offending field, unless `found` obeys the schema `name`."""
    faults = sorted(_validator(name).iter_errors(found), key=lambda fault: [str(part) for part in fault.absolute_path])
    if faults:
        where = "/".join(str(part) for part in faults[0].absolute_path) or "the document"
        # Patterns and long values would drown the sentence; the schema holds them.
        raise error(f"a {name} does not follow its schema: {where}: {faults[0].message[:200]}")


def check_version(found: Mapping[str, Any]) -> None:
    """Raise `Incompatible` when a FORMAT.json or manifest asks for a newer format or an unknown feature."""
    version = found.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise StoreDamaged("the store does not say which format version it has", next_step="restore FORMAT.json")
    if version > FORMAT_VERSION:
        raise Incompatible(
            f"expected a store of format version {FORMAT_VERSION} or older, found version {version}",
            next_step="upgrade isimed-index",
        )
    unknown = sorted(set(found.get("features", ())) - FEATURES)
    if unknown:
        raise Incompatible(
            f"the store uses features that this version does not know: {', '.join(map(str, unknown))}",
            next_step="upgrade isimed-index",
        )


@lru_cache
def table_contract(table: TableName) -> dict[str, Any]:
    """Fields, key and openness of one table, as in `tables/<table>.json`."""
    contract: dict[str, Any] = document(f"tables/{table}.json")
    return contract


@lru_cache
def arrow_schema(table: TableName) -> pa.Schema:
    """Arrow schema of one stored table; each field's metadata holds its unit and description."""
    return _arrow_schema(table_contract(table)["fields"])


@lru_cache
def view_schema(view: ViewName) -> pa.Schema:
    """Arrow schema of one SQL view that is more than a stored table (`views/<view>.json`)."""
    return _arrow_schema(document(f"views/{view}.json")["fields"])


def _arrow_schema(fields: list[dict[str, Any]]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        pa.field(
            field["name"],
            pa.type_for_alias(field["type"]),
            nullable=field["nullable"],
            metadata={"unit": field["unit"] or "", "description": field["description"]},
        )
        for field in fields
    )


def conform(name: TableName, found: pa.Table) -> pa.Table:
    """`found` with the contract's columns first, cast to its types; missing nullable columns become null.

    Further columns follow as they are where the contract allows them. Raises `UsageError` for a missing or null
    column that must be there, a value that does not fit its type, or names that differ in case only.
    """
    import pyarrow as pa

    contract = arrow_schema(name)
    names = [column.casefold() for column in found.column_names]
    if len(set(names)) < len(names):
        raise UsageError(f"table {name}: two columns have the same name but for upper and lower case")
    columns = {field.name: _conform_column(name, field, found) for field in contract}
    extra = [column for column in found.column_names if column not in columns]
    folded = {column.casefold() for column in columns}
    refused = [column for column in extra if column.casefold() in folded or not table_contract(name)["extra_columns"]]
    if refused:
        raise UsageError(f"table {name} cannot take the column {refused[0]!r}")
    fields = [*contract, *(pa.field(column, found.schema.field(column).type) for column in extra)]
    return pa.table([*columns.values(), *(found.column(column) for column in extra)], schema=pa.schema(fields))


def _conform_column(name: TableName, field: pa.Field, found: pa.Table) -> pa.ChunkedArray:
    import pyarrow as pa

    if field.name not in found.column_names:
        if not field.nullable:
            raise UsageError(f"table {name} lacks the column {field.name!r}")
        return pa.chunked_array([pa.nulls(found.num_rows, field.type)])
    try:
        column = found.column(field.name).cast(field.type)
    except pa.ArrowInvalid as error:
        raise UsageError(f"table {name}, column {field.name}: expected {field.type}: {error}") from None
    if column.null_count and not field.nullable:
        raise UsageError(f"table {name}, column {field.name}: {column.null_count} values are missing")
    return column
