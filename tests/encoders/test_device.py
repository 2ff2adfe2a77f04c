"""What is done for a GPU: full float32, transfers beside passes, and the check; the parts that a CPU can show.

Tests that need a GPU are skipped without one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from isimed_index.config import PretrainConfig
from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.networks import Network, build_network
from isimed_index.encoders.protocol import encode_grid, encode_patches
from isimed_index.encoders.runtime import TorchEncoder, load_encoder, write_encoder
from isimed_index.encoders.runtimes.ahead import begin, in_a_row
from isimed_index.encoders.runtimes.by_torch import TorchRun, quick
from isimed_index.encoders.runtimes.checked import BOUNDS, ON_GPU, Checked, relative_errors
from isimed_index.encoders.runtimes.exact import exact_float32
from isimed_index.encoders.runtimes.kind import Maps, Runtime
from isimed_index.errors import RuntimeMismatch
from isimed_index.grid import PatchGrid
from isimed_index.pretrain.trainer import new_card
from isimed_index.scans.prepare import Volume

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # naming a device does not need one
BACKENDS: Any = torch.backends
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def small() -> tuple[EncoderCard, Network]:
    torch.manual_seed(0)
    card = new_card(PretrainConfig(width=2, embedding_dim=4, descriptor_dim=5), "test", "tiny")
    network = build_network(card.factory, card.outputs, card.network).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return card, network


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


# -- float32 in full --------------------------------------------------------------------------------------------------


def switches() -> tuple[bool, bool]:
    """Whether products and convolutions of float32 may be rounded; raises where PyTorch's switches disagree."""
    return BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32


def every_switch() -> dict[str, object]:
    """As they can be read, the older ones as well as the newer ones."""
    older = {"products": torch.get_float32_matmul_precision, "convolutions": lambda: BACKENDS.cudnn.allow_tf32}
    found: dict[str, object] = {}
    for name, read in older.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "contradicted"
    newer = {"matmul": BACKENDS.cuda.matmul, "conv": BACKENDS.cudnn.conv, "rnn": BACKENDS.cudnn.rnn}
    newer |= {"cpu": BACKENDS.mkldnn.matmul, "cudnn": BACKENDS.cudnn, "all": BACKENDS}
    return found | {name: owner.fp32_precision for name, owner in newer.items()}


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """The switches belong to the process: other tests find them as PyTorch has them."""
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.mkldnn.matmul.fp32_precision = BACKENDS.cudnn.fp32_precision = "none"
    BACKENDS.cuda.matmul.fp32_precision = BACKENDS.fp32_precision = "none"
    BACKENDS.cudnn.allow_tf32 = True


@pytest.fixture
def rounding(as_it_was: None) -> None:
    """A process that rounds both, as a training would have it."""
    BACKENDS.cuda.matmul.allow_tf32 = BACKENDS.cudnn.allow_tf32 = True


STATES: dict[str, Callable[[], object]] = {
    "as PyTorch has them": lambda: None,
    "older, on": lambda: switch(True),
    "older, off": lambda: switch(False),
    "products": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "newer": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "newer, all": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
}


def switch(on: bool) -> None:
    BACKENDS.cuda.matmul.allow_tf32 = BACKENDS.cudnn.allow_tf32 = on


@pytest.mark.parametrize("state", STATES)
def test_nothing_is_rounded_within_and_the_process_has_its_switches_back(as_it_was: None, state: str) -> None:
    """However they are set: PyTorch has two generations of them, and refuses to compute where the two disagree."""
    STATES[state]()
    before = every_switch()
    with exact_float32(CUDA):
        assert switches() == (False, False)
        assert BACKENDS.cudnn.conv.fp32_precision == BACKENDS.cuda.matmul.fp32_precision == "ieee"
    assert every_switch() == before
    with pytest.raises(RuntimeError, match="out of memory"), exact_float32(CUDA):
        raise RuntimeError("out of memory")
    assert every_switch() == before


def test_a_cpu_is_left_alone(rounding: None) -> None:
    with exact_float32(CPU):
        assert switches() == (True, True)


def test_no_thread_puts_the_switches_back_while_another_one_computes(rounding: None) -> None:
    inside, go_on, seen = threading.Event(), threading.Event(), list[tuple[bool, bool]]()

    def first() -> None:
        with exact_float32(CUDA):
            inside.set()
            go_on.wait(10)
            seen.append(switches())

    def second() -> None:
        with exact_float32(CUDA):
            seen.append(switches())

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    threads[1].join(0.05)
    assert not seen  # the second one waits
    go_on.set()
    for thread in threads:
        thread.join()
    assert seen == [(False, False)] * 2
    assert switches() == (True, True)


# -- passes in a row --------------------------------------------------------------------------------------------------


