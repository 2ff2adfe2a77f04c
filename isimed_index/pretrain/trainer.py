"""The training loop: batches in, an encoder card and its weights out."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from isimed_index.config import PretrainConfig
from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.networks import Network, build_network
from isimed_index.encoders.runtime import choose_device
from isimed_index.errors import TrainingDiverged, TrainingWarning
from isimed_index.pretrain import checkpoint
from isimed_index.pretrain.monitor import collapse_warning, spread
from isimed_index.pretrain.objective import Losses, joint_loss
from isimed_index.pretrain.sampler import Cohort, Source, batches
from isimed_index.progress import Progress, Silent
from isimed_index.scans.prepare import Intensity

_FACTORY = {
    "valid": "isimed_index.encoders.networks:ValidNet",
    "densenet121": "isimed_index.encoders.networks:PatchDenseNet121",
}


@dataclass(frozen=True, slots=True)
class Trained:
    """The product of a run: a card without its weights' hash, the weights, and where the metrics (JSONL) are."""

    card: EncoderCard
    state: dict[str, torch.Tensor]
    metrics: Path


def new_card(config: PretrainConfig, name: str, preset: str) -> EncoderCard:
    """The card of an encoder that is about to be trained; its weights have no hash yet."""
    outputs = {"embedding": config.embedding_dim}
    network: dict[str, int] = {}
    if config.network == "valid":
        network["width"] = config.width
        if config.coordinate_weight > 0:
            outputs["position"] = 3
        if config.descriptor_weight > 0:
            outputs["descriptor"] = config.descriptor_dim
    match_output = "descriptor" if "descriptor" in outputs else "embedding"
    return EncoderCard(
        name=name,
        factory=_FACTORY[config.network],
        network=network,
        weights_sha256=None,
        patch_vox=32,
        stride_vox=4,
        spacing_mm=config.spacing_mm,
        outputs=outputs,
        match_output=match_output,
        metric="cosine" if match_output == "descriptor" else "l2",
        intensity=intensity_of(config),
        training={"preset": preset, **asdict(config)},
    )


def intensity_of(config: PretrainConfig) -> Intensity:
    """How the values of scans are scaled: by a window, or by percentiles where the configuration has none."""
    if config.window_low == config.window_high:
        return Intensity()
    return Intensity(window_low=config.window_low, window_high=config.window_high)


def train(
    config: PretrainConfig,
    sources: Sequence[Source],
    directory: Path,
    *,
    name: str = "encoder",
    preset: str = "default",
    device: str = "auto",
    resume: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train an encoder on the scans behind `sources`; checkpoints and metrics go to `directory` after every epoch.

    The result depends on the configuration, the order of the sources and the machine's arithmetic alone. `resume` goes
    on from the last checkpoint in `directory` and ends as an uninterrupted run does.
    """
    progress = progress or Silent()
    on = choose_device(device)
    card = new_card(config, name, preset)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay what they were
        torch.manual_seed(config.seed)
        network = build_network(card.factory, card.outputs, card.network).to(on)
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    cohort = Cohort(sources, int(config.cache_gib * 2**30))
    per_epoch = config.steps_per_epoch or math.ceil(len(cohort) / config.batch_scans)
    total = per_epoch * config.epochs
    first = checkpoint.load(directory, network, optimiser, config) if resume else 0
    if not resume:
        checkpoint.discard(directory)
    metrics = directory / checkpoint.METRICS
    _keep_epochs(metrics, first // per_epoch)

    progress.start("pretrain", total, "steps")
    progress.advance(first)
    network.train()
    began, sums = time.monotonic(), dict[str, float]()
    for step, batch in zip(range(first, total), batches(cohort, config, range(first, total)), strict=True):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * _rate(config, step, per_epoch, total)
        images = batch.images.to(on, memory_format=torch.channels_last_3d)
        with torch.autocast(on.type, torch.bfloat16, enabled=_half(config, on)):
            outputs = network(images)
        losses = joint_loss(outputs, batch, network, config, step)
        _descend(losses, network, optimiser, config, step)
        terms = {"loss": losses.total, **losses.terms}
        for key, value in terms.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        done = step % per_epoch + 1
        patches = len(batch.images) * outputs["embedding"][0, 0].numel()
        rate = patches * (step + 1 - first) / (time.monotonic() - began)
        progress.advance(1, f"loss {sums['loss'] / done:.3f} · {rate:,.0f} patches/s")
        if done == per_epoch:
            _end_epoch(step, per_epoch, sums, losses, rate, metrics, config)
            sums = {}
            checkpoint.save(directory, network, optimiser, step + 1, config)
    progress.finish()
    return Trained(card, {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}, metrics)


def _descend(losses: Losses, network: Network, optimiser: torch.optim.AdamW, config: PretrainConfig, step: int) -> None:
    if not torch.isfinite(losses.total):
        raise TrainingDiverged(
            f"the loss became {losses.total.item()} at step {step}",
            next_step="lower learning_rate and start again; the same run would diverge again",
        )
    optimiser.zero_grad(set_to_none=True)
    losses.total.backward()  # type: ignore[no-untyped-call]
    if config.clip_norm:
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
    optimiser.step()


def _end_epoch(
    step: int,
    per_epoch: int,
    sums: dict[str, float],
    losses: Losses,
    rate: float,
    metrics: Path,
    config: PretrainConfig,
) -> None:
    figures = spread(losses.embeddings, losses.centres_mm, losses.scan_of, config.unit_mm)
    warning = collapse_warning(figures)
    if warning:
        warnings.warn(warning, TrainingWarning, stacklevel=3)
    entry: dict[str, float | None] = {"epoch": step // per_epoch + 1, "step": step + 1, "patches_per_s": round(rate, 1)}
    entry |= {key: round(value / per_epoch, 6) for key, value in sums.items()}
    entry |= {key: round(value, 6) if math.isfinite(value) else None for key, value in figures.items()}
    with metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _keep_epochs(metrics: Path, epochs: int) -> None:
    """Drop what a metrics file says of epochs that will be done again; one line is one epoch."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if epochs and metrics.exists() else []
    metrics.write_text("".join(lines[:epochs]), encoding="utf-8")


def _rate(config: PretrainConfig, step: int, per_epoch: int, total: int) -> float:
    """The learning rate of a step as a share of the configured one."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "exponential":
        return warm * float(config.decay ** (step // per_epoch))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))


def _half(config: PretrainConfig, device: torch.device) -> bool:
    """Whether the forward pass runs in bfloat16: where the hardware has it, unless the configuration says."""
    if config.precision != "auto":
        return config.precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    try:
        features = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in features or "amx_bf16" in features
