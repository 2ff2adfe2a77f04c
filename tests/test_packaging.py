"""What is shipped: three top-level packages, their data files, one console script; every requirement pinned."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel that is built from this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_wheel_has_the_three_top_level_packages_and_nothing_else(wheel: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert top == {"isimed_index", "isimed_cli", "isimed_schemas"}


@pytest.mark.parametrize(
    "name",
    [
        "isimed_index/py.typed",
        "isimed_index/pretrain/presets/paper.toml",
        "isimed_index/pretrain/presets/default.toml",
        "isimed_index/pretrain/presets/tiny.toml",
        "isimed_schemas/store.md",
        "isimed_schemas/manifest.schema.json",
        "isimed_schemas/tables/scans.json",
    ],
)
def test_wheel_carries_data_files(wheel: list[str], name: str) -> None:
    assert name in wheel


def test_wheel_has_the_console_script_and_the_licence(wheel: list[str]) -> None:
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)
    assert any(name.endswith("/LICENSE") for name in wheel)


def test_every_requirement_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = {re.split(r"[\[<>=; ]", requirement)[0] for requirement in wanted} - {"isimed-index"}
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line
    )
    assert names <= set(pinned)
    assert pinned["torch"] == "2.13.0"
