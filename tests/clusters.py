"""A Dask scheduler and workers as processes of their own, all on one network or each worker behind another one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE_S = 120.0
_NEAR, _FAR = "10.213.77.1", "10.213.77.2"


def wait_for(done: Callable[[], object]) -> None:
    """Look until it is so; a test that waits in vain fails here."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)  # looking takes processor time from what is waited for


def _end(network: str) -> str:
    """The name of the cable's end in a network."""
    return f"v{network}"[:15]


@contextmanager
def two_networks() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces that are joined by one cable; `OSError` where that is not allowed."""
    names = (f"near{os.getpid()}", f"far{os.getpid()}")

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise PermissionError(done.stderr.strip())

    try:
        for name in names:
            ip("netns", "add", name)
        ends = [_end(name) for name in names]
        ip("-n", names[0], "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, (_NEAR, _FAR), strict=True):
            ip("-n", name, "address", "add", f"{address}/30", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            with suppress(OSError):
                ip("netns", "del", name)


@dataclass
class Processes:
    """What was started, and is ended with the test."""

    folder: Path
    near: str | None = None  # network namespaces; None: the machine's own
    far: str | None = None
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, *command: str, network: str | None = None, **variables: str) -> subprocess.Popen[str]:
        """A module of Python in a process group of its own."""
        inside = [] if network is None else ["ip", "netns", "exec", network]
        process = subprocess.Popen(
            [*inside, sys.executable, "-m", *command],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
            cwd=self.folder,
            stdout=subprocess.PIPE if command[0] == "isimed_cli.main" else subprocess.DEVNULL,
            stderr=subprocess.PIPE if command[0] == "isimed_cli.main" else subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def scheduler(self) -> tuple[subprocess.Popen[str], str]:
        """A scheduler, and its address."""
        told = self.folder / "scheduler.json"
        told.unlink(missing_ok=True)
        host = _NEAR if self.near else "127.0.0.1"
        options = ("--host", host, "--port", "0", "--no-dashboard", "--scheduler-file", str(told))
        process = self.run("distributed.cli.dask_scheduler", *options, network=self.near)
        wait_for(lambda: told.exists() and "address" in told.read_text())
        return process, str(json.loads(told.read_text())["address"])

    def worker(
        self, address: str, preload: str, *options: str, far: bool = False, **variables: str
    ) -> subprocess.Popen[str]:
        """A worker of two threads that runs `preload` first."""
        script = self.folder / f"preload_{len(self.started)}.py"
        script.write_text(preload)
        own = ("--nthreads", "2", "--no-dashboard", "--preload", str(script), "--local-directory", str(self.folder))
        network = self.far if far else self.near
        return self.run("distributed.cli.dask_worker", address, *own, *options, network=network, **variables)

    def cut(self) -> None:
        """Take the cable between the two networks away: no end hears of it."""
        assert self.far is not None
        subprocess.run(["ip", "-n", self.far, "link", "set", _end(self.far), "down"], check=True)

    def isimed(self, *arguments: str) -> subprocess.Popen[str]:
        """The command line."""
        return self.run("isimed_cli.main", *arguments, network=self.near)

    def end(self) -> None:
        """Kill all of it, and what it started."""
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.started:
            process.communicate()


@contextmanager
def processes(folder: Path, networks: Sequence[str] = ()) -> Iterator[Processes]:
    """Processes that are gone afterwards."""
    folder.mkdir()
    ours = Processes(folder, *networks)
    try:
        yield ours
    finally:
        ours.end()
