"""`isimed demo`: the whole path on real anatomy whose true correspondence is known, without any download.

MNI152 brain (in the nilearn wheel) ─▶ 16 deformed 'subjects' ─▶ isimed add ▸ pretrain ▸ index ▸ query ▸ sql ▸ plot
                                                └── truth ──▶ error in mm on held-out subjects
"""

from __future__ import annotations

import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isimed_cli.app import Format, Session, command
from isimed_index.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from isimed_index.testing.phantoms import DeformedCohort

    Points = NDArray[np.float64]  # (n, 3), RAS+ mm
    # A point of one scan → its place in other scans, by scan id.
    Lookup = Callable[[str, tuple[float, float, float]], dict[str, tuple[float, float, float]]]

SUBJECTS = 16  # the last quarter is held out
LANDMARKS = 40
SEED = 9
TRAIN_MINUTES = 5.0
EPOCHS_PER_MINUTE = 2.4  # of the tiny preset on two cores
QUERY_MNI_MM = (26.0, -20.0, -14.0)  # right hippocampus

IMAGES, TRUTH, STORE = "images", "images/truth.npz", "cohort.isimed"


@command("demo", example="isimed demo --out isimed-demo", store=False)
def demo(
    session: Session,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for all that is made.")] = Path(
        "isimed-demo"
    ),
    minutes: Annotated[
        float,
        typer.Option(metavar="N", min=0.1, max=600, help="About how long to train; all else takes some four more."),
    ] = TRAIN_MINUTES,
) -> None:
    """Run the whole path on a real brain.

    Makes a cohort whose truth is known, then add, pretrain, index, query, sql and plot, and measures the error in
    mm on subjects kept from training. Nothing is downloaded. Each command is printed
    as you would type it, with its real output.
    """
    began = time.monotonic()
    prepare_folder(out)
    cohort, landmarks = make_cohort(session, out)
    print(f"$ cd {shlex.quote(str(out))}")
    flags = [flag for flag, on in (("--quiet", session.quiet), ("--no-progress", session.no_progress)) if on]
    for arguments in command_lines(cohort, minutes):
        run_command(arguments, flags, out)
    rows = measure_store(session, cohort, landmarks, out)
    report(rows, out, time.monotonic() - began)


def prepare_folder(out: Path) -> None:
    """Make the folder; clear what an earlier demo left in it, and touch nothing else."""
    if (out / TRUTH).is_file():
        shutil.rmtree(out / IMAGES)
        shutil.rmtree(out / STORE, ignore_errors=True)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"expected a new or empty folder, found {out.name!r} in use", next_step="isimed demo --out DIR"
        )
    out.mkdir(parents=True, exist_ok=True)


def make_cohort(session: Session, out: Path) -> tuple[DeformedCohort, Points]:
    """Write the subjects and return them with landmarks (n, 3) in the template's mm."""
    from isimed_index.testing.phantoms import deformed_cohort, mni152_template

    template = mni152_template()
    print(
        f"# {SUBJECTS} subjects from the MNI152 brain by known smooth deformations, with their own contrast, bias,\n"
        f"# noise, field of view, spacing and axis order; {SUBJECTS // 4} of them are kept from training",
        flush=True,
    )
    with session.progress() as progress:
        cohort = deformed_cohort(template, SUBJECTS, SEED, out / IMAGES, progress=progress)
    return cohort, template.landmarks_mm(LANDMARKS)


def command_lines(cohort: DeformedCohort, minutes: float) -> Iterator[list[str]]:
    """The arguments of each command of the demo, in order."""
    asked = next(subject for subject in cohort.split("test") if cohort.in_view(subject.id, QUERY_MNI_MM))
    point = ",".join(f"{value:.1f}" for value in cohort.map_point(asked.id, QUERY_MNI_MM))
    epochs = max(1, round(minutes * EPOCHS_PER_MINUTE))
    where = ["--point", point, "--scan", asked.scan]
    yield ["add", IMAGES, "--metadata", f"{IMAGES}/participants.tsv"]
    yield ["pretrain", "--preset", "tiny", "--where", "split = 'train'", "--epochs", str(epochs), "--seed", "0"]
    yield ["index"]
    yield ["query", *where, "-k", "5"]
    yield [
        "sql",
        "SELECT split, count(*) AS scans, count(DISTINCT orientation) AS axis_orders FROM scans GROUP BY split",
    ]
    yield ["plot", "match", *where, "-k", "3", "--out", "match.png"]
    yield ["plot", "umap", "--out", "umap.png"]


