"""Where tasks are run: threads, processes of this machine, its GPUs, or the workers of a Dask scheduler.

All are `Workers`, which call a function of one argument and tell its future. The only module that knows of Dask.
"""

from __future__ import annotations

import difflib
import logging
import os
import pickle
import queue
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from isimed_index.blas import one_blas_thread
from isimed_index.encode.scan import AT_ONCE
from isimed_index.errors import IsimedError, IsimedWarning, MissingExtra, UsageError, WorkerFailed
from isimed_index.limits import cores

if TYPE_CHECKING:
    from isimed_index.encoders.runtimes.trial import Choice, Job

_ANY_PORT = "127.0.0.1:0"  # of a page that nobody asked for; without one, Dask opens it at a port that may be taken
_NO_DASHBOARD = {"dashboard": False}
_CONNECT_S = 10.0  # how long a scheduler may take to answer
_HERE = ("threads", "processes", "cuda")  # on this machine
_ALIKE = 0.75  # similarity from which a word is one of these, misspelt
_PROCESSES = 4  # at least, where there are cores for them; on large machines one for so many cores
_A = TypeVar("_A")
_R = TypeVar("_R")


class Future(Protocol):
    """The part of `concurrent.futures.Future` that Dask's futures have too."""

    def cancel(self) -> Any:
        """Do not run it, if it has not begun."""
        ...

    def cancelled(self) -> bool:
        """Whether nobody will run it."""
        ...

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Call `fn` with this future, in some thread, when it has ended in whatever way."""
        ...


class Workers(Protocol):
    """Somewhere to run functions of one argument."""

    def submit(self, function: Callable[[_A], _R], argument: _A, name: str) -> Future:
        """Run it on one of the workers; `name` is one that nothing else has that was ever submitted."""
        ...

    def result(self, future: Any) -> Any:
        """What the function of a future returned, once it has; raises what it raised."""
        ...

    def places(self) -> int:
        """How many scans can be worked on at once, as things are; `WorkerFailed` when nobody is left to say so."""
        ...

    def processes(self) -> int:
        """How many processes encode, each one pass of the network at a time; raises as `places` does."""
        ...

    def losses(self) -> Sequence[frozenset[str]]:
        """The names of what each worker had been given that was lost since this was asked for the last time."""
        ...

    def died(self, error: BaseException) -> bool:
        """Whether a task ended with this error because workers died, and not by itself."""
        ...

    def lost(self) -> WorkerFailed:
        """The error for a task that was cancelled, though not by us."""
        ...


@dataclass(frozen=True, slots=True)
class Threads:
    """Threads of this process."""

    executor: ThreadPoolExecutor

    def submit(self, function: Callable[[_A], _R], argument: _A, name: str) -> Future:
        """Run it on the next thread that is free."""
        return self.executor.submit(function, argument)

    def result(self, future: Any) -> Any:
        """What the function returned; raises what it raised."""
        return future.result()

    def places(self) -> int:
        """One scan is computed while another one is read."""
        return AT_ONCE

    def processes(self) -> int:
        """This one."""
        return 1

    def losses(self) -> Sequence[frozenset[str]]:
        """None: a thread is lost with its process."""
        return ()

    def died(self, error: BaseException) -> bool:
        """Never: a thread dies with its process."""
        return False

    def lost(self) -> WorkerFailed:
        """There is no scheduler to be lost."""
        return WorkerFailed("the threads that encode were stopped")


@dataclass(frozen=True, slots=True)
class Cluster:
    """The workers of a Dask scheduler; `threads` for one pass of the network, 0 where each worker decides."""

    client: Any
    threads: int = 0
    gone: queue.SimpleQueue[frozenset[str]] = field(default_factory=queue.SimpleQueue)  # see `losses`

    def submit(self, function: Callable[[_A], _R], argument: _A, name: str) -> Future:
        """Run it on the worker that the scheduler chooses, and on another one when that one dies."""
        future: Future = self.client.submit(_at_work, function, argument, self.threads, key=name)
        return future

    def result(self, future: Any) -> Any:
        """What the function returned; raises what it raised, or what the scheduler says of its workers."""
        outcome: _Outcome = future.result()
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def places(self) -> int:
        """Two scans in each process, if it has the threads; workers may come and go at any time."""
        return sum(min(AT_ONCE, threads) for threads in self._threads_of_each())

    def processes(self) -> int:
        """As many as there are workers at the moment."""
        return len(self._threads_of_each())

    def _threads_of_each(self) -> list[int]:
        if self.client.status != "running":
            raise self.lost()
        try:
            return list(self.client.nthreads().values())
        except OSError as error:
            raise self.lost() from error

    def losses(self) -> Sequence[frozenset[str]]:
        """By name, what each lost worker was at, was to begin, or had ended and not handed over."""
        return [self.gone.get() for _ in range(self.gone.qsize())]

    def hear(self, event: tuple[float, Any]) -> None:
        """Note what the scheduler says of a worker that is lost; one that was sent away with nothing to do is not."""
        said = event[1]
        if isinstance(said, Mapping) and said.get("action") == "remove-worker":
            given = frozenset({*said.get("processing-tasks", ()), *said.get("lost-computed-tasks", ())})
            if given or not said.get("expected"):
                self.gone.put(given)

    def died(self, error: BaseException) -> bool:
        """Whether the scheduler gave the task up after several workers died that had been given it."""
        from distributed.scheduler import KilledWorker

        return isinstance(error, KilledWorker)

    def lost(self) -> WorkerFailed:
        """The scheduler went, and with it whatever was not committed."""
        return WorkerFailed(
            "the connection to the Dask scheduler was lost; what was committed before is in the store",
            next_step="see that the scheduler runs, then give the same command again: it goes on from there",
        )


@contextmanager
def workers(scheduler: str = "threads") -> Iterator[Workers]:
    """The workers that `threads`, `processes`, `processes:N`, `cuda` or the address of a scheduler stands for.

    `UsageError` when it is none of these, nobody answers there, or there is no GPU; `MissingExtra` for `cuda` without
    dask-cuda.
    """
    check_scheduler(scheduler)
    kind, _, count = scheduler.partition(":")
    if scheduler == "threads":
        with _threads() as threads:
            yield threads
    elif scheduler == "cuda":
        with _gpu_processes() as cluster, _connected(cluster) as client, _listening(Cluster(client)) as listening:
            yield listening
    elif kind == "processes":
        processes = _how_many(count) if ":" in scheduler else _by_cores()
        share = max(1, cores() // processes)
        with _processes(processes, share) as cluster, _connected(cluster) as client:  # noqa: SIM117 — a line too long
            with _listening(Cluster(client, share)) as listening:
                yield listening
    else:
        with _connected(scheduler) as client, _listening(Cluster(client)) as listening:
            if not listening.places():
                warnings.warn("the Dask scheduler has no workers yet; waiting for some", IsimedWarning, stacklevel=3)
            yield listening


@contextmanager
def _listening(cluster: Cluster) -> Iterator[Cluster]:
    """The same cluster, which hears meanwhile of workers that come and go.

    A scheduler logs a traceback when a client leaves that still wants to hear of it.
    """
    cluster.client.subscribe_topic("all", cluster.hear)
    try:
        yield cluster
    finally:
        if cluster.client.status == "running":
            cluster.client.unsubscribe_topic("all")


def check_scheduler(scheduler: str) -> None:
    """Raise `UsageError` for what `workers` would never know; nobody is asked whether he is there."""
    kind, colon, count = scheduler.partition(":")
    if kind == "processes" and colon:
        _how_many(count)
        return
    close = difflib.get_close_matches(kind, _HERE, n=1, cutoff=_ALIKE)
    is_address = "://" in scheduler or (colon and count.rpartition(":")[2].isdecimal() and not close)
    if scheduler in _HERE or is_address:
        return
    meant = "tcp://host:8786"
    if close:
        meant = f"processes:{count}" if count.isdecimal() else close[0]
    raise UsageError(
        f"expected the scheduler threads, processes, processes:N, cuda or an address, found {scheduler!r}"
        + (f"; did you mean {meant}?" if close else ""),
        next_step=f"--scheduler {meant}" + (f", or tcp://{scheduler} for that host" if close and colon else ""),
    )


@contextmanager
def _threads() -> Iterator[Threads]:
    """Threads of this process; NumPy's products have one thread meanwhile, as in Dask's workers.

    With more, each of their many small products waits until a core is free for its second half, and the network has
    them all: resampling a head took 2 s of a core instead of 0.04.
    """
    executor = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="encode")
    try:
        with one_blas_thread():
            yield Threads(executor)
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _connected(to: Any) -> Iterator[Any]:
    """A client of a cluster or an address; closing it does not fail where the scheduler is gone."""
    from distributed import Client

    try:
        client = Client(to, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {to!r}", next_step="dask scheduler") from error
    with _quiet():
        try:
            yield client
        finally:
            with suppress(OSError):
                client.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what Dask logs, with tracebacks, about connections and workers that go: it is told as our errors."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _processes(count: int, cores: int) -> Any:
    """Processes of this machine with so many cores each; one with several computes a scan while it reads another.

    On a single core the two would take turns at it, and at the interpreter's lock: a fifth slower, and more.
    """
    from distributed import LocalCluster

    return LocalCluster(
        n_workers=count,
        threads_per_worker=min(AT_ONCE, cores),
        dashboard_address=_ANY_PORT,
        scheduler_kwargs=_NO_DASHBOARD,
        silence_logs=logging.CRITICAL,
    )


def _gpu_processes() -> Any:
    """One process for each GPU that CUDA_VISIBLE_DEVICES leaves visible."""
    from isimed_index.encoders.runtime import choose_device

    try:
        choose_device("cuda")
    except UsageError as error:
        raise UsageError(
            f"{error}, and the scheduler cuda needs one",
            next_step="--scheduler threads or processes; isimed doctor says what is there",
        ) from None
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise MissingExtra(
            "the scheduler cuda needs the package dask-cuda, which is not installed",
            next_step="pip install dask-cuda, which brings the version of Dask that it needs",
        ) from error
    try:
        return LocalCUDACluster(threads_per_worker=AT_ONCE, dashboard_address=_ANY_PORT, scheduler_kwargs=_NO_DASHBOARD)
    except Exception as error:  # the driver's library says in many ways that there is no GPU
        raise UsageError(
            f"dask-cuda found no GPU that it can use: {error}", next_step="nvidia-smi, or --scheduler threads"
        ) from error


def _how_many(count: str) -> int:
    if not count.isdecimal() or int(count) < 1:
        raise UsageError(
            f"expected a number of processes, found {count!r} in --scheduler processes:{count}",
            next_step="for example --scheduler processes:2",
        )
    return int(count)


def _by_cores() -> int:
    """A process for each core of a small machine; on a large one fewer, because each holds two scans in memory."""
    return min(cores(), max(_PROCESSES, cores() // _PROCESSES))


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a function returned on a worker, or raised there.

    Raised errors would not do: of one whose traceback cannot be pickled, a client of Dask never hears (2026.8).
    """

    value: Any = None
    error: Exception | None = None


