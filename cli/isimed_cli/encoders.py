"""`isimed encoders list`, `show`, `export` and `import`: encoders as things that are handed on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from isimed_cli.app import Format, Session, command, group

NAMED = Annotated[str | None, typer.Argument(metavar="[NAME|ID]", help="Encoder of the store; the newest by default.")]

group("encoders", "List encoders, show their cards, and hand them on.")


@command("encoders list", example="isimed encoders list", rows=True, out=True)
def list_(session: Session) -> None:
    """List the encoders of the store, oldest first."""
    from isimed_cli.render import show_table

    show_table(session.open().encoders(), session.format, session.out)


@command("encoders show", example="isimed encoders show isimed-tiny", rows=True)
def show(session: Session, encoder: NAMED = None) -> None:
    """Show the whole card of an encoder.

    The card says all that changes an embedding, and how the encoder was trained; its id is the hash of the former.
    As a table, the encoder's folder within the store is told, too.
    """
    from isimed_cli.render import show_fields

    store = session.open()
    card = store.encoder(encoder)
    rows = store.encoders().to_pylist()
    namesakes = [row for row in rows if row["name"] == encoder]
    if len(namesakes) > 1 and encoder != card.id:
        session.note(f"{len(namesakes)} encoders are called {encoder!r}; this is the newest, {card.id}")
    fields = card.to_json()
    if session.format is not Format.TABLE:
        show_fields(fields, session.format)
        return
    training = fields.pop("training")
    fields |= {"folder": next((row["folder"] for row in rows if row["encoder"] == card.id), None)}
    show_fields(fields, session.format)
    show_fields(dict(_line_by_line("training", training)), session.format)  # its long names in a column of their own


def _line_by_line(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values of nested fields under dotted names."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _line_by_line(f"{name}.{key}", inner)


@command("encoders export", example="isimed encoders export isimed-tiny --out tiny-encoder", rows=True)
def export(
    session: Session,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the card and the weights.")],
    encoder: NAMED = None,
) -> None:
    """Write an encoder into a folder that can travel alone.

    It holds card.json and weights.safetensors, or model.onnx: no scan, no embedding, no patient.
    """
    from isimed_cli.render import show_fields

    card = session.open().export_encoder(encoder, out)
    if session.format is Format.TABLE:
        print(f"exported encoder {card.id} · {card.name} to {out.name}")
        return
    show_fields({"encoder": card.id, "name": card.name, "out": out.name}, session.format)


@command("encoders import", example="isimed encoders import tiny-encoder --name theirs", rows=True, encodes=True)
def import_(
    session: Session,
    path: Annotated[
        Path, typer.Argument(metavar="PATH", exists=True, help="Exported folder; with --card, .safetensors or .onnx.")
    ],
    card: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, help="JSON card that describes an encoder of another program."),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Its name in the store; the card's by default.")] = (
        None
    ),
) -> None:
    """Store an encoder from elsewhere, under the id that it has there.

    It is loaded and tried out first. Pickles (.pt, .pth, .bin, .ckpt) are refused, and weights that do not fit the
    card or the network; nothing is stored then. With --card, weights or an ONNX file of another program become an
    encoder of the store; code that the card names runs only when --trust names it too. Makes the store if there is
    none.
    """
    from dataclasses import asdict

    from isimed_cli.render import show_fields

    done = session.open_or_create().import_encoder(path, card=card, name=name)
    if session.format is not Format.TABLE:
        show_fields(asdict(done), session.format)
        return
    print(f"{'imported encoder' if done.added else 'there already:'} {done.id} · {done.name}")
