"""Charts of the training scans: known affines are found, the frame keeps its size, nothing is mirrored or forgotten."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pretraining import STILL, Interrupt, config, sources
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from isimed_index.config import PretrainConfig
from isimed_index.encoders.networks import ValidNet
from isimed_index.errors import ConfigError, StoreDamaged
from isimed_index.pretrain.charts import Charts
from isimed_index.pretrain.forward import Forward
from isimed_index.pretrain.methods import build_method, outputs_of
from isimed_index.pretrain.processes import ALONE
from isimed_index.pretrain.sampler import Batch, Cohort, draw, scans_of
from isimed_index.pretrain.state import State
from isimed_index.pretrain.trainer import Trained, train
from isimed_index.pretrain.validation import Best, Validation, split
from isimed_index.scans.prepare import Intensity, Volume, prepare
from isimed_index.space import apply_affine, inverse
from isimed_index.testing.templates import ellipsoid_head

pytestmark = pytest.mark.usefixtures("short_training")

Array = NDArray[np.float64]
Says = Callable[[Array, int], Array]  # what a head says of template places (n, 3) of a scan

SCANS = 12
SETUP = config(batch_scans=4, steps_per_epoch=3, charts_after=1)  # an epoch shows every scan once
LATTICE = np.stack(np.meshgrid(*[np.arange(5) * 12.0] * 3, indexing="ij"), -1).reshape(-1, 3)
HEAD = np.random.default_rng(3).uniform(-80, 80, (200, 3))  # template places where charts are compared


def bodies(count: int = SCANS) -> Array:
    """Template mm → patient mm: axes 0.9 to 1.1 as long, turned by up to 8° about each axis, and far apart."""
    rng = np.random.default_rng(0)
    made = np.tile(np.eye(4), (count, 1, 1))
    for body in made:
        turned = Rotation.from_euler("xyz", rng.uniform(-8, 8, 3), degrees=True).as_matrix()
        body[:3, :3] = turned * rng.uniform(0.9, 1.1, 3)
        body[:3, 3] = rng.uniform(-150, 150, 3)
    return made


def show(charts: Charts, body: Array, epoch: int, says: Says) -> None:
    """One epoch: of every scan two views somewhere in the head, and what is said of their places."""
    per_epoch = charts.config.steps_per_epoch
    for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
        rng = np.random.default_rng([1, step])
        numbers = scans_of(len(body), charts.config, step)
        places, affines = [], []
        for number in np.repeat(numbers, 2):
            to_template = np.eye(4)
            to_template[:3, 3] = rng.uniform(-80, 40, 3)
            affines.append(body[number] @ to_template)
            places.append(says(apply_affine(to_template, LATTICE), int(number)))
        batch = Batch(torch.empty(0), np.stack(affines), np.repeat(np.arange(len(numbers)), 2), np.zeros(8, int))
        said = torch.tensor(np.stack(places), dtype=torch.float32).transpose(1, 2).unflatten(-1, (5, 5, 5))
        charts.take(said, batch, LATTICE, step)


def noisy(seed: int, mm: float = 5.0, wrong: float = 0.15) -> Says:
    """The template's places, shrunk, with an error of `mm` each, some wrong by decimetres, and a free offset."""
    rng = np.random.default_rng(seed)

    def says(places: Array, number: int) -> Array:
        error = np.where(rng.random((len(places), 1)) < wrong, 120.0, mm) * rng.normal(size=places.shape)
        return np.asarray(0.85 * places + error + [7.0 * seed, -30.0, 4.0])

    return says


def gauged(charts: Array) -> Array:
    """The same charts in the frame in which their mean is the identity."""
    return np.asarray(np.linalg.inv(charts.mean(axis=0)) @ charts)


def assert_centred(charts: Charts) -> None:
    np.testing.assert_allclose(charts.affines.mean(axis=0), np.eye(4), atol=1e-9)


# -- fits -----------------------------------------------------------------------------------------------------------


def test_known_affines_are_found_up_to_the_gauge() -> None:
    """To 3 mm where no chart is off by 40 mm in the median; the head's offset drifts by 7 mm from epoch to epoch."""
    body, charts = bodies(), Charts(SETUP, SCANS)
    for epoch in range(8):
        show(charts, body, epoch, noisy(epoch))
        figures = charts.refit()
        assert_centred(charts)
    truth = gauged(np.linalg.inv(body))
    off, before = [], []
    for chart, true, where in zip(charts.affines, truth, body, strict=True):
        places = apply_affine(where, HEAD)
        off.append(np.linalg.norm(apply_affine(chart, places) - apply_affine(true, places), axis=1))
        before.append(np.linalg.norm(places - apply_affine(true, places), axis=1))
    assert np.median(before) > 40
    assert np.mean(off) < 2
    assert np.max(off) < 6
    assert figures["charts"] == SCANS
    assert figures["chart_deviation"] == pytest.approx(np.std(charts.affines[:, :3, :3] - np.eye(3)), rel=1e-6)
    assert figures["chart_change"] < 0.01 < figures["chart_deviation"]


