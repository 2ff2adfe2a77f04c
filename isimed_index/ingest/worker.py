"""The process of one worker: takes files until its parent is gone. Started by `crew`, before there are files to take.

    crew ── Job, then Task by Task ──▶ stdin ─▶ `take`: read, digest ── is it wanted? ──▶ crew ── yes or no ──▶ write
      ▲                                                                                                          │
      └──────────── Taken, ScanRefused, or whatever else went wrong ◀── stdout ──────────────────────────────────┘

Messages are pickles: both ends are this library in two processes of one user. A thread waits for the end of stdin and
then ends the process in the middle of whatever it does, so that nothing writes into a store whose writer is dead.
"""

from __future__ import annotations

import gc
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from typing import IO, Any

READY = "ready"
_UNUSED = ("gdcm", "requests")  # of pydicom


class Stopped(Exception):
    """The file could not be taken for a reason that stops the whole add; the worker's own words."""


def serve() -> None:
    """The worker's main loop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    requests, answers = os.fdopen(0, "rb", closefd=False), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with answers
    _load()
    from isimed_index.ingest.take import Job, Task, take

    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, inbox), daemon=True).start()

    def wanted(digest: str) -> bool:
        _send(answers, digest)
        return bool(inbox.get())

    if inbox.empty():  # the parent is still looking for files: it may well be reading headers of DICOM
        import pydicom.pixels  # noqa: F401
    job: Job = inbox.get()
    _send(answers, READY)
    while True:
        task: Task = inbox.get()
        try:
            _send(answers, take(task, job, wanted))
        except BaseException as error:  # noqa: BLE001 — it is the parent's to raise
            _send(answers, _portable(error))


def _load() -> None:
    """Load what every file needs, before there is one: most of what a worker's start takes.

    nibabel loads pydicom, and pydicom whatever it finds of plug-ins and of downloading, none of which is used. They are
    kept out, pydicom until a file is DICOM: they would be a quarter of the start. Looking for garbage among what is
    loaded and stays would be a tenth.
    """
    gc.disable()
    hidden: dict[str, Any] = dict.fromkeys(_UNUSED)  # an import of None fails as that of a package that is not there
    sys.modules.update(hidden)
    early = "pydicom" not in sys.modules
    if early:
        sys.modules.update(dict.fromkeys(["pydicom"]))  # type: ignore[arg-type]
    import nibabel  # noqa: F401

    if early:
        del sys.modules["pydicom"]
    import isimed_index.ingest.take
    import isimed_index.scans.chunks  # noqa: F401

    gc.freeze()
    gc.enable()


def _listen(requests: IO[bytes], inbox: queue.SimpleQueue[Any]) -> None:
    """Hand on what the parent sends; its end is the end of this process."""
    try:
        while True:
            inbox.put(pickle.load(requests))
    finally:
        os._exit(1)


def _send(answers: IO[bytes], message: object) -> None:
    pickle.dump(message, answers)
    answers.flush()


def _portable(error: BaseException) -> BaseException:
    """The error with its traceback as a note, as what another process can raise."""
    told = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 — an error that cannot be sent may raise anything
        error = Stopped(f"{type(error).__name__}: {error}")
    error.add_note(told)
    return error
