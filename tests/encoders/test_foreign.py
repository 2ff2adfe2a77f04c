"""Encoders of other programs: what their network is shown, what becomes of its answer, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from isimed_index.encoders import foreign
from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.foreign import ForeignEncoder, pooled, turn
from isimed_index.encoders.protocol import Encoder
from isimed_index.encoders.runtime import open_encoder
from isimed_index.errors import EncoderMismatch, EncoderNotTrusted
from isimed_index.store.files import file_digest
from isimed_index.testing.conformance import EncoderConformance

EDGE = 8
CARD = EncoderCard(
    name="theirs",
    factory="foreign_nets:build",
    network={"width": 3},
    weights_sha256=None,
    patch_vox=EDGE,
    stride_vox=4,
    spacing_mm=2.0,
    outputs={"descriptor": 6},
    match_output="descriptor",
    metric="l2",
    pool="mean",
)
MODULE = f"""
import torch

class Net(torch.nn.Module):
    def __init__(self, width, gives="maps", scale=1.0):
        super().__init__()
        self.gives, self.scale = gives, scale
        self.layers = torch.nn.Sequential(
            torch.nn.Conv3d(1, width, 4, stride=2), torch.nn.Tanh(), torch.nn.Conv3d(width, 2 * width, 2)
        )

    def forward(self, x):
        assert x.shape[1:] == (1, {EDGE}, {EDGE}, {EDGE}) and x.dtype == torch.float32, x.shape
        maps = self.scale * self.layers(x)
        answers = {{
            "maps": maps,
            "vectors": maps.mean((2, 3, 4)),
            "named": {{"descriptor": maps, "another": maps[:, :2], "text": "ignored"}},
            "tokens": maps.flatten(2).transpose(1, 2),
            "other name": {{"features": maps}},
            "list": [maps],
            "noise": maps + torch.rand_like(maps),
        }}
        return answers[self.gives]

def build(width, **more):
    return Net(width, **more)

def number():
    return 3

