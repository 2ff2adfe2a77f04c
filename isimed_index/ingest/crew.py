"""Who takes files: this process alone, or several processes of one core each.

Threads would not do: decoders hold the interpreter's lock, and one damaged file that makes a library crash, or the
system run out of memory, would end all of it. A process that ends costs the file that it was at, and another one takes
its place. Locks, intents and commits stay with the parent; workers write into folders that it hands out.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from isimed_index.errors import IsimedError, ScanRefused
from isimed_index.ingest.choose import Chosen
from isimed_index.ingest.take import Job, Taken, Task, take
from isimed_index.ingest.worker import READY
from isimed_index.limits import cores

_START = "import sys; sys.path[:] = sys.argv[1:]; from isimed_index.ingest.worker import serve; serve()"
_AHEAD = 8  # files a worker may be ahead of the one whose turn it is
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ZARR_THREADING__MAX_WORKERS")
_KILLED = (-signal.SIGKILL, -signal.SIGABRT)  # the kernel out of memory; C++ out of memory

Outcome = Taken | ScanRefused


class Early:
    """Processes of workers that load their libraries while the files are still being looked for.

    To be used as a context manager, which ends those that no crew took over. One worker needs none.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Early:
        if self._workers > 1:
            try:
                for _ in range(self._workers):
                    self._processes.append(_started(self._workers))
            except OSError as error:  # no memory, or too many processes: those that there are must not stay
                self.__exit__()
                raise _not_started(error.strerror or type(error).__name__) from error
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            _reap(process)

    def handed_over(self, workers: int) -> subprocess.Popen[bytes] | None:
        """One process, which is the taker's to end; none for a crew of another size, whose share of cores differs."""
        return self._processes.pop() if self._processes and workers == self._workers else None


