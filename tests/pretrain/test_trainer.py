"""The training loop: deterministic, resumable, watched."""

from __future__ import annotations

import json
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretraining import Interrupt, config, sources

from isimed_cli.app import Session, _messages
from isimed_index.config import PretrainConfig, pretrain_config
from isimed_index.encoders.module import our_network
from isimed_index.encoders.networks import build_network
from isimed_index.encoders.runtime import load_encoder, write_encoder
from isimed_index.errors import TrainingDiverged, TrainingWarning, UsageError
from isimed_index.pretrain import checkpoint, trainer
from isimed_index.pretrain.checkpoint import Saved
from isimed_index.pretrain.methods import Method
from isimed_index.pretrain.stopping import asked_to_stop
from isimed_index.pretrain.trainer import Trained, new_card, train
from isimed_index.pretrain.validation import Best, Validation, split
from isimed_index.progress import Silent
from isimed_index.scans.prepare import Intensity

pytestmark = pytest.mark.usefixtures("short_training")


def run(directory: Path, setup: PretrainConfig, **options: Any) -> Trained:
    directory.mkdir(exist_ok=True)
    return train(setup, sources(3), directory, subjects=["a", "b", "c"], device="cpu", **options)


def same(a: Trained, b: Trained) -> bool:
    return a.state.keys() == b.state.keys() and all(torch.equal(a.state[name], b.state[name]) for name in a.state)


def entries(trained: Trained) -> list[dict[str, Any]]:
    """The metrics but for the speed; strict JSON, without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = trained.metrics.read_text().splitlines()
    read = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{key: value for key, value in entry.items() if key != "patches_per_s"} for entry in read]


class Signalled(Silent):
    """A progress display during whose n-th step the process gets signals."""

    def __init__(self, step: int, *numbers: signal.Signals) -> None:
        self.left, self.numbers = step, numbers

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= n
        if self.left == 0:
            for number in self.numbers:
                assert callable(signal.getsignal(number)), "the process would die, and its tests with it"
                signal.raise_signal(number)


class Notes(Silent):
    """A progress display that remembers."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def start(self, task: str, total: int | None, unit: str, done: int = 0) -> None:
        self.said.append((task, total, unit, done))

    def advance(self, n: int = 1, note: str = "") -> None:
        self.said.append(n)

    def finish(self) -> None:
        self.said.append("finished")


def test_training_is_decided_by_configuration_and_scans(tmp_path: Path) -> None:
    torch.manual_seed(99)
    first = run(tmp_path / "a", config())
    torch.manual_seed(100)
    torch.rand(17)
    again = run(tmp_path / "b", config())
    assert same(first, again)
    assert entries(first) == entries(again)
    assert not same(first, run(tmp_path / "c", config(seed=6)))


def test_training_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    run(tmp_path, config(epochs=1, steps_per_epoch=1, warmup_steps=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("method", "minutes", "at", "first"),
    [("isimed", 5.0, 6, 3), ("isimed", 5.0, 7, 6), ("isimed", 0.0, 5, 4), ("regisimed", 0.0, 9, 8)],
)  # regisimed has layers of its own
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, method: Any, minutes: float, at: int, first: int
) -> None:
    """Nine steps, three an epoch, killed in step `at`; the last checkpoint is of an epoch's end, or the step before."""
    setup = config(epochs=3, checkpoint_minutes=minutes, ema=0.9, validation_share=0.3, patience=3, method=method)
    whole = run(tmp_path / "whole", setup)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", setup, progress=Interrupt(at))
    notes = Notes()
    resumed = run(tmp_path / "broken", setup, resume=True, progress=notes)
    assert same(whole, resumed)
    assert entries(whole) == entries(resumed)
    assert len(entries(whole)) == 3
    assert notes.said == [("pretrain", 9, "steps", first), *[1] * (9 - first), "finished"]


def test_a_run_may_be_stopped_in_every_step(tmp_path: Path) -> None:
    setup = config(ema=0.5, validation_share=0.3, checkpoint_minutes=0.0)
    whole = run(tmp_path / "whole", setup)
    for step in range(5):  # each takes one step and is killed in the next
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", setup, progress=Interrupt(2), resume=step > 0)
    resumed = run(tmp_path / "broken", setup, resume=True)
    assert same(whole, resumed)
    assert entries(whole) == entries(resumed)


