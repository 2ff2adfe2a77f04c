"""Small NIfTI files for the tests of this folder."""

import nibabel as nib
import numpy as np
import pytest
from affines import affine_of


@pytest.fixture
def oblique():
    """A left-handed, oblique, anisotropic affine whose axes run P, S, R as many heads are stored."""
    turned = affine_of((8, -12, 15), (0.9, 1.1, 2.5), (-1, 1, 1), (1, 2, 0), (40, 95, -60))
    return turned.astype(np.float32).astype(np.float64)  # what a header can hold


@pytest.fixture
def voxels():
    """Noise of odd shape, so that no two axes can be confused."""
    return np.random.default_rng(5).integers(-900, 2000, (7, 9, 6)).astype(np.int16)


@pytest.fixture
def write(tmp_path):
    """A function that writes voxels and an affine as NIfTI under the test's folder and returns the path."""

    def save(name, data, affine=None, codes=(0, 2), kind=nib.Nifti1Image, **fields):
        header = kind.header_class(endianness=">" if data.dtype.str.startswith(">") else "<")
        header.set_data_dtype(data.dtype)
        image = kind(data, np.eye(4) if affine is None else affine, header)
        qform, sform = codes
        image.set_qform(image.affine, qform)
        image.set_sform(image.affine, sform)
        for field, value in fields.items():
            if field == "scaling":
                image.header.set_slope_inter(*value)
            else:
                image.header[field] = value
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, path)
        return path

    return save