def test_a_frame_does_not_shrink_over_the_rounds() -> None:
    """A head that is uncertain says 0.85 of what it is taught: the mean canonical place of what it sees."""
    body, charts = bodies(), Charts(SETUP, SCANS)
    plain = np.tile(np.eye(4), (SCANS, 1, 1))  # the same, by least squares from places to what is said of them
    volumes = []
    for epoch in range(25):
        shared = (charts.affines @ body)[:, :3].mean(axis=0)
        show(
            charts, body, epoch, lambda places, number, shared=shared: 0.85 * (places @ shared[:, :3].T + shared[:, 3])
        )
        charts.refit()
        assert_centred(charts)
        volumes.append(np.linalg.det((charts.affines @ body)[:, :3, :3]).mean())
        said = 0.85 * (HEAD @ (plain @ body)[:, :3, :3].mean(axis=0).T)
        for number in range(SCANS):
            design = np.c_[apply_affine(body[number], HEAD), np.ones(len(HEAD))]
            plain[number, :3] = np.linalg.lstsq(design, said, rcond=None)[0].T
    assert np.cbrt(volumes[-1]) == pytest.approx(1, abs=0.02)
    assert np.cbrt(np.linalg.det(plain[:, :3, :3]).mean()) < 0.03  # what would have come of it
    sizes = np.cbrt(np.linalg.det(charts.affines[:, :3, :3]) * np.linalg.det(body[:, :3, :3]))
    assert np.ptp(sizes) < 0.02 < np.ptp(np.cbrt(np.linalg.det(body[:, :3, :3])))


def test_two_crops_of_a_head_do_not_extrapolate_wildly() -> None:
    """One visit, with errors that all places of a view share: far away from them the ridge bounds the chart."""
    charts = Charts(SETUP, SCANS)
    rng = np.random.default_rng(0)
    bent = rng.normal(size=(SCANS, 3, 3)) * 0.3
    show(charts, np.tile(np.eye(4), (SCANS, 1, 1)), 0, lambda places, n: places + (places - places.mean(0)) @ bent[n])
    charts.refit()
    off = np.abs(charts.affines[:, :3, :3] - np.eye(3)).max(axis=(1, 2))
    crops = np.abs(bent - bent.mean(axis=0)).max(axis=(1, 2))
    assert (off < 0.5 * crops).all()


def test_nothing_is_ever_mirrored() -> None:
    mirror = np.array([-1.0, 1.0, 1.0])
    one = Charts(SETUP, SCANS)
    for epoch in range(6):
        show(one, bodies(), epoch, lambda places, number: places * mirror if number == 3 else places)
        one.refit()
        assert_centred(one)
        assert (np.linalg.det(one.affines[:, :3, :3]) > 0.3).all()
    others = np.delete(one.affines @ bodies(), 3, axis=0)[:, :3, :3]
    assert np.abs(others - others.mean(axis=0)).max() < 0.05  # one scan's mirror image does not harm the others


@pytest.mark.parametrize("told", [[-1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.1, 0.1, 0.1], [1.0, -1.0, -1.0]])
def test_while_the_head_cannot_tell_places_all_charts_stay(told: list[float]) -> None:
    charts = Charts(SETUP, SCANS)
    show(charts, bodies(), 0, lambda places, number: places * told)
    assert charts.refit() == {"charts": 0.0, "chart_deviation": 0.0, "chart_change": 0.0}
    assert (charts.affines == np.eye(4)).all()
    show(charts, bodies(), 1, lambda places, number: places)
    assert charts.refit()["charts"] == SCANS  # nothing of the epoch before is left


def test_a_scan_that_was_not_seen_has_the_mean_chart() -> None:
    charts = Charts(replace(SETUP, steps_per_epoch=2), SCANS)
    body = bodies()
    show(charts, body, 0, noisy(0))
    assert charts.refit()["charts"] == 8
    unseen = np.setdiff1d(np.arange(SCANS), np.concatenate([scans_of(SCANS, SETUP, step) for step in (0, 1)]))
    assert len(unseen) == 4
    assert (charts.affines[unseen] == np.eye(4)).all()
    assert_centred(charts)
    show(charts, body, 1, noisy(1))  # steps 2 and 3: the others, and four of the first ones again
    assert charts.refit()["charts"] == SCANS
    assert_centred(charts)
    middles = (charts.affines @ body)[:, :3, 3]  # where the template's origin is in every chart, and in every patient
    assert np.linalg.norm(middles - middles.mean(axis=0), axis=1).max() < 20
    assert np.linalg.norm(body[:, :3, 3] - body[:, :3, 3].mean(axis=0), axis=1).max() > 150


