"""Parameters of `isimed sql`: two words, many of them, typed, and from the environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from store_builders import whole_store

from isimed_cli.main import main


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sql") / "c"
    whole_store(path)
    return path


def rows(store: Path, capsys: Any, *words: str) -> list[dict[str, Any]]:
    assert main(["sql", *words, "-s", str(store), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["-p", "a", "40"], 40),
        (["-p", "a", "-1.5e3"], -1500.0),
        (["-p", "a", "true"], True),
        (["-p", "a", "False"], False),
        (["-p", "a", "null"], None),
        (["-p", "a", "007"], "007"),
        (["-p", "a", "two words"], "two words"),
        (["-p", "a", "x=y"], "x=y"),
        (["-p", "a=x"], "x"),
        (["-p", "a", "'40'"], "40"),
        (["-p", "a", "'it''s'"], "it's"),
        (["-p", "a", "'"], "'"),
        (["-p", "a", ""], ""),
        (["--param", "a", "40"], 40),
    ],
)
def test_values_are_typed(store: Path, capsys: Any, words: list[str], value: Any) -> None:
    assert rows(store, capsys, "SELECT $a AS a", *words) == [{"a": value}]


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ("a test b 40", {"a": "test", "b": 40}),
        ("a=test b=40", {"a": "test", "b": 40}),
        ("a 'two words' b=null", {"a": "two words", "b": None}),
    ],
)
def test_the_environment_gives_pairs(
    store: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, environment: str, found: dict[str, Any]
) -> None:
    monkeypatch.setenv("ISIMED_SQL_PARAM", environment)
    assert rows(store, capsys, "SELECT $a AS a, $b AS b") == [found]
    assert rows(store, capsys, "SELECT $c AS c", "-p", "c", "1") == [{"c": 1}]  # what is typed goes first


@pytest.mark.parametrize("environment", ["a", "a 1 b", "a 'open"])
def test_a_broken_environment_is_exit_2(
    store: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, environment: str
) -> None:
    monkeypatch.setenv("ISIMED_SQL_PARAM", environment)
    assert main(["sql", "SELECT $a", "-s", str(store)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error[usage]: ")
    assert "expected" in line
    assert line.endswith("Next: isimed sql --help")


def test_a_missing_value_is_named(store: Path, capsys: Any) -> None:
    assert main(["sql", "SELECT * FROM scans WHERE split = $split", "-s", str(store)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("the query asks for $split, which has no value. Next: add -p split VALUE")
