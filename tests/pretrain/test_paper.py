"""The preset `paper` is the ISImed paper's protocol, for each of its methods (SCIENCE: four methods)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretraining import sources

from isimed_index.config import PretrainConfig, pretrain_config
from isimed_index.encoders.networks import PatchDenseNet121, build_network
from isimed_index.errors import UsageError
from isimed_index.pretrain.forward import in_half
from isimed_index.pretrain.methods import build_method
from isimed_index.pretrain.sampler import Batch, Cohort, draw
from isimed_index.pretrain.schedule import epoch_steps, learning_rate
from isimed_index.pretrain.trainer import intensity_of, new_card, train
from isimed_index.scans.prepare import Volume

METHODS = ("isimed", "barlowtwins", "simclr", "regisimed")
WITH_VIEWS = METHODS[1:]
every_method = pytest.mark.parametrize("method", METHODS)


def paper(method: str, **changes: Any) -> PretrainConfig:
    return replace(pretrain_config("paper", None, {"method": method}), **changes)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def densenet_parameters() -> int:
    """Of DenseNet121 in 3-D without its classifier (Huang et al., 2017): growth 32, bottlenecks of 128."""
    channels, count = 64, 64 * 7**3 + 2 * 64
    for block, layers in enumerate((6, 12, 24, 16)):
        for _ in range(layers):
            count += 2 * channels + channels * 128 + 2 * 128 + 128 * 32 * 3**3
            channels += 32
        if block < 3:
            count += 2 * channels + channels * channels // 2
            channels //= 2
    assert channels == 1024
    return count + 2 * channels


@pytest.fixture(scope="module")
def network() -> Any:
    card = new_card(paper("isimed"), "paper", "paper")
    torch.manual_seed(0)
    return build_network(card.factory, card.outputs, card.network)


@every_method
def test_the_network_is_densenet121_with_1024_outputs_and_no_projector(method: str, network: PatchDenseNet121) -> None:
    card = new_card(paper(method), "paper", "paper")
    assert (card.factory.split(":")[1], dict(card.network)) == ("PatchDenseNet121", {})
    assert (dict(card.outputs), card.patch_vox) == ({"embedding": 1024}, 32)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == densenet_parameters() == 11_242_624
    assert network.features.conv0.in_channels == 1
    own = {name: tuple(p.shape) for name, p in build_method(paper(method), network).named_parameters()}
    heads = {"layers.distance": 512, "layers.redundancy": 2048} if method == "regisimed" else {}
    assert own == {
        f"{name}.{part}": shape
        for name, dim in heads.items()
        for part, shape in (("weight", (dim, 1024)), ("bias", (dim,)))
    }


def test_the_network_is_monais(network: PatchDenseNet121) -> None:
    from monai.networks.nets import DenseNet121

    whole = DenseNet121(spatial_dims=3, in_channels=1, out_channels=1)
    whole.features.load_state_dict(network.features.state_dict())
    whole.class_layers.out = torch.nn.Identity()
    patches = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(patches)["embedding"][:, :, 0, 0, 0], whole.eval()(patches))


@every_method
def test_it_learns_for_50_epochs_at_a_rate_that_falls_by_a_tenth_after_each(method: str) -> None:
    config = paper(method)
    per_epoch = epoch_steps(config, 515)  # autoPET's training scans
    assert (config.epochs, per_epoch) == (50, 9)
    rates = [learning_rate(config, step, per_epoch) for step in range(50 * per_epoch)]
    assert rates == pytest.approx(np.repeat(1e-3 * 0.9 ** np.arange(50), 9))
    assert (config.warmup_steps, config.clip_norm, config.ema) == (0, 0.0, 0.0)


@every_method
def test_intensities_go_from_the_5th_and_95th_percentile_to_one_below_and_above_zero(method: str) -> None:
    intensity = intensity_of(paper(method))
    assert intensity.fields().items() >= {"low_percentile": 5.0, "high_percentile": 95.0, "low": -1.0}.items()
    values = np.linspace(0, 200, 201, dtype=np.float32)
    assert intensity.scale(values)[[10, 100, 190]].tolist() == pytest.approx([-1, 0, 1])
    values[200] = 1900
    assert float(intensity.scale(values)[200]) == pytest.approx(20)  # nothing is cut off
    card = new_card(paper(method), "paper", "paper")
    assert (card.intensity.clip, card.to_json()["intensity"]["clip"]) == (0, 0)


def test_the_objectives_have_the_papers_weights() -> None:
    config = paper("isimed")
    assert (config.pairs, config.unit_mm, config.near_mm, config.huber) == ("all", 1.0, 0.0, 0.0)
    assert (config.distance_weight, config.coordinate_weight, config.descriptor_weight) == (1.0, 0.0, 0.0)
    assert paper("barlowtwins").redundancy_weight == paper("regisimed").redundancy_weight == 0.005
    assert paper("simclr").simclr_temperature == 0.05
    joint = paper("regisimed")
    assert (joint.barlowtwins_weight, joint.pairs, joint.unit_mm, joint.near_mm) == (1000.0, "all", 1.0, 0.0)


# -- the batch ------------------------------------------------------------------------------------------------------


def bright() -> Volume:
    """A scan that is 1 everywhere, so that what was dropped of a view shows as background, -1."""
    values = np.ones((60, 60, 60), np.float32)
    return Volume(values, np.diag([2.0, 2, 2, 1]), -1.0, values > 0)


@pytest.fixture(scope="module")
def batches() -> dict[str, Batch]:
    """First batches as the preset draws them; that with views is of a quarter of the scans, for its time."""
    torch.set_num_threads(1)
    cohort = Cohort([bright] * 64, 10**9)
    return {"isimed": draw(cohort, paper("isimed"), 0), "simclr": draw(cohort, paper("simclr", batch_scans=16), 0)}


def test_a_batch_has_16_patches_of_each_of_64_scans(batches: dict[str, Batch]) -> None:
    batch = batches["isimed"]
    assert batch.images.shape == (1024, 1, 32, 32, 32)
    assert float(batch.images.min()) == 1  # whole patches, as they are
    assert np.bincount(batch.scan_of).tolist() == [16] * 64
    assert len(np.unique(batch.crop_of)) == 1024
    assert len(np.unique(batch.affines[:, :3, 3], axis=0)) > 900  # random places
    method = build_method(paper("isimed"), PatchDenseNet121({"embedding": 1024}))
    losses = method({"embedding": torch.randn(1024, 8, 1, 1, 1)}, batch, 0)
    assert len(losses.embeddings) == 1024  # all of them are in the distance matrix


def test_the_contrastive_methods_draw_two_views_of_each_patch(batches: dict[str, Batch]) -> None:
    batch = batches["simclr"]
    assert batch.images.shape == (512, 1, 32, 32, 32)
    assert np.bincount(batch.scan_of).tolist() == [32] * 16
    assert np.bincount(batch.crop_of).tolist() == [2] * 256
    assert np.array_equal(batch.affines[::2], batch.affines[1::2])  # of the very same voxels
    for method in WITH_VIEWS:
        config = paper(method)
        assert (config.batch_scans, config.crops_per_scan, config.views_per_crop) == (64, 16, 2)
        assert (config.augmentation.holes, config.augmentation.shuffle_probability) == (True, 0.8)
        assert replace(config.augmentation, holes=False, shuffle_probability=0.0) == paper("isimed").augmentation


def test_half_of_the_views_have_six_holes_and_half_six_windows(batches: dict[str, Batch]) -> None:
    images = batches["simclr"].images[:, 0]
    assert bool((images.abs() == 1).all())
    dropped = (images < 0).flatten(1).sum(dim=1).numpy()
    assert dropped.min() >= 3**3
    assert (32**3 - dropped).min() >= 3**3
    holes = dropped <= 6 * 10**3
    assert 0.4 < holes.mean() < 0.6
    assert (32**3 - dropped[~holes]).max() <= 6 * 21**3
    assert np.corrcoef(dropped[::2], dropped[1::2])[0, 1] == pytest.approx(0, abs=0.2)  # each view by itself


# -- one epoch ------------------------------------------------------------------------------------------------------


@every_method
def test_an_epoch_of_the_preset_runs_on_shrunk_data(tmp_path: Path, method: str) -> None:
    """The real network, optimiser, views and objective; two steps of 2 scans × 2 patches in place of 64 × 16."""
    config = paper(method, epochs=1, batch_scans=2, crops_per_scan=2)
    trained = train(config, sources(4), tmp_path, preset="paper", device="cpu")
    entry = json.loads(trained.metrics.read_text())
    terms = {"isimed": ["distance"], "regisimed": ["distance", "barlowtwins"]}.get(method, [method])
    assert (entry["epoch"], entry["step"]) == (1, 2)
    assert all(np.isfinite(entry[name]) for name in ["loss", *terms])
    fresh = PatchDenseNet121({"embedding": 1024})
    assert trained.state.keys() == fresh.state_dict().keys()
    assert trained.state["features.norm5.num_batches_tracked"] == 2
    assert (trained.card.training["preset"], trained.card.training["method"]) == ("paper", method)


def test_it_is_not_trained_in_bfloat16_on_a_cpu() -> None:
    """PyTorch's bfloat16 gradients of densenet121 are noise or NaN there: see `in_half`."""
    cpu = torch.device("cpu")
    assert in_half(paper("isimed"), cpu) is False
    assert in_half(paper("isimed", precision="bfloat16"), torch.device("cuda")) is True
    with pytest.raises(UsageError, match="bfloat16") as refused:
        in_half(paper("isimed", precision="bfloat16"), cpu)
    assert "float32" in refused.value.next_step
