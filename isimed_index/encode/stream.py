"""All tasks through all workers, as a stream: nobody waits for the slowest of a group, or for a commit.

tasks ─▶ at most `_AHEAD` for each place are with the workers ─▶ results in the order in which they end ─▶ batches
              ▲                                                      │
              └── workers died: tried again, in the end alone ◀──────┘
"""

from __future__ import annotations

import queue
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from isimed_index.encode.cluster import Future, Workers
from isimed_index.encode.scan import encode_scan
from isimed_index.encode.task import STARTS, Encoded, EncodeTask
from isimed_index.errors import IsimedWarning, StoreFull, StoreReadOnly, WorkerFailed

COMMIT_SCANS = 4  # results that are worth a commit
COMMIT_S = 30.0  # the longest that a result waits for others to be committed with
_AHEAD = 2  # tasks with the workers for each scan that they can work on: one is at hand while another one is committed
_LEAST = 4  # tasks with a scheduler that has no workers yet: one that starts workers on demand has to see some
_ROUNDS = 3  # times that a task is given to a scheduler which gives up, because workers die
_FAILURES = 8  # of machines, one after another: these are no longer single scans
_LOOK_S = 5.0  # how often to see whether the scheduler is there, while nothing ends
_NAMED = 5  # scans in a message
_PATIENCE_S = 60.0  # without any worker before that is told


@dataclass(slots=True)
class Losses:
    """How many workers were lost during a run."""

    workers: int = 0


@dataclass(slots=True)
class _Flow:
    """The tasks that are with the workers, and what came of others."""

    where: Workers
    losses: Losses
    ended: queue.SimpleQueue[Future] = field(default_factory=queue.SimpleQueue)
    running: dict[Future, tuple[EncodeTask, int]] = field(default_factory=dict)  # and its round
    suspects: list[EncodeTask] = field(default_factory=list)  # each to be tried once more, when nothing else runs
    failures: int = 0  # of machines, since the last scan that was encoded

    def submit(self, task: EncodeTask, rounds: int = 1) -> None:
        """Hand a task out."""
        future = self.where.submit(encode_scan, task, _name(task, rounds))
        self.running[future] = (task, rounds)
        future.add_done_callback(self.ended.put)

    def take(self, future: Future) -> Encoded | None:
        """The result of a task that ended; None when it is tried again."""
        task, rounds = self.running.pop(future)
        if future.cancelled():
            raise self.where.lost()
        try:
            done: Encoded = self.where.result(future)
        except Exception as error:
            if not self.where.died(error):
                raise
            if rounds < _ROUNDS:
                self.submit(task, rounds + 1)
                return None
            return Encoded(task, {}, _workers_died())
        if done.suspect and task.starts == STARTS:
            self.suspects.append(replace(task, starts=STARTS + 1))
            return None
        self._count(done)
        return done

    def tell_losses(self) -> None:
        """Say which workers were lost, and of which scans the encoding begins again by that."""
        for given in self.where.losses():
            self.losses.workers += 1
            scans = sorted(task.scan for task, rounds in self.running.values() if _name(task, rounds) in given)
            named = ", ".join(scans[:_NAMED]) + (f" and {len(scans) - _NAMED} more" if len(scans) > _NAMED else "")
            what = (
                f"what it had been given is encoded again: {named}"
                if scans
                else "it had been given nothing of this run"
            )
            warnings.warn(f"a worker was lost ({self.losses.workers} so far); {what}", IsimedWarning, stacklevel=2)

    def _count(self, done: Encoded) -> None:
        """Raise the error of a machine that has befallen one scan after another: the next ones will have it too."""
        broken = isinstance(done.error, WorkerFailed | StoreFull | StoreReadOnly) and not done.suspect
        self.failures = self.failures + 1 if broken else 0
        if self.failures >= _FAILURES and done.error is not None:
            raise done.error


def _name(task: EncodeTask, rounds: int) -> str:
    """What the workers know a task by, each time that it is handed out."""
    return f"{task.name}-{task.starts}-{rounds}"


def encode_batches(
    tasks: Iterator[EncodeTask], where: Workers, losses: Losses | None = None
) -> Iterator[list[Encoded]]:
    """Encode all tasks; results come in batches to be committed, while the workers go on.

    A batch is what has ended since the last one: `COMMIT_SCANS` results or more, or fewer after `COMMIT_S`, in the
    order of the tasks. `tasks` is asked for the next one when a worker will want it. An error that concerns every scan
    is raised, `WorkerFailed` when the scheduler is lost or one machine after another fails; tasks that are with the
    workers are given up then, and when the iterator is closed. Workers that are lost are told of, and counted
    in `losses`.
    """
    flow = _Flow(where, losses or Losses())
    try:
        yield from _batches(_results(flow, tasks))
    finally:
        for future in flow.running:
            future.cancel()


def _batches(results: Iterator[Encoded | None]) -> Iterator[list[Encoded]]:
    """Results as batches; None says that time has passed. Before an error goes on its way, what there is comes out."""
    batch: list[Encoded] = []
    since = 0.0
    try:
        for done in results:
            if done is not None:
                since = since if batch else time.monotonic()
                batch.append(done)
            elif batch and (len(batch) >= COMMIT_SCANS or time.monotonic() - since >= COMMIT_S):
                yield _in_order(batch)
                batch = []
    except Exception:
        if batch:
            yield _in_order(batch)
        raise
    if batch:
        yield _in_order(batch)


def _in_order(batch: list[Encoded]) -> list[Encoded]:
    return sorted(batch, key=lambda done: done.task.number)


def _results(flow: _Flow, tasks: Iterator[EncodeTask]) -> Iterator[Encoded | None]:
    """Each result when it has ended, and None when there is none at the moment and the workers have their tasks."""
    manned = time.monotonic()
    while True:
        flow.tell_losses()
        if flow.ended.empty():
            places = flow.where.places()
            while len(flow.running) < max(_LEAST, _AHEAD * places) and flow.ended.empty():
                task = next(tasks, None)
                if task is None:
                    break
                flow.submit(task)
            if not flow.running and flow.suspects:
                flow.submit(flow.suspects.pop())
            if not flow.running:
                return
            if places:
                manned = time.monotonic()
            elif time.monotonic() - manned > _PATIENCE_S:
                warnings.warn(f"no worker has been there for {_PATIENCE_S:g} s", IsimedWarning, stacklevel=2)
                manned = time.monotonic()
            yield None
        try:
            done = flow.take(flow.ended.get(timeout=_LOOK_S))
        except queue.Empty:
            continue
        if done is not None:
            yield done


def _workers_died() -> WorkerFailed:
    return WorkerFailed(
        "workers died again and again that were to encode it, before or while they were at it",
        next_step="see the workers' logs, then run the same command again",
    )
