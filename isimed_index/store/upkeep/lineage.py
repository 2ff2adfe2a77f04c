"""Lineage: from whose embeddings the templates of frames may have been made.

fitted anew in generation n ─▶ from what generation n held ─▶ extended in m ─▶ charts change, the template stays

A chart tells whom it is of, a template does not: it outlives the charts of scans that were deleted. Only the history
tells, as far as it reaches. Regions are measured by the standard of the frame that they were made beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from isimed_index.store.manifest import Artefact, Manifest
from isimed_index.store.segment import parts_of

_FITS = "index"  # the verb of every commit that makes a frame


def frames_in_doubt(manifests: Mapping[int, Manifest], voxels: Set[str]) -> set[str]:
    """Paths of frames that may have been made from others than `voxels` (paths), or whose making is not known."""
    seen: set[str] = set()
    doubtful: set[str] = set()
    for number in sorted(manifests):
        for made in manifests[number].find("frame"):
            if made.path not in seen and _in_doubt(manifests, number, made, voxels, doubtful):
                doubtful.add(made.path)
            seen.add(made.path)
    return doubtful


def _in_doubt(
    manifests: Mapping[int, Manifest], number: int, made: Artefact, voxels: Set[str], doubtful: Set[str]
) -> bool:
    """Whether a frame that generation `number` is the first to name is in doubt."""
    encoder = made.fields["encoder"]
    before = manifests.get(number - 1)
    if before is None or manifests[number].verb != _FITS:
        return True
    parent = _newest(before, encoder)
    if parent in doubtful:
        return True
    # It was fitted to any generation since the one that has its parent: scans may have been deleted meanwhile.
    fitted = [manifests[number]]
    while before is not None and _newest(before, encoder) == parent:
        fitted.append(before)
        before = manifests.get(before.generation - 1)
    return any(
        part["scan_artefact"] not in voxels
        for manifest in fitted
        for segment in manifest.find("segment")
        if segment.fields["encoder"] == encoder
        for part in parts_of(segment)
    )


def regions_in_doubt(manifests: Mapping[int, Manifest], frames: Set[str]) -> set[str]:
    """Paths of regions that were made beside one of some `frames`, or beside none that is known."""
    seen: set[str] = set()
    doubtful: set[str] = set()
    for number in sorted(manifests):
        for made in manifests[number].find("region"):
            if made.path not in seen:
                beside = _newest(manifests[number], made.fields["encoder"])
                if beside is None or beside in frames:
                    doubtful.add(made.path)
            seen.add(made.path)
    return doubtful


def _newest(manifest: Manifest, encoder: str) -> str | None:
    found = [made.path for made in manifest.find("frame") if made.fields["encoder"] == encoder]
    return found[-1] if found else None
