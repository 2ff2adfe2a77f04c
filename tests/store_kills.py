"""Workers that change one store at once and are killed; imported by the process that `store/test_kills.py` starts.

Every worker notes in a journal of its own what it is about to do, under which write id it publishes, and what was
acknowledged. A killed process loses nothing that it gave to the kernel, so nothing is flushed to the disk here: workers
get further. What a power cut does is `store/test_replay.py`'s. Manifests that a collector takes are kept aside, so that
the whole history can be compared with what the journals say: a write id tells whose commit a generation is,
acknowledged or not.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
from store_builders import add_encoder, add_scan, content, encode_again, orphans, vectors

from isimed_index.errors import NotFound, StoreLocked, UsageError
from isimed_index.store import files
from isimed_index.store.integrity import check_hash, check_size
from isimed_index.store.manifest import Manifest, listed
from isimed_index.store.place.storage import LocalStorage
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.tags import remove_tag, set_tag, tag_names, tagged
from isimed_index.store.upkeep.collect import collect
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import delete_patches, delete_scans
from isimed_index.store.upkeep.restore import restore

WORKERS = 4
LIFE_S = 0.06  # mean time between kills
SCANS = 12  # about as many are kept

Line = dict[str, Any]


class Journal:
    """What one worker says, line by line, each with the kernel before it goes on."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, **line: Any) -> None:
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")


class Worker:
    """Does one random thing after another until it is killed."""

    def __init__(self, store: Path, folder: Path, number: int, life: int, seed: int) -> None:
        self.repository = Repository.open(store)
        self.random = random.Random(f"{seed}/{number}/{life}")
        self.journal = Journal(folder / f"{number}.jsonl")
        self.name = f"w{number}-{life}"
        self.tag = f"w{number}"
        self.operation = ""
        self.steps = 0
        self._note_attempts()

    def _note_attempts(self) -> None:
        publish = LocalStorage.publish

        def noting(storage: LocalStorage, relative: str, document: bytes) -> None:
            if relative.startswith(files.MANIFESTS):
                self.journal.note(attempt=self.operation, write_id=json.loads(document)["write_id"])
            publish(storage, relative, document)

        LocalStorage.publish = noting  # type: ignore[method-assign]

    def run(self) -> None:
        while True:
            self.steps += 1
            self.operation = f"{self.name}-{self.steps}"
            try:
                with self.repository.pin() as head:
                    self._step(head)
            except (NotFound, UsageError, StoreLocked) as refusal:  # another worker was faster
                self.journal.note(refused=self.operation, why=str(refusal))
            except BaseException:  # noqa: BLE001 — whatever it was is a finding
                self.journal.note(error=traceback.format_exc())
                os._exit(3)

    def _step(self, head: Snapshot) -> None:
        scans = head.scan_ids()
        rows = [row for segment in head.segments() for row in segment.row_ids.tolist()]
        choices: list[Callable[[], None]] = [self._compact, self._collect, self._tag, self._untag, self._restore]
        choices += [lambda: self._add(head)] * (3 if len(scans) < SCANS else 1)
        if scans:
            choices += [lambda: self._encode(self.random.choice(scans))] * 4
            choices += [lambda: self._delete_scan(self.random.choice(scans))]
        if rows:
            choices += [lambda: self._delete_patch(self.random.choice(rows))] * 2
        self.random.choice(choices)()

    def _do(self, act: Callable[[], Any], **intention: Any) -> None:
        self.journal.note(intend=self.operation, **intention)
        self.journal.note(done=self.operation, generation=getattr(act(), "generation", None))

    def _add(self, head: Snapshot) -> None:
        self._do(lambda: add_scan(self.repository, self.operation), verb="add", scan=self.operation)

    def _encode(self, scan: str) -> None:
        rows, seed = self.random.randint(1, 4), self.random.randrange(1 << 30)
        self._do(lambda: encode_again(self.repository, scan, rows, seed), verb="index", scan=scan, rows=rows, seed=seed)

    def _delete_scan(self, scan: str) -> None:
        self._do(lambda: delete_scans(self.repository, f"scan = {scan}"), verb="delete scan", scan=scan)

    def _delete_patch(self, row: int) -> None:
        self._do(lambda: delete_patches(self.repository, f"patch = {row}"), verb="delete patch", row=row)

    def _compact(self) -> None:
        self._do(lambda: compact(self.repository), verb="compact")

    def _collect(self) -> None:
        keep = self.random.randint(1, 4)
        self._do(lambda: collect(self.repository, keep), verb="collect")

    def _tag(self) -> None:
        generation = self.random.choice(listed(self.repository.storage))
        self._do(lambda: set_tag(self.repository.storage, self.tag, generation), verb="tag", tag=self.tag)

    def _untag(self) -> None:
        self._do(lambda: remove_tag(self.repository.storage, self.tag), verb="untag", tag=self.tag)

    def _restore(self) -> None:
        generation = max(1, self.random.choice(listed(self.repository.storage)[-4:]))
        self._do(lambda: restore(self.repository, generation), verb="restore", to=generation)


