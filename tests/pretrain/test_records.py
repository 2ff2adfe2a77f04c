"""Where the figures of a run go: lines of JSON, TensorBoard's event files, Weights & Biases without their service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pretraining import config, sources

from isimed_index.errors import MissingExtra
from isimed_index.pretrain.records import JsonLines, TensorBoard, Watchers, WeightsAndBiases, open_records, plain
from isimed_index.pretrain.trainer import train
from isimed_index.progress import Silent

ENTRIES = [{"epoch": n, "step": 3 * n, "loss": 1.0 / n, "validation_loss": 2.0 / n, "spread": None} for n in (1, 2, 3)]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars of a folder as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_lines_of_epochs_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, 0)
    for entry in ENTRIES:
        lines.write(entry)
    again = JsonLines(path, 2)
    assert again.last_step == 6
    again.write(ENTRIES[2])
    assert [json.loads(line) for line in path.read_text().splitlines()] == ENTRIES
    assert JsonLines(path, 0).last_step == 0
    assert path.read_text() == ""


def test_lines_outlive_a_kill_while_a_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropping lines writes the others aside first; an epoch is on the disk before its checkpoint can be."""
    path = tmp_path / "metrics.jsonl"
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor))[1])
    lines = JsonLines(path, 0)
    for number, entry in enumerate(ENTRIES):
        before = len(synced)
        lines.write(entry)
        assert len(synced) > before, number

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            JsonLines(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == ENTRIES


def test_figures_that_do_not_exist_are_null() -> None:
    assert plain({"a": 1 / 3, "b": float("nan"), "c": float("inf"), "epoch": 2}) == {
        "a": 0.333333,
        "b": None,
        "c": None,
        "epoch": 2,
    }


def test_tensorboard_reads_what_was_written_once_after_a_resumption(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path, 0)
    for entry in ENTRIES:
        first.write(entry)
    first.close()
    second = TensorBoard(tmp_path, 6)  # the third epoch is done again
    second.write(ENTRIES[2] | {"loss": 0.25})
    second.close()
    read = scalars(tmp_path)
    assert read["training/loss"] == [(3, 1.0), (6, 0.5), (9, 0.25)]
    assert [step for step, _ in read["validation/loss"]] == [3, 6, 9]
    assert "training/spread" not in read


class Interrupt(Silent):
    """Ctrl-C at the fifth step."""

    left = 5

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= n
        if not self.left:
            raise KeyboardInterrupt


def test_a_training_shows_its_curves_in_tensorboard(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    setup = replace(config(), validation_share=0.3)
    options: dict[str, Any] = {"subjects": ["a", "b", "c"], "device": "cpu"}
    watched = {"watchers": Watchers(tensorboard=tmp_path / "curves"), **options}
    with pytest.raises(KeyboardInterrupt):
        train(setup, sources(3), tmp_path / "run", progress=Interrupt(), **watched)
    trained = train(setup, sources(3), tmp_path / "run", resume=True, **watched)
    entries = [json.loads(line) for line in trained.metrics.read_text().splitlines()]
    read = scalars(tmp_path / "curves")
    for key in ("loss", "rankme", "distance_error_mm", "distance_error_across_mm", "learning_rate"):
        assert [step for step, _ in read[f"training/{key}"]] == [3, 6]
        assert [value for _, value in read[f"training/{key}"]] == pytest.approx([e[key] for e in entries], rel=1e-5)
    assert len(read["validation/loss"]) == 2


@pytest.mark.parametrize(("module", "extra"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_what_is_missing_is_named_before_training_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(("torch.utils.tensorboard", "wandb"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    watchers = Watchers(tensorboard=tmp_path) if module == "tensorboard" else Watchers(wandb="heads")
    with pytest.raises(MissingExtra) as missing:
        open_records(tmp_path / "metrics.jsonl", watchers, name="a", run="b", settings={}, epochs=0)
    assert f"isimed-index[{extra}]" in missing.value.next_step


def test_weights_and_biases_takes_the_figures_and_nothing_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    record = WeightsAndBiases("heads", "tiny", "01RUN", {"seed": 7})
    for entry in ENTRIES:
        record.write(entry)
    record.close()
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    while b"validation_loss" not in (content := written.read_bytes()):  # it is written by a process of their own
        time.sleep(0.02)
    host = subprocess.run(["uname", "-n"], capture_output=True, check=True).stdout.strip()
    assert str(tmp_path).encode() not in content
    assert len(host) < 4 or host not in content