def fails():
    raise OSError("weights were to be downloaded")
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of somebody, imported anew, with one thread and fixed weights."""
    import sys

    (tmp_path / "foreign_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign_nets", raising=False)
    torch.set_num_threads(1)
    torch.manual_seed(3)
    import foreign_nets

    return foreign_nets


def given_weights(folder: Path, module: torch.nn.Module, card: EncoderCard = CARD) -> tuple[EncoderCard, Path]:
    file = folder / "their.safetensors"
    save_file(module.state_dict(), file)
    return replace(card, weights_sha256=file_digest(file)[1]), file


def opened(card: EncoderCard, file: Path) -> Encoder:
    return open_encoder(card, file, "cpu", ["foreign_nets:build"])


class TestForeignModule(EncoderConformance):
    @pytest.fixture(autouse=True)
    def made(self, nets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(foreign, "_VOXELS_AT_ONCE", 3 * EDGE**3)  # so that batches are cut
        self.card, self.file = given_weights(tmp_path, nets.build(3))

    def make(self) -> Encoder:
        return opened(self.card, self.file)


class TestForeignModuleWithOtherAxes(TestForeignModule):
    def make(self) -> Encoder:
        return opened(replace(self.card, axes="SPL", pool="centre"), self.file)


def patches(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (n, EDGE, EDGE, EDGE)).astype(np.float32)


def test_vectors_are_those_of_the_module(nets: Any, tmp_path: Path) -> None:
    module = nets.build(3)
    card, file = given_weights(tmp_path, module)
    found = opened(card, file).encode(patches())
    with torch.no_grad():
        expected = module(torch.from_numpy(patches())[:, None]).mean((2, 3, 4)).numpy()
    np.testing.assert_allclose(found["descriptor"], expected, rtol=0, atol=1e-6)
    for gives in ("vectors", "named"):
        other = opened(replace(card, network={"width": 3, "gives": gives}), file)
        np.testing.assert_allclose(other.encode(patches())["descriptor"], expected, rtol=0, atol=1e-6)
    twice = opened(replace(card, network={"width": 3, "scale": 2.0}), file)  # arguments of any kind
    np.testing.assert_allclose(twice.encode(patches())["descriptor"], 2 * expected, rtol=0, atol=1e-6)


@given(axes=st.permutations(["RL", "AP", "IS"]).flatmap(lambda ends: st.tuples(*map(st.sampled_from, ends))))
def test_turning_is_what_nibabel_does(axes: tuple[str, ...]) -> None:
    values = np.random.default_rng(1).normal(size=(2, 5, 5, 5)).astype(np.float32)
    change = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("".join(axes))
    )
    expected = np.stack([nib.orientations.apply_orientation(value, change) for value in values])
    np.testing.assert_array_equal(turn(values, "".join(axes)), expected)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_the_centre_favours_no_side(side: int) -> None:
    maps = np.random.default_rng(2).normal(size=(2, 3, side, side, side)).astype(np.float32)
    middle = maps[:, :, (side - 1) // 2 : side // 2 + 1][..., (side - 1) // 2 : side // 2 + 1]
    middle = middle[:, :, :, (side - 1) // 2 : side // 2 + 1]
    np.testing.assert_allclose(pooled(maps, "centre"), middle.mean((2, 3, 4)), atol=1e-6)
    np.testing.assert_allclose(pooled(maps, "centre"), pooled(maps[:, :, ::-1, ::-1, ::-1], "centre"), atol=1e-6)
    np.testing.assert_allclose(pooled(maps, "mean"), maps.reshape(2, 3, -1).mean(2), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pool": None}, "map of 2×2×2 vectors a patch"),
        ({"outputs": {"descriptor": 7}}, r"expected vectors \(3, 7\)"),
        ({"network": {"width": 3, "gives": "tokens"}}, r"found shape \(3, 8, 6\)"),
        ({"network": {"width": 3, "gives": "other name"}}, "features"),
        ({"network": {"width": 3, "gives": "list"}}, "list"),
        ({"network": {"width": 3, "scale": float("inf")}}, "NaN or infinite"),
        ({"outputs": {"descriptor": 6, "position": 3}}, "one tensor where the card has one output"),
        ({"patch_vox": 9}, "fails on patches of 9³"),
    ],
)
def test_an_answer_that_is_not_as_on_the_card_is_refused(
    nets: Any, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    card, file = given_weights(tmp_path, nets.build(3))
    encoder = opened(replace(card, **change), file)
    edge = encoder.card.patch_vox
    with pytest.raises(EncoderMismatch, match=says) as refused:
        encoder.encode(np.full((3, edge, edge, edge), 0.5, np.float32))
    assert refused.value.next_step


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"network": {"width": 4}}, "do not fit its network foreign_nets:build.*expected"),
        ({"network": {}}, "width"),
        ({"network": {"width": 3, "depth": 2}}, "depth"),
        ({"factory": "foreign_nets:number", "network": {}}, "found int"),
        ({"factory": "foreign_nets:fails", "network": {}}, "downloaded"),
        ({"weights_sha256": "0" * 64}, "do not match the hash"),
    ],
)
def test_what_cannot_be_built_is_refused(nets: Any, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    card, file = given_weights(tmp_path, nets.build(3))
    with pytest.raises(EncoderMismatch, match=says) as refused:
        open_encoder(replace(card, **change), file, "cpu", ["foreign_nets"])
    assert refused.value.next_step


def test_without_trust_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "nets_with_effect.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nbuild = dict\n")
    monkeypatch.syspath_prepend(tmp_path)
    card, file = given_weights(tmp_path, torch.nn.Linear(1, 1))
    for trust in ([], ["foreign_nets"], ["nets_with_effect:other"]):
        with pytest.raises(EncoderNotTrusted, match="nets_with_effect:build"):
            open_encoder(replace(card, factory="nets_with_effect:build"), file, "cpu", trust)
    assert not (tmp_path / "ran").exists()
    assert "nets_with_effect" not in sys.modules


def test_large_patches_are_shown_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 patches of 96³ at once would take a network tens of gigabytes."""
    seen = []

    def run(given: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(given.shape)
        return {"descriptor": given.reshape(len(given), -1)[:, :6]}

    found = ForeignEncoder(replace(CARD, patch_vox=64), run).encode(np.zeros((20, 64, 64, 64), np.float32))
    assert [shape[0] for shape in seen] == [8, 8, 4]
    assert found["descriptor"].shape == (20, 6)