def test_an_epoch_whose_checkpoint_was_not_written_is_recorded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = config()
    whole = run(tmp_path / "whole", setup)

    save = checkpoint.save

    def killed(directory: Path, saved: Saved) -> None:
        if saved.notes["step"] == 6:
            raise KeyboardInterrupt
        save(directory, saved)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", setup)
    assert entries(run(tmp_path / "broken", setup, resume=True)) == entries(whole)


def test_resuming_a_finished_run_returns_its_product(tmp_path: Path) -> None:
    whole = run(tmp_path, config())
    assert same(whole, run(tmp_path, config(), resume=True))
    assert len(entries(whole)) == 2


def test_resuming_another_configuration_or_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint") as refused:
        run(tmp_path, config(), resume=True)
    assert "--resume" in refused.value.next_step
    run(tmp_path, config(epochs=1))
    with pytest.raises(UsageError, match="another configuration"):
        run(tmp_path, config(epochs=2), resume=True)


def test_a_fresh_run_forgets_the_checkpoint_before_it(tmp_path: Path) -> None:
    run(tmp_path, config(epochs=1))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, config(epochs=1), progress=Interrupt(1))
    notes = Notes()
    with pytest.warns(TrainingWarning, match="from the beginning"):
        run(tmp_path, config(epochs=1), resume=True, progress=notes)
    assert notes.said[0] == ("pretrain", 3, "steps", 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves_it(tmp_path: Path, number: signal.Signals) -> None:
    setup = config(epochs=3)
    whole = run(tmp_path / "whole", setup)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="after step 5 of 9"):
        run(tmp_path / "broken", setup, progress=Signalled(5, number))
    assert signal.getsignal(number) is before
    notes = Notes()
    assert same(whole, run(tmp_path / "broken", setup, resume=True, progress=notes))
    assert notes.said[0] == ("pretrain", 9, "steps", 5)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(tmp_path, config(), progress=Signalled(2, signal.SIGINT, signal.SIGINT))
    assert not str(stopped.value)


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with asked_to_stop() as asked:
            signal.raise_signal(signal.SIGINT)
            assert not asked()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        trained = pool.submit(run, tmp_path / "a", config(epochs=1)).result()
    assert same(trained, run(tmp_path / "b", config(epochs=1)))


def test_the_average_of_the_weights_is_what_is_stored(tmp_path: Path) -> None:
    """One step an epoch, so that every step's weights are known from shorter runs."""
    name = "trunk.0.0.weight"
    setup = config(steps_per_epoch=1, warmup_steps=1, schedule="exponential")
    plain = [run(tmp_path, replace(setup, epochs=n)).state[name] for n in (1, 2, 3)]
    averaged = run(tmp_path, replace(setup, epochs=3, ema=0.5)).state[name]
    torch.manual_seed(config().seed)
    card = new_card(config(), "a", "tiny")
    expected = build_network(card.factory, card.outputs, card.network).state_dict()[name]
    for step, tensor in enumerate(plain):
        decay = min(0.5, (2 + step) / (11 + step))
        expected = decay * expected + (1 - decay) * tensor
    torch.testing.assert_close(averaged, expected)


