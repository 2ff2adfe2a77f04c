"""The training methods: what they make of a batch whose places are known, and that all that is stored is trained."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pretraining import OBLIQUE, config, sources

from isimed_index import config as configuration
from isimed_index.config import PretrainConfig, pretrain_config
from isimed_index.encoders.networks import MM_PER_POSITION_UNIT, ValidNet
from isimed_index.errors import ConfigError
from isimed_index.pretrain.methods import (
    DISTANCE_HEAD,
    REDUNDANCY_HEAD,
    Losses,
    Method,
    build_method,
    metric_of,
    outputs_of,
    view_lattice,
)
from isimed_index.pretrain.objectives.barlowtwins import barlowtwins_loss
from isimed_index.pretrain.objectives.coordinate import coordinate_loss, offset_loss
from isimed_index.pretrain.objectives.isimed import distance_loss
from isimed_index.pretrain.objectives.simclr import simclr_loss
from isimed_index.pretrain.sampler import Batch, Cohort, draw
from isimed_index.pretrain.trainer import train
from isimed_index.progress import Silent
from isimed_index.scans.prepare import Volume
from isimed_index.space import apply_affine

METHODS = get_args(configuration.Method)
TWO_VIEWS = pytest.mark.parametrize("method", configuration.TWO_VIEW_METHODS)
Geometry = tuple[PretrainConfig, Batch, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def coordinate_cohort(axis: int, count: int) -> Cohort:
    """Scans whose values are one RAS coordinate of the voxel (as a share of 100 mm), around the volume's middle."""

    def make(number: int) -> Volume:
        affine = OBLIQUE.copy()
        affine[:3, 3] += 10 * number
        shape = (90, 90, 90)
        middle = apply_affine(affine, [[44.5, 44.5, 44.5]])[0]
        mm = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)) - middle
        inner = np.zeros(shape, bool)
        inner[43:47, 43:47, 43:47] = True  # views stay inside: nothing of them is padding
        return Volume((mm[..., axis] / 100).astype(np.float32), affine, 0.0, inner)

    return Cohort([lambda n=n: make(n) for n in range(count)], 10**9)


def drawn(setup: PretrainConfig) -> Geometry:
    """A configuration, a batch, and the place in mm that its images themselves show at each patch centre (v, 3, p)."""
    batches = [draw(coordinate_cohort(axis, 2), setup, 0) for axis in range(3)]
    # A patch's centre lies between voxels 15 and 16 of it, which a mean of eight finds.
    centres = list(range(15, setup.view_vox - 16, 4))
    shown = []
    for batch in batches:
        pooled = torch.nn.functional.avg_pool3d(batch.images, 2, stride=1)
        shown.append(100 * pooled[:, 0][:, centres][:, :, centres][:, :, :, centres].flatten(1))
    return setup, batches[0], torch.stack(shown, dim=1)


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    still = replace(config().augmentation, curve_probability=0.0, bias=0.0, noise=0.0, rotation_deg=15.0, scale=0.1)
    return drawn(config(view_vox=40, crops_per_scan=2, augmentation=still, patches_per_scan=10**6, embedding_dim=3))


def maps(values: torch.Tensor) -> torch.Tensor:
    """(v, d, p) → (v, d, i, i, i)."""
    edge = round(values.shape[-1] ** (1 / 3))
    return values.unflatten(-1, (edge, edge, edge)).float()


def outputs_with(positions: torch.Tensor, embeddings: torch.Tensor, descriptors: torch.Tensor) -> Any:
    return {"position": maps(positions), "embedding": maps(embeddings), "descriptor": maps(descriptors)}


def method_for(setup: PretrainConfig) -> Method:
    return build_method(setup, ValidNet(outputs_of(setup), width=2))


def losses_of(outputs: Any, batch: Batch, setup: PretrainConfig, step: int = 0) -> Losses:
    losses: Losses = method_for(setup)(outputs, batch, step)
    return losses


