"""The objectives against slow and obvious oracles, and against what they are meant to prefer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pretraining import OBLIQUE, config

from isimed_index.config import PretrainConfig
from isimed_index.encoders.networks import ValidNet
from isimed_index.pretrain.objective import joint_loss, view_lattice
from isimed_index.pretrain.objectives.coordinate import offset_loss
from isimed_index.pretrain.objectives.descriptor import dense_infonce
from isimed_index.pretrain.objectives.isimed import distance_error_mm, distance_loss
from isimed_index.pretrain.sampler import Batch, Cohort, draw
from isimed_index.scans.prepare import Volume
from isimed_index.space import apply_affine

N = 14
SCAN_OF = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 3, 3, 3])


def drawn(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape) * scale)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# -- distances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pairs", ["within", "all"])
@pytest.mark.parametrize("near_mm", [None, 20.0])
def test_distance_loss_equals_the_papers_formula(dtype: torch.dtype, pairs: Any, near_mm: float | None) -> None:
    z, x = drawn(0, N, 5).to(dtype), drawn(1, N, 3, scale=60).to(dtype)
    found = distance_loss(z, x, SCAN_OF, pairs=pairs, unit_mm=50.0, near_mm=near_mm)
    chosen = [(i, j) for i in range(N) for j in range(i) if pairs == "all" or SCAN_OF[i] == SCAN_OF[j]]
    physical = np.array([np.linalg.norm(x[i] - x[j]) for i, j in chosen])
    latent = np.array([np.linalg.norm(z[i] - z[j]) for i, j in chosen])
    weight = 1 / (physical + near_mm) if near_mm else np.ones_like(physical)
    expected = (weight * (latent - physical / 50) ** 2).sum() / weight.sum()
    assert found.dtype == dtype
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_distance_loss_passes_gradcheck() -> None:
    z, x = drawn(0, 8, 4).requires_grad_(), drawn(1, 8, 3, scale=60)
    for pairs in ("within", "all"):
        assert torch.autograd.gradcheck(lambda v, p=pairs: distance_loss(v, x, SCAN_OF[:8], pairs=p, near_mm=10.0), z)


def test_distance_loss_has_finite_gradients_where_embeddings_coincide() -> None:
    z = torch.zeros(N, 4, requires_grad=True)
    distance_loss(z, drawn(1, N, 3, scale=60), SCAN_OF).backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_distance_loss_is_near_zero_for_true_distances_even_far_from_the_origin() -> None:
    """Millimetres of a scan may be hundreds away from the scanner's centre; float32 must not suffer."""
    x = (drawn(1, N, 3, scale=60) + 900).float()
    assert float(distance_loss(x / 100, x, SCAN_OF, pairs="all")) < 1e-7


def test_distance_loss_without_any_pair_is_zero() -> None:
    assert float(distance_loss(drawn(0, 3, 4), drawn(1, 3, 3), torch.arange(3))) == 0.0


def test_distance_error_in_millimetres() -> None:
    z, x = drawn(0, 5, 4), drawn(1, 5, 3, scale=60)
    pairs = [(i, j) for i in range(5) for j in range(i)]
    expected = np.mean([abs(100 * np.linalg.norm(z[i] - z[j]) - np.linalg.norm(x[i] - x[j])) for i, j in pairs])
    assert float(distance_error_mm(z, x, 100.0)) == pytest.approx(expected, rel=1e-5)


# -- coordinates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_offset_loss_equals_its_formula(dtype: torch.dtype) -> None:
    p, x = drawn(2, N, 3, scale=60).to(dtype), drawn(3, N, 3, scale=60).to(dtype)
    error = ((p - x) / 80).double().numpy()
    rest = np.concatenate([error[s == SCAN_OF] - error[s == SCAN_OF].mean(axis=0) for s in (0, 1, 3)])
    huber = np.where(np.abs(rest) < 0.2, rest**2 / 2, 0.2 * (np.abs(rest) - 0.1))
    found = offset_loss(p, x, SCAN_OF, unit_mm=80.0)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(huber.sum(axis=1).mean(), rel=1e-5)


