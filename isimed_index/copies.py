"""Whether the content of a file is in the store already, and as which scan."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from isimed_index.scans.prepare import resample
from isimed_index.scans.scan import Scan
from isimed_index.store.snapshot import Snapshot

_COLUMNS = ["scan", "digest", "nx", "ny", "nz", "dx_mm", "dy_mm", "dz_mm"]
_ROUNDING_MM = 1e-6  # between a spacing that was asked for and that of the affine it led to


def stored_copy(snapshot: Snapshot, scan: Scan) -> str | None:
    """Id of the stored scan with the content of `scan`, also where `add` resampled it; None without one."""
    table = snapshot.table("scans").select(_COLUMNS)
    by_digest = dict(zip(table.column("digest").to_pylist(), table.column("scan").to_pylist(), strict=True))
    if scan.digest in by_digest:
        return str(by_digest[scan.digest])
    values = None
    for spacing_mm in _spacings(table.to_pylist(), scan):
        values = scan.values() if values is None else values
        found = by_digest.get(Scan(scan.id, *resample(values, scan.affine, spacing_mm)).digest)
        if found is not None:
            return str(found)
    return None


def _spacings(rows: list[dict[str, float]], scan: Scan) -> Iterator[float]:
    """The isotropic spacings to which `scan` may have been resampled: some stored scan has the shape that follows."""
    tried = set()
    for row in rows:
        sizes, spacing = ([row[f"{start}{axis}{unit}"] for axis in "xyz"] for start, unit in (("n", ""), ("d", "_mm")))
        spacing_mm = round(spacing[0], 6)
        if spacing_mm in tried or np.ptp(spacing) > _ROUNDING_MM:
            continue
        if (np.abs(np.array(scan.shape) * scan.spacing_mm / spacing_mm - sizes) < 1).all():
            tried.add(spacing_mm)
            yield spacing_mm
