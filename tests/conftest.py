"""What all tests share: one thread a process, Ctrl-C as at a terminal, and the way to the real volumes."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import settings

signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job starts with it ignored
settings.register_profile("isimed", deadline=None, max_examples=50)
settings.load_profile("isimed")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real volumes: `ISIMED_TEST_DATA`, else `shared/data` beside the repository; skips without one."""
    named = os.environ.get("ISIMED_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real volumes: set ISIMED_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory):
    """An indexed store of copies of one head in several axis orders and poses; treat it as read-only."""
    from cohorts import make_cohort

    return make_cohort(tmp_path_factory.mktemp("cohort"))
