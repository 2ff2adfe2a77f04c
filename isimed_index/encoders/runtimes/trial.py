"""Which runtime is the fastest for an encoder on this machine: a short measured trial, once in a run.

networks of others, GPU, or nothing else installed ─▶ the native one, no trial
this encoder's scans were encoded by another one   ─▶ that one again
or by PyTorch, that was settled on (`Job.settled`) ─▶ PyTorch again
a job that PyTorch does in a minute                ─▶ PyTorch: to try others would cost more than they save
else                                               ─▶ the fastest that passes the check, if well ahead of PyTorch
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.card import EncoderCard, read_card
from isimed_index.encoders.onnx_model import FACTORY as ONNX
from isimed_index.encoders.protocol import Encoder, encode_grid
from isimed_index.encoders.runtime import (
    NetworkEncoder,
    choose_device,
    native_runtime,
    open_encoder,
    refuse_other,
    weights_file,
)
from isimed_index.encoders.runtimes.kind import AUTO, PRECISIONS, Auto, Runtime, missing_packages
from isimed_index.encoders.trust import is_ours, said_by
from isimed_index.grid import PatchGrid
from isimed_index.scans.prepare import Volume

WORTH_S = 60.0  # a job that PyTorch does sooner is not worth a trial
FEW = 1000  # patches that PyTorch encodes within that time, whatever the network: not even its pace is measured
MARGIN = 1.2  # times as fast as PyTorch another one has to be: noise must not decide
_ROUNDS = 3  # of all in turn; the fastest of each counts, because other programs can only make it slower
_PATCHES = 16  # that are encoded at once where work is not shared
_POINTS = 15  # most lattice points along an edge of the volume that is encoded where it is,
_EDGE = 60  # and most voxels


@dataclass(frozen=True, slots=True)
class Choice:
    """The runtime of a run, patches per second of each that was tried, and why others were left aside."""

    runtime: Runtime
    patches_per_s: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be encoded, and what is known of it beforehand; plain values, so that it travels to any machine."""

    encoder: str  # path of the encoder directory
    device: str
    trust: tuple[str, ...]
    asked: Runtime
    patches: int  # at most that many will be encoded
    stride_vox: int
    before: str | None = None  # runtime that scans of this encoder were encoded by, in this precision
    settled: bool = False  # and that is final: a trial chose it, or `auto` did for a job no shorter than this one


def choose(job: Job) -> Choice:
    """The runtime for a job on this machine: the one that was named, or for `auto` what the rules above say."""
    card, precision = read_card(Path(job.encoder)), job.asked.precision
    ours = is_ours(card.factory) and card.factory != ONNX
    if not ours:
        refuse_other(card, job.asked)
    if job.asked.name != AUTO:
        return Choice(job.asked)
    auto = Auto(job.patches, trial=False)
    native = Runtime(native_runtime(card), precision, auto)
    if not ours or choose_device(job.device).type != "cpu":
        return Choice(native)
    others = [name for name in PRECISIONS[precision] if name != native.name and not missing_packages(name)]
    if job.before in others:
        return Choice(Runtime(job.before, precision, auto))
    if not others or job.patches < FEW or (job.settled and job.before == native.name):
        return Choice(native)
    return _tried(job, card, native, others)


def _tried(job: Job, card: EncoderCard, native: Runtime, others: Sequence[str]) -> Choice:
    def opened(name: str) -> Encoder:
        file = weights_file(Path(job.encoder), card)
        return open_encoder(card, file, job.device, job.trust, Runtime(name, native.precision))

    work = {native.name: round_of(opened(native.name), job.stride_vox)}
    failed = {}
    work[native.name]()  # the first round is not the pace
    if job.patches < WORTH_S * work[native.name]():
        return Choice(native)
    for name in others:
        try:
            work[name] = round_of(opened(name), job.stride_vox)
            work[name]()  # its first batch: compiled, and checked
        except Exception as error:  # noqa: BLE001 — whatever is wrong with it, the job can do without
            failed[name] = said_by(error)
            work.pop(name, None)
    rounds = [{name: once() for name, once in work.items()} for _ in range(_ROUNDS)]
    rates = {name: max(found[name] for found in rounds) for name in work}
    best = max(rates, key=lambda name: rates[name])
    ahead = rates[best] >= MARGIN * rates[native.name]
    auto = Auto(job.patches, trial=True)
    return Choice(Runtime(best if ahead else native.name, native.precision, auto), rates, failed)


def bare_pace(job: Job) -> float | None:
    """Patches a second of bare passes of the runtime that a job asks for; None where these fail: the job will say."""
    try:
        card = read_card(Path(job.encoder))
        encoder = open_encoder(card, weights_file(Path(job.encoder), card), job.device, job.trust, job.asked)
        return pace_of(encoder, job.stride_vox)
    except Exception:  # noqa: BLE001 — a figure to compare with must not end a job
        return None


def cheaper_strides(job: Job) -> list[int]:
    """The nearest strides (voxels) at which patches share work, if at the job's own they do not and could."""
    card = read_card(Path(job.encoder))
    if not is_ours(card.factory) or card.factory == ONNX:
        return []
    try:
        encoder = open_encoder(card, weights_file(Path(job.encoder), card), "cpu")
    except Exception:  # noqa: BLE001 — the job will say what is wrong with it
        return []
    return encoder.strides_near(job.stride_vox) if isinstance(encoder, NetworkEncoder) else []


def pace_of(encoder: Encoder, stride_vox: int) -> float:
    """Patches a second of an encoder that has nothing else to do: of noise, in memory, the faster of two rounds."""
    once = round_of(encoder, stride_vox)
    once()  # the first round is not the pace
    return max(once(), once())


def round_of(encoder: Encoder, stride_vox: int) -> Callable[[], float]:
    """What encodes a little noise as the job will its scans, and says how many patches a second that were."""
    card, rng = encoder.card, np.random.default_rng(0)

    def noise(*shape: int) -> NDArray[np.float32]:
        return rng.uniform(card.intensity.low, card.intensity.high, shape).astype(np.float32)

    if isinstance(encoder, NetworkEncoder) and encoder.shares_work(stride_vox):
        edge = stride_vox * min(_POINTS, max(1, _EDGE // stride_vox))
        volume = Volume(noise(edge, edge, edge), np.eye(4), card.intensity.low, np.ones((edge,) * 3, bool))
        grid = PatchGrid((edge, edge, edge), card.patch_vox, stride_vox, volume.affine)
        numbers = np.arange(len(grid))
        return lambda: _rate(lambda: encode_grid(encoder, volume, grid, numbers), len(numbers))
    patches = noise(_PATCHES, card.patch_vox, card.patch_vox, card.patch_vox)
    return lambda: _rate(lambda: encoder.encode(patches), _PATCHES)


def _rate(work: Callable[[], object], patches: int) -> float:
    began = time.perf_counter()
    work()
    return patches / (time.perf_counter() - began)
