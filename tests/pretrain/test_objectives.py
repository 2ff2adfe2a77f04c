"""The objectives against slow and obvious oracles, values and gradients, and against what they are meant to prefer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from isimed_index.pretrain.objectives.barlowtwins import barlowtwins_loss
from isimed_index.pretrain.objectives.coordinate import coordinate_loss, offset_loss
from isimed_index.pretrain.objectives.descriptor import dense_infonce
from isimed_index.pretrain.objectives.isimed import distance_loss
from isimed_index.pretrain.objectives.regisimed import regisimed_loss
from isimed_index.pretrain.objectives.simclr import simclr_loss

N = 14
SCAN_OF = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 3, 3, 3])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
Loss = Callable[..., torch.Tensor]


def drawn(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape) * scale)


def agree(loss: Loss, oracle: Loss, dtype: torch.dtype, *inputs: torch.Tensor) -> None:
    """`loss` in `dtype` equals `oracle` in float64 on `inputs`, and so do its gradients with respect to all of them."""
    ours = [x.to(dtype).requires_grad_() for x in inputs]
    theirs = [x.to(dtype).double().requires_grad_() for x in inputs]
    found, expected = loss(*ours), oracle(*theirs)
    assert found.dtype == dtype
    assert found.shape == ()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    found.backward()
    expected.backward()
    for our, their in zip(ours, theirs, strict=True):
        assert our.grad is not None
        assert their.grad is not None
        assert float(their.grad.abs().max()) > 0
        difference = (our.grad.double() - their.grad).abs().max() / their.grad.abs().max()
        assert float(difference) < 1e-5


def finite(loss: torch.Tensor, *inputs: torch.Tensor) -> None:
    loss.backward()
    assert torch.isfinite(loss)
    for x in inputs:
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# -- distances ------------------------------------------------------------------------------------------------------


def plain_huber(error: torch.Tensor, delta: float) -> torch.Tensor:
    return torch.where(error.abs() < delta, error**2 / 2, delta * (error.abs() - delta / 2))


def plain_distances(z: torch.Tensor, x: torch.Tensor, pairs: str, near: float | None, huber: float | None) -> Any:
    chosen = [(i, j) for i in range(len(z)) for j in range(i) if pairs == "all" or SCAN_OF[i] == SCAN_OF[j]]
    physical = torch.stack([torch.linalg.vector_norm(x[i] - x[j]) for i, j in chosen])
    error = torch.stack([torch.linalg.vector_norm(z[i] - z[j]) for i, j in chosen]) - physical / 50
    each = error**2 if huber is None else plain_huber(error, huber)
    weight = 1 / (physical + near) if near else torch.ones_like(physical)
    return (weight * each).sum() / weight.sum()


@DTYPES
@pytest.mark.parametrize("pairs", ["within", "all"])
@pytest.mark.parametrize("near_mm", [None, 20.0])
@pytest.mark.parametrize("huber", [None, 0.8])
def test_distance_loss_equals_the_papers_formula(
    dtype: torch.dtype, pairs: Any, near_mm: float | None, huber: float | None
) -> None:
    x = drawn(1, N, 3, scale=60).to(dtype)
    agree(
        lambda z: distance_loss(z, x, SCAN_OF, pairs=pairs, unit_mm=50.0, near_mm=near_mm, huber=huber),
        lambda z: plain_distances(z, x.double(), pairs, near_mm, huber),
        dtype,
        drawn(0, N, 5),
    )


@pytest.mark.parametrize("huber", [None, 0.5])
def test_distance_loss_passes_gradcheck(huber: float | None) -> None:
    z, x = drawn(0, 8, 4).requires_grad_(), drawn(1, 8, 3, scale=60)
    for pairs in ("within", "all"):
        options: dict[str, Any] = {"pairs": pairs, "near_mm": 10.0, "huber": huber}
        assert gradcheck(lambda v, o=options: distance_loss(v, x, SCAN_OF[:8], **o), z)


def test_a_huber_loss_is_half_the_squared_one_where_errors_are_small() -> None:
    z, x = drawn(0, N, 5), drawn(1, N, 3, scale=60)
    squared = distance_loss(z, x, SCAN_OF)
    assert float(distance_loss(z, x, SCAN_OF, huber=100.0)) == pytest.approx(float(squared) / 2)
    assert float(distance_loss(z, x, SCAN_OF, huber=1e-3)) < float(squared) / 2


def test_distances_may_be_of_voxels() -> None:
    """The unit is the caller's: voxels of 2 mm with a unit of one are millimetres with a unit of two."""
    z, voxels = drawn(0, N, 5), drawn(1, N, 3, scale=30)
    in_voxels = distance_loss(z, voxels, SCAN_OF, unit_mm=1.0, near_mm=5.0)
    assert float(distance_loss(z, 2 * voxels, SCAN_OF, unit_mm=2.0, near_mm=10.0)) == pytest.approx(float(in_voxels))


