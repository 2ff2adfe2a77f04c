"""`isimed index`: an embedding for every patch, and an index over them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isimed_cli.app import Format, Session, command
from isimed_cli.options import DeviceOption, PathsOption, ReportOption, WhereOption, parse_bytes

if TYPE_CHECKING:
    from isimed_index.api import Refusal
    from isimed_index.indexing import IndexReport


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
    max_latency: Annotated[
        float | None, typer.Option(metavar="MS", min=0.001, help="Most time of a query in the index, such as 0.5.")
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit the canonical frame anew; else when many scans are new to it.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only say how the stored index was chosen: what was tried and measured.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, and what time and room it would take.")
    ] = False,
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

    refused: list[Refusal] = []
    asked: dict[str, Any] = {
        "encoder": encoder,
        "stride_mm": stride,
        "where": where,
        "scheduler": scheduler,
        "device": device,
        "runtime": runtime,
        "precision": precision,
    }
    if explain:
        _explain(session, encoder)
        return
    if dry_run:
        _plan(session, paths, report, asked)
        return
    asked_of_results: dict[str, Any] = {
        "min_recall": min_recall,
        "max_ram": max_ram,
        "max_latency_ms": max_latency,
        "refit": refit,
    }
    try:
        try:
            store, before = add_first(session, paths)
            refused += before
            with session.progress() as progress:
                done = store.index(**asked, **asked_of_results, progress=progress)
        except (Exception, KeyboardInterrupt) as error:
            _report_end(report, error, refused)
            raise
        refused += done.refused
        fields = _fields(done, refused)
        write_report(report, fields, refused)
        if session.format is Format.TABLE:
            fields = _counted(fields)
        show_fields(fields, session.format)
        if told := _made_by_others(done, runtime):
            session.note(told)
    finally:
        list_refusals(refused)
    end_batch(len(done.encoded) + len(done.skipped), refused)


def _report_end(report: Path | None, error: BaseException, refused: list[Refusal]) -> None:
    """Write, where --report asks for it, what was done before an error or Ctrl-C; `refused` gets what was refused."""
    from isimed_cli.batch import write_report

    so_far = getattr(error, "report", None)
    if so_far is not None:
        refused += so_far.refused
    fields = {} if so_far is None else _fields(so_far, refused)
    if isinstance(error, KeyboardInterrupt):
        fields["interrupted"] = True
    else:
        fields["error"] = {
            "kind": getattr(error, "kind", "internal"),
            # Texts of other errors may hold paths, which often name patients.
            "reason": str(error) if hasattr(error, "kind") else type(error).__name__,
            "next_step": getattr(error, "next_step", ""),
        }
    with suppress(OSError):  # the disk may be full by now, and the error itself says more than that
        write_report(report, fields, refused)


def _explain(session: Session, encoder: str | None) -> None:
    """Show the plan of the stored index: a text, or its card as it is written beside it."""
    from isimed_cli.render import show_fields

    card = session.open(mode="r").index_card(encoder)
    if session.format is Format.TABLE:
        typer.echo(card.explain())
    else:
        show_fields(card.to_json(), session.format)


def _fields(done: IndexReport, refused: Sequence[Refusal]) -> dict[str, Any]:
    """What was done, as it is written; of refused scans, also those of an `add` before, the names."""
    from dataclasses import asdict

    return asdict(done) | {"refused": [item.name for item in refused], "share_of_bare": done.share_of_bare}


def _made_by_others(done: IndexReport, runtime: str) -> str:
    """That vectors were there already, which another runtime than the one that was asked for had made."""
    others = {by: scans for by, scans in done.skipped_by.items() if by.partition("/")[0] not in (runtime, "unknown")}
    if runtime == "auto" or not others:
        return ""
    count = sum(others.values())
    scans = f"the vectors of {count} scan{'s' if count > 1 else ''}"
    before = f"{scans}, encoded before, were" if done.encoded else f"nothing was encoded anew: {scans} were"
    return f"{before} made by {' and '.join(others)}"


def _counted(fields: dict[str, Any]) -> dict[str, Any]:
    """The same as a person reads it: numbers of scans for their names, and nothing that there is nothing to say of."""
    shown = {name: len(value) if isinstance(value, list) else value for name, value in fields.items()}
    shown["workers_lost"] = shown["workers_lost"] or None
    del shown["interrupted"]  # such a run is shown as an error
    return {name: value for name, value in shown.items() if value not in ("", {}, None)}


def _plan(session: Session, paths: list[Path] | None, report: Path | None, asked: dict[str, Any]) -> None:
    """Show what the same command without --dry-run would do; damaged scans are told of on stderr."""
    from dataclasses import asdict

    from isimed_cli.batch import list_refusals, write_report
    from isimed_cli.render import show_fields
    from isimed_index.errors import UsageError

    if paths:
        raise UsageError(
            "a dry run adds nothing, so it cannot say what scans outside the store would take",
            next_step="isimed add PATH, then isimed index --dry-run",
        )
    store = session.open(mode="r")
    with session.progress() as progress:
        plan = store.plan_index(progress=progress, **asked)
    fields = asdict(plan) | {"damaged": [item.name for item in plan.damaged]}
    write_report(report, {name: value for name, value in fields.items() if name != "damaged"}, plan.damaged)
    if session.format is Format.TABLE:
        fields = _said(fields)
    show_fields(fields, session.format)
    if not plan.to_encode:
        session.note("there is nothing to encode")
    list_refusals(plan.damaged)


def _said(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan as a person reads it: counts, units, and behind each number what it is founded on."""
    basis, said = plan.pop("basis"), {}
    for name, value in plan.items():
        if value in ("", {}, None) or (name == "processes" and not value):
            continue
        shown = len(value) if isinstance(value, list) and name != "measured_scans" else value
        shown = _WRITE[name](shown) if name in _WRITE else shown
        said[name] = f"{shown} ({basis[name]})" if name in basis else shown
    if not plan["to_encode"]:
        return {
            name: said[name] for name in ("encoder", "stride_mm", "to_encode", "skipped", "damaged") if name in said
        }
    return {name: value for name, value in said.items() if value != []}


def _duration(seconds: float) -> str:
    """Such as `45 s`, `12 min` or `3.5 h`."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(count: int) -> str:
    """Such as `34.1 MB`, in powers of 1000."""
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


_WRITE = {
    "patches": "{:,}".format,
    "patches_per_s": "{:,.0f}".format,
    "bare_patches_per_s": "{:,.0f}".format,
    "bytes_written": _size,
    "seconds": _duration,
    "memory_bytes": _size,
}
