"""The shell around every command: shared options, progress, warnings, errors as one line, exit codes.

    argv ── typer ──▶ command(session, …) ──▶ isimed_index ──▶ render ──▶ stdout
                          │ Session: store, format, notes and progress ──▶ stderr
                          └ IsimedError ──▶ `error[kind]: … . Next: …` on stderr, its exit code

Only typer is imported here: `isimed --help` and shell completion must not wait for numerical packages.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from isimed_index.api import Store
    from isimed_index.progress import Progress

INTERRUPTED = 130
PARTIAL = 3


class Format(StrEnum):
    """How rows are written; arrow and parquet need `--out FILE`."""

    TABLE = "table"
    JSON = "json"
    NDJSON = "ndjson"
    CSV = "csv"
    ARROW = "arrow"
    PARQUET = "parquet"


StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        "-s",
        metavar="DIR",
        envvar="ISIMED_STORE",
        help="Directory of the store, or s3://BUCKET/PREFIX.",
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", envvar="ISIMED_QUIET", help="Only results, warnings and errors.")
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", envvar="ISIMED_VERBOSE", help="Log what the library does to stderr.")
]
NoProgressOption = Annotated[
    bool, typer.Option("--no-progress", envvar="ISIMED_NO_PROGRESS", help="No progress bars on stderr.")
]
DebugOption = Annotated[bool, typer.Option("--debug", envvar="ISIMED_DEBUG", help="Show the traceback of an error.")]


def writable(path: Path | None) -> Path | None:
    """A file that an option names, checked before any work: its folder is there, and it can be written."""
    if path is None:
        return None
    there = path.exists()
    if path.is_dir():
        raise typer.BadParameter(f"expected a file, found the folder {path.name!r}")
    if not there and not path.parent.is_dir():
        raise typer.BadParameter(f"the folder for {path.name!r} does not exist")
    if not os.access(path if there else path.parent, os.W_OK):
        raise typer.BadParameter(f"{path.name!r} cannot be written there")
    return path


FormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        "-f",
        envvar="ISIMED_FORMAT",
        help="How to write rows; as a table by default.",
        case_sensitive=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", envvar="ISIMED_JSON", help="Short for --format json.")]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        callback=writable,
        help="Write rows here: .csv, .json, .ndjson, .jsonl, .arrow or .parquet, or any name with --format.",
    ),
]

TrustOption = Annotated[
    str | None,
    typer.Option(
        "--trust",
        metavar="CODE",
        envvar="ISIMED_TRUST",
        help="Code of others that an encoder may run: packages, or PACKAGE.MODULE:CALLABLE, with commas between.",
    ),
]

_EVERYWHERE: dict[str, tuple[Any, Any]] = {
    "quiet": (QuietOption, False),
    "verbose": (VerboseOption, False),
    "no_progress": (NoProgressOption, False),
    "debug": (DebugOption, False),
}
_STORE: dict[str, tuple[Any, Any]] = {"store": (StoreOption, "cohort.isimed")}
_ROWS: dict[str, tuple[Any, Any]] = {"output_format": (FormatOption, None), "as_json": (JsonOption, False)}
_OUT: dict[str, tuple[Any, Any]] = {"out": (OutOption, None)}
_TRUST: dict[str, tuple[Any, Any]] = {"trust": (TrustOption, None)}

_NAME_A_STORE = "name a store by -s DIR or ISIMED_STORE (default ./cohort.isimed), or make one: isimed add -s DIR PATH"

_UPKEEP = ("tag", "restore", "delete", "purge", "compact", "gc", "check", "repair", "export", "import", "doctor")
# The order of `isimed --help`: the path of a working session; a command that is not named here comes last.
_LOOKS = ("evaluate", "plot", "info", "ls", "log", "encoders")
ORDER = ("add", "pretrain", "index", "query", "sql", *_LOOKS, *_UPKEEP, "demo")


class Verbs(TyperGroup):
    """The verbs of one noun, in the order in which they were registered; without one, the help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`isimed NOUN` is `isimed NOUN --help`."""
        parsed: list[str] = super().parse_args(ctx, args or ["--help"])
        return parsed


class InOrder(TyperGroup):
    """Lists commands in the order in which they are used, not in which their modules were imported."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands, `ORDER` first."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


app = typer.Typer(
    name="isimed",
    cls=InOrder,
    epilog="Example: isimed query --point 24.4,-22.3,-21.0 --scan sub-13_T1w",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: half the start-up time, and it can be piped
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "ISIMED", "help_option_names": ["--help", "-h"]},
)


def _show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        import isimed_index

        print(f"isimed {isimed_index.__version__}")
        raise typer.Exit


