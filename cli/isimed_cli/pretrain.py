"""`isimed pretrain`: learn an encoder from the scans of the store."""

from __future__ import annotations

import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from isimed_cli.app import INTERRUPTED, Format, Session, command
from isimed_cli.options import DeviceOption, PathsOption, WhereOption
from isimed_index.errors import UsageError
from isimed_index.pretrain.stopping import Stopped


class Method(StrEnum):
    """The training objective."""

    ISIMED = "isimed"
    BARLOWTWINS = "barlowtwins"
    SIMCLR = "simclr"
    REGISIMED = "regisimed"
    COORDINATE = "coordinate"


class Preset(StrEnum):
    """A whole configuration: the paper's, ours, or one for two CPU cores and five minutes."""

    PAPER = "paper"
    DEFAULT = "default"
    TINY = "tiny"


@command("pretrain", example="isimed pretrain --preset tiny --where \"split = 'train'\" --seed 0", rows=True)
def pretrain(
    session: Session,
    paths: PathsOption = None,
    method: Annotated[Method | None, typer.Option(help="Training objective; the preset's by default (isimed).")] = None,
    preset: Annotated[Preset, typer.Option(help="Configuration to start from.")] = Preset.DEFAULT,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", exists=True, help="Fields that replace the preset's.")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Epochs, of as many steps as the preset or steps_per_epoch in --config says."
        ),
    ] = None,
    batch_scans: Annotated[int | None, typer.Option(metavar="N", min=1, help="Scans in a batch.")] = None,
    patches_per_scan: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Random patches of each scan in a batch.")
    ] = None,
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this training.")] = False,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the encoder.")] = None,
    where: WhereOption = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of everything random.")] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", file_okay=False, help="Folder for TensorBoard's event files.")
    ] = None,
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Project of Weights & Biases that shows the curves.")
    ] = None,
) -> None:
    """Train an encoder on the scans of the store.

    Prints the id of its card. PATHs are added first. The encoder is stored with its card: weights,
    preprocessing, patch and spacing. Several processes share the work under
    `torchrun -m isimed_cli.main pretrain …`, after `isimed add`; the first one prints.
    """
    from isimed_cli.batch import add_first, end_batch, list_refusals
    from isimed_cli.render import show_fields

    first = int(os.environ.get("RANK", "0")) == 0  # of torchrun's processes
    if paths and "RANK" in os.environ:
        raise UsageError("torchrun's processes cannot add scans", next_step="isimed add PATH, then pretrain without it")
    store, refused = add_first(session, paths)
    try:
        with (session if first else replace(session, quiet=True)).progress() as progress:
            card = store.pretrain(
                method=method.value if method else None,
                preset=preset.value,
                config=config,
                epochs=epochs,
                batch_scans=batch_scans,
                patches_per_scan=patches_per_scan,
                device=device,
                resume=resume,
                name=name,
                where=where,
                seed=seed,
                progress=progress,
                tensorboard=tensorboard,
                wandb=wandb,
            )
        if not first:
            return
        if session.format is Format.TABLE:
            print(card.id)
        else:
            show_fields({"encoder": card.id, "name": card.name}, session.format)
    except KeyboardInterrupt as stop:
        if not first:
            raise typer.Exit(INTERRUPTED) from None
        if str(stop):
            raise
        saved = "its checkpoint is kept" if resume else "nothing is saved yet"
        raise Stopped(f"training stopped before its first step; {saved}", "run the same command again") from None
    finally:
        list_refusals(refused)
    end_batch(1, refused)
