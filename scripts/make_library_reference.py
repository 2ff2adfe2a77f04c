"""Write docs/reference/python.md from docstrings and docs/reference/views.md from the SQL views' contracts.

Run from the repository: python scripts/make_library_reference.py
"""

from __future__ import annotations

import inspect
from pathlib import Path

import isimed_index
from isimed_index.contracts import arrow_schema, view_schema
from isimed_index.pretrain.objectives import coordinate, descriptor, isimed

FOLDER = Path(__file__).parent.parent / "docs" / "reference"
NOTE = "<!-- Written by scripts/make_library_reference.py: change the code, then run the script. -->"
OBJECTIVES = (isimed.distance_loss, coordinate.offset_loss, descriptor.dense_infonce)
TABLES = ("scans", "subjects", "labels", "transforms")  # views that are stored tables as they are
VIEWS = ("patches", "regions", "encoders", "segments", "indexes", "generations")


def python_page() -> str:
    """The public names of `isimed_index`, and the objectives as pure functions."""
    parts = ["# The Python API", NOTE, "```python\nimport isimed_index as isi\n```"]
    for name in isimed_index.__all__:
        parts += _entry(f"isi.{name}", getattr(isimed_index, name), level=2)
    parts.append("## Objectives of pretraining")
    for function in OBJECTIVES:
        parts += _entry(f"{function.__module__}.{function.__name__}", function, level=3)
    return "\n\n".join(parts) + "\n"


def views_page() -> str:
    """The SQL views, column by column."""
    intro = "`isimed sql` and `Store.sql` see these views of the pinned generation, read-only."
    parts = ["# The SQL views", NOTE, intro]
    for view, schema in [(t, arrow_schema(t)) for t in TABLES] + [(v, view_schema(v)) for v in VIEWS]:
        rows = ["| column | type | unit | what |", "|---|---|---|---|"]
        for field in schema:
            facts = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
            rows.append(f"| `{field.name}` | {field.type} | {facts.get('unit', '')} | {facts.get('description', '')} |")
        parts += [f"## {view}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def _entry(title: str, found: object, level: int) -> list[str]:
    """A heading, the signature of a function, the docstring; for a class its public methods too."""
    parts = [f"{'#' * level} {title}"]
    if inspect.isfunction(found):
        parts.append(f"```python\n{found.__name__}{inspect.signature(found)}\n```")
    parts.append("```text\n" + (inspect.getdoc(found) or "") + "\n```")
    if inspect.isclass(found):
        for name, member in vars(found).items():
            public = not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
            if public and inspect.getdoc(member):
                parts += _entry(f"{title.removeprefix('isi.')}.{name}", member, level + 1)
    return parts


PAGES = {"python.md": python_page, "views.md": views_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
