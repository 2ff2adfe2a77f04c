"""How fast a run encodes: patches per second of wall time, as a share of what the bare network would do."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_SAYS_LITTLE_S = 1.0  # a rate of less time than that is not shown


@dataclass(slots=True)
class Pace:
    """Counts the patches of one run, from the moment it is made.

    `points` are the lattice points by scan, of which patches are those that hold foreground: how many these will be is
    not known beforehand, so the time left is reckoned by points. `bare_per_s` is what all processes together would do
    if they did nothing but passes of the network over noise in memory; None where that was not measured.
    """

    points: Mapping[str, int]
    bare_per_s: float | None = None
    began: float = field(default_factory=lambda: time.monotonic())
    took_s: float = 0.0
    patches: int = 0
    _passed: int = 0  # lattice points

    def add(self, scans: Iterable[str], patches: int) -> None:
        """These scans are done, refused ones too, and committed; they had so many patches."""
        self.took_s = time.monotonic() - self.began
        self.patches += patches
        self._passed += sum(self.points[scan] for scan in scans)

    @property
    def per_s(self) -> float | None:
        """Patches per second of wall time until the last commit; None before the first patch."""
        return self.patches / self.took_s if self.patches and self.took_s > 0 else None

    @property
    def share(self) -> float | None:
        """`per_s` over `bare_per_s`."""
        return self.per_s / self.bare_per_s if self.per_s is not None and self.bare_per_s else None

    def note(self) -> str:
        """Such as `1,234 patches · 210 patches/s, 93 % of bare passes · ETA 95 s`."""
        parts = [f"{self.patches:,} patches"]
        if self.per_s is not None and self.took_s >= _SAYS_LITTLE_S:
            share = "" if self.share is None else f", {self.share:.0%} of bare passes".replace("%", " %")
            parts.append(f"{self.per_s:,.0f} patches/s{share}")
            left = sum(self.points.values()) - self._passed
            if left > 0 and self._passed:
                parts.append(f"ETA {self.took_s * left / self._passed:.0f} s")
        return " · ".join(parts)