def waves(shown: torch.Tensor) -> torch.Tensor:
    """Embeddings that are smooth functions of the place and of nothing else."""
    return torch.cat([torch.cos(shown / 12), torch.sin(shown / 12)], dim=1)


def swapped(values: torch.Tensor) -> torch.Tensor:
    """The same values, those of second views in another order."""
    other = values.clone()
    other[1::2] = values[1::2].flip(-1)
    return other


# -- isimed ---------------------------------------------------------------------------------------------------------


def test_view_lattice_gives_patch_centres() -> None:
    lattice = view_lattice(ValidNet({"embedding": 2}, width=2), 40)
    assert lattice.shape == (27, 3)
    assert lattice[0].tolist() == [15.5, 15.5, 15.5]
    assert lattice[1].tolist() == [15.5, 15.5, 19.5]
    assert lattice[-1].tolist() == [23.5, 23.5, 23.5]


def test_a_network_that_reads_places_off_the_image_has_no_loss(geometry: Geometry) -> None:
    """Images that show their own millimetres prove crops, poses, affines and lattice at once."""
    setup, batch, shown = geometry
    losses = losses_of(outputs_with(shown, shown / 100, shown), batch, setup)
    assert float(losses.terms["coordinate"]) < 1e-5
    assert float(losses.terms["distance"]) < 1e-5
    mirrored = shown * torch.tensor([-1.0, 1.0, 1.0])[None, :, None]
    assert float(losses_of(outputs_with(mirrored, shown, shown), batch, setup).terms["coordinate"]) > 1e-3


def test_the_same_place_in_two_views_is_the_positive(geometry: Geometry) -> None:
    """Descriptors that are smooth functions of the place win; those of another place, or another order, lose."""
    setup, batch, shown = geometry
    changed = replace(setup, ignore_mm=9.0, descriptor_temperature=0.02)

    def loss(descriptors: torch.Tensor) -> float:
        return float(losses_of(outputs_with(shown, shown, descriptors), batch, changed).terms["descriptor"])

    right = waves(shown)
    assert loss(right) < 0.5 * loss(torch.ones_like(right))
    assert loss(right) < 0.1 * loss(swapped(right))


def test_the_total_is_the_weighted_sum(geometry: Geometry) -> None:
    setup, batch, shown = geometry
    changed = replace(setup, distance_weight=2.0, coordinate_weight=3.0, descriptor_weight=0.5, patches_per_scan=7)
    noise = torch.randn_like(shown)
    losses = losses_of(outputs_with(100 * noise, noise, noise), batch, changed, 4)
    terms = losses.terms
    expected = 2 * terms["distance"] + 3 * terms["coordinate"] + 0.5 * terms["descriptor"]
    torch.testing.assert_close(losses.total, expected)
    assert torch.bincount(losses.scan_of).tolist() == [7, 7]
    alone = replace(changed, coordinate_weight=0.0, descriptor_weight=0.0)
    only = losses_of({"embedding": maps(noise)}, batch, alone, 4)
    assert set(only.terms) == {"distance"}


