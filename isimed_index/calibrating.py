"""Calibrating: how far answers are off is measured at the label centroids of subjects that trained nothing.

    held-out labelled scans ─▶ ordered pairs ─▶ centroids looked up ─▶ errors ─▶ calibration, stored in the frame

Labels are the only truth that a store has. Without enough of them answers have no error, rather than a guess.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from isimed_index.calibration import Calibration
from isimed_index.encoders.card import RUN, EncoderCard
from isimed_index.errors import StoreDamaged
from isimed_index.frame import write_frame
from isimed_index.in_order import in_order
from isimed_index.lookup import Lookup
from isimed_index.progress import Progress
from isimed_index.space import apply_affine
from isimed_index.store.derived import commit_derived
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Transaction

LEAST_SUBJECTS = 8  # fewer tell too little of others (decision 0027)
LEAST_VOXELS = 20  # a label with fewer has no trustworthy centroid
_MOST_SUBJECTS = 32
_PAIRS, _QUESTIONS = 400, 6000  # at most
_MORE = 1.25  # times as many subjects: then it is measured anew

Points = Mapping[int, NDArray[np.float64]]  # label → its centroid (3,), RAS+ mm


def commit_calibration(transaction: Transaction, card: EncoderCard, progress: Progress) -> None:
    """Store in an encoder's frame what its answers are off by, where enough held-out subjects have labels.

    Nothing is done where that is known from as many subjects already, where charts are awaited, or where another
    process has committed a frame since: its next index run does it.
    """
    with transaction.repository.pin() as snapshot:
        before = snapshot.newest("frame", card.id)
        if before is None:
            return
        lookup = Lookup(snapshot, card.id)
        frame = lookup.frame
        held_out = held_out_landmarks(lookup)
        known = 0 if frame.calibration is None else frame.calibration.subjects
        if frame.awaited or len(held_out) < LEAST_SUBJECTS or len(held_out) < _MORE * known:
            return
        calibration = measure(lookup, held_out, progress)
        if calibration is None:
            return
        directory = transaction.stage("frame")
        write_frame(directory, replace(frame, calibration=calibration), snapshot.voxels_of)
        artefact = transaction.add("frame", directory, encoder=card.id)
    commit_derived(transaction, artefact, {"frame": before})


def held_out_landmarks(lookup: Lookup) -> dict[str, Points]:
    """The landmarks of labelled scans whose charts hold, by scan: one of each subject that trained nothing, at most 32.

    A subject trained the encoder when one of its scans did, or when one is of the split `train`. Where it is not known
    what the encoder was shown, every subject may have trained it that has no split.
    """
    snapshot = lookup.snapshot
    landmarks: dict[str, dict[int, NDArray[np.float64]]] = {}
    for row in snapshot.table("labels").to_pylist():
        if row["voxels"] >= LEAST_VOXELS:
            at = np.array([row["x_mm"], row["y_mm"], row["z_mm"]])
            landmarks.setdefault(row["scan"], {})[row["label"]] = at
    scans = snapshot.table("scans").select(["scan", "subject", "split"]).to_pylist()
    shown = trained_on_voxels(snapshot, lookup.card)
    voxels = snapshot.voxels_of
    seen = {row["subject"] for row in scans if row["split"] == "train"}
    if shown is None:
        seen |= {row["subject"] for row in scans if row["split"] is None}
    else:
        seen |= {row["subject"] for row in scans if voxels.get(row["scan"]) in shown}
    chosen: dict[str, str] = {}
    for row in sorted(scans, key=lambda row: str(row["scan"])):
        scan = row["scan"]
        charted = scan in lookup.segments and lookup.frame.charts[scan].holds
        if charted and scan in landmarks and row["subject"] not in seen:
            chosen.setdefault(row["subject"], scan)
    found = list(chosen.values())
    spread = np.linspace(0, len(found) - 1, min(len(found), _MOST_SUBJECTS)).round().astype(int)
    return {found[number]: landmarks[found[number]] for number in spread}


def trained_on_voxels(snapshot: Snapshot, card: EncoderCard) -> set[str] | None:
    """The paths of the stored voxels that an encoder was trained on; None where that is not known."""
    with suppress(StoreDamaged, OSError, ValueError, KeyError, TypeError):
        text = (snapshot.encoder_path(card.id) / RUN).read_text(encoding="utf-8")
        return set(json.loads(text)["voxels"])
    return None


def measure(lookup: Lookup, held_out: Mapping[str, Points], progress: Progress) -> Calibration | None:
    """The calibration from the landmarks (by scan) that pairs of scans share; None where they share none.

    Errors are those of answers that are in view.
    """
    rng = np.random.default_rng(0)
    asked = _questions(held_out, rng)

    def errors_from(scan: str) -> list[tuple[float, ...]]:
        # Lattices are read for each scan that asks: all of them in memory may be too much.
        source = lookup.source(scan, lookup.read(scan))
        rows = []
        for target, labels in asked[scan].items():
            lattice = lookup.read(target)
            for label in labels:
                at = held_out[scan][label]
                found = lookup.find(source, lookup.sought(source, at), target, lattice)
                away = float(np.linalg.norm(found.xyz_mm - held_out[target][label]))
                if found.in_view and np.isfinite(found.residual_mm):
                    rows.append((label, *apply_affine(source.chart.affine, at), found.residual_mm, away))
        return rows

    progress.start("calibrate", len(asked), "scans")
    rows: list[tuple[float, ...]] = []
    with closing(in_order(errors_from, asked)) as answers:
        for of_scan in answers:
            rows += of_scan
            progress.advance(1)
    progress.finish()
    if not rows:
        return None
    landmarks, *place, residual, away = np.array(rows).T
    return Calibration.of(len(held_out), landmarks.astype(np.int64), np.stack(place, axis=1), residual, away)


def _questions(held_out: Mapping[str, Points], rng: np.random.Generator) -> dict[str, dict[str, list[int]]]:
    """By scan that asks and scan that answers: landmarks of both; a sample where pairs or landmarks are many."""
    shared = {(a, b): sorted(held_out[a].keys() & held_out[b].keys()) for a in held_out for b in held_out if a != b}
    pairs = [pair for pair, labels in shared.items() if labels]
    chosen = [pairs[number] for number in sorted(rng.permutation(len(pairs))[:_PAIRS])]
    asked: dict[str, dict[str, list[int]]] = {}
    for a, b in chosen:
        labels = rng.permutation(shared[a, b])[: max(1, _QUESTIONS // len(chosen))]
        asked.setdefault(a, {})[b] = sorted(labels.tolist())
    return asked