def test_offset_loss_passes_gradcheck() -> None:
    p, x = drawn(2, 8, 3, scale=60).requires_grad_(), drawn(3, 8, 3, scale=60)
    assert torch.autograd.gradcheck(lambda v: offset_loss(v, x, SCAN_OF[:8]), p, eps=1e-4)


def test_offset_loss_is_blind_to_a_translation_of_each_scan() -> None:
    p, x = drawn(2, N, 3, scale=60), drawn(3, N, 3, scale=60)
    moved = p + drawn(4, 4, 3, scale=300)[SCAN_OF]
    assert float(offset_loss(moved, x, SCAN_OF)) == pytest.approx(float(offset_loss(p, x, SCAN_OF)), abs=1e-9)
    assert float(offset_loss(x + drawn(4, 4, 3, scale=300)[SCAN_OF], x, SCAN_OF)) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offset_loss_sees_a_mirror_image_that_distances_do_not(axis: int) -> None:
    x = drawn(3, N, 3, scale=60)
    mirrored = x.clone()
    mirrored[:, axis] *= -1
    assert float(distance_loss(mirrored / 100, x, SCAN_OF)) < 1e-7
    assert float(offset_loss(mirrored, x, SCAN_OF)) > 0.02


def test_half_precision_predictions_are_compared_in_float32() -> None:
    p, x = drawn(2, N, 3, scale=60).to(torch.bfloat16), drawn(3, N, 3, scale=60).float()
    assert offset_loss(p, x, SCAN_OF).dtype == torch.float32
    assert distance_loss(p, x, SCAN_OF).dtype == torch.float32
    assert dense_infonce(p, p, p, x, x).dtype == torch.float32


# -- descriptors ----------------------------------------------------------------------------------------------------


def infonce_case() -> tuple[torch.Tensor, ...]:
    return drawn(5, 6, 4), drawn(6, 6, 4), drawn(7, 9, 4), drawn(8, 6, 3, scale=15), drawn(9, 9, 3, scale=15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infonce_equals_its_formula(dtype: torch.dtype) -> None:
    a, p, c, xa, xc = (tensor.to(dtype) for tensor in infonce_case())
    found = dense_infonce(a, p, c, xa, xc, ignore_mm=20.0, temperature=0.3)
    a, p, c = (v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True) for v in (a, p, c))
    far = np.linalg.norm(xa.numpy()[:, None] - xc.numpy()[None], axis=-1) >= 20
    assert far.any()
    assert not far.all()
    hit, miss = np.exp((a * p).sum(1) / 0.3), np.exp(a @ c.T / 0.3)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(-np.log(hit / (hit + (miss * far).sum(1))).mean(), rel=1e-5)


def test_infonce_passes_gradcheck() -> None:
    a, p, c, xa, xc = infonce_case()
    vectors = tuple(v.requires_grad_() for v in (a, p, c))
    assert torch.autograd.gradcheck(lambda *v: dense_infonce(*v, xa, xc, ignore_mm=20.0), vectors)


def test_infonce_without_any_candidate_is_zero_with_finite_gradients() -> None:
    a, p, c, xa, xc = infonce_case()
    a.requires_grad_()
    loss = dense_infonce(a, p, c, xa, xc, ignore_mm=1e4)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()


# -- together -------------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def geometry() -> tuple[PretrainConfig, Batch, torch.Tensor]:
    """A configuration, a batch, and the place in mm that its images themselves show at each patch centre (v, 3, p)."""
    still = replace(config().augmentation, curve_probability=0.0, bias=0.0, noise=0.0, rotation_deg=15.0, scale=0.1)
    setup = config(view_vox=40, crops_per_scan=2, augmentation=still, patches_per_scan=10**6)
    batches = [draw(coordinate_cohort(axis, 2), setup, 0) for axis in range(3)]
    centres = [15, 19, 23]  # a patch's centre lies between voxels 15 and 16 of it, which a mean of eight finds
    shown = []
    for batch in batches:
        pooled = torch.nn.functional.avg_pool3d(batch.images, 2, stride=1)
        shown.append(100 * pooled[:, 0][:, centres][:, :, centres][:, :, :, centres].flatten(1))
    return setup, batches[0], torch.stack(shown, dim=1)


