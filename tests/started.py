"""`isimed` in a process of its own, forked from a server that has loaded the libraries: torch alone takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["isimed_cli.main", "isimed_index.training", "isimed_index.indexing", "torch._dynamo", "safetensors.torch"]
)


class Started:
    """A command that runs; the part of `subprocess.Popen[str]` that tests use."""

    def __init__(self, *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._said = [Path(self._folder.name) / name for name in ("output", "errors")]
        self._process = _CONTEXT.Process(target=_isimed, args=(arguments, self._said), daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """How it ended, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing is sent to a process that has ended."""
        if self.returncode is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it as a power cut would."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it printed, and its errors, when it has ended."""
        self._process.join(timeout)
        assert self.returncode is not None, f"it still runs after {timeout:g} s"
        output, errors = (path.read_text() if path.exists() else "" for path in self._said)
        self._folder.cleanup()
        return output, errors


def _isimed(arguments: tuple[str, ...], said: list[Path]) -> None:
    for descriptor, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    sys.argv = ["isimed", *arguments]
    runpy.run_module("isimed_cli.main", run_name="__main__")