def test_the_best_epoch_by_validation_is_stored_and_patience_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out losses as they are said here: which epoch of a run of real losses is the best one hangs on rounding."""
    said = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 0.1, 12: 0.5}  # by step

    def judged(of: Validation, weights: Any) -> dict[str, float]:
        return {"validation_loss": said[int(weights["trunk.0.1.num_batches_tracked"])]}

    monkeypatch.setattr(Validation, "figures", judged)
    setup = config(epochs=6, steps_per_epoch=2, validation_share=0.3, patience=2, schedule="exponential")
    notes = Notes()
    trained = run(tmp_path / "early", setup, progress=notes)
    assert [(entry["epoch"], entry["best_epoch"]) for entry in entries(trained)] == [(1, 1), (2, 2), (3, 2), (4, 2)]
    assert notes.said == [("pretrain", 12, "steps", 0), *[1] * 8, "finished"]
    assert same(trained, run(tmp_path / "short", replace(setup, epochs=2)))
    assert same(trained, run(tmp_path / "early", setup, resume=True))  # a run that gave up does not go on
    assert len(entries(trained)) == 4

    late = run(tmp_path / "late", replace(setup, patience=0))
    assert [entry["best_epoch"] for entry in entries(late)] == [1, 2, 2, 2, 5, 5]
    assert late.state["trunk.0.1.num_batches_tracked"] == 10


def test_validation_changes_nothing_that_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same two scans trained on, with and without a third one that is judged after every epoch."""
    setup = config(epochs=3, validation_share=0.3)
    _, (held,) = split(["a", "b", "c"], 0.3, setup.seed)
    rows = [row for row in range(3) if row != held]
    monkeypatch.setattr(Best, "consider", lambda *_: None)  # so that the last weights are stored
    with_validation = run(tmp_path / "with", setup)
    (tmp_path / "without").mkdir()
    alone = train(
        replace(setup, validation_share=0.0), [sources(3)[row] for row in rows], tmp_path / "without", device="cpu"
    )
    assert same(with_validation, alone)
    assert all("validation_distance_error_mm" in entry for entry in entries(with_validation))


def test_validation_needs_to_know_the_subjects(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="subject of every scan"):
        train(config(validation_share=0.3), sources(3), tmp_path, device="cpu")
    with pytest.raises(UsageError, match="two subjects"):
        train(config(validation_share=0.3), sources(3), tmp_path, subjects=["a"] * 3, device="cpu")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    real = Method.forward

    def broken(method: Method, outputs: Any, batch: Any, step: int) -> Any:
        losses = real(method, outputs, batch, step)
        return replace(losses, total=losses.total * float(value)) if step == 4 else losses

    monkeypatch.setattr(Method, "forward", broken)
    with pytest.raises(TrainingDiverged, match="step 4") as diverged:
        run(tmp_path, config())
    assert "learning_rate" in diverged.value.next_step
    monkeypatch.undo()
    assert len(entries(run(tmp_path, config(), resume=True))) == 2  # the checkpoint before it is sound


def test_collapsing_embeddings_are_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Method.forward

    def flat(method: Method, outputs: Any, *rest: Any) -> Any:
        return real(method, {**outputs, "embedding": outputs["embedding"] * 0}, *rest)

    monkeypatch.setattr(Method, "forward", flat)
    with pytest.warns(TrainingWarning, match="collapsing"):
        run(tmp_path, config(epochs=1))
    with _messages(Session()):  # as `isimed pretrain` runs it
        warnings.simplefilter("default")
        run(tmp_path, config(epochs=1))
    assert capsys.readouterr().err.startswith("warning: the embeddings are collapsing (RankMe ")


def test_training_learns(tmp_path: Path) -> None:
    """The plainest task: three scans, no augmentation of contrast, forty steps."""
    plain = replace(config().augmentation, curve_probability=0.0, bias=0.0, noise=0.0)
    setup = config(epochs=4, steps_per_epoch=10, augmentation=plain, descriptor_weight=0.0, learning_rate=1e-2)
    losses = [entry["loss"] for entry in entries(run(tmp_path, setup))]
    assert losses[-1] < 0.8 * losses[0]


