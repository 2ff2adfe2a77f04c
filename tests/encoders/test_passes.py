"""One pass over a volume: the vectors of patches taken one by one, and refused to networks that cannot do it."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isimed_index.config import PretrainConfig, pretrain_config
from isimed_index.encoders import networks, runtime
from isimed_index.encoders.networks import PatchDenseNet121, StemNet, ValidNet, build_network
from isimed_index.encoders.passes import passes_hold
from isimed_index.encoders.protocol import Encoder, encode_grid
from isimed_index.encoders.runtime import TILE, NetworkEncoder, TorchEncoder, load_encoder, write_encoder
from isimed_index.encoders.runtimes.kind import Runtime, missing_packages
from isimed_index.errors import IsimedWarning
from isimed_index.grid import PatchGrid
from isimed_index.pretrain.trainer import new_card
from isimed_index.scans.prepare import Volume

CPU = torch.device("cpu")
OUTPUTS = {"embedding": 4, "position": 3}
PATCH = 32
CASES = ["tiny torch", "tiny openvino", "default torch", "default openvino", "valid torch"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(4)


def settled(network: nn.Module, rounds: int = 3) -> nn.Module:
    """A network whose batch norms have seen data: fresh ones leave vectors that hardly differ."""
    network.train()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(rounds):
            network(torch.from_numpy(rng.uniform(-1, 1, (4, 1, PATCH, PATCH, PATCH)).astype(np.float32)))
    return network.eval()


def noise(shape: tuple[int, int, int]) -> Volume:
    values = np.random.default_rng(5).uniform(-1, 1, shape).astype(np.float32)
    return Volume(values, np.eye(4), -1.25, values > 0)


# -- equal to patch by patch ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CASES)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """The networks that presets train, as large as they are, in a runtime."""
    name, program = request.param.split()
    if missing := missing_packages(program):
        pytest.skip(f"the runtime {program} needs {missing[0]}")
    config = PretrainConfig(network="valid", width=4) if name == "valid" else pretrain_config(name)
    card = new_card(config, "test", "tiny")
    torch.manual_seed(1)
    folder: Path = tmp_path_factory.mktemp(name)
    network = settled(build_network(card.factory, card.outputs, card.network))
    write_encoder(folder, card, network.state_dict())
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return load_encoder(folder, "cpu", runtime=Runtime(program))


@st.composite
def windows(draw: st.DrawFn) -> tuple[PatchGrid, int, np.ndarray]:
    """A lattice, an edge of tiles, and lattice points (n, 3) that lie side by side over a seam of tiles in each axis.

    They begin at a border of the lattice or anywhere; the volume may be smaller than a patch.
    """
    stride, tile = draw(st.sampled_from([2, 4, 8, 12])), draw(st.integers(2, 3))
    grid = PatchGrid(draw(st.tuples(*[st.integers(20, 80)] * 3)), PATCH, stride, np.eye(4))
    phases, steps = max(1, 4 // stride), max(1, tile * 4 // max(4, stride))
    long = draw(st.integers(0, 2)) if phases > 1 else None
    sides = []
    for axis, count in enumerate(grid.lattice_shape):
        wanted = phases * steps + 1 if long in (None, axis) else phases
        length = min(count, wanted)
        first = draw(st.sampled_from([0, count - length]) | st.integers(0, count - length))
        sides.append(range(first, first + length))
    return grid, tile, np.array(list(itertools.product(*sides)))


@settings(max_examples=10, derandomize=True)
@given(window=windows(), seed=st.integers(0, 99))
def test_a_pass_gives_the_vectors_of_single_patches(
    encoder: Encoder, window: tuple[PatchGrid, int, np.ndarray], seed: int
) -> None:
    """Within 1e-4 of a vector's length; and a vector of the voxels beside these is a hundred times further off."""
    grid, tile, ijk = window
    volume, numbers = noise(grid.shape), np.random.default_rng(seed).permutation(grid.number(ijk))
    assert isinstance(encoder, NetworkEncoder)
    assert encoder.shares_work(grid.stride)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runtime, "TILE", tile)
        found = encode_grid(encoder, volume, grid, numbers)
    ends = [int(np.flatnonzero(numbers == grid.number(ijk)[n])[0]) for n in (0, -1)]
    some = np.array([*ends, *range(min(5, len(numbers)))])
    expected = encoder.encode(grid.extract(volume.values, numbers[some], volume.background))
    beside = encoder.encode(grid.extract(np.roll(volume.values, 1, seed % 3), numbers[some], volume.background))
    for name, alone in expected.items():
        off = np.linalg.norm(found[name][some] - alone, axis=1)
        assert (off <= 1e-4 * np.linalg.norm(alone, axis=1)).all(), name
        assert (100 * off < np.linalg.norm(beside[name] - alone, axis=1)).all(), name


def test_passes_as_large_as_they_are_give_the_vectors_of_single_patches(encoder: Encoder) -> None:
    """A lattice that is one point longer than a tile: two passes, and each patch beside the seam as it is alone."""
    grid = PatchGrid((4 * TILE + 1, 8, 4), PATCH, 4, np.eye(4))
    volume, numbers = noise(grid.shape), np.arange(len(grid))
    assert grid.lattice_shape == (TILE + 1, 2, 1)
    assert isinstance(encoder, NetworkEncoder)
    assert sorted(map(len, encoder.parts(grid, numbers))) == [2, 2 * TILE]
    found = encode_grid(encoder, volume, grid, numbers)
    some = np.array([0, *numbers[-6:]])
    for name, alone in encoder.encode(grid.extract(volume.values, some, volume.background)).items():
        off = np.linalg.norm(found[name][some] - alone, axis=1)
        assert (off <= 1e-4 * np.linalg.norm(alone, axis=1)).all(), name


