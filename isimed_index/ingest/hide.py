"""What a file is called in the store: its own names, or keyed surrogates of them; and whether its path is kept.

Names of files and folders often are names of people. With `surrogate_ids` a scan, its subject and its session get
surrogates, and the names go no further than this process: tables of metadata are still joined by them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from isimed_index.ingest.choose import Chosen, Hidden
from isimed_index.ingest.options import AddOptions
from isimed_index.scans.metadata import Who
from isimed_index.scans.surrogate import Surrogates, key_file, read_surrogates


def hide(chosen: Sequence[Chosen], options: AddOptions, store: Path) -> list[Chosen]:
    """The files under the names that the store will know them by, with their paths where those are kept."""
    if options.keep_source:
        chosen = [replace(item, source=_source(item)) for item in chosen]
    if not options.surrogate_ids or not chosen:
        return list(chosen)
    surrogates = read_surrogates(options.surrogate_key or key_file(), store)
    return [_hidden(item, surrogates) for item in chosen]


def _source(item: Chosen) -> str:
    """The absolute path of a file, or of the folder that all files of a series lie in."""
    if item.series is None:
        return str(item.path.absolute())
    return os.path.commonpath([path.absolute().parent for path in item.series.files])


def _hidden(item: Chosen, surrogates: Surrogates) -> Chosen:
    hidden = Hidden(item.subject or item.name, surrogates)
    who = item.who or Who(item.name, subject=item.subject, session=item.session)
    if item.series is not None and item.subject == item.series.subject:  # surrogates already
        return replace(item, hidden=hidden, who=who)
    return replace(
        item,
        name=item.name if item.series else surrogates.of("scan", item.name),
        subject=item.subject and hidden.subject_id(item.subject),
        session=item.session and hidden.session_id(item.session),
        hidden=hidden,
        who=who,
    )