def run_command(arguments: Sequence[str], flags: Sequence[str], directory: Path) -> None:
    """Print the command as one types it and run it in its own process; its failure ends the demo with its exit code."""
    print(f"\n$ {shlex.join(['isimed', *arguments])}", flush=True)
    done = subprocess.run([sys.executable, "-m", "isimed_cli.main", *arguments, *flags], cwd=directory, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


def measure_store(session: Session, cohort: DeformedCohort, landmarks: Points, out: Path) -> dict[str, list[Any]]:
    """The error table of the store that the demo made, on its held-out subjects."""
    import isimed_index

    store = isimed_index.open(out / STORE)

    def lookup(scan: str, point: tuple[float, float, float]) -> dict[str, tuple[float, float, float]]:
        columns = store.lookup(point=point, scan=scan, k=SUBJECTS, where="split = 'test'").columns
        places = zip(columns["x_mm"], columns["y_mm"], columns["z_mm"], strict=True)
        return dict(zip(columns["scan"], places, strict=True))

    print(
        f"\n# Held-out subjects, {LANDMARKS} landmarks, from each to each other: distance to the true point", flush=True
    )
    with session.progress() as progress:
        progress.start("measure", len(cohort.split("test")), "scans")
        rows = measure(cohort, landmarks, lookup, advance=progress.advance)
        progress.finish()
    return rows


def measure(
    cohort: DeformedCohort, landmarks: Points, lookup: Lookup, advance: Callable[[], object] = lambda: None
) -> dict[str, list[Any]]:
    """Errors in mm among the held-out subjects: of `lookup`, and of two guesses that need no learning.

    Every landmark (n, 3, template mm) in view of both scans is asked for in one and compared with the truth in the
    other. Columns: predictor, pairs, points, mean_mm, median_mm, p95_mm, missing (places the lookup did not give).
    """
    import numpy as np

    members = cohort.split("test")
    centres = {subject.scan: centre_of_mass_mm(cohort.directory / subject.file) for subject in members}
    errors: dict[str, list[float]] = {"isimed": [], "same world point": [], "centre of mass": []}
    missing = 0
    for source in members:
        asked = landmarks[cohort.in_view(source.id, landmarks)]
        points = cohort.map_point(source.id, asked)
        found = [lookup(source.scan, (float(x), float(y), float(z))) for x, y, z in points]
        for target in members:
            if target is source:
                continue
            truth = cohort.map_point(target.id, asked)
            shift = centres[target.scan] - centres[source.scan]
            for i in np.flatnonzero(cohort.in_view(target.id, asked)):
                errors["same world point"].append(float(np.linalg.norm(points[i] - truth[i])))
                errors["centre of mass"].append(float(np.linalg.norm(points[i] + shift - truth[i])))
                place = found[i].get(target.scan)
                if place is None:
                    missing += 1
                else:
                    errors["isimed"].append(float(np.linalg.norm(np.asarray(place) - truth[i])))
        advance()
    return {
        "predictor": list(errors),
        "pairs": [len(members) * (len(members) - 1)] * len(errors),
        "points": [len(found) for found in errors.values()],
        "mean_mm": [_summary(values, np.mean) for values in errors.values()],
        "median_mm": [_summary(values, np.median) for values in errors.values()],
        "p95_mm": [_summary(values, lambda v: np.percentile(v, 95)) for values in errors.values()],
        "missing": [missing, 0, 0],
    }


def centre_of_mass_mm(path: Path) -> Points:
    """Centre (3,) of a volume's foreground in RAS+ mm: the guess that centres two heads on each other."""
    import numpy as np

    from isimed_index.space import apply_affine
    from isimed_index.testing.templates import read_template

    image = read_template(path)
    return apply_affine(image.affine, np.argwhere(image.foreground()).mean(axis=0))


def report(rows: dict[str, list[Any]], out: Path, seconds: float) -> None:
    """Print the error table, keep it as CSV, and say what was written and what it cost."""
    from isimed_cli.render import as_text

    print(as_text(rows, Format.TABLE), end="")
    (out / "errors.csv").write_text(as_text(rows, Format.CSV), encoding="utf-8")
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    written = ", ".join(str(out / name) for name in (STORE, "match.png", "umap.png", "errors.csv"))
    print(f"\n# {seconds / 60:.1f} minutes, at most {peak / 1024**2:.1f} GiB in one process; wrote {written}")


def _summary(values: list[float], statistic: Callable[[list[float]], Any]) -> float | None:
    """A statistic of the errors, or nothing when there are none."""
    return float(statistic(values)) if values else None
