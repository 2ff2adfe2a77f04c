"""Ctrl-C and SIGTERM end a run after its step, not in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Ctrl-C with what was kept, and how to go on."""

    def __init__(self, message: str, next_step: str) -> None:
        super().__init__(message)
        self.next_step = next_step


@contextmanager
def asked_to_stop(*, patient: bool = False) -> Iterator[Callable[[], bool]]:
    """Inside, a signal is remembered instead of raised; the value says whether one came.

    A second Ctrl-C goes to whoever handled signals before, which stops at once; not where `patient`, for torchrun sends
    its processes a signal of its own after the terminal's. A signal that is ignored stays so, as a script's background
    jobs ignore Ctrl-C. Outside of the main thread nothing is changed: only there can signals be handled.
    """
    asked: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: Any) -> None:
        handler = before[signal.Signals(number)]
        if asked and number == signal.SIGINT and not patient and callable(handler):
            handler(number, frame)
        asked.append(number)

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