def test_the_distance_objective_draws_other_patches_each_step(geometry: Geometry) -> None:
    setup, batch, shown = geometry
    few = replace(setup, patches_per_scan=5)
    seen = [losses_of(outputs_with(shown, shown, shown), batch, few, step).centres_mm for step in (0, 0, 1)]
    torch.testing.assert_close(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_isimed_takes_huber_unit_and_pairs_from_the_configuration(geometry: Geometry) -> None:
    setup, batch, shown = geometry
    changed = replace(setup, huber=0.3, unit_mm=40.0, pairs="all", near_mm=0.0)
    losses = losses_of(outputs_with(shown, shown, shown), batch, changed)
    expected = distance_loss(losses.embeddings, losses.centres_mm, losses.scan_of, pairs="all", unit_mm=40.0, huber=0.3)
    assert len(losses.embeddings) == 8 * 27
    torch.testing.assert_close(losses.terms["distance"], expected)


# -- two views of maps ----------------------------------------------------------------------------------------------


def test_views_in_any_pose_are_paired_by_place(geometry: Geometry) -> None:
    """What is linear in the place is the same in both views once the second is interpolated at the first's places."""
    setup, batch, shown = geometry

    def agreement(values: torch.Tensor) -> float:
        changed = replace(setup, method="barlowtwins", redundancy_weight=0.0)
        return float(losses_of({"embedding": maps(values)}, batch, changed).total)

    assert agreement(shown) < 1e-6
    assert agreement(swapped(shown)) > 0.1


def test_simclr_finds_the_place_in_the_other_view(geometry: Geometry) -> None:
    setup, batch, shown = geometry

    def loss(values: torch.Tensor) -> float:
        return float(losses_of({"embedding": maps(values)}, batch, replace(setup, method="simclr")).total)

    right = waves(shown)
    assert loss(right) < 0.8 * loss(torch.ones_like(right))
    assert loss(right) < 0.5 * loss(swapped(right))


@pytest.mark.parametrize("most", [2, 3])
def test_at_most_patches_per_scan_pairs_of_each_scan_are_compared(geometry: Geometry, most: int) -> None:
    """With constant embeddings, simclr's loss is the logarithm of how many views each is compared with."""
    setup, batch, shown = geometry
    few = replace(setup, method="simclr", patches_per_scan=most)
    losses = losses_of({"embedding": maps(shown * 0 + 1)}, batch, few)
    assert float(losses.total) == pytest.approx(math.log(2 * 2 * most - 1), rel=1e-5)


def test_views_of_one_pose_share_every_place() -> None:
    """Also the outermost ones, where rounding could lose them; their embeddings are taken as they are."""
    still = replace(config().augmentation, rotation_deg=0.0, scale=0.0, shift_vox=0.0, curve_probability=0.0)
    setup = config(view_vox=40, crops_per_scan=2, augmentation=still, patches_per_scan=10**6, method="simclr")
    setup, batch, shown = drawn(setup)
    values = torch.randn_like(shown)
    found = losses_of({"embedding": maps(values)}, batch, setup).total
    one, two = (values[view::2].transpose(1, 2).flatten(0, 1).float() for view in (0, 1))
    torch.testing.assert_close(found, simclr_loss(one, two), rtol=1e-4, atol=1e-4)


@TWO_VIEWS
def test_views_without_a_common_place_cost_nothing(geometry: Geometry, method: Any) -> None:
    setup, batch, shown = geometry
    apart = batch.affines.copy()
    apart[1::2, :3, 3] += 500
    away = Batch(batch.images, apart, batch.scan_of, batch.crop_of)
    values = maps(shown).requires_grad_()
    losses = losses_of({"embedding": values}, away, replace(setup, method=method))
    losses.total.backward()
    assert float(losses.total.detach()) == 0
    assert values.grad is not None
    assert float(values.grad.abs().max()) == 0
    assert len(losses.embeddings) > 0  # the monitor has something to look at


# -- two views of single patches, as in the paper -------------------------------------------------------------------


def paper_case(method: Any) -> tuple[PretrainConfig, Batch, torch.Tensor]:
    paper = pretrain_config("paper", None, {"method": method})
    setup = replace(paper, network="valid", width=2, batch_scans=3, crops_per_scan=4, embedding_dim=6)
    batch = draw(Cohort(sources(3), 10**9), setup, 0)
    return setup, batch, torch.randn(len(batch.affines), 6, 1, 1, 1)


@pytest.mark.parametrize(("method", "oracle"), [("barlowtwins", barlowtwins_loss), ("simclr", simclr_loss)])
def test_single_patches_are_paired_as_they_are(method: Any, oracle: Any) -> None:
    setup, batch, values = paper_case(method)
    losses = losses_of({"embedding": values}, batch, setup)
    flat = values[:, :, 0, 0, 0]
    assert len(flat) == 24
    assert batch.crop_of[::2].tolist() == batch.crop_of[1::2].tolist()
    torch.testing.assert_close(losses.total, oracle(flat[::2], flat[1::2]))
    assert list(losses.terms) == [method]
    assert {tuple(row) for row in losses.embeddings.tolist()} <= {tuple(row) for row in flat.tolist()}


def test_regisimed_applies_distances_to_the_patches_of_both_views() -> None:
    setup, batch, values = paper_case("regisimed")
    method = method_for(setup)
    losses = method({"embedding": values}, batch, 0)
    flat = values[:, :, 0, 0, 0]
    places = np.stack([apply_affine(affine, [15.5] * 3) for affine in batch.affines])
    centres = torch.tensor(places, dtype=torch.float32)
    distance, redundancy = method.layers["distance"], method.layers["redundancy"]
    assert (distance.out_features, redundancy.out_features) == (DISTANCE_HEAD, REDUNDANCY_HEAD) == (512, 2048)
    of_distance = distance_loss(distance(flat), centres, torch.tensor(batch.scan_of), pairs="all", unit_mm=1.0)
    of_redundancy = barlowtwins_loss(redundancy(flat[::2]), redundancy(flat[1::2]))
    torch.testing.assert_close(losses.terms["distance"], of_distance)
    torch.testing.assert_close(losses.terms["barlowtwins"], of_redundancy)
    torch.testing.assert_close(losses.total, of_distance + 1000 * of_redundancy)
    assert losses.embeddings.shape[1] == 6  # the monitor sees what the encoder gives, not a head


def test_distances_of_single_patches_are_between_the_places_that_each_view_itself_shows() -> None:
    """A configuration may shift the two views of a crop apart, which a map of one patch cannot make up for."""
    setup, _, values = paper_case("regisimed")
    setup = replace(setup, augmentation=replace(setup.augmentation, shift_vox=6.0))
    batch = draw(Cohort(sources(3), 10**9), setup, 0)
    centres = np.stack([apply_affine(affine, [15.5] * 3) for affine in batch.affines])
    assert np.linalg.norm(centres[::2] - centres[1::2], axis=1).min() > 1
    method = method_for(setup)
    expected = distance_loss(
        method.layers["distance"](values[:, :, 0, 0, 0]),
        torch.tensor(centres, dtype=torch.float32),
        torch.tensor(batch.scan_of),
        pairs="all",
        unit_mm=1.0,
    )
    torch.testing.assert_close(method({"embedding": values}, batch, 0).terms["distance"], expected)


# -- coordinate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["within", "all"])
def test_coordinates_are_offsets_within_scans_or_in_the_common_frame(geometry: Geometry, pairs: Any) -> None:
    setup, _, _ = geometry
    setup, batch, shown = drawn(replace(setup, method="coordinate", pairs=pairs, unit_mm=50.0))
    method = method_for(setup)
    losses = method({"embedding": maps(shown), "position": maps(shown)}, batch, 0)
    assert float(losses.terms["coordinate"]) < 1e-5
    moved = method({"embedding": maps(shown), "position": maps(shown + 30)}, batch, 0)
    if pairs == "within":
        assert float(moved.terms["coordinate"]) < 1e-5
    else:
        assert float(moved.terms["coordinate"]) == pytest.approx(3 * 0.6**2, rel=1e-2)
    read = method.layers["coordinate"](losses.embeddings) * MM_PER_POSITION_UNIT  # 27 patches of all views, in order
    if pairs == "within":
        expected = offset_loss(read, losses.centres_mm, losses.scan_of, unit_mm=50.0)
    else:
        expected = coordinate_loss(read, losses.centres_mm, unit_mm=50.0)
    torch.testing.assert_close(losses.terms["read_out"], expected)
    torch.testing.assert_close(losses.total, losses.terms["read_out"] + losses.terms["coordinate"])


# -- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("view_vox", [32, 48])
def test_everything_that_is_stored_is_trained(method: Any, view_vox: int) -> None:
    """Each parameter of the network and of the method gets a gradient: no output is left as it was drawn."""
    setup = config(method=method, view_vox=view_vox, crops_per_scan=3, descriptor_weight=0.3 if view_vox > 32 else 0.0)
    batch = draw(Cohort(sources(2), 10**9), setup, 0)
    network = ValidNet(outputs_of(setup), width=2)
    learned = build_method(setup, network)
    losses = learned(network(batch.images), batch, 0)
    losses.total.backward()
    for name, parameter in [*network.named_parameters(), *learned.named_parameters()]:
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if not name.endswith("bias"):  # a bias that all embeddings share changes no distance
            assert float(parameter.grad.abs().max()) > 0, name
    assert not losses.embeddings.requires_grad
    assert len(losses.embeddings) == len(losses.centres_mm) == len(losses.scan_of) > 0


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_in_float32_whatever_the_networks_precision(method: Any) -> None:
    setup = config(method=method, view_vox=40, crops_per_scan=3)
    batch = draw(Cohort(sources(2), 10**9), setup, 0)
    network = ValidNet(outputs_of(setup), width=2)
    learned = build_method(setup, network)
    outputs = network(batch.images)
    exact = learned(outputs, batch, 0).total
    with torch.autocast("cpu", torch.bfloat16):
        assert learned(outputs, batch, 0).total.dtype == torch.float32
        torch.testing.assert_close(learned(outputs, batch, 0).total, exact)
        assert learned({name: y.bfloat16() for name, y in outputs.items()}, batch, 0).total.dtype == torch.float32
    wide = learned.double()({name: y.double() for name, y in outputs.items()}, batch, 0).total
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), exact, rtol=1e-3, atol=1e-4)