class Slow:
    """A device: what is begun is computed when it is waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __call__(self, values: np.ndarray) -> Maps:
        return self.begin(values)()

    def begin(self, values: np.ndarray) -> Callable[[], Maps]:
        name = f"{values.flat[0]:g}"
        self.log.append(f"begin {name}")

        def wait() -> Maps:
            self.log.append(f"wait {name}")
            return {"a": values}

        return wait


def batches(count: int) -> list[tuple[str, np.ndarray]]:
    return [(f"batch {n}", np.full((1, 1, 1, 1, 1), n, np.float32)) for n in range(count)]


def test_each_pass_is_begun_before_the_one_before_it_is_waited_for() -> None:
    run = Slow()
    given = [(what, maps["a"].item()) for what, maps in in_a_row(run, batches(3))]
    assert given == [("batch 0", 0), ("batch 1", 1), ("batch 2", 2)]
    assert run.log == ["begin 0", "begin 1", "wait 0", "begin 2", "wait 1", "wait 2"]
    assert list(in_a_row(run, [])) == []


def test_the_first_batch_is_compared_and_the_others_run_ahead() -> None:
    run, compared = Slow(), []

    def reference(values: np.ndarray) -> Maps:
        compared.append(values.item())
        return {"a": values}

    checked = Checked(run, reference, Runtime("torch"), "encoder 'e'")
    assert [maps["a"].item() for _, maps in in_a_row(checked, batches(3))] == [0, 1, 2]
    assert compared == [0]
    assert run.log == ["begin 0", "wait 0", "begin 1", "begin 2", "wait 1", "wait 2"]


def test_a_pass_that_is_begun_is_refused_as_well() -> None:
    checked = Checked(Slow(), lambda values: {"a": values + 1}, Runtime("torch"), "encoder 'e'")
    with pytest.raises(RuntimeMismatch):
        begin(checked, noise(1, 1, 1, 1, 1))


def test_what_runs_on_a_gpu_passes_its_check_here() -> None:
    """The same preparation, transfers and comparison; only the device is another one."""
    _, network = small()
    run = Checked(TorchRun(quick(network), CPU), TorchRun(network, CPU), Runtime("torch"), "encoder 'e'")
    given = [noise(2, 1, 32, 36, 40, seed=n) for n in range(3)]
    found = [maps for _, maps in in_a_row(run, enumerate(given))]
    for values, maps in zip(given, found, strict=True):
        expected = TorchRun(network, CPU)(values)
        assert {name: y.dtype for name, y in maps.items()} == {name: np.dtype(np.float32) for name in expected}
        assert relative_errors(maps, expected).within(BOUNDS["fp32"])
    assert run._reference is None


def test_bare_passes_are_those_of_the_run() -> None:
    """What the benchmark takes for the ceiling."""
    _, network = small()
    run, values = TorchRun(quick(network), CPU), noise(2, 1, 32, 32, 32)
    for name, y in run(values).items():
        np.testing.assert_array_equal(run.compute(run.resident(values))[name].numpy(), y)


def test_a_grid_that_shares_no_work_is_encoded_in_batches() -> None:
    """A step of 3 against one of 4: the very bits of the patches one by one, in the order that was asked for."""
    card, network = small()
    encoder = TorchEncoder(card, network, CPU)
    values = noise(40, 37, 35)
    volume = Volume(values, np.eye(4), -1.0, np.ones(values.shape, bool))
    grid = PatchGrid((40, 37, 35), 32, 3, volume.affine)
    numbers = np.random.default_rng(0).permutation(len(grid))[:150]
    found = encode_grid(encoder, volume, grid, numbers)
    for name, expected in encode_patches(encoder, volume, grid, numbers).items():
        np.testing.assert_array_equal(found[name], expected)
    assert {len(y) for y in encode_grid(encoder, volume, grid, numbers[:0]).values()} == {0}


# -- with a GPU -------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_gives_the_vectors_of_a_cpu(tmp_path: Path, rounding: None, precision: str) -> None:
    card, network = small()
    card = write_encoder(tmp_path, card, network.state_dict())
    there, here = load_encoder(tmp_path, "cuda", runtime=Runtime("torch", precision)), TorchEncoder(card, network, CPU)
    values = noise(75, 70, 61)
    volume = Volume(values, np.eye(4), -1.0, np.ones(values.shape, bool))
    for stride in (4, 2, 3):
        grid = PatchGrid((75, 70, 61), 32, stride, volume.affine)
        numbers = np.random.default_rng(0).permutation(len(grid))[:300]
        pair = [encode_grid(encoder, volume, grid, numbers) for encoder in (there, here)]
        found, expected = ({name: y[:, :, None, None, None] for name, y in v.items()} for v in pair)
        assert relative_errors(found, expected).overall <= (ON_GPU if precision == "fp32" else BOUNDS[precision])
    assert switches() == (True, True)
