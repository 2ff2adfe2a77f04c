"""What each training method makes of the same cohort in the same time: the paper's, the default, and no training.

    python benchmarks/methods.py --data FOLDER [--minutes 10] [--seeds 3] [--heads 6] [--keep FOLDER] [--control SCRIPT]
        [--out FILE.json]

FOLDER holds real heads (docs/how-to/real-test-data.md: `ixi`). All methods train the same trunk (`StemNet` of one
width) on the training subjects, on one core, for as many steps as fit into the minutes, as two short trials of each
method tell; two trainings run side by side. The paper's methods take 256 patches a step instead of 1024, for at the
paper's own batch few steps fit. `dense` has the paper's objective alone, but the sampling of `default`: hundreds of
overlapping patches of every crop; `isimed-scaled` the paper's objective in units of 100 mm, at which the trunk's heads
begin. `random` is the untrained trunk, its features whitened on three heads. Everything
that is trained is searched as its card says. This takes hours: with `--keep` the store and every row that is whole stay
in a folder, and the same command goes on after them. SCRIPT is the published training-free control, which finds its
heads in `data/ixi` beside its own folder; it is run on the same heads, without and with its refinement.

Then test heads, which no method has seen and on which nothing was chosen, are matched in all ordered pairs, the target
as it is and under each change of `isimed_index.testing.variants`. Told, for every method, mean and sd over seeds:

    within, across   |D_latent − D_physical| in mm, pairs of patches of one head and of two, by the embedding. Latent
                     distances are scaled by the one factor that fits best, for not every method has millimetres; places
                     of two heads are compared after an affine to the mean of the landmarks, which uses labels
    rankme           effective rank of the embeddings
    nearest, affine, local   error in mm at the centroids of the labels after each step of the plain consensus
    deep             `local` over the deep structures alone
    knn              share of patches whose structure is that of most of their five nearest patches in other heads
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import isimed_index as isi
from isimed_index.config import PretrainConfig, pretrain_config
from isimed_index.encode import encode_volume
from isimed_index.evaluate.plain import Described, plain_consensus
from isimed_index.scans.chunks import open_chunks
from isimed_index.scans.prepare import prepare
from isimed_index.space import apply_affine
from isimed_index.store.manifest import utc_now
from isimed_index.testing.variants import VARIANTS, Head, vary

WIDTH = 16
EMBEDDING = 128
PAPER = {"network": "stem", "width": WIDTH, "embedding_dim": EMBEDDING, "batch_scans": 16}
RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {  # name → preset, method, what is changed
    "default": ("default", "isimed", {"width": WIDTH}),
    "dense": ("default", "isimed", {"width": WIDTH, "coordinate_weight": 0.0, "descriptor_weight": 0.0}),
    "isimed": ("paper", "isimed", PAPER),
    "isimed-scaled": ("paper", "isimed", {**PAPER, "unit_mm": 100.0}),
    "barlowtwins": ("paper", "barlowtwins", PAPER),
    "simclr": ("paper", "simclr", PAPER),
    "regisimed": ("paper", "regisimed", PAPER),
}
RANDOM = "random"
EPOCHS = 20  # of as many steps as fit: what schedules and records go by
_TRIAL, _TRIAL_SCANS = 14, 12  # steps of the shorter trial, which shows all of so many scans
STRIDE_VOX = 4
CHOSEN_ON = 4  # the first test heads were looked at when the default was chosen: they judge no more
LEAST_VOXELS = 20  # of a landmark
MARGIN_MM = 6.0  # of a landmark from the border of what is left of the field of view
NEIGHBOURS = 5
SAMPLE = 400  # patches of a head, for distances and neighbours


def recipe(name: str, seed: int) -> PretrainConfig:
    """The configuration of a method, but for the number of its steps."""
    preset, method, changed = RECIPES[name]
    config = pretrain_config(preset, overrides={"method": method, "seed": seed, **changed})
    return replace(config, epochs=EPOCHS, steps_per_epoch=1)


def heads_of(data: Path, split: str) -> list[str]:
    """The subjects of one split."""
    with (data / "ixi" / "participants.tsv").open(encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return [row["participant_id"] for row in rows if row["split"] == split]


def judged(data: Path, heads: int) -> list[str]:
    """The test subjects that judge."""
    return heads_of(data, "test")[CHOSEN_ON:][:heads]


def build_store(data: Path, path: Path, heads: int) -> None:
    """A store at `path` of all training heads, and of the test heads that are matched, with their label maps."""
    images = data / "ixi" / "t1"
    begun = path.with_suffix(".begun")
    shutil.rmtree(begun, ignore_errors=True)
    store = isi.create(begun)
    store.add([images / f"{subject}_T1.nii.gz" for subject in heads_of(data, "train")])
    labels = str(data / "ixi" / "seg" / "{stem}_DLMUSE.nii.gz")
    store.add([images / f"{subject}_T1.nii.gz" for subject in judged(data, heads)], labels=labels)
    begun.rename(path)


def train(path: Path, name: str, seed: int, steps: int, data: Path, scans: int = 0) -> dict[str, Any]:
    """Train one method on all training heads, or the first few, and store its encoder; in a process of its own."""
    store = isi.open(path)
    preset, method, changed = RECIPES[name]
    subjects = ", ".join(f"'{subject}_T1'" for subject in heads_of(data, "train")[: scans or None])
    epochs = EPOCHS if steps % EPOCHS == 0 else 1
    values = {**changed, "steps_per_epoch": steps // epochs, "cache_gib": 4.0, "sampler_threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        began = time.process_time()
        card = store.pretrain(
            method, preset, config=file, epochs=epochs, where=f"scan IN ({subjects})", seed=seed, device="cpu"
        )
        seconds = time.process_time() - began
    return {"encoder": card.id, "steps": steps, "core_minutes": round(seconds / 60, 2)}


def steps_in(minutes: float, path: Path, name: str, data: Path) -> int:
    """How many steps of a method fit into the minutes of one core, once its scans are prepared."""
    spent = [60 * train(path, name, 0, steps, data, _TRIAL_SCANS)["core_minutes"] for steps in (_TRIAL, 2 * _TRIAL)]
    return EPOCHS * max(1, round(60 * minutes * _TRIAL / max(spent[1] - spent[0], 1e-3) / EPOCHS))


class Judge:
    """The test heads of a store, and what an encoder makes of them."""

    def __init__(self, path: Path, encoder: str, data: Path, heads: int) -> None:
        from isimed_index.encoders.runtime import load_encoder

        self.store = isi.open(path, mode="r")
        self.whiten = encoder.startswith(RANDOM)
        self.encoder = (
            untrained(int(encoder.removeprefix(RANDOM)))
            if self.whiten
            else load_encoder(self.store.snapshot.encoder_path(encoder), "cpu")
        )
        self.heads = [self._head(f"{subject}_T1") for subject in judged(data, heads)]
        with (data / "ixi" / "labels.tsv").open(encoding="utf-8") as file:
            self.deep = {int(row["label"]) for row in csv.DictReader(file, delimiter="\t") if row["deep"] == "1"}
        self.landmarks = [self._landmarks(f"{subject}_T1") for subject in judged(data, heads)]
        self.rows = [self.encoded(head) for head in self.heads]
        self.standard = self._standard([outputs[self.encoder.card.match_output] for _, outputs in self.rows[:3]])

    def _head(self, scan: str) -> Head:
        stored = open_chunks(self.store.snapshot.chunks_path(scan))
        labels = stored.labels()
        assert labels is not None
        return Head(stored.values(), labels, stored.affine)

    def _landmarks(self, scan: str) -> dict[int, np.ndarray]:
        query = "SELECT label, x_mm, y_mm, z_mm FROM labels WHERE scan = $scan AND voxels >= $least"
        rows = self.store.sql(query, {"scan": scan, "least": LEAST_VOXELS}).to_pylist()
        return {row["label"]: np.array([row["x_mm"], row["y_mm"], row["z_mm"]]) for row in rows}

    def encoded(self, head: Head) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Centres (n, 3) RAS+ mm of a head's patches, and the encoder's outputs, name → (n, d)."""
        card = self.encoder.card
        volume = prepare(head.values.astype(np.float32), head.affine, card.spacing_mm, card.intensity)
        grid, numbers, vectors, _ = encode_volume(self.encoder, volume, STRIDE_VOX)
        return grid.centres_mm(numbers), vectors

    def _standard(self, samples: list[np.ndarray]) -> Any:
        """What is done to vectors before they are compared."""
        if self.whiten:
            rows = np.concatenate(samples).astype(np.float64)
            middle = rows.mean(axis=0)
            _, values, axes = np.linalg.svd(rows - middle, full_matrices=False)
            turn = axes[:64].T / (values[:64] / len(rows) ** 0.5 + 1e-3)
            return lambda x: unit((x - middle) @ turn)
        return unit if self.encoder.card.metric == "cosine" else lambda x: x.astype(np.float32)

    def described(self, rows: tuple[np.ndarray, dict[str, np.ndarray]]) -> Described:
        return Described(rows[0], self.standard(rows[1][self.encoder.card.match_output]))

    def figures(self) -> dict[str, Any]:
        """Everything that is told of an encoder."""
        plain = [self.described(rows) for rows in self.rows]
        told: dict[str, Any] = self._structure(plain)
        for variant in VARIANTS:
            told[variant] = self._matched(plain, variant)
        return told

    def _matched(self, plain: list[Described], variant: str) -> dict[str, float]:
        """Mean errors in mm over all ordered pairs of heads, the target under a change."""
        errors: dict[str, list[float]] = {"nearest": [], "affine": [], "local": [], "deep": []}
        for b, head in enumerate(self.heads):
            varied, to = vary(head, variant)
            target = plain[b] if variant == "plain" else self.described(self.encoded(varied))
            truth = {label: apply_affine(to, point) for label, point in self.landmarks[b].items()}
            corner = varied.affine @ [0, 0, 0, 1]
            seen = {label for label, point in truth.items() if (point > corner[:3] + MARGIN_MM).all()}
            for a in range(len(self.heads)):
                labels = sorted(self.landmarks[a].keys() & seen)
                if a == b:
                    continue
                answers = plain_consensus(plain[a], target, np.array([self.landmarks[a][label] for label in labels]))
                for step in ("nearest", "affine", "local"):
                    found = getattr(answers, step)
                    error = [float(np.linalg.norm(p - truth[label])) for p, label in zip(found, labels, strict=True)]
                    errors[step] += error
                errors["deep"] += [e for e, label in zip(error, labels, strict=True) if label in self.deep]
        return {step: round(statistics.fmean(values), 2) for step, values in errors.items()}

    def _structure(self, plain: list[Described]) -> dict[str, float]:
        """Distance errors within and across heads, effective rank, and structures of nearest patches."""
        rng = np.random.default_rng(0)
        parts, embeddings, common, places, structures = [], [], [], [], []
        middle = self._mean_landmarks()
        for head, described, (_, outputs), landmarks in zip(self.heads, plain, self.rows, self.landmarks, strict=True):
            voxel = np.rint(apply_affine(np.linalg.inv(head.affine), described.places_mm)).astype(int)
            inside = ((voxel >= 0) & (voxel < head.labels.shape)).all(axis=1)
            label = np.zeros(len(voxel), int)
            label[inside] = head.labels[tuple(voxel[inside].T)]
            some = rng.permutation(np.flatnonzero(label))[:SAMPLE]
            parts.append(described.vectors[some])
            embeddings.append(parts[-1] if self.whiten else outputs["embedding"][some])
            places.append(described.places_mm[some])
            structures.append(label[some])
            keys = sorted(landmarks.keys() & middle.keys())
            design = np.c_[np.array([landmarks[key] for key in keys]), np.ones(len(keys))]
            to_common = np.linalg.lstsq(design, np.array([middle[key] for key in keys]), rcond=None)[0]
            common.append(np.c_[places[-1], np.ones(len(some))] @ to_common)
        within = [(spread(x), spread(p)) for x, p in zip(embeddings, places, strict=True)]
        pairs = list(itertools.combinations(range(len(parts)), 2))
        across = [(between(embeddings[a], embeddings[b]), between(common[a], common[b])) for a, b in pairs]
        rows = np.concatenate(embeddings)
        singular = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
        share = singular / singular.sum() + 1e-7
        return {
            "within": distance_error(within),
            "across": distance_error(across),
            "rankme": round(float(np.exp(-(share * np.log(share)).sum())), 1),
            "knn": self._neighbours(parts, structures),
        }

    def _mean_landmarks(self) -> dict[int, np.ndarray]:
        shared = set.intersection(*(set(landmarks) for landmarks in self.landmarks))
        return {label: np.mean([landmarks[label] for landmarks in self.landmarks], axis=0) for label in shared}

    def _neighbours(self, parts: list[np.ndarray], structures: list[np.ndarray]) -> float:
        right = []
        for own in range(len(parts)):
            others = [n for n in range(len(parts)) if n != own]
            rows, labels = (np.concatenate([x[n] for n in others]) for x in (parts, structures))
            near = np.argsort(between(parts[own], rows), axis=1)[:, :NEIGHBOURS]
            for found, label in zip(labels[near], structures[own], strict=True):
                values, counts = np.unique(found, return_counts=True)
                right.append(values[counts.argmax()] == label)
        return round(float(np.mean(right)), 3)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    scaled: np.ndarray = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)).astype(np.float32)
    return scaled


