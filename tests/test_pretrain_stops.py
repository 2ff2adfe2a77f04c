"""`isimed pretrain` that is killed or asked to stop goes on where its last checkpoint was, to the same encoder."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cohorts import add_random_encoder, tiny_scan
from safetensors import SafetensorError, safe_open
from started import Started

import isimed_index as isi
from isimed_cli.main import main
from isimed_index import training
from isimed_index.config import PretrainConfig, pretrain_config
from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.runtime import write_encoder
from isimed_index.errors import IsimedNote, StoreLocked, TrainingWarning, UsageError
from isimed_index.progress import Silent
from isimed_index.training import run_name

STEPS = 20
CONFIG = f"""
width = 1
embedding_dim = 2
descriptor_dim = 2
view_vox = 36
crops_per_scan = 1
patches_per_scan = 8
batch_scans = 2
steps_per_epoch = {STEPS // 2}
precision = "float32"
warmup_steps = 2
ema = 0.9
validation_share = 0.4
"""


class Notes(Silent):
    """Remembers how many steps were left."""

    left = -1

    def start(self, task: str, total: int | None, unit: str, done: int = 0) -> None:
        self.left = (total or 0) - done


class Killed(Notes):
    """Does not let a training take a step."""

    def start(self, task: str, total: int | None, unit: str, done: int = 0) -> None:
        super().start(task, total, unit, done)
        raise KeyboardInterrupt


class Interrupted(Notes):
    """Ctrl-C while the first batch is waited for, or when `steps` were taken."""

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps

    def start(self, task: str, total: int | None, unit: str, done: int = 0) -> None:
        super().start(task, total, unit, done)
        if not self.steps:
            raise KeyboardInterrupt

    def advance(self, n: int = 1, note: str = "") -> None:
        self.steps -= n
        if not self.steps:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with four scans."""
    folder = tmp_path_factory.mktemp("scans")
    for n in range(4):
        tiny_scan(folder / "in" / f"s{n}.nii", n, (40, 40, 40))
    isi.create(folder / "store").add(folder / "in")
    return folder / "store"


@pytest.fixture(scope="module")
def whole(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The encoder of a training that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return pretrain(shutil.copytree(scans, folder / "store"), options(folder, 0.0))


def options(folder: Path, minutes: float, epochs: int = 2) -> Path:
    path = folder / "more.toml"
    path.write_text(f"{CONFIG}checkpoint_minutes = {minutes}\nepochs = {epochs}\n")
    return path


def pretrain(store: Path, config: Path, resume: bool = False, progress: Silent | None = None) -> str:
    torch.set_num_threads(1)
    card = isi.open(store).pretrain(preset="tiny", config=config, device="cpu", resume=resume, progress=progress)
    return card.id


def start(store: Path, config: Path) -> Started:
    arguments = ["-s", str(store), "--preset", "tiny", "--config", str(config), "--device", "cpu", "--no-progress"]
    return Started("pretrain", *arguments)


def saved_step(store: Path) -> int:
    """The step of the checkpoint that is there, -1 without one."""
    for path in store.glob("tmp/pretrain-*/checkpoint.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                return int(json.loads(file.metadata()["notes"])["step"])
        except (FileNotFoundError, SafetensorError):
            pass
    return -1


def wait_until(store: Path, process: Started, step: int) -> None:
    while saved_step(store) < step and process.poll() is None:
        time.sleep(0.02)


def test_a_training_keeps_the_name_that_earlier_versions_gave_it() -> None:
    """The names are what the version before `clip` gave; the preset `paper` became another training with it."""
    shown = [["digest", "subject"]]
    assert run_name(PretrainConfig(), shown) == "pretrain-e667ba8f9d70e98d"
    assert run_name(pretrain_config("default"), shown) == "pretrain-a2574b372ca05d55"
    paper = pretrain_config("paper")
    assert run_name(paper, shown) != "pretrain-db0240d38102bd84"
    assert run_name(replace(paper, clip=1.5), shown) == "pretrain-db0240d38102bd84"


def test_a_training_that_is_killed_loses_no_more_than_since_its_last_checkpoint(
    tmp_path: Path, scans: Path, whole: str
) -> None:
    """With checkpoints after every step; the kill comes at a random moment of a random step."""
    store, config = shutil.copytree(scans, tmp_path / "store"), options(tmp_path, 0.0)
    process = start(store, config)
    chance = random.Random()
    wait_until(store, process, chance.randrange(1, STEPS - 5))
    time.sleep(chance.uniform(0, 0.05))
    before = saved_step(store)
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    notes = Notes()
    assert pretrain(store, config, resume=True, progress=notes) == whole
    assert 0 < notes.left <= STEPS - before


def test_the_same_training_is_refused_while_it_runs(tmp_path: Path, scans: Path, whole: str) -> None:
    """Both would write the same checkpoints. The one that runs is not disturbed."""
    store, config = shutil.copytree(scans, tmp_path / "store"), options(tmp_path, 0.0)
    process = start(store, config)
    wait_until(store, process, 1)
    process.send_signal(signal.SIGSTOP)  # it cannot end before the second one has begun
    try:
        with pytest.raises(StoreLocked, match="the same training"):
            pretrain(store, config)
    finally:
        process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert isi.open(store).encoders()["encoder"].to_pylist() == [whole]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_is_asked_to_stop_saves_its_step(tmp_path: Path, scans: Path, number: signal.Signals) -> None:
    """In the second epoch, before the end of which no checkpoint would be due."""
    store, config = shutil.copytree(scans, tmp_path / "store"), options(tmp_path, 5.0, epochs=6)
    total = 3 * STEPS
    process = start(store, config)
    wait_until(store, process, 1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, ""), errors
    step = saved_step(store)
    assert STEPS // 2 < step < total
    line = errors.splitlines()[-1]
    assert line.startswith(f"error[interrupted]: training stopped after step {step} of {total}, which is saved. Next:")
    assert "--resume" in line
    with pytest.raises(KeyboardInterrupt):
        pretrain(store, config, resume=True, progress=(again := Killed()))
    assert again.left == total - step


def test_a_training_that_was_killed_before_its_first_checkpoint_begins_anew(
    tmp_path: Path, scans: Path, whole: str
) -> None:
    store, config = shutil.copytree(scans, tmp_path / "store"), options(tmp_path, 0.0)
    with pytest.raises(UsageError, match="no checkpoint"):
        pretrain(store, config, resume=True)
    assert not list(store.glob("tmp/pretrain-*"))
    with pytest.raises(KeyboardInterrupt):
        pretrain(store, config, progress=Killed())
    notes = Notes()
    with pytest.warns(TrainingWarning, match="from the beginning"):
        assert pretrain(store, config, resume=True, progress=notes) == whole
    assert notes.left == STEPS


def test_a_training_that_is_stopped_while_its_encoder_is_stored_only_stores_it_again(
    tmp_path: Path, scans: Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = shutil.copytree(scans, tmp_path / "store"), options(tmp_path, 5.0)

    def interrupted(directory: Path, *arguments: Any) -> EncoderCard:
        (directory / "half.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGINT)
        return write_encoder(directory, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_encoder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(store, config)
    assert not list(isi.open(store).snapshot.artefacts("encoder"))
    assert saved_step(store) == STEPS
    notes = Notes()
    assert pretrain(store, config, resume=True, progress=notes) == whole
    assert notes.left == 0
    assert not list(store.glob("tmp/pretrain-*"))
    assert not list(store.glob("**/half.safetensors"))


def test_a_training_that_is_finished_is_not_done_again_when_it_is_resumed(tmp_path: Path, scans: Path) -> None:
    """As a cluster job that always says --resume; of other scans or options nothing is claimed."""
    store, config = shutil.copytree(scans, tmp_path / "store"), options(tmp_path, 5.0, epochs=1)
    done = isi.open(store).pretrain(preset="tiny", config=config, device="cpu", name="first")
    notes = Notes()
    with pytest.warns(IsimedNote, match=f"finished already: {done.id} · first"):
        again = isi.open(store).pretrain(
            preset="tiny", config=config, device="cpu", name="second", resume=True, progress=notes
        )
    assert (again, notes.left) == (done, -1)
    assert not list(store.glob("tmp/pretrain-*"))
    assert isi.check(store, read=1.0) == []
    for other in ({"seed": 1}, {"where": "scan <> 's0'"}):
        with pytest.raises(UsageError, match="no checkpoint"):
            isi.open(store).pretrain(preset="tiny", config=config, device="cpu", resume=True, **other)
    isi.open(store).delete_encoder(done.id)
    with pytest.raises(UsageError, match="no checkpoint"):
        pretrain(store, config, resume=True)


@pytest.mark.filterwarnings("always::isimed_index.errors.IsimedWarning")  # printed, and not raised
def test_the_same_result_keeps_the_name_that_it_has(
    tmp_path: Path, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, config = shutil.copytree(scans, tmp_path / "store"), options(tmp_path, 5.0, epochs=1)
    done = isi.open(store).pretrain(preset="tiny", config=config, device="cpu", name="first")
    with pytest.warns(TrainingWarning, match=f"there already: {done.id} · first"):
        again = isi.open(store).pretrain(preset="tiny", config=config, device="cpu", name="second")
    assert (again.id, again.name) == (done.id, "first")
    assert isi.open(store).encoders()["name"].to_pylist() == ["first"]
    asked = ["pretrain", "-s", str(store), "--preset", "tiny", "--config", str(config), "--device", "cpu"]
    assert main([*asked, "--resume", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"encoder": done.id, "name": "first"}
    assert said.err == f"finished already: {done.id} · first\n"  # a remark, and no warning
    assert main([*asked, "--resume", "--json", "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_a_second_encoder_of_a_name_is_told_of_with_both_ids(tmp_path: Path, scans: Path) -> None:
    store, config = shutil.copytree(scans, tmp_path / "store"), options(tmp_path, 5.0, epochs=1)
    first = isi.open(store).pretrain(preset="tiny", config=config, device="cpu", name="mine")
    with pytest.warns(IsimedNote, match=f"'mine' is now that of 2 encoders.*; the one before it is {first.id}") as told:
        second = isi.open(store).pretrain(preset="tiny", config=config, device="cpu", name="mine", seed=1)
    assert f"stands for the newest, {second.id};" in str(told[0].message)
    assert isi.open(store).encoder("mine").id == second.id


def test_a_condition_that_keeps_no_scan_is_no_usage_error(
    tmp_path: Path, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("index", "pretrain"):
        add_random_encoder(store := shutil.copytree(scans, tmp_path / command))
        assert main([command, "-s", str(store), "--where", "false", "--no-progress"]) == 1
        assert capsys.readouterr().err.startswith("error[not_found]: there is no scan to ")


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 201, 3])
def test_a_name_is_checked_before_the_first_step(tmp_path: Path, scans: Path, name: Any) -> None:
    notes = Notes()
    with pytest.raises(UsageError, match="name of 1 to 200 printable characters") as refused:
        isi.open(scans).pretrain(preset="tiny", config=options(tmp_path, 5.0), name=name, progress=notes)
    assert refused.value.next_step
    assert notes.left == -1


@pytest.mark.parametrize(
    ("steps", "says", "then"),
    [
        (0, "training stopped before its first checkpoint; nothing is saved yet", "run the same command again"),
        (3, "training stopped at once; its last checkpoint is kept", "with --resume"),
    ],
)
def test_a_stop_says_what_was_saved(tmp_path: Path, scans: Path, steps: int, says: str, then: str) -> None:
    store, config = shutil.copytree(scans, tmp_path / "store"), options(tmp_path, 0.0)
    with pytest.raises(KeyboardInterrupt) as stopped:
        pretrain(store, config, progress=Interrupted(steps))
    assert str(stopped.value) == says
    assert then in stopped.value.next_step  # type: ignore[attr-defined]


def test_a_configuration_is_a_file(scans: Path) -> None:
    with pytest.raises(UsageError, match="expected a path, found dict") as refused:
        isi.open(scans).pretrain(config={"epochs": 1})  # type: ignore[arg-type]
    assert "TOML file" in refused.value.next_step


def test_a_run_that_is_shorter_than_its_warm_up_says_so(tmp_path: Path, scans: Path) -> None:
    store, config = shutil.copytree(scans, tmp_path / "store"), options(tmp_path, 5.0, epochs=1)
    config.write_text(config.read_text().replace("warmup_steps = 2", "warmup_steps = 11"))
    with pytest.warns(TrainingWarning, match=r"10 steps .* warmup_steps \(11\); set warmup_steps = 1"):
        pretrain(store, config)
