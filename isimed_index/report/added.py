"""What became of each file of an add, as JSON, a table, or a page with a picture per scan.

The page is one file that loads nothing from elsewhere. It is written row by row, with each picture read when its row
is, and its rows are laid out by the browser when they come into sight: thousands of files make no difference.
"""

from __future__ import annotations

import base64
import csv
import html
import json
from pathlib import Path
from typing import Any, TextIO

from isimed_index.errors import UsageError
from isimed_index.ingest.report import AddReport, FileOutcome, Refusal

PAGE = (".html", ".htm")
_NUMBERS = ("shape", "spacing_mm", "orientation", "modality", "format", "low", "high", "labels", "seconds")
_AXES = {"shape": ("nx", "ny", "nz"), "spacing_mm": ("dx_mm", "dy_mm", "dz_mm")}
_HEADINGS = {
    "thumbnail": "",
    "name": "file",
    "outcome": "outcome",
    "scan": "scan",
    "shape": "voxels",
    "spacing_mm": "spacing mm",
    "orientation": "axes",
    "modality": "modality",
    "format": "format",
    "range": "values",
    "labels": "labels",
    "seconds": "s",
    "reason": "reason · next step",
}
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff }
table { border-collapse: collapse; width: 100% }
th { text-align: left; position: sticky; top: 0; background: #fff; border-bottom: 2px solid #999; padding: .3em .6em }
td { border-bottom: 1px solid #ddd; padding: .3em .6em; vertical-align: top; overflow-wrap: anywhere }
tbody { content-visibility: auto; contain-intrinsic-size: auto 10000px }
img { display: block; width: 288px; height: 96px; background: #000 }
.refused { color: #a00 } .added { color: #060 } .note { color: #666 }
"""
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
_ROWS_A_BODY = 100  # what a browser lays out at once


def check_target(path: Path) -> None:
    """`UsageError` unless a report can be written under this name."""
    if path.suffix.lower() not in (".csv", ".json", *PAGE):
        raise UsageError(
            f"expected a report that ends in .json, .csv or .html, found {path.name}", next_step="name it so"
        )


def write_added(report: AddReport, path: Path, thumbnails: Path | None = None) -> None:
    """Write the report as .csv, as a page (.html, with the pictures in the folder `thumbnails`), or as JSON.

    Raises `OSError` when the file cannot be written.
    """
    suffix = path.suffix.lower()
    with path.open("w", encoding="utf-8", newline="", errors="backslashreplace") as out:
        if suffix == ".csv":
            _write_csv(report, out)
        elif suffix in PAGE:
            _write_page(report, out, thumbnails)
        else:
            json.dump(to_json(report), out, indent=2, ensure_ascii=False)
            out.write("\n")


def to_json(report: AddReport) -> dict[str, Any]:
    """Ids of scans that are new and that were there already, refusals, and an entry for each file."""
    return {
        "added": list(report.added),
        "unchanged": list(report.unchanged),
        "refused": [_refusal(refusal) | {"name": refusal.name} for refusal in report.refused],
        "files": [_entry(file) for file in report.files],
    }


def _refusal(refusal: Refusal | None) -> dict[str, str | None]:
    keys = ("kind", "reason", "next_step")
    return {key: None if refusal is None else getattr(refusal, key) for key in keys}


def _entry(file: FileOutcome) -> dict[str, Any]:
    facts: dict[str, Any] = dict.fromkeys(_NUMBERS)
    if file.facts is not None:
        facts |= {key: getattr(file.facts, key) for key in _NUMBERS[:-2]}
    seconds = None if file.seconds is None else round(file.seconds, 3)
    own = {"name": file.name, "outcome": file.outcome, "scan": file.scan}
    return own | _refusal(file.refusal) | facts | {"labels": file.labels, "seconds": seconds}


def _write_csv(report: AddReport, out: TextIO) -> None:
    """One line a file; shape and spacing take a column an axis."""
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(_flat(_entry(FileOutcome("", "refused"))))
    for file in report.files:
        lines.writerow(map(_inert, _flat(_entry(file)).values()))


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        flat |= dict(zip(_AXES[key], value or [None] * 3, strict=True)) if key in _AXES else {key: value}
    return flat


def _inert(value: object) -> object:
    """Text that a spreadsheet would take for a formula, with an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULAS) else value


def _write_page(report: AddReport, out: TextIO, thumbnails: Path | None) -> None:
    counts = f"added {len(report.added)} · unchanged {len(report.unchanged)} · refused {len(report.refused)}"
    headings = "".join(f"<th>{text}</th>" for text in _HEADINGS.values())
    out.write(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>isimed add</title>\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<style>{_STYLE}</style></head>\n<body><h1>isimed add</h1><p>{counts}</p>\n"
        '<p class="note">Pictures: axial, coronal and sagittal planes through the middle. R and L are the patient’s '
        "right and left. Values are drawn from the 1st to the 99th percentile; CT from −160 to 240 HU.</p>\n"
        f"<table><thead><tr>{headings}</tr></thead>\n"
    )
    for start in range(0, len(report.files), _ROWS_A_BODY):
        out.write("<tbody>\n")
        for file in report.files[start : start + _ROWS_A_BODY]:
            out.write(_row(file, thumbnails))
        out.write("</tbody>\n")
    out.write("</table></body></html>\n")


def _row(file: FileOutcome, thumbnails: Path | None) -> str:
    entry = _entry(file)
    shown = entry | {
        "shape": _joined(entry["shape"], " × ", "d"),
        "spacing_mm": _joined(entry["spacing_mm"], " × ", ".3g"),
        "range": _joined((entry["low"], entry["high"]), " … ", ".4g"),
        "reason": " · ".join(text for text in (entry["reason"], entry["next_step"]) if text),
    }
    cells = "".join(f"<td>{_text(shown[key])}</td>" for key in list(_HEADINGS)[1:])
    picture = ""
    if file.thumbnail is not None and thumbnails is not None:
        data = base64.b64encode((thumbnails / file.thumbnail).read_bytes()).decode()
        picture = f'<img loading="lazy" decoding="async" alt="planes" src="data:image/png;base64,{data}">'
    return f'<tr class="{file.outcome}"><td>{picture}</td>{cells}</tr>\n'


def _joined(values: tuple[float | None, ...] | None, between: str, form: str) -> str:
    return "" if values is None or None in values else between.join(format(value, form) for value in values)


def _text(value: object) -> str:
    return "" if value is None else html.escape(str(value))
