"""Running and keeping an encoder: one pass over a volume equals patch by patch, and what is loaded is what was kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from isimed_index.config import PretrainConfig
from isimed_index.encoders import runtime
from isimed_index.encoders.card import CARD, WEIGHTS, EncoderCard
from isimed_index.encoders.networks import ValidNet, build_network
from isimed_index.encoders.runtime import TorchEncoder, choose_device, load_encoder, write_encoder
from isimed_index.errors import EncoderMismatch, StoreDamaged, UsageError
from isimed_index.grid import PatchGrid
from isimed_index.pretrain.trainer import new_card
from isimed_index.scans.prepare import Volume

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def card() -> EncoderCard:
    return new_card(PretrainConfig(network="valid", width=2, embedding_dim=4, descriptor_dim=5), "test", "tiny")


def network() -> ValidNet:
    made = ValidNet(card().outputs, width=2)
    with torch.no_grad():
        for name, buffer in made.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(0.3)
    return made


class Watched(ValidNet):
    """A network that notes the shapes it was shown."""

    def __init__(self) -> None:
        super().__init__(card().outputs, width=2)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(tuple(x.shape))
        return super().forward(x)


class Padded(Watched):
    """It says of itself that it is not exactly convolutional, as a zero-padded network would."""

    exactly_convolutional = False


def volume(shape: tuple[int, int, int] = (50, 41, 33)) -> Volume:
    values = np.random.default_rng(5).uniform(-1, 1, shape).astype(np.float32)
    return Volume(values, np.eye(4), -1.25, values > 0)


def grid_of(made: Volume, stride: int) -> PatchGrid:
    x, y, z = made.values.shape
    return PatchGrid((x, y, z), 32, stride, made.affine)


@pytest.mark.parametrize("stride", [2, 4, 8, 3])
def test_a_tiled_pass_equals_patch_by_patch(monkeypatch: pytest.MonkeyPatch, stride: int) -> None:
    monkeypatch.setattr(runtime, "TILE", 3)
    encoder, made = TorchEncoder(card(), network(), CPU), volume()
    grid = grid_of(made, stride)
    i, j, k = grid.lattice_shape
    rng = np.random.default_rng(stride)
    corners = grid.number([[0, 0, 0], [i - 1, j - 1, k - 1], [0, j - 1, 0], [i - 1, 0, k - 1]])
    seams = grid.number([[n, min(n, j - 1), min(n, k - 1)] for n in range(min(i, 8))])
    numbers = np.concatenate([corners, seams, rng.choice(len(grid), 30)])
    rng.shuffle(numbers)
    expected = encoder.encode(grid.extract(made.values, numbers, made.background))
    found = encoder.encode_grid(made, grid, numbers)
    for name, vectors in expected.items():
        scale = np.abs(vectors).max()
        assert scale > 0
        np.testing.assert_allclose(found[name] / scale, vectors / scale, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_tiles_bound_what_the_network_is_shown_at_once(monkeypatch: pytest.MonkeyPatch, stride: int) -> None:
    monkeypatch.setattr(runtime, "TILE", 4)
    net, made = Watched(), volume((90, 33, 33))
    grid = grid_of(made, stride)
    encoder = TorchEncoder(card(), net, CPU)
    net.seen.clear()  # of the trial at the start
    encoder.encode_grid(made, grid, np.arange(len(grid)))
    assert max(max(shape[2:]) for shape in net.seen) <= 4 * 4 + 32 - 4
    if stride == 4:
        tiles = np.ceil(np.array(grid.lattice_shape) / 4).prod()
        assert len(net.seen) == tiles


def test_a_padded_network_is_never_run_over_more_than_a_patch() -> None:
    net, made = Padded(), volume()
    grid = grid_of(made, 8)
    found = TorchEncoder(card(), net, CPU).encode_grid(made, grid, np.arange(len(grid)))
    assert {shape[1:] for shape in net.seen} == {(1, 32, 32, 32)}
    assert max(shape[0] for shape in net.seen) <= 64
    assert sum(shape[0] for shape in net.seen) == len(grid) == len(found["descriptor"])


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UsageError, match="auto, cpu or cuda"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="CUDA"):
            choose_device("cuda")


def kept(directory: Path) -> EncoderCard:
    return write_encoder(directory, card(), network().state_dict())


def test_a_loaded_encoder_is_the_one_that_was_kept(tmp_path: Path) -> None:
    made = network()
    written = write_encoder(tmp_path, card(), made.state_dict())
    loaded = load_encoder(tmp_path, "cpu")
    assert loaded.card == written
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD, WEIGHTS]
    patches = np.random.default_rng(1).normal(size=(3, 32, 32, 32)).astype(np.float32)
    before = TorchEncoder(card(), made, CPU).encode(patches)
    for name, vectors in loaded.encode(patches).items():
        np.testing.assert_allclose(vectors, before[name], rtol=0, atol=1e-6 * np.abs(before[name]).max())
        np.testing.assert_array_equal(vectors, load_encoder(tmp_path, "cpu").encode(patches)[name])


def test_weights_are_safetensors_whatever_their_memory_format(tmp_path: Path) -> None:
    """The layout of safetensors: eight bytes of length, then a JSON header."""
    made = network()
    plain = write_encoder(tmp_path, card(), made.state_dict())
    data = (tmp_path / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert set(header) - {"__metadata__"} == set(made.state_dict())
    made.to(memory_format=torch.channels_last_3d)
    assert write_encoder(tmp_path, card(), made.state_dict()).id == plain.id


def test_tampered_weights_are_refused(tmp_path: Path) -> None:
    kept(tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(EncoderMismatch, match="do not match the hash"):
        load_encoder(tmp_path, "cpu")


def test_a_tampered_card_is_refused(tmp_path: Path) -> None:
    kept(tmp_path)
    fields = json.loads((tmp_path / CARD).read_text())
    fields["intensity"]["clip"] = 3.0
    (tmp_path / CARD).write_text(json.dumps(fields))
    with pytest.raises(EncoderMismatch, match="hashes to"):
        load_encoder(tmp_path, "cpu")


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_truncated_weights_are_damage(tmp_path: Path, left: int) -> None:
    kept(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:left])
    with pytest.raises(StoreDamaged, match="weights"):
        load_encoder(tmp_path, "cpu")


def test_missing_weights_are_damage(tmp_path: Path) -> None:
    kept(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(StoreDamaged, match=WEIGHTS) as damaged:
        load_encoder(tmp_path, "cpu")
    assert damaged.value.next_step
    assert str(tmp_path) not in str(damaged.value)


def test_the_papers_network_is_loaded_as_it_was_kept(tmp_path: Path) -> None:
    """Loading builds a network twice, once without memory: every network of ours has to allow it."""
    named = "isimed_index.encoders.networks:PatchDenseNet121"
    made = build_network(named, {"embedding": 1024}, {})
    before = replace(card(), factory=named, network={}, outputs={"embedding": 1024}, match_output="embedding")
    write_encoder(tmp_path, before, made.state_dict())
    patches = np.random.default_rng(1).normal(size=(2, 32, 32, 32)).astype(np.float32)
    expected = TorchEncoder(before, made, CPU).encode(patches)["embedding"]
    found = load_encoder(tmp_path, "cpu").encode(patches)["embedding"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path, card(), ValidNet(card().outputs, width=3).state_dict())
    with pytest.raises(EncoderMismatch, match="do not fit"):
        load_encoder(tmp_path, "cpu")
