"""What answers are off by: the radii hold the shares that they promise, for subjects that were not measured."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isimed_index.calibration import LEVELS, Calibration
from isimed_index.errors import StoreDamaged

DEEP, CORTEX = np.array([0.0, 0.0, 0.0]), np.array([60.0, 0.0, 0.0])


def answers(rng: np.random.Generator, n: int, at: np.ndarray, typical_mm: float):
    """Residuals, and errors that grow with them, at one landmark."""
    residual = rng.lognormal(np.log(3), 0.3, n)
    error = typical_mm * (residual / 3) * rng.lognormal(0, 0.5, n)
    return np.tile(at, (n, 1)) + rng.normal(0, 2, (n, 3)), residual, error


def both(rng: np.random.Generator, n: int):
    """Answers at a landmark where errors are small, and at one where they are large."""
    parts = [answers(rng, n, DEEP, 2.0), answers(rng, n, CORTEX, 7.0)]
    place, residual, error = (np.concatenate(values) for values in zip(*parts, strict=True))
    return np.repeat([5, 9], n), place, residual, error


def calibrated(n: int = 2000, subjects: int = 1000) -> Calibration:
    return Calibration.of(subjects, *both(np.random.default_rng(0), n))


@pytest.mark.parametrize("landmark", [5, 9])
def test_radii_hold_the_shares_that_they_promise_at_each_place(landmark: int) -> None:
    known = calibrated()
    labels, place, residual, error = both(np.random.default_rng(1), 1500)
    here = labels == landmark
    told = [known.around(at).expected(r) for at, r in zip(place[here], residual[here], strict=True)]
    assert np.mean(error[here] <= [each.error_mm for each in told]) == pytest.approx(0.68, abs=0.04)
    assert np.mean(error[here] <= [each.error_95_mm for each in told]) == pytest.approx(0.95, abs=0.02)
    assert np.mean([each.confidence for each in told]) == pytest.approx(np.mean(error[here] < 10), abs=0.04)


def test_what_is_told_follows_the_place_and_the_residual() -> None:
    known = calibrated()
    deep, cortex = known.around(DEEP).expected(3.0), known.around(CORTEX).expected(3.0)
    assert deep.error_mm < cortex.error_mm
    assert deep.error_95_mm < cortex.error_95_mm
    assert deep.confidence > cortex.confidence
    worse = known.around(CORTEX).expected(6.0)
    assert worse.error_mm == pytest.approx(2 * cortex.error_mm, rel=0.1)
    assert worse.confidence < cortex.confidence
    assert known.slope == pytest.approx(1.0, abs=0.15)


def test_where_no_landmark_is_near_and_without_a_residual_nothing_is_told() -> None:
    known = calibrated()
    assert known.around(np.array([0.0, 0.0, 25.0])) is None
    assert known.around(np.array([0.0, 0.0, 18.0])) is not None
    assert known.around(DEEP).expected(float("inf")) is None


def test_few_subjects_promise_less() -> None:
    many, few = calibrated(subjects=1000), calibrated(subjects=8)
    assert few.around(DEEP).expected(3.0).error_mm > many.around(DEEP).expected(3.0).error_mm
    assert few.around(DEEP).expected(3.0).error_95_mm > many.around(DEEP).expected(3.0).error_95_mm


def test_residuals_that_say_nothing_change_nothing() -> None:
    rng = np.random.default_rng(3)
    error = rng.lognormal(1, 0.5, 500)
    same = Calibration.of(9, np.zeros(500, np.int64), np.zeros((500, 3)), np.full(500, 3.0), error)
    assert (same.slope, same.scale(12.0)) == (0.0, 1.0)
    against = Calibration.of(9, np.zeros(500, np.int64), np.zeros((500, 3)), 10 / error, error)
    assert against.slope == 0.0  # a larger residual never promises a smaller error


@example(([1, 0, 0, 0, 1], [3.0, 0.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0, 1.0]), 3.0)
@given(
    st.integers(1, 40).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 3), min_size=n, max_size=n),
            st.lists(st.floats(0, 1e3), min_size=n, max_size=n),
            st.lists(st.floats(0, 1e3), min_size=n, max_size=n),
        )
    ),
    st.floats(0, 100),
)
def test_any_answers_give_a_calibration_that_comes_back_as_it_was_stored(measured, asked) -> None:
    labels, residual, error = map(np.array, measured)
    place = np.stack([labels * 10.0] * 3, axis=1)
    known = Calibration.of(8, labels, place, residual, error)
    assert known.errors_mm.shape == (len(set(labels.tolist())), LEVELS)
    back = Calibration.from_json(json.loads(json.dumps(known.to_json())))
    for name in ("places_mm", "errors_mm"):
        np.testing.assert_array_equal(getattr(back, name), getattr(known, name))
    told, again = (each.around(place[0]).expected(asked) for each in (known, back))
    assert 0 <= told.error_mm <= told.error_95_mm
    assert 0 <= told.confidence <= 1
    assert again == told


@pytest.mark.parametrize(
    "change",
    [
        {"subjects": None},
        {"places_mm": [[0, 0]]},
        {"places_mm": [], "counts": [], "errors_mm": []},
        {"errors_mm": [[1.0] * (LEVELS - 1) + [0.5]] * 2},
        {"counts": [float("nan"), 1.0]},
        {"typical_mm": 0.0},
        {"slope": "steep"},
    ],
)
def test_a_malformed_calibration_is_damage(change: dict[str, object]) -> None:
    with pytest.raises(StoreDamaged, match="calibration"):
        Calibration.from_json({**calibrated(50).to_json(), **change})


def test_shares_rise_with_errors() -> None:
    around = calibrated(200).around(np.array([30.0, 0.0, 0.0])) or calibrated(200).around(DEEP)
    assert (np.diff(around.errors_mm) >= 0).all()
    assert (np.diff(around.shares) > 0).all()
    assert replace(around).shares[-1] <= 1
