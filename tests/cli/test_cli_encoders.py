"""`isimed encoders` on real stores, and the how-to page about it, whose blocks are run as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from cohorts import COPIES, Cohort, add_random_encoder

import isimed_index as isi
from isimed_cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "encoders.md"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    path = isi.create(tmp_path / "cohort.isimed").path
    add_random_encoder(path, name="first")
    return add_random_encoder(path, name="second", seed=1)


def test_list(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encoders", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["first", "second"]
    assert rows[1]["encoder"] == store
    assert main(["encoders", "list", "--out", "rows.csv"]) == 0
    assert Path("rows.csv").read_text().startswith("encoder,name,method,dim,")


def test_show_gives_the_whole_card(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    for named in ([], ["second"], [store], [store[:6]]):
        assert main(["encoders", "show", *named, "--json"]) == 0
        card = json.loads(capsys.readouterr().out)
        assert (card["id"], card["network"], card["outputs"]["descriptor"]) == (store, {"width": 4}, {"dim": 16})
    assert main(["encoders", "show", "third"]) == 1
    assert capsys.readouterr().err.startswith("error[not_found]: no encoder 'third'")


def test_the_folder_of_an_encoder_is_told(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encoders", "list", "--json"]) == 0
    folders = [row["folder"] for row in json.loads(capsys.readouterr().out)]
    assert [json.loads(Path("cohort.isimed", folder, "card.json").read_text())["name"] for folder in folders] == [
        "first",
        "second",
    ]
    assert main(["encoders", "show", "first"]) == 0
    assert re.search(rf"^folder +{folders[0]}$", capsys.readouterr().out, re.MULTILINE)


def test_show_gives_a_training_key_by_key(
    store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from isimed_index.config import pretrain_config
    from isimed_index.pretrain.trainer import new_card

    monkeypatch.setattr(isi.Store, "encoder", lambda *_: new_card(pretrain_config("tiny"), "tiny", "tiny"))
    assert main(["encoders", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"training.preset tiny", "training.epochs 12", "training.augmentation.noise 0.05"} <= {
        " ".join(line.split()) for line in lines
    }
    assert max(map(len, lines)) < 120


def test_show_says_which_of_several_it_took(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    again = add_random_encoder(Path("cohort.isimed"), name="second", seed=2)
    assert main(["encoders", "show", "second"]) == 0
    said = capsys.readouterr()
    assert re.search(rf"^id +{again}$", said.out, re.MULTILINE)
    assert said.err == f"2 encoders are called 'second'; this is the newest, {again}\n"
    assert main(["encoders", "show", store]) == 0
    assert capsys.readouterr().err == ""


def test_there_and_back(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encoders", "export", "second", "--out", "travels"]) == 0
    assert capsys.readouterr().out == f"exported encoder {store} · second to travels\n"
    assert main(["encoders", "import", "travels", "-s", "other.isimed", "--name", "theirs", "-q"]) == 0
    assert capsys.readouterr().out == f"imported encoder {store} · theirs\n"
    assert main(["encoders", "import", "travels", "-s", "other.isimed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"id": store, "name": "theirs", "added": False, "generation": 1}
    assert main(["encoders", "export", "second", "--out", "travels"]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["weights", "card", "pickle"])
def test_what_is_wrong_is_incompatible(store: str, capsys: pytest.CaptureFixture[str], what: str) -> None:
    main(["encoders", "export", "--out", "travels"])
    if what == "weights":
        file = Path("travels/weights.safetensors")
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    elif what == "card":
        Path("travels/card.json").write_text(Path("travels/card.json").read_text().replace("32", "31"))
    else:
        torch.save({}, "travels/weights.pt")
    capsys.readouterr()
    assert main(["encoders", "import", "travels", "-s", "other.isimed", "-q"]) == 13
    error = capsys.readouterr().err
    assert re.fullmatch(r"error\[encoder_mismatch\]: .+\. Next: .+\n", error), error
    assert isi.open("other.isimed").encoders().num_rows == 0


def test_a_group_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encoders"]) == 0
    assert "export" in capsys.readouterr().out
    assert main(["encoders", "eject"]) == 2
    assert capsys.readouterr().err == "error[usage]: No such command 'eject'. Next: isimed encoders --help\n"


def test_trust_is_a_name(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "--trust", "a b"]) == 2
    assert "to trust, found 'a b'" in capsys.readouterr().err


def blocks() -> list[tuple[str, str]]:
    """Language and content of the page's code blocks, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter that needs no further package
@pytest.mark.filterwarnings("ignore:[0-9]+ scans are stored at another stride")
def test_the_page_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cohort: Cohort
) -> None:
    """Python blocks and command lines are run; a block that begins with the name of a file is that file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("ISIMED_TRUST", raising=False)
    torch.set_num_threads(1)
    store = isi.create("cohort.isimed")
    add_random_encoder(store.path, name="isimed-tiny")
    store.add([cohort.file(COPIES[0]), cohort.file(COPIES[2])])
    ran = 0
    for language, content in blocks():
        named = re.match(r"# (\w+)\.py\n", content)
        if language == "json":
            json.loads(content)
        elif language == "python" and named:
            Path(f"{named[1]}.py").write_text(content)
            monkeypatch.delitem(sys.modules, named[1], raising=False)
        elif language == "python":
            exec(compile(content, PAGE.name, "exec"), {})
        elif language == "console":
            for line, said in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", content, re.MULTILINE):
                program, *arguments = shlex.split(line)
                assert program == "isimed"
                capsys.readouterr()
                code = main(arguments)
                error = capsys.readouterr().err
                expected = re.match(r"error\[\w+\]", said)
                assert (code == 0) == (expected is None), f"{line}\n{error}"
                assert expected is None or expected[0] in error
                ran += 1
    assert ran > 10