def test_nothing_is_taken_before_the_first_epoch_with_charts() -> None:
    charts = Charts(replace(SETUP, charts_after=3, epochs=9), SCANS)
    for epoch in range(2):
        show(charts, bodies(), epoch, noisy(0))
        assert charts.refit() == {}
        assert (charts.affines == np.eye(4)).all()
    show(charts, bodies(), 2, noisy(0))
    assert charts.refit()["charts"] == SCANS


def test_ten_thousand_scans_take_six_megabytes() -> None:
    held = Charts(SETUP, 10_000).tensors().values()
    assert sum(tensor.nbytes for tensor in held) < 6e6


# -- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["within", "all"])
def test_the_places_of_a_loss_are_canonical_ones(pairs: Any) -> None:
    """Each scan's by its own chart; with pairs across scans, after its centroid is where the sampler puts it."""
    setup = config(charts_after=1, pairs=pairs, batch_scans=3, patches_per_scan=10**6)
    network = ValidNet(outputs_of(setup), width=2)
    forward = Forward(setup, network, build_method(setup, network), torch.device("cpu"), ALONE)
    charts, step = Charts(setup, 5), 4
    charts.affines = inverse(bodies(1)[0]) @ bodies(5)
    batch = draw(Cohort(sources(5), 2**30), setup, step)
    own, carried = forward.losses(batch, step), forward.losses(batch, step, charts=charts)
    assert not torch.equal(own.total, carried.total)
    for place, number in enumerate(scans_of(5, setup, step)):
        rows = own.scan_of == place
        expected = apply_affine(charts.affines[number], own.centres_mm[rows].numpy())
        np.testing.assert_allclose(carried.centres_mm[rows].numpy(), expected, atol=1e-3)
        mean = charts.fresh[number, 3, :3] / charts.fresh[number, 3, 3]  # of places in its own millimetres
        assert (own.centres_mm[rows].numpy().min(axis=0) < mean).all()
        assert (mean < own.centres_mm[rows].numpy().max(axis=0)).all()
    seen = charts.fresh[:, 3, 3] > 0
    assert sorted(np.flatnonzero(seen)) == sorted(scans_of(5, setup, step))


# -- training -------------------------------------------------------------------------------------------------------


def run(directory: Path, setup: PretrainConfig, **options: Any) -> Trained:
    directory.mkdir(exist_ok=True)
    return train(setup, sources(4), directory, subjects=list("abcd"), device="cpu", **options)


def entries(trained: Trained) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in trained.metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "patches_per_s"} for line in lines]


def same(one: Trained, other: Trained) -> bool:
    return all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the head could tell places from the first epoch on, which takes longer than these runs of nine steps."""
    take = Charts.take

    def told(charts: Charts, positions: torch.Tensor, batch: Batch, lattice: Array, step: int) -> None:
        places = np.stack([apply_affine(affine, lattice) for affine in batch.affines])  # (v, p, 3)
        bent = places * (1 + 0.05 * np.sin(charts._numbers(step)[batch.scan_of]))[:, None, None]
        true = torch.tensor(bent).transpose(1, 2).unflatten(-1, positions.shape[2:])
        take(charts, true + 0.1 * positions.detach(), batch, lattice, step)

    monkeypatch.setattr(Charts, "take", told)


@pytest.mark.usefixtures("learned")
@pytest.mark.parametrize(
    ("minutes", "at", "method"),
    [(5.0, 4, "isimed"), (5.0, 7, "isimed"), (0.0, 5, "isimed"), (0.0, 7, "isimed"), (0.0, 8, "coordinate")],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, minutes: float, at: int, method: Any) -> None:
    """Nine steps, three an epoch, stopped in step `at`: within an epoch, too, half of whose predictions are taken."""
    setup = config(epochs=3, charts_after=1, checkpoint_minutes=minutes, validation_share=0.3, ema=0.9, method=method)
    whole = run(tmp_path / "whole", setup)
    assert [entry["charts"] for entry in entries(whole)] == [3, 3, 3]
    assert entries(whole)[-1]["chart_deviation"] > 0.001
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", setup, progress=Interrupt(at))
    resumed = run(tmp_path / "broken", setup, resume=True)
    assert same(whole, resumed)
    assert entries(whole) == entries(resumed)


@pytest.mark.usefixtures("learned")
def test_charts_change_what_is_learned_from_their_epoch_on(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", config(epochs=3))
    charted = run(tmp_path / "charted", config(epochs=3, charts_after=2))
    keys = ("charts", "chart_deviation", "chart_change")
    shown = [{key: value for key, value in entry.items() if key not in keys} for entry in entries(charted)]
    assert shown[:2] == entries(plain)[:2]
    assert shown[2] != entries(plain)[2]
    assert "charts" not in entries(charted)[0]
    assert "charts" in entries(charted)[1]


@pytest.mark.usefixtures("learned")
def test_held_out_scans_are_judged_in_their_own_millimetres(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the last weights, which had charts to learn from, is that of a validation that knows of none."""
    monkeypatch.setattr(Best, "consider", lambda *_: None)  # so that the last weights are stored
    setup = config(epochs=3, charts_after=1, validation_share=0.3)
    trained = run(tmp_path / "run", setup)
    _, held = split(list("abcd"), 0.3, setup.seed)
    network = ValidNet(outputs_of(setup), width=2)
    plain = replace(setup, charts_after=0)
    forward = Forward(plain, network, build_method(plain, network), torch.device("cpu"), ALONE)
    judged = Validation(plain, Cohort([sources(4)[row] for row in held], 2**30), forward).figures(trained.state)
    for name, value in judged.items():
        assert entries(trained)[-1][name] == pytest.approx(value, abs=2e-6), name


