"""Write docs/reference/refusals.md from the list of bad and odd files that the tests make (tests/bad_files.py).

Run from the repository: python scripts/make_refusals.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from bad_files import CASES  # noqa: E402 -- it lies beside the tests

PAGE = ROOT / "docs" / "reference" / "refusals.md"
NOTE = "<!-- Written by scripts/make_refusals.py: change tests/bad_files.py, then run the script. -->"
TITLES = {
    "nii": "NIfTI and Analyze",
    "nrrd": "NRRD",
    "mha": "MetaImage",
    "mgh": "FreeSurfer",
    "dicom": "DICOM",
    "name": "Names, links, folders",
}
INTRO = """Each line is a file that the tests make and give to `isimed add`, one by one and all in one call. What is
read is compared voxel by voxel, and place by place, with what was written. The tests make them in a folder of yours by
`python tests/bad_files.py DIR`."""


def page() -> str:
    """One table for each kind of file: what it is, and a part of the reason, or that it is read."""
    parts = ["# Bad and odd files: what becomes of them", NOTE, INTRO]
    for kind, title in TITLES.items():
        rows = ["| file | outcome |", "|---|---|"]
        for case in CASES:
            if case.format == kind:
                outcome = "read" if case.says is None else f"refused: *… {case.says} …*"
                rows.append(f"| {case.what} | {outcome} |")
        parts += [f"## {title}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
