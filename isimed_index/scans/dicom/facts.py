"""The facts on the allow-list, out of DICOM headers: of one file, then of a series.

    header ──`of_file`──▶ facts by column, and what was dropped ──`of_series`──▶ those that all files agree on

A classic file has a fact at its top, an enhanced one in a functional group, shared by all frames or one by one; a fact
of which two frames or two files say different things, or that some of them lack, is no fact of the series.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isimed_index.scans.allowed import FACTS, Fact, Taken, take, years_between

_AGENTS = "ContrastBolusAgentSequence"
_CALCULATED_AGE = ("PatientBirthDate", "StudyDate")  # read for the age alone where PatientAge is not there
_MADE_UP = ("Radionuclide",)  # what the column is called; DICOM has it as a code in a sequence
TAGS = (
    *(fact.tag for fact in FACTS if fact.tag not in _MADE_UP),
    "RadiopharmaceuticalInformationSequence",
    _AGENTS,
    *_CALCULATED_AGE,
)


def of_file(dataset: Any) -> Taken:
    """The facts of one data set, read with `TAGS` and the functional groups."""
    return take(FACTS, lambda fact: _found(dataset, fact))


def of_series(files: Sequence[Taken]) -> Taken:
    """The facts that are the same in all files; what differs is dropped, and so is what one of the files dropped."""
    columns = {column: None for taken in files for column in (*taken.values, *taken.dropped)}
    first = files[0].values
    same = {key: value for key, value in first.items() if all(taken.values.get(key) == value for taken in files)}
    return Taken(same, tuple(column for column in columns if column not in same))


def _found(dataset: Any, fact: Fact) -> Any:
    """What the header says of a fact, as texts and numbers; of frames that disagree, an object that no fact reads."""
    if fact.tag not in _MADE_UP and (value := _plain(dataset.get(fact.tag, None))) is not None:
        return value
    if fact.tag == "PatientAge":
        return years_between(*(str(dataset.get(tag, "") or "") for tag in _CALCULATED_AGE))
    if fact.tag == "ContrastBolusAgent":
        return "yes" if dataset.get(_AGENTS, None) else None
    if fact.group == "RadiopharmaceuticalInformationSequence":
        return _in(dataset, fact)
    frames = dataset.get("PerFrameFunctionalGroupsSequence", None) if fact.group else None
    shared = dataset.get("SharedFunctionalGroupsSequence", None) if fact.group else None
    holders = [*(frames or ()), *(shared or ())[:1]]
    values = [value for holder in holders if (value := _in(holder, fact)) is not None]
    if not values:
        return None
    return values[0] if all(value == values[0] for value in values) else _Several()


class _Several:
    """Frames say different things: no number, and no word."""


def _in(holder: Any, fact: Fact) -> Any:
    """What the first item of a group says."""
    items = holder.get(fact.group, None)
    if not items:
        return None
    if fact.tag == "Radionuclide":
        codes = items[0].get("RadionuclideCodeSequence", None)
        return _plain(codes[0].get("CodeMeaning", None)) if codes else None
    return _plain(items[0].get(fact.in_group or fact.tag, None))


def _plain(value: Any) -> Any:
    """A value as a text, a number or a list of texts; None for one that is not there or empty."""
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return str(value).strip() or None
    texts = [text for item in value if (text := str(item).strip())]
    return texts if len(texts) != 1 else texts[0]
