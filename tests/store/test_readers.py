"""Many readers beside a writer that commits, compacts and collects: each sees one generation, whole.

`ISIMED_COMMITS=200 pytest tests/store/test_readers.py` writes more than the default.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from store_builders import add_encoder, finish, start
from store_readers import Journal, expected

from isimed_index.store.files import LEASES
from isimed_index.store.repository import Repository
from isimed_index.store.upkeep.collect import collect

COMMITS = int(os.environ.get("ISIMED_COMMITS", "60"))
READERS = 8
CODE = "from store_readers import main; main()"


def test_every_read_is_complete_and_of_one_generation(tmp_path: Path) -> None:
    store, journal = tmp_path / "store", tmp_path / "journal"
    generation = add_encoder(Repository.create(store)).generation
    Journal(journal).note(generation, expected([], {}))
    seed = str(secrets.randbits(32))
    readers = [start(CODE, "read", str(store), str(journal), str(number)) for number in range(READERS)]
    try:
        finish(start(CODE, "write", str(store), str(journal), str(COMMITS), seed))
    finally:
        (tmp_path / "stop").touch()
    reads = [int(finish(reader)) for reader in readers]
    print(f"seed {seed}: {COMMITS} commits, {sum(reads)} reads by {READERS} readers")
    assert min(reads) > 0
    repository = Repository.open(store)
    assert repository.head() >= COMMITS
    collect(repository, keep=1)
    assert list((store / LEASES).iterdir()) == []
