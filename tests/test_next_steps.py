"""What messages tell people to type exists: every `isimed …` in a string of the source is a real command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from enum import EnumType
from pathlib import Path
from typing import get_args

import pytest
import typer

from isimed_cli.main import app

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "isimed_index").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
CHOICES = {
    (command.name, name): [member.value for member in kind]
    for command in app.registered_commands
    for name, annotation in command.callback.__annotations__.items()
    if isinstance(kind := get_args(annotation)[0], EnumType)
}
_COMMAND_LINE = re.compile(r"\bisimed [a-z].*?(?=[,;.)]? isimed [a-z]|[,;.)]*(?:\s*$|[,;.)] ))")


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string in a file but docstrings; what an f-string fills in reads VALUE."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            inner.add(id(node.value))  # a docstring
        elif isinstance(node, ast.JoinedStr):
            inner |= set(map(id, node.values))
            parts = [str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in node.values]
            yield node.lineno, "".join(parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.lineno, node.value


def command_lines(text: str) -> list[str]:
    """The `isimed …` in a message, each to the end of its clause."""
    return _COMMAND_LINE.findall(text)


def faults(line: str) -> list[str]:
    """What in a command line does not exist: the command, an option, or a choice of its first argument."""
    _, name, *words = line.split()
    if name not in COMMANDS:
        return [name]
    command = COMMANDS[name]
    if hasattr(command, "commands"):  # a group: its verb comes next
        verb, *words = words or ["--help"]
        if verb not in command.commands:
            return [] if verb == "--help" else [verb]
        command = command.commands[verb]
    parameters = command.params
    known = {"--help", "-h"} | {option for parameter in parameters for option in parameter.opts}
    wrong = [word for word in words if word.startswith("-") and word[1:2].isalpha() | (word[1:2] == "-")]
    wrong = [word for word in wrong if word.split("=")[0] not in known]
    first = next((parameter for parameter in parameters if parameter.param_type_name == "argument"), None)
    choices = CHOICES.get((name, first.name)) if first else None
    if choices and words and not words[0].startswith("-") and words[0] not in choices:
        wrong.append(words[0])
    return wrong


FOUND = [
    pytest.param(line, id=f"{path.relative_to(ROOT)}:{number}")
    for path in SOURCES
    for number, text in texts(path)
    for line in command_lines(text)
]


def test_the_source_names_commands() -> None:
    assert len(FOUND) > 20


@pytest.mark.parametrize("line", FOUND)
def test_a_command_that_a_message_names_exists(line: str) -> None:
    assert faults(line) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("isimed mend", ["mend"]),
        ("damaged. Next: isimed mend", ["mend"]),
        ("isimed ls --encoders", ["--encoders"]),
        ("isimed ls encodings", ["encodings"]),
        ("run isimed index again, or isimed bogus", ["bogus"]),
        ("isimed add --labels PATTERN PATH, then isimed index --strid 3", ["--strid"]),
        ("isimed ls encoders", []),
        ("isimed encoders eject", ["eject"]),
        ("isimed encoders show --whole", ["--whole"]),
        ("isimed encoders import FILE --card FILE", []),
        ("isimed add PATH, or widen --where", []),
        ("isimed query --point 24.4,-22.3,-21.0 --scan sub-13_T1w -k 5", []),
    ],
)
def test_what_does_not_exist_is_found(text: str, expected: list[str]) -> None:
    assert [fault for line in command_lines(text) for fault in faults(line)] == expected
