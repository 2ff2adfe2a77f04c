"""docs/reference/cli.md holds every command with an example that parses, and is what the program says of itself."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer

from isimed_cli.main import app

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "cli.md"
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "make_cli_reference.py"))
GROUP = typer.main.get_command(app)
COMMANDS = {name: command for name, command, _ in SCRIPT["commands"](GROUP, None)}
NAMES = list(COMMANDS)
EXAMPLES = dict(re.findall(r"^## isimed (.+)\n\n```sh\n(.+)\n```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def test_no_command_is_missing_and_none_is_invented():
    assert sorted(EXAMPLES) == sorted(NAMES)


def test_the_page_is_up_to_date():
    assert SCRIPT["reference"]() == PAGE.read_text(encoding="utf-8"), "run python scripts/make_cli_reference.py"


@pytest.mark.parametrize("name", NAMES)
def test_the_example_parses(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # what examples name: the folder that `isimed demo` leaves
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "participants.tsv").touch()
    (tmp_path / "cohort-export").mkdir()  # which the example of `isimed export` leaves
    (tmp_path / "tiny-encoder").mkdir()  # and that of `isimed encoders export`
    (tmp_path / "lesions.mrk.json").touch()  # what a user brings to `isimed propagate`
    words = shlex.split(EXAMPLES[name])
    named = 1 + len(name.split())
    assert words[:named] == ["isimed", *name.split()]
    context = COMMANDS[name].make_context(name, words[named:])
    assert context.params


@pytest.mark.parametrize("name", NAMES)
def test_help_carries_the_example(name: str):
    command = COMMANDS[name]
    assert command.epilog == f"Example: {EXAMPLES[name]}"
    assert command.help


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_the_shared_options(name: str):
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {"--quiet", "--verbose", "--no-progress", "--debug"} <= options
    if name != "demo":
        assert {"--store", "-s"} <= options
    if name not in ("demo", "plot"):
        assert {"--format", "--json"} <= options
