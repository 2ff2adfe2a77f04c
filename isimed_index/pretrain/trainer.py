"""The training loop: batches in, an encoder card and its weights out.

sampler ─▶ forward ─▶ losses ─▶ optimiser ─▶ (moving average)    a step
                   after every epoch: figures, validation ─▶ records, best weights; charts
after every epoch and few minutes, and when stopped: checkpoint
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from isimed_index.config import PretrainConfig
from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.networks import Network, PatchDenseNet121, StemNet, ValidNet, build_network
from isimed_index.encoders.runtime import choose_device
from isimed_index.errors import TrainingDiverged, TrainingWarning, UsageError
from isimed_index.pretrain import checkpoint
from isimed_index.pretrain.charts import Charts
from isimed_index.pretrain.forward import Forward
from isimed_index.pretrain.methods import Losses, build_method, metric_of, outputs_of
from isimed_index.pretrain.monitor import collapse_warning
from isimed_index.pretrain.processes import ALONE, Processes
from isimed_index.pretrain.records import Record, Watchers, open_records, plain
from isimed_index.pretrain.sampler import Batch, Cohort, Source, batches
from isimed_index.pretrain.schedule import epoch_steps, learning_rate
from isimed_index.pretrain.state import State
from isimed_index.pretrain.stopping import asked_to_stop
from isimed_index.pretrain.validation import Validation, split
from isimed_index.progress import Progress, Silent
from isimed_index.scans.prepare import Intensity
from isimed_index.space import Affine

_NETWORKS: dict[str, type[Network]] = {"stem": StemNet, "valid": ValidNet, "densenet121": PatchDenseNet121}
_STRIDE_VOX = 4  # of the lattice of a network that takes single patches, wherever they lie


@dataclass(frozen=True, slots=True)
class Trained:
    """The product of a run: a card without its weights' hash, the weights, and where the metrics (JSONL) are."""

    card: EncoderCard
    state: dict[str, torch.Tensor]
    metrics: Path


def new_card(config: PretrainConfig, name: str, preset: str) -> EncoderCard:
    """The card of an encoder that is about to be trained; its weights have no hash yet."""
    outputs = outputs_of(config)
    network = {"width": config.width} if config.network != "densenet121" else {}
    kind = _NETWORKS[config.network]
    match_output = "descriptor" if "descriptor" in outputs else "embedding"
    return EncoderCard(
        name=name,
        factory=f"{kind.__module__}:{kind.__qualname__}",
        network=network,
        weights_sha256=None,
        patch_vox=kind.patch,
        stride_vox=kind.stride if kind.exactly_convolutional else _STRIDE_VOX,
        spacing_mm=config.spacing_mm,
        outputs=outputs,
        match_output=match_output,
        metric=metric_of(config),
        intensity=intensity_of(config),
        training={"preset": preset, **asdict(config)},
    )


def intensity_of(config: PretrainConfig) -> Intensity:
    """How the values of scans are scaled: by a window, or by percentiles where the configuration has none."""
    if config.window_low == config.window_high:
        return Intensity(clip=config.clip)
    return Intensity(clip=config.clip, window_low=config.window_low, window_high=config.window_high)