def outputs_of(positions: torch.Tensor, embeddings: torch.Tensor, descriptors: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {"position": positions, "embedding": embeddings, "descriptor": descriptors}
    return {name: y.unflatten(-1, (3, 3, 3)).float() for name, y in named.items()}


def test_view_lattice_gives_patch_centres() -> None:
    lattice = view_lattice(ValidNet({"embedding": 2}, width=2), 40)
    assert lattice.shape == (27, 3)
    assert lattice[0].tolist() == [15.5, 15.5, 15.5]
    assert lattice[1].tolist() == [15.5, 15.5, 19.5]
    assert lattice[-1].tolist() == [23.5, 23.5, 23.5]


def test_a_network_that_reads_places_off_the_image_has_no_loss(
    geometry: tuple[PretrainConfig, Batch, torch.Tensor],
) -> None:
    """Images that show their own millimetres prove crops, poses, affines and lattice at once."""
    setup, batch, shown = geometry
    network = ValidNet({"embedding": 2}, width=2)
    losses = joint_loss(outputs_of(shown, shown / 100, shown), batch, network, setup, 0)
    assert float(losses.terms["coordinate"]) < 1e-5
    assert float(losses.terms["distance"]) < 1e-5
    mirrored = shown * torch.tensor([-1.0, 1.0, 1.0])[None, :, None]
    assert float(joint_loss(outputs_of(mirrored, shown, shown), batch, network, setup, 0).terms["coordinate"]) > 1e-3


def test_the_same_place_in_two_views_is_the_positive(geometry: tuple[PretrainConfig, Batch, torch.Tensor]) -> None:
    """Descriptors that are smooth functions of the place win; those of another place, or another order, lose."""
    setup, batch, shown = geometry
    network = ValidNet({"embedding": 2}, width=2)
    waves = torch.cat([torch.cos(shown / 12), torch.sin(shown / 12)], dim=1)

    def loss(descriptors: torch.Tensor) -> float:
        changed = replace(setup, ignore_mm=9.0, temperature=0.02)
        return float(joint_loss(outputs_of(shown, shown, descriptors), batch, network, changed, 0).terms["descriptor"])

    swapped = waves.clone()
    swapped[1::2] = waves[1::2].flip(-1)
    assert loss(waves) < 0.5 * loss(torch.ones_like(waves))
    assert loss(waves) < 0.1 * loss(swapped)


def test_the_total_is_the_weighted_sum(geometry: tuple[PretrainConfig, Batch, torch.Tensor]) -> None:
    setup, batch, shown = geometry
    changed = replace(setup, distance_weight=2.0, coordinate_weight=3.0, descriptor_weight=0.5, patches_per_scan=7)
    noise = torch.randn_like(shown)
    network = ValidNet({"embedding": 2}, width=2)
    losses = joint_loss(outputs_of(100 * noise, noise, noise), batch, network, changed, 4)
    terms = losses.terms
    expected = 2 * terms["distance"] + 3 * terms["coordinate"] + 0.5 * terms["descriptor"]
    torch.testing.assert_close(losses.total, expected)
    assert torch.bincount(losses.scan_of).tolist() == [7, 7]
    alone = replace(changed, coordinate_weight=0.0, descriptor_weight=0.0)
    only = joint_loss({"embedding": outputs_of(noise, noise, noise)["embedding"]}, batch, network, alone, 4)
    assert set(only.terms) == {"distance"}


def test_the_distance_objective_draws_other_patches_each_step(
    geometry: tuple[PretrainConfig, Batch, torch.Tensor],
) -> None:
    setup, batch, shown = geometry
    few = replace(setup, patches_per_scan=5)
    network = ValidNet({"embedding": 2}, width=2)
    drawn_at = [joint_loss(outputs_of(shown, shown, shown), batch, network, few, step).centres_mm for step in (0, 0, 1)]
    torch.testing.assert_close(drawn_at[0], drawn_at[1])
    assert not torch.equal(drawn_at[0], drawn_at[2])