def matching(snapshot: Snapshot, view: str, where: str, columns: list[str] | None = None) -> pa.Table:
    """`column = value` without the SQL engine, which takes longer to start than a worker lives."""
    column, _, value = where.partition(" = ")
    if view == "scans":
        return snapshot.table("scans").filter(pa.compute.equal(snapshot.table("scans").column(column), value))
    rows = [row for segment in snapshot.segments() for row in segment.row_ids.tolist() if row == int(value)]
    return pa.table({"patch": pa.array(rows, pa.int64())})


def keep_history(folder: Path) -> None:
    """Keep every manifest that a collector takes away."""
    move = LocalStorage.move

    def keeping(storage: LocalStorage, relative: str, target: str) -> None:
        if relative.startswith(files.MANIFESTS):
            with suppress(FileExistsError):
                os.link(storage.root / relative, folder / Path(relative).name)
        move(storage, relative, target)

    LocalStorage.move = keeping  # type: ignore[method-assign]


@dataclass
class Journals:
    """What all workers said."""

    intentions: dict[str, Line] = field(default_factory=dict)  # by operation
    done: dict[str, Line] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    attempts: dict[str, str] = field(default_factory=dict)  # operation by write id

    @classmethod
    def read(cls, folder: Path) -> Journals:
        found = cls()
        for path in sorted(folder.glob("*.jsonl")):
            for text in path.read_text().splitlines(keepends=True):
                line = json.loads(text) if text.endswith("\n") else {}
                assert "error" not in line, line["error"]
                if "intend" in line:
                    found.intentions[line["intend"]] = line
                elif "attempt" in line:
                    found.attempts[line["write_id"]] = line["attempt"]
                elif "done" in line:
                    found.done[line["done"]] = line
                elif "refused" in line:
                    found.refused.add(line["refused"])
        return found

    def tags(self) -> dict[str, set[bool]]:
        """By tag, whether it may be set: an operation that was cut short may have been done or not."""
        state: dict[str, set[bool]] = {}
        for operation, line in self.intentions.items():
            if line["verb"] in ("tag", "untag") and operation not in self.refused:
                now = line["verb"] == "tag"
                before = state.get(line["tag"], {False})
                state[line["tag"]] = {now} if operation in self.done else {*before, now}
        return state


@dataclass
class Model:
    """What the store holds after a generation: scans, and by row id the scan, patch number and vectors of a patch."""

    scans: list[str] = field(default_factory=list)
    rows: dict[int, tuple[str, int, bytes]] = field(default_factory=dict)

    def after(self, line: Line, first_row_id: int, past: dict[int, Model]) -> Model:
        scans, rows = list(self.scans), dict(self.rows)
        match line["verb"]:
            case "add":
                scans.append(line["scan"])
            case "delete scan":
                scans.remove(line["scan"])
                rows = {row: patch for row, patch in rows.items() if patch[0] != line["scan"]}
            case "delete patch":
                del rows[line["row"]]
            case "restore":
                return past[line["to"]]
            case "index":
                made = vectors(line["rows"], line["seed"])
                rows = {row: patch for row, patch in rows.items() if patch[0] != line["scan"]}
                for number in range(line["rows"]):
                    data = b"".join(made[name][number].tobytes() for name in sorted(made))
                    rows[first_row_id + number] = (line["scan"], number, data)
        return Model(scans, rows)


