"""Affines for property tests: any rotation, reflection and anisotropic spacing, with or without shear."""

import numpy as np
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation


def affine_of(angles, spacing, flips, order, origin, shear=0.0):
    """A 4×4 affine: rotation · permutation · flip · shear · spacing, then the origin."""
    matrix = np.eye(4)
    sheared = np.eye(3)
    sheared[0, 1] = shear
    turned = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.eye(3)[:, list(order)]
    matrix[:3, :3] = turned @ np.diag(flips) @ sheared @ np.diag(spacing)
    matrix[:3, 3] = origin
    return matrix


@st.composite
def affines(draw, shear=0.0):
    """Oblique, anisotropic, flipped, permuted; `shear` bounds how far the axes leave the right angle."""
    angle, edge, place = st.floats(-40, 40), st.floats(0.3, 6), st.floats(-300, 300)
    return affine_of(
        draw(st.tuples(angle, angle, angle)),
        draw(st.tuples(edge, edge, edge)),
        draw(st.tuples(*[st.sampled_from([-1, 1])] * 3)),
        draw(st.permutations(range(3))),
        draw(st.tuples(place, place, place)),
        draw(st.floats(-shear, shear)) if shear else 0.0,
    )
