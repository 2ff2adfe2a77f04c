"""The paper's views for contrastive methods: coarse dropout, then coarse shuffling (ISImed, §2.2.2)."""

from __future__ import annotations

import numpy as np
import torch

from isimed_index.config import Augmentation

_PIECES = 6  # holes, or windows that stay
_HOLE_VOX = (3, 10)  # least and greatest edge of a hole
_WINDOW_VOX = (3, 21)
_SHUFFLED_PIECES, _SHUFFLED_VOX = 2, 6  # not in the paper; as in its authors' public code


def disturbed(
    view: torch.Tensor, rng: np.random.Generator, augmentation: Augmentation, background: float
) -> torch.Tensor:
    """Drop parts of a (side, side, side) view and shuffle the voxels of others, by MONAI's transforms; geometry stays.

    With `holes`, in half of the views six boxes of 3 to 10 voxels an edge become background, in the others all but six
    boxes of 3 to 21. (MONAI's own default, which the authors' public code uses, is noise over the view's range; the
    paper does not say. Background is what the network sees beyond the border of a scan too.)
    """
    if not augmentation.holes and not augmentation.shuffle_probability:
        return view
    seen = view[None].clone()  # MONAI writes into what it is given
    if augmentation.holes:
        seen = _dropped(seen, rng, background)
    if augmentation.shuffle_probability:
        seen = _shuffled(seen, rng, augmentation.shuffle_probability)
    return torch.as_tensor(np.asarray(seen[0]))


def _dropped(view: torch.Tensor, rng: np.random.Generator, background: float) -> torch.Tensor:
    from monai.transforms import RandCoarseDropout  # takes seconds to import

    dropped = bool(rng.random() < 0.5)
    least, greatest = _HOLE_VOX if dropped else _WINDOW_VOX
    transform = RandCoarseDropout(_PIECES, least, dropout_holes=dropped, fill_value=background, prob=1.0)
    # MONAI 1.6 would draw no piece smaller than the one before, so that the last ones are nearly all of the greatest
    # size; the paper draws sizes evenly. So the pieces are drawn here.
    side = np.array(view.shape[1:])
    sizes = np.minimum(rng.integers(least, greatest + 1, (_PIECES, 3)), side)
    starts = rng.integers(0, side - sizes + 1)
    transform.hole_coords = [
        (slice(None), *map(slice, start, start + size)) for start, size in zip(starts, sizes, strict=True)
    ]
    seen: torch.Tensor = transform(view, randomize=False)
    return seen


def _shuffled(view: torch.Tensor, rng: np.random.Generator, probability: float) -> torch.Tensor:
    from monai.transforms import RandCoarseShuffle

    transform = RandCoarseShuffle(_SHUFFLED_PIECES, _SHUFFLED_VOX, prob=probability)
    transform.set_random_state(seed=int(rng.integers(2**32)))
    seen: torch.Tensor = transform(view)
    return seen