def _at_work(function: Callable[[_A], _R], argument: _A, threads: int) -> _Outcome:
    """In the process of a Dask worker: the function, with as many threads for the network as the worker may use.

    Dask tells its processes to compute on one thread each (OMP_NUM_THREADS=1), and runs as many tasks as the worker
    has threads. Here it is one pass at a time, on all of these; unless somebody has given it more by that variable.
    """
    from distributed import get_worker

    from isimed_index.encoders.threads import use_threads

    asked = os.environ.get("OMP_NUM_THREADS", "")
    if threads or asked in ("", "1"):
        use_threads(threads or get_worker().state.nthreads)
    try:
        return _Outcome(function(argument))
    except Exception as error:  # noqa: BLE001 — it is raised where it can be dealt with
        return _Outcome(error=_portable(error))


def _portable(error: Exception) -> Exception:
    """An error that survives the way to another process, with where it came from as a note."""
    if not isinstance(error, IsimedError):
        error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 — an error class may fail in any way at being made again
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def choose_on(job: Job, where: Workers) -> Choice:
    """The runtime for a job, chosen on one of the workers that will do it: this machine may be unlike them."""
    died = WorkerFailed(
        "the workers died that tried which runtime is the fastest", next_step="name one: --runtime torch"
    )
    return ask(_choose, job, where, died)


def ask(function: Callable[[_A], _R], argument: _A, where: Workers, died: WorkerFailed) -> _R:
    """What a function of one argument says on one of the workers; raises `died` when workers died of it."""
    future = where.submit(function, argument, f"{function.__name__.strip('_')}-{uuid.uuid4().hex}")
    try:
        said: _R = where.result(future)
    except IsimedError:
        raise
    except BaseException as error:
        if future.cancelled():
            raise where.lost() from error
        if where.died(error):
            raise died from error
        raise
    return said


def _choose(job: Job) -> Choice:
    from isimed_index.encoders.runtimes.trial import choose

    return choose(job)