def test_distance_loss_has_finite_gradients_where_embeddings_or_places_coincide() -> None:
    for z in (torch.zeros(N, 4, requires_grad=True), drawn(0, 1, 4).repeat(N, 1).requires_grad_()):
        finite(distance_loss(z, drawn(1, N, 3, scale=60), SCAN_OF), z)
    twice = drawn(0, N, 4).float().requires_grad_()
    places = drawn(1, N, 3, scale=60).float()
    loss = distance_loss(torch.cat([twice, twice]), torch.cat([places, places]), SCAN_OF.repeat(2), pairs="all")
    finite(loss, twice)


def test_distance_loss_is_near_zero_for_true_distances_even_far_from_the_origin() -> None:
    """Millimetres of a scan may be hundreds away from the scanner's centre; float32 must not suffer."""
    x = (drawn(1, N, 3, scale=60) + 900).float()
    assert float(distance_loss(x / 100, x, SCAN_OF, pairs="all")) < 1e-7


def test_distance_loss_without_any_pair_is_zero() -> None:
    z = drawn(0, 3, 4).requires_grad_()
    loss = distance_loss(z, drawn(1, 3, 3), torch.arange(3))
    assert float(loss.detach()) == 0.0
    finite(loss, z)


# -- two views: Barlow Twins ----------------------------------------------------------------------------------------


def plain_barlowtwins(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    norm = torch.nn.BatchNorm1d(one.shape[1], affine=False, dtype=torch.float64)
    c = torch.einsum("ni,nj->ij", norm(one), norm(two)) / len(one)
    weight = torch.eye(len(c)) + 0.005 * (1 - torch.eye(len(c)))
    return (weight * (c - torch.eye(len(c))) ** 2).sum()


@DTYPES
def test_barlowtwins_equals_its_formula(dtype: torch.dtype) -> None:
    agree(barlowtwins_loss, plain_barlowtwins, dtype, drawn(0, 12, 5, scale=3) + 2, drawn(1, 12, 5))


def test_barlowtwins_passes_gradcheck() -> None:
    one, two = drawn(0, 6, 4).requires_grad_(), drawn(1, 6, 4).requires_grad_()
    assert gradcheck(lambda *v: barlowtwins_loss(*v, redundancy_weight=0.3), (one, two))


def test_barlowtwins_is_near_zero_for_views_that_agree_in_independent_dimensions() -> None:
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1]]).T  # a constant and two that do not correlate
    assert float(barlowtwins_loss(signs[:, 1:], 5 * signs[:, 1:] + 7)) < 1e-8
    assert float(barlowtwins_loss(signs[:, 1:], -signs[:, 1:])) == pytest.approx(8, rel=1e-4)
    assert float(barlowtwins_loss(signs, signs)) == pytest.approx(1, rel=1e-4)  # the constant one has no correlation


# -- two views: SimCLR ----------------------------------------------------------------------------------------------


