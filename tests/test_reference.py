"""The generated pages of docs/reference are what the code says today."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "make_library_reference.py"))

CONFIG = runpy.run_path(str(ROOT / "scripts" / "make_config_reference.py"))


def test_the_page_of_the_configuration_is_up_to_date() -> None:
    page = CONFIG["PAGE"].read_text(encoding="utf-8")
    assert CONFIG["page"]() == page, "run python scripts/make_config_reference.py"


@pytest.mark.parametrize("name", sorted(SCRIPT["PAGES"]))
def test_page_is_up_to_date(name: str) -> None:
    page = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert SCRIPT["PAGES"][name]() == page, "run python scripts/make_library_reference.py"
