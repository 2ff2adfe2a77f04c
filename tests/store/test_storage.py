"""Local directories keep the contract of storages; `test_remote.py` says the same of buckets."""

from __future__ import annotations

from pathlib import Path

import pytest

from isimed_index.store.place.storage import LocalStorage, Storage, storage_of
from isimed_index.testing.conformance import StorageConformance

FOLDERS = ("manifests", "segments", "tables", "tags", "intents", "leases", "tmp")


class TestLocalStorage(StorageConformance):
    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path):
        self.places = (tmp_path / str(number) for number in range(9))

    def make(self) -> Storage:
        storage = LocalStorage(next(self.places))
        storage.prepare(FOLDERS)
        return storage

    def elsewhere(self, storage: Storage) -> Storage:
        return LocalStorage(storage.root)


def test_a_path_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for place in ("cohort.isimed", Path("cohort.isimed"), tmp_path / "cohort.isimed", "./s3:/cohort.isimed"):
        assert isinstance(storage_of(place), LocalStorage)
    assert storage_of("cohort.isimed").root == tmp_path / "cohort.isimed"
