"""isimed-index: an embedding store and search toolkit for 3-D medical images.

    import isimed_index as isi

    st = isi.create("cohort.isimed")
    st.add("data/ct")
    st.pretrain(preset="tiny")
    st.index()
    matches = st.lookup(point=(12, -40, 88), scan="sub-01_T1w", space="ras")

World coordinates are RAS+ millimetres everywhere inside. Heavy packages load on use: importing this module loads none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isimed_index.adapter import NearestNeighbors
    from isimed_index.api import Store, check, create, open, repair
    from isimed_index.encoders.card import EncoderCard
    from isimed_index.errors import IsimedError
    from isimed_index.grid import PatchGrid
    from isimed_index.matches import Matches
    from isimed_index.scans.scan import Scan
    from isimed_index.within import Ball, Cuboid, Label

__version__ = "0.1.0"

_HOMES = {
    "Ball": "isimed_index.within",
    "Cuboid": "isimed_index.within",
    "EncoderCard": "isimed_index.encoders.card",
    "IsimedError": "isimed_index.errors",
    "Label": "isimed_index.within",
    "Matches": "isimed_index.matches",
    "NearestNeighbors": "isimed_index.adapter",
    "PatchGrid": "isimed_index.grid",
    "Scan": "isimed_index.scans.scan",
    "Store": "isimed_index.api",
    "check": "isimed_index.api",
    "create": "isimed_index.api",
    "open": "isimed_index.api",
    "repair": "isimed_index.api",
}

__all__ = [
    "Ball",
    "Cuboid",
    "EncoderCard",
    "IsimedError",
    "Label",
    "Matches",
    "NearestNeighbors",
    "PatchGrid",
    "Scan",
    "Store",
    "check",
    "create",
    "open",
    "repair",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'isimed_index' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