def verify(store: Path, folder: Path) -> dict[str, int]:
    """Compare the store with the journals, with nobody at work; collect; look again."""
    repository, journals = Repository.open(store), Journals.read(folder)
    chain = sorted(manifests(store, folder), key=lambda manifest: manifest.generation)
    assert [manifest.generation for manifest in chain] == list(range(len(chain)))
    model, past, lost = Model(), {1: Model()}, 0
    made: dict[str, int] = {}
    for parent, manifest in pairwise(chain[1:]):  # 0 and 1 are the empty store and its encoder
        assert manifest.parent == (parent.generation, parent.sha256)
        operation = journals.attempts[manifest.write_id]
        assert operation not in made, "one operation was committed twice"
        made[operation] = manifest.generation
        lost += operation not in journals.done
        model = model.after(journals.intentions[operation], parent.next_row_id, past)
        past[manifest.generation] = model
    for operation, line in journals.done.items():
        if operation in made:
            assert made[operation] == line["generation"]
        else:
            intention = journals.intentions[operation]
            assert needless(intention, past.get(line["generation"], model), past), f"{intention} is lost"
    compare(repository, model)
    known = tag_names(repository.storage)
    for tag, possible in journals.tags().items():
        assert (tag in known) in possible, tag
    collect(repository, keep=1)
    assert orphans(repository) == set()
    compare(repository, model)
    for tag in known:
        whole(repository, tagged(repository.storage, tag))
    return {"generations": len(chain), "commits": len(made), "unacknowledged": lost, "rows": len(model.rows)}


def needless(line: Line, model: Model, past: dict[int, Model]) -> bool:
    """Whether an operation had nothing to change in what it found."""
    match line["verb"]:
        case "delete scan":
            return line["scan"] not in model.scans
        case "delete patch":
            return line["row"] not in model.rows
        case "restore":
            return model == past[line["to"]]
        case verb:
            return verb in ("compact", "collect", "tag", "untag")


def manifests(store: Path, folder: Path) -> Iterator[Manifest]:
    """The whole history, each generation once."""
    paths = {
        path.name: path for place in (folder / "history", store / files.MANIFESTS) for path in place.glob("*.json")
    }
    paths |= {path.name.removeprefix("expired-"): path for path in (store / files.TMP).glob("expired-*.json")}
    for name, path in paths.items():
        yield Manifest.from_bytes(path.read_bytes(), name)


def compare(repository: Repository, model: Model) -> None:
    """The head holds exactly what the model holds, and every artefact is as committed."""
    head = repository.snapshot()
    found = content(head)
    assert sorted(found["scans"]) == sorted(model.scans)
    assert found["patches"] == model.rows
    whole(repository, head.manifest)


def whole(repository: Repository, manifest: Manifest) -> None:
    for artefact in manifest.artefacts:
        check_hash(check_size(repository.storage, artefact), artefact)


def warm_up(folder: Path) -> None:
    """Load what loads on first use, so that a worker is at work within milliseconds."""
    repository = Repository.create(folder)
    add_encoder(repository)
    for scan in ("a", "b"):
        add_scan(repository, scan)
        encode_again(repository, scan, 2, 0)
    delete_patches(repository, "patch = 0")
    delete_scans(repository, "scan = b")
    compact(repository)
    restore(repository, 1)
    collect(repository)
    content(repository.snapshot())


def forked(task: Callable[[], None]) -> int:
    """Run a task in a child of this warm process and return the child's id."""
    child = os.fork()
    if child:
        return child
    try:
        task()
        os._exit(0)
    except BaseException:  # noqa: BLE001 — a forked child must not go on as its parent
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    """Arguments: folder, kills, kills between two verifications, seed. Prints a line of JSON a verification."""
    folder, kills, round_kills, seed = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    store = folder / "store"
    (folder / "history").mkdir()
    Snapshot.matching = matching  # type: ignore[assignment,method-assign]
    warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)  # the threads of Arrow do not outlive a fork
    warm_up(folder / "warm")
    add_encoder(Repository.create(store))
    keep_history(folder / "history")
    os.fsync = lambda descriptor: None
    chance, lives, killed = random.Random(seed), 0, 0
    while killed < kills:
        workers: dict[int, int] = {}

        def start(number: int, workers: dict[int, int] = workers) -> None:
            nonlocal lives
            lives += 1
            life = lives
            workers[number] = forked(lambda: Worker(store, folder, number, life, seed).run())

        for number in range(WORKERS):
            start(number)
        for _ in range(min(round_kills, kills - killed) - WORKERS):
            time.sleep(chance.expovariate(1 / LIFE_S))
            number = chance.randrange(WORKERS)
            end(workers[number], folder)
            start(number)
        for worker in workers.values():
            end(worker, folder)
        killed = min(killed + round_kills, kills)
        _, status = os.waitpid(forked(lambda: print(json.dumps(verify(store, folder)), flush=True)), 0)
        assert status == 0, f"after {killed} kills"


def end(worker: int, folder: Path) -> None:
    """Kill a worker, which must have been at work."""
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    _, status = os.waitpid(worker, 0)
    if not os.WIFSIGNALED(status):
        Journals.read(folder)
        raise AssertionError(f"a worker ended by itself: {status}")
