"""A recipe: how a FAISS index is laid out, how much of it a query visits, and how many rows are ranked again."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

ASKED = 11  # rows that a query asks for while a recipe is tuned: ten neighbours and itself
_LAYOUT = re.compile(r"(?:PCAR?(?P<pca>\d+),)?(?:IVF(?P<lists>\d+),)?(?P<code>\w+)")
_CODE = re.compile(r"(?P<kind>Flat|SQ8|SQ4|PQ|RaBitQfs)(?P<parts>\d+)?(?:x4fs)?")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One layout, and what was tuned of it for ten neighbours; more neighbours visit and rank more, in proportion."""

    factory: str  # as FAISS writes it: Flat, or PCA32,IVF1024,SQ8 and the like
    lists: int = 0  # inverted lists; 0 for a flat index
    probes: int = 0  # lists visited by a query without filter
    fetch: float = 4.0  # rows ranked again by the stored vectors, for each row that is asked for
    deep: float = 16.0  # the same under a filter, where queries may be far from all that is kept
    reach: int = 0  # under a filter: the nearest lists are visited until they hold so many kept rows; 0: every list

    @property
    def pca(self) -> int:
        """Dimensions after projection on principal axes; 0 where there is none."""
        return int(_parts(self.factory)["pca"] or 0)

    @property
    def rotated(self) -> bool:
        """Whether the principal axes are mixed by a random rotation, so that all dimensions vary alike."""
        return self.factory.startswith("PCAR")

    @property
    def code(self) -> str:
        """How FAISS names the codes: Flat, SQ8, PQ16x4fs, RaBitQfs."""
        return _parts(self.factory)["code"]

    def rows_fetched(self, k: int, filtered: bool = False) -> int:
        """How many rows are ranked again to find k: never fewer than for the ten that the recipe was tuned for."""
        return math.ceil((self.deep if filtered else self.fetch) * max(k, ASKED))

    def growth(self, fetched: int, filtered: bool = False) -> float:
        """By how much more a search must visit that fetches so many rows, 1 for those that the recipe was tuned for."""
        return max(1.0, fetched / self.rows_fetched(ASKED, filtered))


def ram_bytes(recipe: Recipe, n: int, dim: int) -> int:
    """Memory that a loaded index of n vectors takes: codes, row ids, the list of each row, centres, axes.

    Vectors that are ranked again are memory-mapped and do not count.
    """
    inner = recipe.pca or dim
    row = code_bytes(recipe.code, inner) + 8 + (4 if recipe.lists else 0)
    padding = 16 * recipe.lists * code_bytes(recipe.code, inner) if recipe.code.endswith("fs") else 0  # blocks of 32
    centres = 2 * recipe.lists * inner * 4  # FAISS's own, and ours for filters
    return n * row + padding + centres + recipe.pca * (dim + 1) * 4


def code_bytes(code: str, dim: int) -> int:
    """Bytes of the code of one vector of `dim` dimensions."""
    found = _CODE.fullmatch(code)
    assert found is not None, code
    match found["kind"]:
        case "Flat":
            return 4 * dim
        case "SQ8":
            return dim
        case "SQ4":
            return (dim + 1) // 2
        case "PQ":
            return int(found["parts"]) // 2
        case _:
            return (dim + 7) // 8 + 8


def _parts(factory: str) -> dict[str, str]:
    found = _LAYOUT.fullmatch(factory)
    assert found is not None, factory
    return found.groupdict()