def test_charts_of_other_scans_are_a_damaged_checkpoint(tmp_path: Path) -> None:
    def state(scans: int) -> State:
        made = State.new(torch.nn.ModuleDict({"network": ValidNet({"embedding": 2}, width=2)}), SETUP, 3)
        made.charts = Charts(SETUP, scans)
        return made

    one = state(3)
    assert one.charts
    one.charts.affines += np.random.default_rng(0).normal(size=(3, 4, 4))
    one.save(tmp_path)
    other = state(3)
    assert other.load(tmp_path)
    assert other.charts
    assert (other.charts.affines == one.charts.affines).all()
    with pytest.raises(StoreDamaged):
        state(4).load(tmp_path)
    other.charts = None
    other.save(tmp_path)
    with pytest.raises(StoreDamaged):
        one.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"charts_after": -1},
        {"charts_after": 2, "epochs": 2},
        {"charts_after": 1, "coordinate_weight": 0.0},
        {"charts_after": 1, "method": "simclr"},
        {"charts_after": 1, "method": "regisimed"},
        {"charts_after": 1, "method": "coordinate", "network": "densenet121", "view_vox": 32},
        {
            "charts_after": 1,
            "network": "densenet121",
            "view_vox": 32,
            "coordinate_weight": 0.0,
            "descriptor_weight": 0.0,
        },
    ],
)
def test_charts_without_a_position_head_or_an_epoch_to_be_used_in_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="charts_after"):
        config(**changes)


def head_of(size: float) -> Volume:
    """The analytic head, so many times as large, at 7 mm, anywhere in its scanner."""
    template = ellipsoid_head(6.0)
    shape = np.ceil(2 * np.array([84.0, 104.0, 94.0]) * size / 7).astype(int)
    affine = np.diag([7.0, 7.0, 7.0, 1.0])
    affine[:3, 3] = -7 * (shape - 1) / 2
    mm = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    at = np.moveaxis(apply_affine(inverse(template.affine), mm / size), -1, 0)
    affine[:3, 3] += [13, -50 * size, 300 * (size - 1)]
    return prepare(map_coordinates(template.values, at, order=1).astype(np.float32), affine, None, Intensity())


def test_heads_of_several_sizes_get_charts_of_inverse_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real training: views are scaled at random, so that the network cannot tell how large a head is."""
    sizes = (0.84, 1.0, 1.16)
    fitted: list[Array] = []
    refit = Charts.refit

    def noted(charts: Charts) -> dict[str, float]:
        figures = refit(charts)
        fitted.append(np.cbrt(np.linalg.det(charts.affines[:, :3, :3])))
        return figures

    monkeypatch.setattr(Charts, "refit", noted)
    setup = config(
        augmentation=replace(STILL, scale=0.15, rotation_deg=10.0),
        views_per_crop=1,
        crops_per_scan=2,
        descriptor_weight=0.0,
        batch_scans=3,
        steps_per_epoch=10,
        epochs=6,
        charts_after=3,
        learning_rate=5e-3,
        patches_per_scan=32,
    )
    train(setup, [lambda size=size: head_of(size) for size in sizes], tmp_path, device="cpu")
    assert (fitted[1] == 1).all()
    small, middle, large = fitted[-1]
    assert small > 1.05 > 0.95 > large
    assert small > middle > large