def between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distances (n, m) of the rows of two arrays."""
    square = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.sqrt(np.maximum(square, 0))


def spread(x: np.ndarray) -> np.ndarray:
    """Distances of all pairs of rows."""
    return between(x, x)[np.triu_indices(len(x), 1)]


def distance_error(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean |D_latent − D_physical| in mm, latent distances scaled by least squares."""
    latent, physical = (np.concatenate([np.ravel(pair[n]) for pair in pairs]) for n in (0, 1))
    factor = float((latent * physical).sum() / max((latent**2).sum(), 1e-12))
    return round(float(np.abs(factor * latent - physical).mean()), 1)


def untrained(seed: int) -> Any:
    """The trunk of the others with random weights, its batch-norms set by a few patches of noise-free anatomy."""
    import torch

    from isimed_index.encoders.networks import build_network
    from isimed_index.encoders.runtime import TorchEncoder
    from isimed_index.pretrain.trainer import new_card
    from isimed_index.testing.templates import ellipsoid_head

    features = 12 * WIDTH
    card = new_card(replace(recipe("isimed", seed), embedding_dim=features), RANDOM, RANDOM)
    torch.manual_seed(seed)
    network = build_network(card.factory, card.outputs, card.network).train()
    torch.nn.init.eye_(network.heads["embedding"].weight.data.view(features, features))
    torch.nn.init.zeros_(network.heads["embedding"].bias)
    head = ellipsoid_head(2.0)
    volume = prepare(head.values, head.affine, card.spacing_mm, card.intensity)
    with torch.no_grad():
        for _ in range(3):
            network(torch.tensor(volume.values)[None, None])
    return TorchEncoder(card, network, torch.device("cpu"))


