"""Whose code runs: nothing is imported that the user did not name, and a trusted package lends its own alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isimed_index.encoders.trust import VARIABLE, is_ours, said_by, trusted, trusted_factory
from isimed_index.errors import EncoderMismatch, EncoderNotTrusted, UsageError


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of somebody, which leaves a file when it is imported; the file's path is its name."""
    package = tmp_path / "their_lab"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(
        f"from os import system\nfrom pathlib import Path\nPath({str(tmp_path / 'imported')!r}).touch()\n"
        "def build(width=1):\n    return ('built', width)\nnumber = 3\n"
    )
    (package / "broken.py").write_text("raise RuntimeError('no licence')\n")
    (tmp_path / "their_labs.py").write_text("def build():\n    return 'another'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield str(tmp_path / "imported")
    for name in [name for name in sys.modules if name.startswith("their_lab")]:
        del sys.modules[name]


@pytest.mark.parametrize("trust", [["their_lab"], ["their_lab.nets"], ["their_lab.nets:build"], ["x", "their_lab"]])
def test_what_is_trusted_is_imported(theirs: str, trust: list[str]) -> None:
    assert trusted_factory("their_lab.nets:build", trust)(width=4) == ("built", 4)
    assert Path(theirs).exists()


@pytest.mark.parametrize("trust", [[], ["their"], ["their_la"], ["nets"], ["their_lab.nets:buil"], ["their_lab.net"]])
def test_what_is_not_trusted_is_refused_before_it_is_imported(theirs: str, trust: list[str]) -> None:
    with pytest.raises(EncoderNotTrusted, match=r"their_lab\.nets:build") as refused:
        trusted_factory("their_lab.nets:build", trust)
    assert not Path(theirs).exists()
    assert "their_lab.nets" not in sys.modules
    assert "--trust their_lab.nets:build" in refused.value.next_step
    assert refused.value.exit_code == 13


def test_a_name_that_only_begins_alike_is_another_package(theirs: str) -> None:
    with pytest.raises(EncoderNotTrusted):
        trusted_factory("their_labs:build", ["their_lab"])
    assert "their_labs" not in sys.modules


@pytest.mark.parametrize("factory", ["os:system", "subprocess:call", "builtins:exec", "torch.hub:load"])
def test_the_standard_library_is_nobodys_encoder(factory: str) -> None:
    with pytest.raises(EncoderNotTrusted):
        trusted_factory(factory, ["their_lab"])


def test_a_trusted_package_does_not_lend_what_it_imported(theirs: str) -> None:
    """`from os import system` in a trusted module must not let a card call it."""
    with pytest.raises(EncoderNotTrusted, match=os.system.__module__):
        trusted_factory("their_lab.nets:system", ["their_lab"])
    with pytest.raises(EncoderNotTrusted):
        trusted_factory("their_lab.nets:number", ["their_lab"])
    assert trusted_factory("their_lab.nets:system", ["their_lab.nets:system"]) is os.system  # said in so many words


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("their_lab.broken:build", "no licence"),
        ("their_lab.nowhere:build", "nowhere"),
        ("their_lab.nets:nothing", "nothing"),
    ],
)
def test_what_cannot_be_imported_is_a_typed_error(theirs: str, factory: str, says: str) -> None:
    with pytest.raises(EncoderMismatch, match=says):
        trusted_factory(factory, ["their_lab"])


@pytest.mark.parametrize(
    ("factory", "says", "then"),
    [
        ("their_lab.nowhere:build", r"there is no module their_lab\.nowhere", "PYTHONPATH"),
        ("elsewhere:build", "there is no module elsewhere", "PYTHONPATH"),
        (
            "their_lab.nets:bulid",
            r"the module their_lab\.nets has no 'bulid'; did you mean 'build'",
            "correct `factory`",
        ),
        ("their_lab.needy:build", "their_lab.needy needs the module absent_package", "install absent_package"),
    ],
)
def test_what_is_missing_says_what_to_do(theirs: str, factory: str, says: str, then: str) -> None:
    Path(theirs).with_name("their_lab").joinpath("needy.py").write_text("import absent_package.layers\n")
    with pytest.raises(EncoderMismatch, match=says) as raised:
        trusted_factory(factory, ["their_lab", "elsewhere"])
    assert then in raised.value.next_step


@pytest.mark.parametrize(
    "factory",
    ["their_lab", "their_lab.nets", ":build", "their_lab:", "../x:build", "a b:c", "a:b.c", "a:b:c", "a..b:c"],
)
def test_what_is_no_dotted_name_is_refused(factory: str) -> None:
    with pytest.raises(EncoderMismatch, match=r"package\.module:callable"):
        trusted_factory(factory, [factory, "their_lab"])


def test_our_own_modules_are_no_factories() -> None:
    """A card naming `isimed_index.api:create` must not make stores, whatever is trusted."""
    with pytest.raises(EncoderMismatch):
        trusted_factory("isimed_index.api:create", ["isimed_index"])
    assert is_ours("isimed_index.encoders.networks:ValidNet")
    assert not is_ours("isimed_index_of_others.nets:build")


def test_trust_comes_from_the_caller_or_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert trusted() == ()
    monkeypatch.setenv(VARIABLE, "their_lab, other.nets:build ,")
    assert trusted() == ("their_lab", "other.nets:build")
    assert trusted([]) == ()
    assert trusted("a,b.c") == ("a", "b.c")
    for wrong in ("a b", "/etc", "a:b:c", "a;b", "*"):
        with pytest.raises(UsageError, match="to trust"):
            trusted(wrong)


def test_what_their_code_says_is_told_without_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trust_broken.py").write_text("from os import nothing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EncoderMismatch, match=r"cannot import name 'nothing' from 'os' \(os\.py\)") as raised:
        trusted_factory("trust_broken:build", ["trust_broken"])
    assert "/" not in raised.value.message
    assert said_by(FileNotFoundError(2, "No such file or directory", "/home/them/a b/weights 1.npz")) == (
        "[Errno 2] No such file or directory: 'weights 1.npz'"
    )
    assert said_by(ValueError(f"1.5 mm/voxel\n{'x' * 300}")) == f"1.5 mm/voxel {'x' * 187}"
