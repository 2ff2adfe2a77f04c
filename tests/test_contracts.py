"""The contracts check what they say: examples, columns, versions."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import jsonschema
import pyarrow as pa
import pytest

from isimed_index import contracts
from isimed_index.errors import Incompatible, StoreDamaged, UsageError

EXAMPLES = files("isimed_schemas").joinpath("examples")


def examples(which: str) -> list[str]:
    return sorted(entry.name for entry in EXAMPLES.joinpath(which).iterdir())


def load(which: str, name: str) -> Any:
    return json.loads(EXAMPLES.joinpath(which, name).read_text())


@pytest.mark.parametrize("name", ["format", "manifest", "card", "tag", "artefact"])
def test_the_schemas_are_json_schemas(name: contracts.SchemaName) -> None:
    jsonschema.Draft202012Validator.check_schema(contracts.schema(name))


@pytest.mark.parametrize("name", examples("valid"))
def test_valid_examples_pass(name: str) -> None:
    contracts.validate(name.split(".")[0], load("valid", name))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", examples("invalid"))
def test_invalid_examples_are_refused(name: str) -> None:
    kind = name.split(".")[0]
    with pytest.raises(UsageError, match=f"{kind} does not follow its schema"):
        contracts.validate(kind, load("invalid", name), UsageError)  # type: ignore[arg-type]


def test_every_kind_of_document_has_examples() -> None:
    for which in ("valid", "invalid"):
        assert {name.split(".")[0] for name in examples(which)} == {"format", "manifest", "card", "tag"}


@pytest.mark.parametrize("table", ["scans", "subjects", "labels", "patches", "charts", "tombstones"])
def test_columns_are_described_and_lengths_have_units(table: contracts.TableName) -> None:
    for field in contracts.arrow_schema(table):
        assert field.metadata[b"description"]
        if field.name.endswith("_mm"):
            assert field.metadata[b"unit"] == b"mm"


@pytest.mark.parametrize("view", ["patches", "encoders", "segments", "indexes", "generations"])
def test_views_are_described(view: contracts.ViewName) -> None:
    assert all(field.metadata[b"description"] for field in contracts.view_schema(view))


def test_a_newer_format_is_incompatible() -> None:
    with pytest.raises(Incompatible, match="version 2"):
        contracts.check_version({"format_version": contracts.FORMAT_VERSION + 1})


def test_an_unknown_feature_is_incompatible() -> None:
    with pytest.raises(Incompatible, match="time-machine"):
        contracts.check_version({"format_version": 1, "features": ["tombstones", "time-machine"]})


@pytest.mark.parametrize("version", [None, "1", 0, -3])
def test_a_store_without_a_version_is_damaged(version: object) -> None:
    with pytest.raises(StoreDamaged):
        contracts.check_version({"format_version": version})


def test_conform_casts_orders_and_fills() -> None:
    found = contracts.conform(
        "subjects", pa.table({"cohort": ["a"], "age": pa.array([40], pa.int16()), "subject": ["s"]})
    )
    assert found.column_names == ["subject", "sex", "age", "cohort"]
    assert found.to_pylist() == [{"subject": "s", "sex": None, "age": 40.0, "cohort": "a"}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sex": ["f"]}, "lacks the column 'subject'"),
        ({"subject": ["s", None]}, "1 values are missing"),
        ({"subject": ["s"], "age": ["old"]}, "column age"),
        ({"subject": ["s"], "Age": [40]}, "cannot take the column 'Age'"),
        ({"subject": ["s"], "site": [1], "Site": [2]}, "upper and lower case"),
    ],
)
def test_conform_refuses(columns: dict[str, list[object]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        contracts.conform("subjects", pa.table(columns))


def test_a_closed_table_takes_no_further_column(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = {**contracts.table_contract("subjects"), "extra_columns": False}
    monkeypatch.setattr(contracts, "table_contract", lambda table: closed)
    with pytest.raises(UsageError, match="site"):
        contracts.conform("subjects", pa.table({"subject": ["s"], "site": [1]}))