_groups: dict[str, typer.Typer] = {}  # by name


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Find the same anatomy in every scan, in patient millimetres."""


@dataclass(frozen=True, slots=True)
class Session:
    """What one run of a command was told by the options that commands share."""

    store: str = "cohort.isimed"  # a directory, or s3://BUCKET/PREFIX
    format: Format = Format.TABLE
    out: Path | None = None
    quiet: bool = False
    verbose: bool = False
    no_progress: bool = False
    debug: bool = False
    trust: str | None = None  # code of others that encoders may run; None: the library's default, ISIMED_TRUST

    def _trusting(self) -> dict[str, Any]:
        return {} if self.trust is None else {"trust": self.trust}

    def open(self, mode: Literal["r", "a"] = "r") -> Store:
        """Open the store; `StoreNotFound` (exit 10) when there is none."""
        import isimed_index
        from isimed_index.errors import StoreNotFound

        try:
            return isimed_index.open(self.store, mode=mode, **self._trusting())
        except StoreNotFound as error:
            raise StoreNotFound(error.message, next_step=_NAME_A_STORE) from None

    def open_or_create(self) -> Store:
        """Open the store for writing, making a new one where there is none yet."""
        import isimed_index
        from isimed_index.errors import StoreNotFound, UsageError

        try:
            return isimed_index.open(self.store, mode="a", **self._trusting())
        except StoreNotFound:
            try:
                store = isimed_index.create(self.store, **self._trusting())
            except UsageError:
                with suppress(StoreNotFound):
                    return isimed_index.open(
                        self.store, mode="a", **self._trusting()
                    )  # another process has just made it
                raise
        self.note(f"new store {self.store}")
        return store

    def note(self, text: str) -> None:
        """A remark for a person, on stderr; silent with --quiet."""
        if not self.quiet:
            print(text, file=sys.stderr)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A progress display on stderr that is cleared away when the job ends or fails."""
        from isimed_cli.progress import progress_on

        with progress_on(sys.stderr, shown=not (self.quiet or self.no_progress)) as shown:
            yield shown


def group(name: str, about: str) -> None:
    """Make `isimed NAME VERB …` possible: `command("NAME VERB", …)` registers the verbs."""
    _groups[name] = typer.Typer(
        name=name,
        cls=Verbs,
        help=about,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["--help", "-h"]},  # the prefix of variables grows by the group's name
    )
    app.add_typer(_groups[name])


def command(
    name: str,
    *,
    example: str,
    store: bool = True,
    rows: bool = False,
    out: bool = False,
    encodes: bool = False,
    cls: type[TyperCommand] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(session, …)` as the command `name`, or as `verb` of a group by the name `group verb`.

    Its own parameters come first, then the shared options: `store` adds -s, `rows` adds --format and --json, `out`
    adds --out, `encodes` adds --trust. `example` is one true command line, shown at the end of --help and in the
    reference.
    """
    shared = {**(_STORE if store else {}), **(_ROWS if rows else {}), **(_OUT if out else {})}
    shared |= {**(_TRUST if encodes else {}), **_EVERYWHERE}
    *above, own_name = name.split()

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        added = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for key, (annotation, default) in shared.items()
        ]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + added

        def run(**values: Any) -> None:
            _run(function, {key: values.pop(key) for key in shared}, values)

        run.__doc__, run.__name__ = function.__doc__, function.__name__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        where = _groups[above[0]] if above else app
        where.command(own_name, epilog=f"Example: {example}", cls=cls)(run)
        return function

    return register


def _run(function: Callable[..., None], shared: dict[str, Any], own: dict[str, Any]) -> None:
    """Build the session, call the command, and turn what goes wrong into one line and an exit code."""
    from isimed_cli.render import resolve_format
    from isimed_index.errors import IsimedError

    takes_out = "out" in shared
    as_json, chosen = shared.pop("as_json", False), shared.pop("output_format", None)
    session = Session(**shared)
    try:
        asked = Format.JSON if as_json else chosen
        session = replace(session, format=resolve_format(asked, session.out, takes_out=takes_out))
        with _messages(session):
            function(session, **own)
        if session.out is not None:
            session.note(f"wrote {session.out}")
    except IsimedError as error:
        _fail(session, error.line(), error.exit_code)
    except KeyboardInterrupt as stop:
        again = getattr(stop, "next_step", "run the same command again (pretrain: with --resume)")
        what = str(stop) or f"{function.__name__.rstrip('_')} was stopped before its end; what was committed stays"
        line = f"error[interrupted]: {what}. Next: {again}"
        _fail(session, line, INTERRUPTED)
    except BrokenPipeError:
        raise typer.Exit(0) from None  # the reader left (`| head`): it has what it wanted
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception as error:  # noqa: BLE001 — the last guard: a bug is one line too, and says how to see more
        line = f"error[internal]: {type(error).__name__}: {error}"
        _fail(session, f"{' '.join(line.split())}. Next: run again with --debug and report what it shows", 1)


def _fail(session: Session, line: str, exit_code: int) -> None:
    """Print the line (below the traceback with --debug) and leave with `exit_code`."""
    if session.debug:
        traceback.print_exc()
    print(line, file=sys.stderr)
    raise typer.Exit(exit_code)


@contextmanager
def _messages(session: Session) -> Iterator[None]:
    """Warnings as one line on stderr, and the library's log with --verbose."""
    from isimed_index.errors import IsimedNote

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        text = " ".join(str(message).split())
        if issubclass(category, IsimedNote):
            session.note(text)
        elif session.verbose or category.__module__.startswith("isimed_"):  # also with --quiet
            print(f"warning: {text}", file=sys.stderr)

    logger = logging.getLogger("isimed_index")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    with warnings.catch_warnings():
        warnings.showwarning = show
        if session.verbose:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
