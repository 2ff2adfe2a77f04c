"""A store against a model in memory: whatever is done to it, in whatever order, it answers like the model.

`ISIMED_STEPS=200000 pytest tests/store/test_state_machine.py` walks longer than the default of 2,000 steps.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule
from store_builders import add_encoder, add_scan, content, encode_again
from store_kills import matching

from isimed_index.errors import NotFound
from isimed_index.store.files import FOLDERS, TMP
from isimed_index.store.integrity import check_hash
from isimed_index.store.manifest import listed
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.tags import remove_tag, set_tag
from isimed_index.store.upkeep.collect import collect
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import delete_patches, delete_scans
from isimed_index.store.upkeep.restore import restore

STEPS = int(os.environ.get("ISIMED_STEPS", "2000"))
WALK = 50  # steps of one walk
SCANS = st.sampled_from(["a", "b", "c", "d"])
Content = dict[str, dict[Any, Any]]


class StoreMachine(RuleBasedStateMachine):
    """What the store holds now, and what it held at every generation that is kept."""

    tags = Bundle("tags")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.repository = Repository.create(self.folder / "c")
        add_encoder(self.repository)
        self.model: Content = {"scans": {}, "patches": {}}
        self.past: dict[int, Content] = {1: self.model}
        self.limbo: dict[int, Content] = {}  # taken away by a collector that was killed: the next one decides
        self.tagged: dict[str, int] = {}
        self.next_row = 0
        self.seed = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # -- what may happen ------------------------------------------------------------------------------------------

    @rule(scan=SCANS)
    def add(self, scan: str) -> None:
        if scan in self.model["scans"]:
            return
        self._done(add_scan(self.repository, scan).generation, self._with_scan(scan))

    @rule(scan=SCANS, rows=st.integers(1, 4))
    def encode(self, scan: str, rows: int) -> None:
        if scan not in self.model["scans"]:
            return
        self.seed += 1
        snapshot = encode_again(self.repository, scan, rows, self.seed)
        found = content(snapshot)["patches"]
        fresh = {row: found[row] for row in range(self.next_row, self.next_row + rows)}  # row ids are given in order
        self.next_row += rows
        old = {row: patch for row, patch in self.model["patches"].items() if patch[0] != scan}
        self._done(snapshot.generation, {**self.model, "patches": old | fresh})

    @rule(scan=SCANS)
    def delete_scan(self, scan: str) -> None:
        self._done(delete_scans(self.repository, f"scan = '{scan}'").generation, self._without_scan(scan))

    @rule(remainder=st.integers(0, 4))
    def delete_some_patches(self, remainder: int) -> None:
        left = {row: patch for row, patch in self.model["patches"].items() if row % 5 != remainder}
        done = delete_patches(self.repository, f"patch % 5 = {remainder}")
        assert done.patches == len(self.model["patches"]) - len(left)
        self._done(done.generation, {**self.model, "patches": left})

    @rule(size=st.sampled_from([1, 4000, 1 << 28]))
    def compact(self, size: int) -> None:
        self._done(compact(self.repository, target_bytes=size).generation, self.model)

    @rule(target=tags, name=st.sampled_from(["v1", "v2", "v3"]))
    def tag(self, name: str) -> Any:
        if name in self.tagged:
            return multiple()
        head = self.repository.head()
        set_tag(self.repository.storage, name, head)
        self.tagged[name] = head
        return name

    @rule(name=consumes(tags))
    def untag(self, name: str) -> None:
        remove_tag(self.repository.storage, name)
        del self.tagged[name]

    @rule(name=tags)
    def restore_tag(self, name: str) -> None:
        if name in self.tagged:
            self._done(restore(self.repository, tag=name).generation, self.past[self.tagged[name]])

    @rule(back=st.integers(1, 6))
    def restore_generation(self, back: int) -> None:
        wanted = self.repository.head() - back
        if wanted not in self.past:
            return
        self._done(restore(self.repository, wanted).generation, self.past[wanted])

    @rule(keep=st.integers(1, 4))
    def collect(self, keep: int) -> None:
        collect(self.repository, keep)
        self.past |= self.limbo
        self.limbo = {}
        kept = {*sorted(self.past)[-keep:], *self.tagged.values()}
        self.past = {generation: held for generation, held in self.past.items() if generation in kept}
        assert [generation for generation in listed(self.repository.storage) if generation] == sorted(self.past)
        named = {
            artefact.path
            for generation in self.past
            for artefact in self.repository.snapshot(generation).manifest.artefacts
        }
        folders = {folder: (self.repository.path / folder).iterdir() for folder in FOLDERS.values()}
        assert named == {f"{folder}/{path.name}" for folder, paths in folders.items() for path in paths}

    @rule()
    def reopen(self) -> None:
        self.repository = Repository.open(self.repository.path)

    @rule(scan=SCANS, point=st.integers(1, 12), verb=st.sampled_from(["add", "delete", "compact", "collect"]))
    def crash(self, scan: str, point: int, verb: str) -> None:
        """A process does the verb and is killed at its n-th flush, link or rename: it happened, or it did not."""
        before, after, act = self._verb(verb, scan)
        if act is None:
            return
        _killed_at(point, act)
        self.repository = Repository.open(self.repository.path)
        head = self.repository.head()
        if verb == "collect":
            held = self.past | self.limbo
            states = {generation: self._state(generation) for generation in held}
            self.limbo = {generation: held[generation] for generation, state in states.items() if state == "away"}
            self.past = {generation: held[generation] for generation, state in states.items() if state == "there"}
        elif head != max(self.past):
            self._done(head, after)
        else:
            assert content(self.repository.snapshot()) == before

    def _verb(self, verb: str, scan: str) -> tuple[Content, Content, Callable[[], Any] | None]:
        if verb == "add":
            taken = scan in self.model["scans"]
            return self.model, self._with_scan(scan), None if taken else lambda: add_scan(self.repository, scan)
        if verb == "delete":
            return self.model, self._without_scan(scan), lambda: self._delete_without_engine(scan)
        if verb == "compact":
            return self.model, self.model, lambda: compact(self.repository, target_bytes=4000)
        return self.model, self.model, lambda: collect(self.repository, 3)

    def _delete_without_engine(self, scan: str) -> None:
        """In a child that dies at the disk, where starting an SQL engine of its own is most of what it would do."""
        Snapshot.matching = matching  # type: ignore[assignment,method-assign]
        delete_scans(self.repository, f"scan = {scan}")

    def _state(self, generation: int) -> str:
        """A collector that was killed may have taken a generation away; the next one finishes, or brings it back."""
        try:
            self.repository.snapshot(generation)
        except NotFound:
            return "away" if (self.repository.path / TMP / f"expired-{generation:020d}.json").exists() else "gone"
        return "there"

    # -- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def the_head_answers_like_the_model(self) -> None:
        snapshot = self.repository.snapshot()
        assert snapshot.generation == max(self.past)
        assert content(snapshot) == self.model
        assert snapshot.manifest.rows == len(self.model["patches"])

    @precondition(lambda self: self.seed % 3 == 0)
    @invariant()
    def tagged_generations_answer_as_they_did(self) -> None:
        for name, generation in self.tagged.items():
            with self.repository.pin(tag=name) as snapshot:
                assert snapshot.generation == generation
                assert content(snapshot) == self.past[generation]
                for artefact in snapshot.manifest.artefacts:
                    check_hash(self.repository.path / artefact.path, artefact)

    def _done(self, generation: int, now: Content) -> None:
        self.model = now
        self.past[generation] = now

    def _with_scan(self, scan: str) -> Content:
        import hashlib

        row = (scan, 8, hashlib.sha256(scan.encode()).hexdigest().encode())
        return {**self.model, "scans": {**self.model["scans"], scan: row}}

    def _without_scan(self, scan: str) -> Content:
        return {
            "scans": {known: row for known, row in self.model["scans"].items() if known != scan},
            "patches": {row: patch for row, patch in self.model["patches"].items() if patch[0] != scan},
        }


def _killed_at(point: int, act: Callable[[], Any]) -> None:
    """Run `act` in a child that dies by SIGKILL before its `point`-th durable step, if it comes so far."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    left = point

    def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for name in ("fsync", "link", "rename", "replace", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
    try:
        act()
    finally:
        os._exit(0)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=max(1, STEPS // WALK),
    stateful_step_count=WALK,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=STEPS == 2000,  # the same walk in every CI run; a longer one is a new one
)