def plain_simclr(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    z = torch.nn.functional.normalize(torch.cat([one, two]), dim=1)
    n = len(one)
    similarity = torch.exp(z @ z.T / 0.3) * (1 - torch.eye(2 * n))
    share = [similarity[i, (i + n) % (2 * n)] / similarity[i].sum() for i in range(2 * n)]
    return -torch.log(torch.stack(share)).mean()


@DTYPES
@pytest.mark.parametrize("rows", [1, 7, 24, 100])
def test_simclr_equals_its_formula_however_it_is_cut(dtype: torch.dtype, rows: int) -> None:
    loss = lambda *v: simclr_loss(*v, temperature=0.3, rows=rows)  # noqa: E731
    agree(loss, plain_simclr, dtype, drawn(0, 12, 5, scale=3), drawn(1, 12, 5))


def test_simclr_passes_gradcheck() -> None:
    one, two = drawn(0, 6, 4).requires_grad_(), drawn(1, 6, 4).requires_grad_()
    assert gradcheck(lambda *v: simclr_loss(*v, rows=5), (one, two))


def test_simclr_finds_the_other_view() -> None:
    views = torch.eye(6)
    assert float(simclr_loss(views, views)) == pytest.approx(np.log1p(10 * np.exp(-20)), abs=1e-6)
    assert float(simclr_loss(views, views.roll(1, 0))) == pytest.approx(20 + np.log1p(0), abs=2.5)


def peak_bytes(tmp_path: Path, work: Callable[[], Any]) -> int:
    """The most that tensors of `work` held at once, as the profiler saw every allocation; inputs are not counted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    trace = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return int(np.cumsum([event["args"]["Bytes"] for event in events]).max())


def simclr_step(places: int, dim: int) -> Callable[[], None]:
    one, two = (drawn(seed, places, dim).float().requires_grad_() for seed in (0, 1))
    return lambda: simclr_loss(one, two).backward()  # type: ignore[no-untyped-call,unused-ignore]


def test_simclrs_memory_is_small_at_the_papers_batch(tmp_path: Path) -> None:
    """1024 places, 2048 views × 1024-d; a tensor of all differences would have 16 GiB, the inputs have 8 MiB."""
    peak = peak_bytes(tmp_path, simclr_step(1024, 1024)) / 2**20
    assert 8 < peak < 100


def test_simclrs_memory_grows_with_the_batch_and_not_with_its_square(tmp_path: Path) -> None:
    once, twice = (peak_bytes(tmp_path, simclr_step(places, 64)) for places in (2048, 4096))
    assert twice < 2.3 * once


# -- two views: what both have to bear ------------------------------------------------------------------------------

TWO_VIEWS = pytest.mark.parametrize("loss", [barlowtwins_loss, simclr_loss])


@TWO_VIEWS
def test_odd_batches_have_finite_losses_and_gradients(loss: Loss) -> None:
    """None at all, one place, all the same, a place twice, and embeddings of nought."""
    one, two = drawn(0, 5, 4).float(), drawn(1, 5, 4).float()
    cases = [
        (one[:0], two[:0]),
        (one[:1], two[:1]),
        (one[:1].repeat(5, 1), one[:1].repeat(5, 1)),
        (one.repeat(2, 1), two.repeat(2, 1)),
        (one, one),
        (one * 0, two * 0),
    ]
    for views in cases:
        a, b = (v.clone().requires_grad_() for v in views)
        finite(loss(a, b), a, b)


@TWO_VIEWS
def test_half_precision_views_are_compared_in_float32(loss: Loss) -> None:
    one, two = drawn(0, 5, 4).to(torch.bfloat16), drawn(1, 5, 4).to(torch.bfloat16)
    assert loss(one, two).dtype == torch.float32
    assert float(loss(one, two)) == pytest.approx(float(loss(one.float(), two.float())))


@TWO_VIEWS
def test_the_order_of_places_does_not_matter_but_which_views_are_a_pair_does(loss: Loss) -> None:
    one, two = drawn(0, 9, 4), drawn(0, 9, 4) + drawn(1, 9, 4, scale=0.1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert float(loss(one[order], two[order])) == pytest.approx(float(loss(one, two)))
    assert float(loss(one, two.roll(1, 0))) > 1.5 * float(loss(one, two))


# -- regISImed ------------------------------------------------------------------------------------------------------


@DTYPES
def test_regisimed_is_the_sum_of_its_two_losses(dtype: torch.dtype) -> None:
    x = drawn(1, N, 3, scale=60).to(dtype)

    def ours(z: torch.Tensor, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return regisimed_loss(z, x, SCAN_OF, one, two, pairs="all", unit_mm=50.0)[0]

    def plain(z: torch.Tensor, one: torch.Tensor, two: torch.Tensor) -> Any:
        return plain_distances(z, x.double(), "all", None, None) + 1000 * plain_barlowtwins(one, two)

    agree(ours, plain, dtype, drawn(0, N, 5, scale=30), drawn(2, 12, 4), drawn(3, 12, 4))


def test_regisimed_passes_gradcheck_and_names_its_terms() -> None:
    x, inputs = drawn(1, 8, 3), tuple(drawn(seed, 8, 4).requires_grad_() for seed in (0, 2, 3))
    assert gradcheck(lambda z, *views: regisimed_loss(z, x, SCAN_OF[:8], *views, barlowtwins_weight=2.0)[0], inputs)
    z, one, two = (v.detach() for v in inputs)
    total, terms = regisimed_loss(z, x, SCAN_OF[:8], one, two, barlowtwins_weight=2.0)
    assert list(terms) == ["distance", "barlowtwins"]
    assert float(total) == pytest.approx(float(terms["distance"]) + 2 * float(terms["barlowtwins"]))


# -- coordinates ----------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("huber", [None, 0.7])
def test_coordinate_loss_equals_its_formula(dtype: torch.dtype, huber: float | None) -> None:
    x = drawn(3, N, 3, scale=60).to(dtype)

    def plain(p: torch.Tensor) -> torch.Tensor:
        error = (p - x.double()) / 80
        if huber is None:
            return torch.stack([e @ e for e in error]).mean()
        return plain_huber(error, huber).sum(dim=1).mean()

    agree(lambda p: coordinate_loss(p, x, unit_mm=80.0, huber=huber), plain, dtype, drawn(2, N, 3, scale=60))


def test_coordinate_loss_passes_gradcheck() -> None:
    p, x = drawn(2, 8, 3, scale=60).requires_grad_(), drawn(3, 8, 3, scale=60)
    for huber in (None, 0.5):
        assert gradcheck(lambda v, h=huber: coordinate_loss(v, x, huber=h), p, eps=1e-4)


def test_coordinate_loss_sees_a_translation_of_a_scan() -> None:
    x = drawn(3, N, 3, scale=60)
    assert float(coordinate_loss(x, x)) == 0
    assert float(coordinate_loss(x + torch.tensor([30.0, 0, 40.0]), x, unit_mm=100.0)) == pytest.approx(0.25)


def plain_offsets(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    error = (p - x) / 80
    rest = torch.cat([error[s == SCAN_OF] - error[s == SCAN_OF].mean(dim=0) for s in (0, 1, 3)])
    return plain_huber(rest, 0.2).sum(dim=1).mean()


@DTYPES
def test_offset_loss_equals_its_formula(dtype: torch.dtype) -> None:
    x = drawn(3, N, 3, scale=60).to(dtype)
    agree(
        lambda p: offset_loss(p, x, SCAN_OF, unit_mm=80.0),
        lambda p: plain_offsets(p, x.double()),
        dtype,
        drawn(2, N, 3, scale=60),
    )


def test_offset_loss_passes_gradcheck() -> None:
    p, x = drawn(2, 8, 3, scale=60).requires_grad_(), drawn(3, 8, 3, scale=60)
    assert gradcheck(lambda v: offset_loss(v, x, SCAN_OF[:8]), p, eps=1e-4)


def test_offset_loss_is_blind_to_a_translation_of_each_scan() -> None:
    p, x = drawn(2, N, 3, scale=60), drawn(3, N, 3, scale=60)
    moved = p + drawn(4, 4, 3, scale=300)[SCAN_OF]
    assert float(offset_loss(moved, x, SCAN_OF)) == pytest.approx(float(offset_loss(p, x, SCAN_OF)), abs=1e-9)
    assert float(offset_loss(x + drawn(4, 4, 3, scale=300)[SCAN_OF], x, SCAN_OF)) == pytest.approx(0, abs=1e-20)


def test_offset_loss_of_one_patch_a_scan_is_zero() -> None:
    p = drawn(2, 3, 3, scale=60).requires_grad_()
    loss = offset_loss(p, drawn(3, 3, 3), torch.arange(3))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-20)
    finite(loss, p)


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
    assert coordinate_loss(p, x).dtype == torch.float32
    assert distance_loss(p, x, SCAN_OF).dtype == torch.float32
    assert dense_infonce(p, p, p, x, x).dtype == torch.float32


# -- descriptors ----------------------------------------------------------------------------------------------------


def infonce_case() -> tuple[torch.Tensor, ...]:
    return drawn(5, 6, 4), drawn(6, 6, 4), drawn(7, 9, 4), drawn(8, 6, 3, scale=15), drawn(9, 9, 3, scale=15)


@DTYPES
def test_infonce_equals_its_formula(dtype: torch.dtype) -> None:
    *vectors, xa, xc = infonce_case()
    far = torch.linalg.vector_norm(xa[:, None] - xc[None], dim=-1) >= 20
    assert far.any()
    assert not far.all()

    def plain(*vectors: torch.Tensor) -> torch.Tensor:
        a, p, c = (v / torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in vectors)
        hit, miss = torch.exp((a * p).sum(1) / 0.3), torch.exp(a @ c.T / 0.3)
        return -torch.log(hit / (hit + (miss * far).sum(1))).mean()

    places = (xa.to(dtype), xc.to(dtype))
    agree(lambda *v: dense_infonce(*v, *places, ignore_mm=20.0, temperature=0.3), plain, dtype, *vectors)


def test_infonce_passes_gradcheck() -> None:
    a, p, c, xa, xc = infonce_case()
    vectors = tuple(v.requires_grad_() for v in (a, p, c))
    assert gradcheck(lambda *v: dense_infonce(*v, xa, xc, ignore_mm=20.0), vectors)


def test_infonce_without_any_candidate_is_zero_with_finite_gradients() -> None:
    a, p, c, xa, xc = infonce_case()
    a.requires_grad_()
    loss = dense_infonce(a, p, c, xa, xc, ignore_mm=1e4)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    finite(loss, a)
