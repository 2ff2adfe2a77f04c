"""`isimed query`: a point of one scan, found in all the others."""

from __future__ import annotations

from typing import Annotated

import typer

from isimed_cli.app import Session, command
from isimed_cli.options import EncoderOption, PointOption, SameSubject, ScanOption, Space, SpaceOption, WhereOption


@command("query", example="isimed query --point 24.4,-22.3,-21.0 --scan sub-13_T1w -k 5", rows=True, out=True)
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
    cycle: Annotated[bool, typer.Option("--cycle", help="Also match back and report cycle_mm.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Search every patch, without the index.")] = False,
    encoder: EncoderOption = None,
    patches: Annotated[
        bool, typer.Option("--patches", help="The raw nearest patches instead of one match per scan.")
    ] = False,
) -> None:
    """Find a point of one scan in all the others.

    One best match per scan, ranked; with --patches the nearest patches, several of which may be in one scan.
    """
    from isimed_cli.render import show_table

    store = session.open()
    ask = store.search_patches if patches else store.lookup
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
    if not table.num_rows and same_subject is SameSubject.EXCLUDE:
        limits = [f"a wider {name}" for name, value in (("--where", where), ("--within", within)) if value is not None]
        steps = ", ".join(["--same-subject include", *limits])
        session.note(f"no scan of another subject is left to answer. Next: {steps}, or index more scans")
    show_table(table, session.format, session.out)
