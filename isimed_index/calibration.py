"""What answers are off by: measured where the truth was known, told for answers where it is not.

At each of many landmarks, calibration keeps how far answers were off. Around a place the errors of the landmarks near
it count, by a Gaussian weight, scaled by how well the matches around an answer agree. Farther from all landmarks
nothing is told: an error is not the same in the cortex and in the neck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.errors import StoreDamaged

Values = NDArray[np.float64]

GOOD_MM = 10.0  # `confidence` is the probability of an error below this
RADII = (0.68, 0.95)  # shares of errors that the two radii hold
LEVELS = 64  # quantiles of the errors that are kept of each landmark
_WIDTH_MM = 12.0  # of the Gaussian by which landmarks around a place count
_REACH_MM = 20.0  # from the nearest landmark: farther away nothing is known
_LEAST_MM, _MOST_MM = 0.1, 20.0  # residuals below and above say no more
_SMALL = 0.3  # mm, beside which an error is none


@dataclass(frozen=True, slots=True)
class Expected:
    """What an answer is off by: radii in mm that hold 68 % and 95 % of such answers, P(error < 10 mm)."""

    error_mm: float
    error_95_mm: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Around:
    """The errors around one place: their sizes in mm, rising, and what share of answers is off by less."""

    calibration: Calibration
    errors_mm: Values
    shares: Values

    def expected(self, residual_mm: float) -> Expected | None:
        """What an answer there with this residual is off by; None without a residual."""
        if not np.isfinite(residual_mm):
            return None
        scale = self.calibration.scale(residual_mm)
        near, far = (scale * float(np.interp(share, self.shares, self.errors_mm)) for share in self._levels())
        return Expected(near, far, float(np.interp(GOOD_MM / scale, self.errors_mm, self.shares)))

    def _levels(self) -> list[float]:
        """The shares to look up: from few subjects, the errors of others are underestimated."""
        n = self.calibration.subjects
        return [1 - (1 - share) * n / (n + 2) for share in RADII]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Errors of answers at m landmarks of held-out subjects.

    Args:
        subjects: of how many subjects.
        questions: how many answers.
        places_mm: (m, 3) where the landmarks lie, canonical mm.
        counts: (m,) answers at each.
        errors_mm: (m, `LEVELS`) quantiles of the errors at each, rising, for answers of the typical residual.
        slope: by how much the logarithm of an error grows with that of the residual.
        typical_mm: the geometric mean of the residuals.
    """

    subjects: int
    questions: int
    places_mm: Values
    counts: Values
    errors_mm: Values
    slope: float
    typical_mm: float

    @classmethod
    def of(
        cls,
        subjects: int,
        landmarks: NDArray[np.int64],
        places_mm: Values,
        residual_mm: Values,
        error_mm: Values,
    ) -> Calibration:
        """From n answers: landmark of each (n,), where it lies (n, 3) canonical mm, residual and error (n,) in mm."""
        size = _size(residual_mm)
        names, which = np.unique(landmarks, return_inverse=True)
        counts = np.bincount(which).astype(np.float64)
        places = np.stack([np.bincount(which, axis) for axis in places_mm.T], axis=1) / counts[:, None]
        # Within landmarks: those with large errors have large residuals too, which their places tell already.
        x, y = (v - (np.bincount(which, v) / counts)[which] for v in (np.log(size), np.log(error_mm + _SMALL)))
        slope = max(0.0, float(x @ y / (x @ x))) if (x @ x) > 0 else 0.0
        typical = float(np.exp(np.log(size).mean()))
        plain = error_mm / (size / typical) ** slope
        levels = (np.arange(LEVELS) + 0.5) / LEVELS
        errors = np.stack([np.quantile(plain[which == number], levels) for number in range(len(names))])
        return cls(subjects, len(error_mm), places, counts, errors, slope, typical)

    def scale(self, residual_mm: float) -> float:
        """How many times as large errors are as those of the typical residual."""
        return float((_size(residual_mm) / self.typical_mm) ** self.slope)

    def around(self, place_mm: Values) -> Around | None:
        """The errors around a place (3,) in canonical mm; None where no landmark is near."""
        square = ((self.places_mm - place_mm) ** 2).sum(axis=1)
        if not square.size or square.min() > _REACH_MM**2:
            return None
        weight = self.counts * np.exp(-(square - square.min()) / (2 * _WIDTH_MM**2))
        near = weight > 1e-3 * weight.max()
        errors = self.errors_mm[near].ravel()
        order = np.argsort(errors, kind="stable")
        share = np.repeat(weight[near], self.errors_mm.shape[1])[order]
        total = np.cumsum(share)
        return Around(self, errors[order], (total - share / 2) / total[-1])

    def to_json(self) -> dict[str, Any]:
        """As it is stored, exactly: a store answers as the process that calibrated it."""
        return {
            "subjects": self.subjects,
            "questions": self.questions,
            "places_mm": self.places_mm.tolist(),
            "counts": self.counts.tolist(),
            "errors_mm": self.errors_mm.tolist(),
            "slope": self.slope,
            "typical_mm": self.typical_mm,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Calibration:
        """What `to_json` stored; `StoreDamaged` when it is not that."""
        try:
            places, counts, errors = (_array(fields[name]) for name in ("places_mm", "counts", "errors_mm"))
            m = len(counts)
            sound = places.shape == (m, 3) and errors.shape == (m, LEVELS) and bool((np.diff(errors) >= 0).all())
            slope, typical = float(fields["slope"]), float(fields["typical_mm"])
            if not (sound and m and np.isfinite([slope, typical]).all() and typical > 0):
                raise ValueError
            return cls(int(fields["subjects"]), int(fields["questions"]), places, counts, errors, slope, typical)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreDamaged("the calibration of errors cannot be read", next_step="isimed index --refit") from error


def _size(residual_mm: ArrayLike) -> Values:
    return np.clip(np.asarray(residual_mm, np.float64), _LEAST_MM, _MOST_MM)


def _array(values: Any) -> Values:
    array = np.array(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError
    return array