def train(
    config: PretrainConfig,
    sources: Sequence[Source],
    directory: Path,
    *,
    subjects: Sequence[str] | None = None,
    frames: Sequence[Affine] | None = None,
    name: str = "encoder",
    preset: str = "default",
    device: str = "auto",
    resume: bool = False,
    watchers: Watchers | None = None,
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> Trained:
    """Train an encoder on the scans behind `sources`; checkpoints and metrics go to `directory`.

    The result depends on the configuration, the order of the sources and the machine's arithmetic alone. `subjects`
    says whose scan each source is; validation needs it. `frames` are the scans' transforms (4, 4) to the reference
    `registered_to`, patient RAS+ mm → its RAS+ mm, and are given where the configuration names one. `resume` goes on
    from the last checkpoint in `directory` and ends as an uninterrupted run does. Ctrl-C and SIGTERM end the step,
    write a checkpoint and raise KeyboardInterrupt.
    """
    on = choose_device(device)
    if on.type == "cuda" and processes.world > 1:
        on = torch.device("cuda", processes.local)
    card = new_card(config, name, preset)
    cohort, held_out = _cohorts(config, sources, subjects, frames, processes)
    if processes.first:
        _warn_of_warm_up(config, config.epochs * epoch_steps(config, len(cohort)))
    with ExitStack() as stack:
        # The caller's random numbers stay what they were.
        stack.enter_context(torch.random.fork_rng(devices=[on] if on.type == "cuda" else []))
        torch.manual_seed(config.seed)
        network = build_network(card.factory, card.outputs, card.network).to(on)
        method = build_method(config, network)
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        processes.convert(network)
        forward = Forward(config, network, method, on, processes)
        learned = torch.nn.ModuleDict({"network": network, "method": method})
        state = State.new(learned.train(), config, epoch_steps(config, len(cohort)))
        state.charts = Charts(config, len(cohort)) if config.charts_after else None
        run = _begin(state, directory, config, processes, resume=resume)
        records: list[Record] = []
        metrics = directory / checkpoint.METRICS
        if processes.first:
            done = state.step // epoch_steps(config, len(cohort))
            records = open_records(
                metrics, watchers or Watchers(), name=name, run=run, settings=card.training, epochs=done
            )
        for record in records:
            stack.callback(record.close)
        validation = Validation(config, held_out, forward) if held_out else None
        loop = _Loop(config, forward, state, validation, records, directory)
        loop.run(cohort, progress if progress and processes.first else Silent())
    stored = state.best.weights or state.weights()
    return Trained(card, {key: value.detach().cpu().clone() for key, value in stored.items()}, metrics)


def _cohorts(
    config: PretrainConfig,
    sources: Sequence[Source],
    subjects: Sequence[str] | None,
    frames: Sequence[Affine] | None,
    processes: Processes,
) -> tuple[Cohort, Cohort | None]:
    """The scans to train on, and those held out; the memory for them is shared by their numbers."""
    if config.batch_scans % processes.world:
        raise UsageError(
            f"expected batch_scans as a multiple of the {processes.world} processes, found {config.batch_scans}",
            next_step=f"--batch-scans {processes.world * -(-config.batch_scans // processes.world)}",
        )
    if len(frames or ()) != (len(sources) if config.registered_to else 0):
        raise UsageError("expected a transform of every scan where registered_to names a reference, and else none")
    budget = config.cache_gib * 2**30
    if not config.validation_share:
        return Cohort(sources, int(budget), frames), None
    if subjects is None or len(subjects) != len(sources):
        raise UsageError("expected the subject of every scan, for validation_share holds out subjects")
    chosen, held = split(subjects, config.validation_share, config.seed)

    def part(rows: Sequence[int]) -> Cohort:
        theirs = None if frames is None else [frames[row] for row in rows]
        return Cohort([sources[row] for row in rows], int(budget * len(rows) / len(sources)), theirs)

    return part(chosen), part(held)


def _warn_of_warm_up(config: PretrainConfig, steps: int) -> None:
    if steps < config.warmup_steps:
        warnings.warn(
            f"the training has {steps} steps in all, fewer than its warmup_steps ({config.warmup_steps}); set "
            f"warmup_steps = {steps // 10}, or the learning rate never gets where it should",
            TrainingWarning,
            stacklevel=3,
        )


def _begin(state: State, directory: Path, config: PretrainConfig, processes: Processes, *, resume: bool) -> str:
    """Go on from the last checkpoint, or note that a run begins; returns the run's name."""
    if resume:
        run = checkpoint.begun(directory, config)
        if not state.load(directory) and processes.first:
            text = "the training was stopped before its first checkpoint was written; it starts from the beginning"
            warnings.warn(text, TrainingWarning, stacklevel=3)
        return run
    if processes.first:
        directory.mkdir(parents=True, exist_ok=True)
        return processes.from_first(checkpoint.begin(directory, config))
    return processes.from_first("")


class _Loop:
    """Steps and epochs of one run."""

    def __init__(
        self,
        config: PretrainConfig,
        forward: Forward,
        state: State,
        validation: Validation | None,
        records: Sequence[Record],
        directory: Path,
    ) -> None:
        self.config = config
        self.forward = forward
        self.processes = forward.processes
        self.state = state
        self.validation = validation
        self.records = records
        self.directory = directory
        self.per_epoch = 0

    def run(self, cohort: Cohort, progress: Progress) -> None:
        """Take all steps that are left; `KeyboardInterrupt`, after a checkpoint, when asked to stop."""
        config, state = self.config, self.state
        self.per_epoch = epoch_steps(config, len(cohort))
        total = self.per_epoch * config.epochs
        steps = range(state.step, total if not self._given_up() else state.step)
        share = (self.processes.rank, self.processes.world)
        progress.start("pretrain", steps.stop, "steps", state.step)
        drawn = batches(cohort, config, steps, share=share)
        with asked_to_stop(patient=self.processes.world > 1) as asked, closing(drawn):
            began, first = time.monotonic(), state.step
            saved = began
            for step, batch in zip(steps, drawn, strict=True):
                patches = self._step(batch, step)
                rate = patches * (step + 1 - first) / (time.monotonic() - began)
                progress.advance(1, self._note(rate))
                ended = state.step % self.per_epoch == 0
                if ended:
                    self._end_epoch(rate)
                    began, first = time.monotonic(), state.step
                stop = self.processes.any(asked()) and state.step < total
                if ended or stop or time.monotonic() - saved >= 60 * config.checkpoint_minutes:
                    if self.processes.first:
                        state.save(self.directory)
                    saved = time.monotonic()
                if self._given_up():
                    break
                if stop:
                    self.processes.from_first(None)  # nobody leaves before the checkpoint is whole
                    raise KeyboardInterrupt(f"training stopped after step {state.step} of {total}, which is saved")
        progress.finish()

    def _step(self, batch: Batch, step: int) -> int:
        """Learn from one batch; returns how many patches all processes encoded."""
        state = self.state
        for group in state.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, step, self.per_epoch)
        losses = self.forward.losses(batch, step, charts=state.charts)
        self._descend(losses, step)
        if state.average:
            state.average.update(self.forward.network, step)
        for key, value in {"loss": losses.total, **losses.terms}.items():
            state.sums[key] = state.sums.get(key, 0.0) + float(value.detach())
        state.sample.take(losses, step)
        state.step = step + 1
        return len(batch.images) * self.forward.places * self.processes.world

    def _descend(self, losses: Losses, step: int) -> None:
        if not torch.isfinite(losses.total):
            raise TrainingDiverged(
                f"the loss became {losses.total.item()} at step {step}",
                next_step="lower learning_rate and start again; the same run would diverge again",
            )
        parameters = list(self.state.learned.parameters())
        self.state.optimiser.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        self.processes.average_gradients(parameters)
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        self.state.optimiser.step()

    def _end_epoch(self, rate: float) -> None:
        state = self.state
        epoch = state.step // self.per_epoch
        figures = {key: value / self.per_epoch for key, value in state.sums.items()} | state.sample.figures()
        if self.processes.first and (warning := collapse_warning(figures, state.spread)):
            warnings.warn(warning, TrainingWarning, stacklevel=4)
        state.spread = figures.get("spread", math.nan)
        if self.validation:
            judged = self.validation.figures(state.weights())
            state.best.consider(judged["validation_loss"], epoch, state.weights())
            figures |= judged | {"best_epoch": state.best.epoch}
        if state.charts:
            figures |= state.charts.refit()
        used = state.optimiser.param_groups[0]["lr"]
        entry = {"epoch": epoch, "step": state.step, "learning_rate": used, "patches_per_s": round(rate, 1), **figures}
        for record in self.records:
            record.write(plain(entry))
        state.sums = {}
        state.sample.clear()

    def _given_up(self) -> bool:
        """Whether validation has not become better for as many epochs as are waited for."""
        return 0 < self.config.patience <= self.state.best.waited

    def _note(self, rate: float) -> str:
        done = (self.state.step - 1) % self.per_epoch + 1
        epoch = (self.state.step - 1) // self.per_epoch + 1
        return f"epoch {epoch}/{self.config.epochs} · loss {self.state.sums['loss'] / done:.3f} · {rate:,.0f} patches/s"
