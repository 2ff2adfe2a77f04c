"""Another runtime is believed after its first batch gave what PyTorch gives for it, within a stated bound.

values ─▶ runtime ─▶ found ────┐
   └────▶ PyTorch ─▶ expected ─┴─▶ relative error ≤ bound?  no ─▶ RuntimeMismatch, nothing is stored
          (first batch only, plain network, on the CPU,     yes ─▶ PyTorch is let go
           in float32)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.runtimes.ahead import begin
from isimed_index.encoders.runtimes.kind import Maps, Run, Runtime
from isimed_index.errors import RuntimeMismatch

BOUNDS = {"fp32": 1e-5, "bf16": 1e-2}  # largest relative error, by precision
ON_GPU = 1e-4  # PyTorch in float32, which sums in another order there; TF32, which is not float32, would be about 1e-3
_PYTORCH = (Runtime(), Runtime("torch"))  # in float32: only on a GPU are they compared
SINGLE = 5.0  # times the bound that a single vector may be off


@dataclass(frozen=True, slots=True)
class Errors:
    """How far vectors are from the expected ones, in units of the root mean square length of these."""

    overall: float  # root mean square
    worst: float  # of a single vector

    def within(self, bound: float) -> bool:
        """Whether all vectors together are within the bound, and each within `SINGLE` times it; never what is NaN."""
        return self.overall <= bound and self.worst <= SINGLE * bound


def relative_errors(found: Maps, expected: Maps) -> Errors:
    """The errors of the output that is furthest off; infinite when shapes or names differ, NaN when something is NaN.

    A single wrong vector among ten thousand would vanish in the mean, so the worst one counts by itself.
    """
    if {name: y.shape for name, y in found.items()} != {name: y.shape for name, y in expected.items()}:
        return Errors(float("inf"), float("inf"))
    errors = [_errors(found[name].astype(np.float64), y.astype(np.float64)) for name, y in expected.items()]
    overall, worst = np.max(errors, axis=0)  # unlike max(), it keeps a NaN
    return Errors(float(overall), float(worst))


def _errors(found: NDArray[np.float64], expected: NDArray[np.float64]) -> tuple[float, float]:
    squares = ((found - expected) ** 2).sum(axis=1)  # (n, i, j, k)
    length = float((expected**2).sum(axis=1).mean()) ** 0.5
    if length == 0.0:
        return (0.0, 0.0) if not squares.any() else (float("inf"), float("inf"))
    return float(squares.mean()) ** 0.5 / length, float(squares.max()) ** 0.5 / length


class Checked:
    """A `Run` whose first batch is compared with that of `reference`, whatever thread it comes from."""

    def __init__(self, run: Run, reference: Run, runtime: Runtime, whose: str) -> None:
        self._run = run
        self._reference: Run | None = reference
        self._runtime = runtime
        self._whose = whose
        self._lock = threading.Lock()

    def __call__(self, values: NDArray[np.float32]) -> Maps:
        """Maps of `values` (n, 1, x, y, z); `RuntimeMismatch` until a batch was within the bound."""
        found = self._run(values)
        if self._reference is not None:
            with self._lock:
                if self._reference is not None:
                    self._compare(found, self._reference(values))
                    self._reference = None
        return found

    def begin(self, values: NDArray[np.float32]) -> Callable[[], Maps]:
        """Begin a pass where the runtime can; a batch that is to be compared is waited for."""
        if self._reference is None:
            return begin(self._run, values)
        found = self(values)
        return lambda: found

    def _compare(self, found: Maps, expected: Maps) -> None:
        on_gpu = self._runtime in _PYTORCH
        errors, bound = relative_errors(found, expected), ON_GPU if on_gpu else BOUNDS[self._runtime.precision]
        if not errors.within(bound):
            there = "--device cpu" if on_gpu else "--runtime torch"
            other = "" if self._runtime.precision == "fp32" else "--precision fp32, or "
            raise RuntimeMismatch(
                f"the runtime {self._runtime} does not give the vectors of {self._whose} that PyTorch gives on a CPU: "
                f"expected a relative error of at most {bound:.0e} ({SINGLE * bound:.0e} of a single vector), found "
                f"{errors.overall:.1e} ({errors.worst:.1e}) on the first batch",
                next_step=f"{other}{there}",
            )