class Interrupted(Silent):
    """A progress display whose user presses Ctrl-C at the fifth step."""

    steps = 0

    def advance(self, n: int = 1, note: str = "") -> None:
        self.steps += n
        if self.steps >= 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["regisimed", "coordinate"])
@pytest.mark.filterwarnings("ignore:the embeddings are collapsing")
def test_a_methods_own_layers_are_resumed_and_not_stored(tmp_path: Path, method: Any) -> None:
    setup = config(method=method, view_vox=40)
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = train(setup, sources(3), tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(setup, sources(3), tmp_path / "broken", device="cpu", progress=Interrupted())
    resumed = train(setup, sources(3), tmp_path / "broken", device="cpu", resume=True)
    fresh = ValidNet(outputs_of(setup), width=2)
    assert whole.state.keys() == resumed.state.keys() == fresh.state_dict().keys()
    assert all(torch.equal(whole.state[name], resumed.state[name]) for name in whole.state)
    assert whole.card.training["method"] == method


@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_has_the_outputs_that_its_method_trains(method: Any) -> None:
    extra = {"isimed": {"position": 3, "descriptor": 4}, "coordinate": {"position": 3}}.get(method, {})
    setup = config(method=method)
    assert outputs_of(setup) == {"embedding": 4} | extra
    assert outputs_of(pretrain_config("paper", None, {"method": method})) == {"embedding": 1024}
    angles = method in ("isimed", "simclr", "barlowtwins")  # isimed's matches are searched in its descriptor
    assert metric_of(setup) == ("cosine" if angles else "l2")
    assert metric_of(replace(setup, descriptor_weight=0.0, method="isimed")) == "l2"


@TWO_VIEWS
def test_two_view_methods_need_two_views(method: Any) -> None:
    with pytest.raises(ConfigError, match="two views"):
        config(method=method, views_per_crop=1)