class Crew:
    """Takes files in any order and tells of them in theirs; to be used as a context manager.

    `known` are digests of content that is not to be written again. Of several files with one content the first is
    written, however many workers there are.
    """

    def __init__(
        self, job: Job, workers: int, known: Collection[str], stage: Callable[[], Path], early: Early | None = None
    ) -> None:
        self._job = job
        self._workers = workers
        self._stage = stage  # gives a new empty folder; called in the thread that calls `each`
        self._spare: list[Path] = []
        self._landed = set(known)  # of the files whose turn has been
        self._claims: dict[str, int] = {}  # digest → number of the first file that it was wanted of
        self._guard = threading.Lock()
        self._local = threading.local()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._early = early
        self._closed = False
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="add") if workers > 1 else None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        """End every worker, in the middle of its file where there is one."""
        with self._guard:
            self._closed = True
            for process in self._processes:
                process.kill()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            _reap(process)

    def each(self, files: Iterable[Chosen]) -> Iterator[tuple[Chosen, Outcome]]:
        """Every file and what became of it, in order; `Taken.folder` is None where the content is there already."""
        waiting: deque[tuple[Task, Future[Outcome]]] = deque()
        for number, file in enumerate(files):
            task = Task(number, file, self._spare.pop() if self._spare else self._stage())
            waiting.append((task, self._begin(task)))
            if len(waiting) >= (self._workers * _AHEAD if self._pool else 1):
                yield self._told(*waiting.popleft())
        while waiting:
            yield self._told(*waiting.popleft())

    def _begin(self, task: Task) -> Future[Outcome]:
        if self._pool is not None:
            return self._pool.submit(self._delegate, task)
        done: Future[Outcome] = Future()
        done.set_result(take(task, self._job, lambda digest: self._wanted(digest, task.number)))
        return done

    def _told(self, task: Task, done: Future[Outcome]) -> tuple[Chosen, Outcome]:
        """The outcome of the file whose turn it is, once it is sure which file has its content."""
        outcome = done.result()
        if isinstance(outcome, ScanRefused):
            self._spare.append(_emptied(task.folder))
            return task.file, outcome
        if outcome.folder is None:
            self._spare.append(task.folder)
            if outcome.digest not in self._landed:  # an earlier file wanted it, whose worker then died
                return self._told(again := Task(task.number, task.file, self._spare.pop()), self._begin(again))
        elif outcome.digest in self._landed:  # a later file was quicker than the first one with this content
            self._spare.append(_emptied(task.folder))
            return task.file, outcome.unwritten()
        self._landed.add(outcome.digest)
        return task.file, outcome

    def _wanted(self, digest: str, number: int) -> bool:
        """Whether the file of that number is to be written: the first of its content, as far as is known yet."""
        with self._guard:
            if digest in self._landed or self._claims.get(digest, number) < number:
                return False
            self._claims[digest] = number
            return True

    def _disowned(self, number: int) -> None:
        """What a file that came to nothing had claimed is free again."""
        with self._guard:
            for digest in [digest for digest, owner in self._claims.items() if owner == number]:
                del self._claims[digest]

    def _delegate(self, task: Task) -> Outcome:
        """Have this thread's own process take a file; a process that ends over it is replaced."""
        process = self._process()
        try:
            _send(process, task)
            while isinstance(answer := pickle.load(process.stdout), str):  # type: ignore[arg-type]
                _send(process, self._wanted(answer, task.number))
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            self._local.process = None
            code = self._gone(process)
            self._disowned(task.number)
            return _lost(task.file, code)
        if isinstance(answer, BaseException) and not isinstance(answer, ScanRefused):
            raise answer
        outcome: Outcome = answer
        return outcome

    def _process(self) -> subprocess.Popen[bytes]:
        """This thread's process, started when there is none."""
        found: subprocess.Popen[bytes] | None = getattr(self._local, "process", None)
        if found is not None:
            return found
        with self._guard:
            if self._closed:
                raise _not_started("the add was ended")
            process = (self._early and self._early.handed_over(self._workers)) or _started(self._workers)
            self._processes.add(process)
        try:
            _send(process, self._job)
            if pickle.load(process.stdout) != READY:  # type: ignore[arg-type]
                raise EOFError
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise _not_started(f"exit code {self._gone(process)}") from None
        self._local.process = process
        return process

    def _gone(self, process: subprocess.Popen[bytes]) -> int:
        """How a process ended that does not answer any more."""
        with self._guard:
            self._processes.discard(process)
        return _reap(process)


def _started(workers: int) -> subprocess.Popen[bytes]:
    """A process that shares the cores with the others; it loads no module of the caller's own."""
    threads = str(max(1, cores() // workers))
    path = [os.path.abspath(entry) for entry in sys.path]  # noqa: PTH100 — '' is the current folder
    return subprocess.Popen(
        [sys.executable, "-I", "-c", _START, *path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **dict.fromkeys(_THREADS, threads)},
    )


def _send(process: subprocess.Popen[bytes], message: Any) -> None:
    assert process.stdin is not None
    pickle.dump(message, process.stdin)
    process.stdin.flush()


def _reap(process: subprocess.Popen[bytes]) -> int:
    """Close the pipes to a process that has ended or is ending, and return how it did."""
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):  # what was still to be sent has no reader
            stream.close()  # type: ignore[union-attr]
    try:
        return process.wait(timeout=5)  # one whose pipes are closed ends by itself
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _emptied(folder: Path) -> Path:
    """The folder without what a worker may have left in it."""
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


def _lost(file: Chosen, code: int) -> ScanRefused:
    """The refusal of the file that a worker process was at when it ended."""
    if code in _KILLED:
        return ScanRefused(
            f"{file.shown}: the system ended the process that read it (signal {-code}), as it does when memory "
            "runs out",
            next_step="add it with --workers 1, or on a machine with more memory",
        )
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return ScanRefused(
        f"{file.shown}: the process that read it crashed ({how})", next_step="copy or export the file again"
    )


def _not_started(why: str) -> IsimedError:
    return IsimedError(f"a worker process did not start ({why})", next_step="use --workers 1")
