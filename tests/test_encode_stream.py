"""The stream of tasks: bounded, in batches, tried again where workers died, ended where it makes no sense to go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import pytest

from isimed_index.encode import stream
from isimed_index.encode.stream import COMMIT_SCANS, Losses, encode_batches
from isimed_index.encode.task import STARTS, Encoded, EncodeTask
from isimed_index.errors import IsimedWarning, ScanRefused, StoreDamaged, StoreFull, WorkerFailed


class WorkersDied(Exception):
    """What a scheduler says of a task that it gave up."""


class ByHand:
    """Workers that do nothing: `act` says what becomes of each task, or leaves it for later."""

    def __init__(self, act: Callable[[EncodeTask], Encoded | Exception | None], places: int = 2) -> None:
        self.act = act
        self.free = places
        self.given: list[tuple[EncodeTask, str]] = []
        self.open: list[Future[Encoded]] = []
        self.gone: list[frozenset[str]] = []

    def submit(self, function: Callable, argument: EncodeTask, name: str) -> Future[Encoded]:
        future: Future[Encoded] = Future()
        self.given.append((argument, name))
        done = self.act(argument)
        if done is None:
            self.open.append(future)
        elif isinstance(done, Exception):
            future.set_exception(done)
        else:
            future.set_result(done)
        return future

    def result(self, future: Future[Encoded]) -> Encoded:
        return future.result()

    def places(self) -> int:
        return self.free

    def losses(self) -> list[frozenset[str]]:
        gone, self.gone = self.gone, []
        return gone

    def died(self, error: BaseException) -> bool:
        return isinstance(error, WorkersDied)

    def lost(self) -> WorkerFailed:
        return WorkerFailed("lost")


def fine(task: EncodeTask) -> Encoded:
    return Encoded(task, {"rows": 1}, staged="somewhere")


def tasks(count: int, asked: list[int] | None = None) -> Iterator[EncodeTask]:
    for number in range(count):
        if asked is not None:
            asked.append(number)
        yield EncodeTask(number, f"key{number}", f"s{number}", "", "", "segments/bench", 8, "cpu")


def numbers(batches: Iterator[list[Encoded]]) -> list[int]:
    return [done.task.number for batch in batches for done in batch]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_LOOK_S", 0.01)


def test_no_more_tasks_are_with_the_workers_than_they_want_soon() -> None:
    """Of ten thousand scans, the ones that wait are not even asked for: they cost no memory, no disk and no hashing."""
    asked: list[int] = []
    where = ByHand(lambda task: fine(task) if task.number == 0 else None, places=3)
    batches = encode_batches(tasks(10_000, asked), where)
    stream_one = iter(batches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "COMMIT_S", 0.0)
        assert [done.task.number for done in next(stream_one)] == [0]
    assert asked == list(range(7))  # two for each place, and one in place of the first
    stream_one.close()
    assert all(future.cancelled() for future in where.open)


def test_every_task_has_one_result_and_none_waits_for_a_slow_one() -> None:
    where = ByHand(lambda task: None if task.number == 1 else fine(task))
    found = []
    for batch in encode_batches(tasks(30), where):
        assert len(batch) >= COMMIT_SCANS or 29 in [done.task.number for done in batch] or 1 in found
        found += [done.task.number for done in batch]
        if 29 in found and where.open:
            where.open.pop().set_result(fine(where.given[1][0]))
        if len(found) >= 24 and where.open:
            where.open.pop().set_result(fine(where.given[1][0]))
    assert sorted(found) == list(range(30))
    assert found[-1] == 1 or found.index(1) > 20


def test_a_result_waits_for_others_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "COMMIT_S", 0.05)
    where = ByHand(lambda task: fine(task) if task.number == 0 else None)
    began = time.monotonic()
    assert [done.task.number for done in next(encode_batches(tasks(3), where))] == [0]
    assert time.monotonic() - began >= 0.05


def test_a_batch_is_in_the_order_of_the_tasks() -> None:
    where = ByHand(lambda task: None, places=2)

    def end(task: EncodeTask) -> None:
        if task.number == 3:
            for future, (given, _) in reversed(list(zip(where.open, where.given, strict=False))):
                future.set_result(fine(given))

    where.act = lambda task: fine(task) if end(task) or task.number == 3 else None
    (batch,) = encode_batches(tasks(4), where)
    assert [done.task.number for done in batch] == [0, 1, 2, 3]


def test_a_task_is_given_out_again_under_a_new_name_when_workers_died() -> None:
    tries: list[int] = []

    def act(task: EncodeTask) -> Encoded | Exception:
        tries.append(task.number)
        return WorkersDied() if task.number == 2 and tries.count(2) < 3 else fine(task)

    where = ByHand(act)
    assert sorted(numbers(encode_batches(tasks(5), where))) == list(range(5))
    assert tries.count(2) == 3
    names = [name for _, name in where.given]
    assert len(set(names)) == len(names) == 7


def test_workers_that_are_lost_are_counted_and_told_with_their_scans() -> None:
    """Of a scheduler that others use, too: what it says of their tasks is not ours."""
    where = ByHand(lambda task: None if task.number < 3 else fine(task))
    losses = Losses()
    batches = encode_batches(tasks(9), where, losses)
    assert len(next(batches)) >= COMMIT_SCANS
    where.gone = [frozenset({where.given[2][1], where.given[0][1], "theirs"}), frozenset({"theirs"}), frozenset()]
    for future, (task, _) in zip(where.open, where.given, strict=False):
        future.set_result(fine(task))
    with pytest.warns(IsimedWarning) as told:
        rest = numbers(batches)
    assert {0, 1, 2} < set(rest)
    assert [str(warning.message).partition(". ")[0] for warning in told] == [
        "a worker was lost (1 so far); what it had been given is encoded again: s0, s2",
        "a worker was lost (2 so far); it had been given nothing of this run",
        "a worker was lost (3 so far); it had been given nothing of this run",
    ]
    assert losses.workers == 3


def test_workers_that_die_for_ever_cost_the_scan_alone() -> None:
    where = ByHand(lambda task: WorkersDied() if task.number == 2 else fine(task))
    results = [done for batch in encode_batches(tasks(5), where) for done in batch]
    (refused,) = [done for done in results if done.error]
    assert refused.task.number == 2
    assert isinstance(refused.error, WorkerFailed)
    assert "same command again" in refused.error.next_step
    assert len(results) == 5


def test_a_suspect_is_tried_once_more_with_nothing_beside_it() -> None:
    """Two scans were on workers that were ended; one of them is what ends workers, the other one was beside it."""

    def act(task: EncodeTask) -> Encoded:
        if task.number == 1 or (task.number == 4 and task.starts == STARTS):
            return Encoded(task, {}, WorkerFailed("ended"), suspect=True)
        return fine(task)

    where = ByHand(act)
    results = {done.task.number: done for batch in encode_batches(tasks(9), where) for done in batch}
    assert [number for number, done in sorted(results.items()) if done.error] == [1]
    assert len(results) == 9
    last = [(task.number, task.starts) for task, _ in where.given][-2:]
    assert sorted(last) == [(1, STARTS + 1), (4, STARTS + 1)]


def test_what_befalls_one_scan_after_another_ends_the_run() -> None:
    where = ByHand(lambda task: Encoded(task, {}, StoreFull("no room")))
    with pytest.raises(StoreFull):
        numbers(encode_batches(tasks(1000), where))
    assert len(where.given) < 20
    bad = ByHand(lambda task: Encoded(task, {}, StoreDamaged("cut")))  # one by one, these are the scans' own
    assert len(numbers(encode_batches(tasks(50), bad))) == 50
    mixed = ByHand(lambda task: fine(task) if task.number % 5 == 0 else Encoded(task, {}, WorkerFailed("disk")))
    assert len(numbers(encode_batches(tasks(50), mixed))) == 50


def test_what_was_encoded_before_an_error_for_all_is_not_lost() -> None:
    where = ByHand(lambda task: fine(task) if task.number < 6 else ScanRefused("the encoder"))
    batches = encode_batches(tasks(50), where)
    found = [done.task.number for batch in (next(batches), next(batches)) for done in batch]
    assert found == list(range(6))
    with pytest.raises(ScanRefused):
        next(batches)


def test_a_lost_scheduler_ends_the_run() -> None:
    where = ByHand(lambda task: None)

    def act(task: EncodeTask) -> Encoded | None:
        if task.number == 3:
            where.open[0].cancel()
        return None

    where.act = act
    with pytest.raises(WorkerFailed, match="lost"):
        numbers(encode_batches(tasks(9), where))
    assert all(future.cancelled() for future in where.open)


def test_a_scheduler_without_workers_is_given_some_tasks_and_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that starts workers when there is work has to see work first."""
    monkeypatch.setattr(stream, "_PATIENCE_S", 0.03)
    where = ByHand(lambda task: None, places=0)

    def comes(*_: object, **__: object) -> None:
        where.free, where.act = 1, fine
        for future, (task, _) in zip(where.open, where.given, strict=True):
            future.set_result(fine(task))
        where.open = []

    monkeypatch.setattr(stream.warnings, "warn", lambda *told, **__: seen.append(told) or comes())
    seen: list[tuple] = []
    assert sorted(numbers(encode_batches(tasks(9), where))) == list(range(9))
    assert [kind for _, kind in seen] == [IsimedWarning]
    assert len({replace(task) for task, _ in where.given}) == 9
