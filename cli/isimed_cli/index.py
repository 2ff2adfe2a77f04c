"""`isimed index`: an embedding for every patch, and an index over them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from isimed_cli.app import Format, Session, command
from isimed_cli.options import DeviceOption, PathsOption, ReportOption, WhereOption, parse_bytes


@command("index", example="isimed index --stride 8 --min-recall 0.98", rows=True, encodes=True)
def index(
    session: Session,
    paths: PathsOption = None,
    encoder: Annotated[
        str | None,
        typer.Option(metavar="NAME|ID|DIR", help="Encoder of the store, or an exported one; the newest by default."),
    ] = None,
    stride: Annotated[
        float | None, typer.Option(metavar="MM", min=0.1, help="Distance of patches; the encoder's own by default.")
    ] = None,
    where: WhereOption = None,
    scheduler: Annotated[
        str,
        typer.Option(
            metavar="threads|processes[:N]|cuda|ADDRESS",
            help="Who encodes: this process, N others, one for each GPU, or the workers of a Dask scheduler.",
        ),
    ] = "threads",
    device: DeviceOption = "auto",
    runtime: Annotated[
        str,
        typer.Option(
            metavar="auto|torch|openvino|onnx",
            help="What runs the network; auto: the fastest of a short trial.",
        ),
    ] = "auto",
    precision: Annotated[
        str, typer.Option(metavar="fp32|bf16", help="Of the network; bf16 is faster, with an error of up to 1 %.")
    ] = "fp32",
    min_recall: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Least recall@10 of the index, measured against exact search.")
    ] = 0.98,
    max_ram: Annotated[
        int | None, typer.Option(metavar="SIZE", parser=parse_bytes, help="Most memory for the index, such as 4G.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after an interruption: always so, said for scripts.")
    ] = False,
    report: ReportOption = None,
) -> None:
    """Encode every patch and build the index.

    Fits the canonical frame and measures the index's recall against exact search. PATHs are added first.
    Scans that are encoded already are skipped, so the same command goes on where it stopped.
    """
    from isimed_cli.batch import add_first, end_batch, list_refusals, write_report
    from isimed_cli.render import show_fields

    store, refused = add_first(session, paths)
    try:
        with session.progress() as progress:
            done = store.index(
                encoder=encoder,
                stride_mm=stride,
                where=where,
                scheduler=scheduler,
                device=device,
                runtime=runtime,
                precision=precision,
                min_recall=min_recall,
                max_ram=max_ram,
                progress=progress,
            )
        refused += done.refused
        fields: dict[str, Any] = {
            "encoder": done.encoder,
            "encoded": list(done.encoded),
            "skipped": list(done.skipped),
            "refused": [item.name for item in refused],
            "patches": done.patches,
            "recall_at_10": done.recall_at_10,
            "index_kind": done.index_kind,
            "runtime": done.runtime,
            "precision": done.precision,
            "trial_patches_per_s": done.trial_patches_per_s,
        }
        write_report(report, fields, refused)
        if session.format is Format.TABLE:
            fields |= {name: len(fields[name]) for name in ("encoded", "skipped", "refused")}
            fields = {name: value for name, value in fields.items() if value not in ("", {})}
        show_fields(fields, session.format)
    finally:
        list_refusals(refused)
    end_batch(len(done.encoded) + len(done.skipped), refused)
