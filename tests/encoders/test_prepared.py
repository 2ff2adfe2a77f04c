"""What a process keeps prepared for a network is bounded before the first convolution, unless the user chose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cohorts import add_random_encoder

import isimed_index as isi

_LOOK = """
import os, sys
from pathlib import Path
from isimed_index.encoders.runtime import load_encoder
load_encoder(Path(sys.argv[1]), "cpu")
print(*(os.environ[name] for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")))
"""


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, "64 64"), ({"LRU_CACHE_CAPACITY": "7"}, "7 64"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9"}, "64 9")],
)
def test_a_process_that_opens_an_encoder_keeps_few_prepared_operations(
    tmp_path: Path, chosen: dict[str, str], expected: str
) -> None:
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    store = isi.create(tmp_path / "store")
    encoder = add_random_encoder(store.path)
    store.refresh()
    folder = store.snapshot.encoder_path(encoder)
    look = [sys.executable, "-c", _LOOK, str(folder)]
    done = subprocess.run(look, env=clean | chosen, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected.split()