def test_metrics_hold_means_of_every_epoch(tmp_path: Path) -> None:
    read = entries(run(tmp_path, config()))
    assert [(entry["epoch"], entry["step"]) for entry in read] == [(1, 3), (2, 6)]
    for entry in read:
        total = entry["distance"] + entry["coordinate"] + config().descriptor_weight * entry["descriptor"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
        assert entry["rankme"] >= 1


def test_figures_that_do_not_exist_are_null(tmp_path: Path) -> None:
    alone = config(
        view_vox=32,
        views_per_crop=1,
        descriptor_weight=0.0,
        coordinate_weight=0.0,
        batch_scans=3,
        pairs="all",
        epochs=1,
    )
    assert entries(run(tmp_path, alone))[0]["distance_error_mm"] is None


def test_an_epoch_shows_every_scan_unless_told_otherwise(tmp_path: Path) -> None:
    notes = Notes()
    run(tmp_path, config(epochs=1, steps_per_epoch=0), progress=notes)
    assert notes.said[0] == ("pretrain", 2, "steps", 0)  # three scans, two at a time


class Recorded(torch.optim.AdamW):
    """AdamW that tells what it was told."""

    made: dict[str, Any]
    rates: list[float]
    norms: list[float]  # of the whole gradient, at each step

    def __init__(self, parameters: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(parameters, *arguments, **options)
        Recorded.made, Recorded.rates, Recorded.norms = dict(self.defaults), [], []

    def step(self, *arguments: Any, **options: Any) -> Any:
        Recorded.rates.append(self.param_groups[0]["lr"])
        gradients = [p.grad.flatten() for p in self.param_groups[0]["params"] if p.grad is not None]
        Recorded.norms.append(float(torch.cat(gradients).norm()))
        return super().step(*arguments, **options)


def recorded(directory: Path, setup: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Recorded)
        run(directory, setup)
    return Recorded.rates


def test_the_papers_optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW with PyTorch's own betas, 1e-3, times 0.9 after every epoch, no warm-up (a small network stands in)."""
    paper = pretrain_config("paper")
    small = replace(
        paper, network="valid", width=2, embedding_dim=4, batch_scans=3, crops_per_scan=2, epochs=3, steps_per_epoch=2
    )
    rates = recorded(tmp_path, small, monkeypatch)
    assert rates == pytest.approx([1e-3, 1e-3, 9e-4, 9e-4, 8.1e-4, 8.1e-4])
    assert Recorded.made["betas"] == (0.9, 0.999)
    assert Recorded.made["weight_decay"] == 1e-2


def test_the_default_schedule_warms_up_and_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = recorded(tmp_path, config(epochs=3, warmup_steps=3, learning_rate=1e-2), monkeypatch)
    assert rates[0] < rates[1] < rates[2] <= 1e-2
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 2e-3


def test_gradients_are_clipped_where_a_norm_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(tmp_path, config(epochs=1, clip_norm=1e-3), monkeypatch)
    assert Recorded.norms == pytest.approx([1e-3] * 3, rel=1e-2)
    recorded(tmp_path, config(epochs=1, clip_norm=0.0), monkeypatch)
    assert min(Recorded.norms) > 1e-2


def test_checkpoints_are_minutes_apart_and_at_the_end_of_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 25 s by the clock here."""
    now, saved = 0.0, []
    real = Method.forward

    def slow(method: Method, *arguments: Any) -> Any:
        nonlocal now
        now += 25
        return real(method, *arguments)

    monkeypatch.setattr(Method, "forward", slow)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(checkpoint, "save", lambda _, state: saved.append(state.notes["step"]))
    run(tmp_path, config(epochs=1, steps_per_epoch=8, checkpoint_minutes=1.0))
    assert saved == [3, 6, 8]


def test_an_encoder_has_the_outputs_that_it_was_trained_for() -> None:
    whole = new_card(config(), "a", "tiny")
    assert (dict(whole.outputs), whole.match_output, whole.metric) == (
        {"embedding": 4, "position": 3, "descriptor": 4},
        "descriptor",
        "cosine",
    )
    plain = new_card(config(descriptor_weight=0.0, coordinate_weight=0.0), "a", "tiny")
    assert (dict(plain.outputs), plain.match_output, plain.metric) == ({"embedding": 4}, "embedding", "l2")
    assert new_card(config(window_low=-1000, window_high=600), "a", "tiny").intensity.window_high == 600
    assert whole.intensity == Intensity()
    assert dict(new_card(pretrain_config("paper"), "a", "paper").outputs) == {"embedding": 1024}


def test_the_product_can_be_kept_and_loaded(tmp_path: Path) -> None:
    trained = run(tmp_path, config(epochs=1))
    kept = tmp_path / "kept"
    kept.mkdir()
    card = write_encoder(kept, trained.card, trained.state)
    loaded = load_encoder(kept, "cpu")
    assert loaded.card == card
    assert card.training["seed"] == 5
    for name, tensor in our_network(card, kept / "weights.safetensors").state_dict().items():
        assert torch.equal(tensor, trained.state[name])
