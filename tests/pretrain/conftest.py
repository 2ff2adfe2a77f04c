"""What tests of training share."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from isimed_index.errors import TrainingWarning


@pytest.fixture
def short_training() -> Iterator[None]:
    """One thread; a few steps may leave an embedding that looks collapsed, which such tests are not about."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the embeddings are collapsing", TrainingWarning)
        yield
