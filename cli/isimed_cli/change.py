"""`isimed delete`, `compact`, `gc`, `tag` and `restore`: what the newest generation holds, and which are kept."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from isimed_cli.app import Session, command


class Deletable(StrEnum):
    """What a condition can choose."""

    SCANS = "scans"
    PATCHES = "patches"
    MATCHES = "matches"


@command("delete", example="isimed delete \"scan = 'sub-13_T1w'\"", rows=True)
def delete(
    session: Session,
    where: Annotated[
        str | None, typer.Argument(metavar="[SQL]", help="Condition over the view that --from names.")
    ] = None,
    what: Annotated[
        Deletable,
        typer.Option(
            "--from", help="Delete whole scans with all that belongs to them, single patches, or kept answers."
        ),
    ] = Deletable.SCANS,
    encoder: Annotated[
        str | None,
        typer.Option(metavar="NAME|ID", help="Delete this encoder with its embeddings, frame and index instead."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Delete scans, patches, kept answers or an encoder.

    Older generations still hold them: `isimed restore` brings them back until `isimed gc` has taken these.
    To erase a patient for good: `isimed purge`.
    """
    from isimed_cli.render import show_fields
    from isimed_index.errors import UsageError

    if (where is None) == (encoder is None):
        raise UsageError(
            "expected a condition or --encoder", next_step="isimed delete \"scan = 'NAME'\", or --encoder NAME"
        )
    store = session.open(mode="a")
    if encoder is not None:
        done = store.delete_encoder(encoder, dry_run)
    else:
        done = store.delete(str(where), what.value, dry_run)
    show_fields(
        {
            "scans": list(done.scans),
            "subjects": done.subjects,
            "patches": done.patches,
            "encoders": list(done.encoders),
            "matches": done.matches,
            "generation": done.generation,
        },
        session.format,
    )


@command("compact", example="isimed compact", rows=True)
def compact(session: Session) -> None:
    """Pack small files together; no answer changes.

    Queries get faster, and rows that were deleted take no more room.
    """
    from isimed_cli.render import show_fields

    store = session.open(mode="a")
    with session.progress() as progress:
        done = store.compact(progress)
    show_fields(
        {
            "segments_before": done.segments[0],
            "segments": done.segments[1],
            "pieces_before": done.pieces[0],
            "pieces": done.pieces[1],
            "generation": done.generation,
        },
        session.format,
    )


@command("gc", example="isimed gc --keep 5", rows=True)
def gc(
    session: Session,
    keep: Annotated[int, typer.Option(metavar="K", help="Newest generations to keep.")] = 10,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove old generations and their files.

    Kept are the newest K generations, tagged ones and those that a running process reads.
    """
    from isimed_cli.render import show_fields

    gone = session.open(mode="a").gc(keep, dry_run)
    show_fields(
        {"generations": len(gone.generations), "artefacts": len(gone.artefacts), "bytes": gone.bytes}, session.format
    )


@command("tag", example="isimed tag paper-v1", rows=True)
def tag(
    session: Session,
    name: Annotated[str | None, typer.Argument(help="Tag to set; without one, all tags are listed.")] = None,
    generation: Annotated[
        int | None, typer.Option(metavar="N", help="Generation to tag; the newest by default.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Forget the tag NAME.")] = False,
) -> None:
    """Name a generation, or list the tags.

    A tagged generation is kept by isimed gc, and isimed restore finds it by name.
    """
    from isimed_cli.render import show_columns
    from isimed_index.errors import UsageError

    if name is None and (delete or generation is not None):
        raise UsageError("expected the name of a tag", next_step="isimed tag NAME")
    store = session.open(mode="r" if name is None else "a")
    if name is not None and delete:
        store.untag(name)
    elif name is not None:
        store.tag(name, generation)
    tags = store.tags()
    show_columns(
        {
            "tag": [found.name for found in tags],
            "generation": [found.generation for found in tags],
            "time": [found.time for found in tags],
        },
        session.format,
    )


@command("restore", example="isimed restore paper-v1", rows=True)
def restore(
    session: Session,
    what: Annotated[str, typer.Argument(metavar="TAG|N", help="A tag, or the number of a generation.")],
) -> None:
    """Make a new generation that equals an old one.

    What came between stays in the history, so a restore can itself be undone.
    """
    from isimed_cli.render import show_fields

    store = session.open(mode="a")
    number = store.restore(generation=int(what)) if what.isdecimal() else store.restore(tag=what)
    show_fields({"restored": what, "generation": number}, session.format)