def called(arguments: list[str]) -> Any:
    """This script in a process of its own with one thread; what it prints last."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(out.stdout.splitlines()[-1])


def compared(given: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """Every method with every seed, trained, two at a time, then judged; what lies in `place` is not done again."""
    path, done, trials = place / "cohort.isimed", place / "rows.jsonl", place / "steps.json"
    if not path.exists():
        build_store(given.data, path, given.heads)
    shared = ["--data", str(given.data), "--heads", str(given.heads), "--store", str(path)]
    names = [name for name in [*RECIPES, RANDOM] if name in (given.only or [*RECIPES, RANDOM])]
    steps = json.loads(trials.read_text()) if trials.exists() else {RANDOM: 0}
    rows = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []

    def fitting(name: str) -> int:
        return int(called([*shared, "--minutes", str(given.minutes), "--trial", name]))

    def one(task: tuple[int, str]) -> dict[str, Any]:
        seed, name = task
        row: dict[str, Any] = {"method": name, "seed": seed}
        encoder = f"{RANDOM}{seed}"
        if name != RANDOM:
            row |= called([*shared, "--train", name, "--seed", str(seed), "--steps", str(steps[name])])
            encoder = row["encoder"]
        row |= called([*shared, "--judge", encoder])
        with done.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row

    with ThreadPoolExecutor(2) as pool:
        new = [name for name in names if name not in steps]
        steps |= dict(zip(new, pool.map(fitting, new), strict=True))
        trials.write_text(json.dumps(steps))
        tasks = list(itertools.product(range(given.seeds), names))
        known = {(row["seed"], row["method"]): row for row in rows}
        known |= {(row["seed"], row["method"]): row for row in pool.map(one, [t for t in tasks if t not in known])}
    return [known[task] for task in tasks]


def controlled(script: Path, data: Path, heads: int) -> list[dict[str, Any]]:
    """What the training-free control prints of the judged heads: a line a variant, without and with its refinement."""
    with tempfile.TemporaryDirectory() as place:
        ixi, copy = Path(place) / "data" / "ixi", Path(place) / "controls" / script.name
        ixi.mkdir(parents=True)
        copy.parent.mkdir()
        shutil.copy(script, copy)
        for name in ("t1", "seg", "labels.tsv"):
            (ixi / name).symlink_to((data / "ixi" / name).resolve())
        lines = [f"{subject}\ttest" for subject in judged(data, heads)]
        (ixi / "participants.tsv").write_text("\n".join(["participant_id\tsplit", *lines]) + "\n")
        told = []
        for rounds in ("0", "3"):
            command = [sys.executable, str(copy), "--heads", str(heads), "--descriptor", "random", "--refine", rounds]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            told += [json.loads(line) for line in out.stdout.splitlines()]
    return told


def table(rows: list[dict[str, Any]]) -> str:
    """Mean ± sd over seeds, a line a method, as Markdown."""
    columns = [
        "within",
        "across",
        "rankme",
        "knn",
        *(f"{v} {s}" for v in VARIANTS for s in ("nearest", "local", "deep")),
    ]
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(row["method"] for row in rows):
        of = [row for row in rows if row["method"] == name]
        cells = []
        for column in columns:
            variant, _, step = column.partition(" ")
            values = [row[variant][step] if step else row[variant] for row in of]
            spread_of = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3g}{spread_of}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table, and write all figures to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of real volumes; without it nothing is measured")
    parser.add_argument("--minutes", type=float, default=10.0, help="of one core, for each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heads", type=int, default=6, help="test heads that are matched")
    parser.add_argument("--only", action="append", choices=[*RECIPES, RANDOM])
    parser.add_argument(
        "--keep", type=Path, help="folder of what is done, to go on from; of one --data, --minutes, --heads"
    )
    parser.add_argument("--control", type=Path, help="the control's script")
    parser.add_argument("--out", type=Path)
    for hidden in ("--store", "--trial", "--train", "--judge"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--seed", "--steps"):
        parser.add_argument(hidden, type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.data is None:
        print("no --data: real heads are needed", file=sys.stderr)
        return 0
    if given.trial:
        print(json.dumps(steps_in(given.minutes, Path(given.store), given.trial, given.data)))
        return 0
    if given.train:
        print(json.dumps(train(Path(given.store), given.train, given.seed, given.steps, given.data)))
        return 0
    if given.judge:
        print(json.dumps(Judge(Path(given.store), given.judge, given.data, given.heads).figures()))
        return 0
    with nullcontext(given.keep) if given.keep else tempfile.TemporaryDirectory() as place:
        Path(place).mkdir(parents=True, exist_ok=True)
        rows = compared(given, Path(place))
    print(table(rows))
    report = {"date": utc_now()[:10], "minutes": given.minutes, "heads": given.heads, "rows": rows}
    if given.control:
        report["control"] = controlled(given.control, given.data, given.heads)
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