# -- tried, not believed --------------------------------------------------------------------------------------------


def pad(network: ValidNet | StemNet) -> None:
    """Pad every convolution with zeros; a patch still has one vector, and maps the shape that they had."""
    for layer in network.trunk.modules():
        if isinstance(layer, nn.Conv3d):
            layer.padding = tuple((edge - 1) // 2 for edge in layer.kernel_size)
    network.trunk.append(nn.AvgPool3d(8, stride=1))


def zero_padded(kind: type[ValidNet] | type[StemNet]) -> nn.Module:
    """A network that says it is exactly convolutional, and is padded."""
    network = kind(OUTPUTS, width=4)
    pad(network)
    assert network.eval()(torch.zeros(1, 1, 36, 36, 36))["embedding"].shape == (1, 4, 2, 2, 2)
    return network


@pytest.mark.parametrize("kind", [StemNet, ValidNet])
@pytest.mark.parametrize("rounds", [0, 3])
def test_the_trial_tells_networks_that_hold_from_those_that_do_not(
    kind: type[ValidNet] | type[StemNet], rounds: int
) -> None:
    whole = kind(OUTPUTS, width=4)
    padded = zero_padded(kind)
    if rounds:
        settled(whole, rounds)
        settled(padded, rounds)
    assert passes_hold(whole, PATCH, 4)
    assert not passes_hold(whole, PATCH, 2)  # a stride that is not its own
    assert not passes_hold(padded, PATCH, 4)


class Pooled(ValidNet):
    """Its features are averaged over all that it is shown."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: y.mean((2, 3, 4), keepdim=True).expand_as(y) for name, y in super().forward(x).items()}


def test_a_network_that_sees_all_it_is_shown_does_not_hold() -> None:
    assert not passes_hold(settled(Pooled(OUTPUTS, width=4)), PATCH, 4)


def test_what_is_wrong_with_vectors_of_nan_is_not_the_pass() -> None:
    network = ValidNet(OUTPUTS, width=2)
    network.heads["embedding"].bias.data.fill_(np.nan)
    assert passes_hold(network, PATCH, 4)


class DenseOverVolumes(PatchDenseNet121):
    """The paper's network as it would be if it were believed: its features at every 32nd voxel of a volume."""

    exactly_convolutional = True

    def __init__(self, outputs: dict[str, int]) -> None:
        super().__init__(outputs)
        self.pool = nn.ReLU()


def test_densenet121_over_a_volume_is_another_encoder() -> None:
    """What vectors tell of patches, their deviation from the mean, has nothing left in common."""
    network = settled(DenseOverVolumes({"embedding": 1024}), rounds=1)
    volume = noise((64, 64, 64))
    grid = PatchGrid((64, 64, 64), PATCH, PATCH, volume.affine)
    patches = grid.extract(volume.values, np.arange(len(grid)), volume.background)
    with torch.inference_mode():
        whole = network(torch.from_numpy(volume.values[None, None]))["embedding"][0].flatten(1).T.numpy()  # (8, d)
        alone = network(torch.from_numpy(patches[:, None]))["embedding"].flatten(1).numpy()
    mean = alone.mean(axis=0)
    assert np.abs(cosines(whole - mean, alone - mean)).max() < 0.5
    assert not passes_hold(network, PATCH, PATCH)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def refused(card: Any, network: Any) -> TorchEncoder:
    with pytest.warns(IsimedWarning, match="a pass of its network over a volume does not give the vectors of patches"):
        return TorchEncoder(card, network, CPU)


def test_a_network_that_does_not_hold_is_run_patch_by_patch_with_a_warning() -> None:
    card = new_card(PretrainConfig(network="stem", width=4), "test", "tiny")
    card = replace(card, outputs=OUTPUTS, match_output="embedding")
    network = settled(zero_padded(StemNet))
    encoder, volume = refused(card, network), noise((40, 36, 44))
    assert not encoder.shares_work(4)
    grid = PatchGrid((40, 36, 44), PATCH, 4, volume.affine)
    numbers = np.array([0, len(grid) - 1, len(grid) // 2, 7])
    expected = encoder.encode(grid.extract(volume.values, numbers, volume.background))
    for name, found in encode_grid(encoder, volume, grid, numbers).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-5 * np.abs(expected[name]).max())
    believed = NetworkEncoder(card, encoder._run, own_stride=4).encode_grid(volume, grid, np.arange(len(grid)))
    off = np.linalg.norm(believed["position"][numbers] - expected["position"], axis=1)
    apart = np.linalg.norm(expected["position"] - expected["position"].mean(axis=0), axis=1)
    assert (off > 0.3 * apart.mean()).all()  # what would have been stored


def test_a_stored_encoder_is_tried_when_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed(StemNet):
        """What this factory would be in a version that padded it: the same weights fit."""

        def __init__(self, outputs: dict[str, int], width: int) -> None:
            super().__init__(outputs, width)
            pad(self)

    card = new_card(PretrainConfig(network="stem", width=4), "test", "tiny")
    network = settled(build_network(card.factory, card.outputs, card.network))
    write_encoder(tmp_path, card, network.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_encoder(tmp_path, "cpu").shares_work(4)  # type: ignore[attr-defined]
    monkeypatch.setitem(networks._FACTORIES, card.factory, Changed)
    for program in ("torch", "openvino"):
        if not missing_packages(program):
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
            with pytest.warns(IsimedWarning, match="encoder 'test'.*run patch by patch"):
                opened = load_encoder(tmp_path, "cpu", runtime=Runtime(program))
            assert not opened.shares_work(4)  # type: ignore[attr-defined]
