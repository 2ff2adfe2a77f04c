"""`isimed query`: a point of one scan, found in all the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from isimed_cli.app import Session, command
from isimed_cli.options import EncoderOption, PointOption, SameSubject, ScanOption, Space, SpaceOption, WhereOption
from isimed_index.errors import UsageError


@command(
    "query",
    example="isimed query --point 24.4,-22.3,-21.0 --scan sub-13_T1w -k 5",
    rows=True,
    out=True,
    encodes=True,
)
def query(
    session: Session,
    point: PointOption,
    scan: ScanOption,
    space: SpaceOption = Space.RAS,
    k: Annotated[int, typer.Option("-k", "--k", metavar="N", min=1, help="How many answers.")] = 10,
    where: WhereOption = None,
    within: Annotated[
        float | None, typer.Option(metavar="MM", min=0.0, help="Only answers within this of the expected place.")
    ] = None,
    same_subject: Annotated[
        SameSubject, typer.Option(help="Other scans of the query's own subject.")
    ] = SameSubject.EXCLUDE,
    min_confidence: Annotated[
        float | None,
        typer.Option(metavar="P", min=0.0, max=1.0, help="Only answers that are off by less than 10 mm this surely."),
    ] = None,
    cycle: Annotated[bool, typer.Option("--cycle", help="Also match back and report cycle_mm.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Search every patch, without the index.")] = False,
    encoder: EncoderOption = None,
    patches: Annotated[
        bool, typer.Option("--patches", help="The raw nearest patches instead of one match per scan.")
    ] = False,
    keep: Annotated[
        str | None, typer.Option(metavar="NAME", help="Store the answer under this name, for SQL over matches.")
    ] = None,
) -> None:
    """Find a point of one scan in all the others.

    One best match per scan, ranked; with --patches the nearest patches, several of which may be in one scan.
    x_mm, y_mm, z_mm are RAS+ mm whatever --space is; with another --space, the columns x, y, z hold the answer in it,
    and the column space names it. A label without a name reads 'label 87'. A file that is in the store already, by
    content, is asked as its stored copy. Radii of error_mm and error_95_mm hold 68 and 95 % of such answers, and
    confidence is the probability of an error below 10 mm: measured on labelled subjects that the encoder was not
    trained on, and empty where there were too few of them, or none of their labels is near.
    """
    from functools import partial

    from isimed_cli.render import show_table

    store = session.open(mode="r" if keep is None else "a")
    if patches and min_confidence is not None:
        raise UsageError("raw patches have no confidence", next_step="leave out --min-confidence or --patches")
    ask = store.search_patches if patches else partial(store.lookup, min_confidence=min_confidence)
    matches = ask(
        point=point,
        scan=scan,
        space=space.value,
        k=k,
        where=where,
        within_mm=within,
        same_subject=same_subject.value,
        cycle=cycle,
        exact=exact,
        encoder=encoder,
    )
    table = matches.to_arrow()
    if isinstance(scan, Path) and matches.source is not None:
        session.note(f"{scan.name} is in the store as {matches.source}: its stored copy is asked")
    if not table.num_rows:
        asked = {"--where": where, "--within": within, "--min-confidence": min_confidence}
        limits = [name for name, value in asked.items() if value is not None]
        session.note(nothing_found(same_subject, limits))
    if keep is not None and table.num_rows:
        store.keep(matches, keep)
    show_table(table, session.format, session.out)


def nothing_found(same_subject: SameSubject, limits: Sequence[str], *, region: bool = False) -> str:
    """Why nothing answers and what to do: the limits that were set come first, then the choice of subjects.

    Where a `region` was asked for, the scans may all be there, without it.
    """
    who = {
        SameSubject.INCLUDE: "no other scan",
        SameSubject.EXCLUDE: "no scan of another subject",
        SameSubject.ONLY: "no other scan of this subject",
    }[same_subject]
    lacking = "has a vector of that region"
    if limits:
        also = f" and {lacking}" if region else ""
        return f"{who} meets {' and '.join(limits)}{also}. Next: widen {' or '.join(limits)}"
    step = "" if same_subject is SameSubject.INCLUDE else "--same-subject include, or "
    if region:
        return f"{who} {lacking}. Next: {step}isimed sql 'SELECT scan, label, name FROM regions' to see which do"
    return f"{who} is indexed. Next: {step}isimed index with more scans"
