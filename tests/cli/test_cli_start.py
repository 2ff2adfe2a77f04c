"""Starting is light, and signals end a command cleanly; both seen from a fresh process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = "numpy scipy pandas nibabel zarr dask duckdb pyarrow faiss torch monai matplotlib sklearn umap nilearn"


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that sees the same packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["query", "--help"], ["--version"], ["query", "--point", "1,2"]])
def test_help_and_wrong_usage_load_no_heavy_package(arguments: list[str]):
    done = python(
        "import sys\n"
        "from isimed_cli.main import main\n"
        f"main({arguments!r})\n"
        f"print(sorted(set({HEAVY!r}.split()) & set(sys.modules)), file=sys.stderr)"
    )
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_with_130_and_one_line(number: signal.Signals):
    done = python(
        "import os, sys, isimed_index\n"
        "from isimed_cli.main import main\n"
        f"def opened(*_, **__): os.kill(os.getpid(), {int(number)})\n"
        "isimed_index.open = opened\n"
        "sys.exit(main(['info']))"
    )
    assert done.returncode == 130
    assert done.stderr.startswith("error[interrupted]: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_stop_says_what_was_stopped():
    done = python(
        "import os, signal, sys, isimed_index\n"
        "from types import SimpleNamespace\n"
        "from isimed_cli.main import main\n"
        "def stop(*_, **__): os.kill(os.getpid(), signal.SIGINT)\n"
        "isimed_index.open = lambda *_, **__: SimpleNamespace(pretrain=stop, info=stop)\n"
        "main(['info']), main(['pretrain']), main(['pretrain', '--resume'])"
    )
    info, begun, resumed = done.stderr.splitlines()
    assert info.startswith("error[interrupted]: info was stopped before its end; what was committed stays. Next: ")
    begins = "error[interrupted]: training stopped before its first step; "
    assert begun == f"{begins}nothing is saved yet. Next: run the same command again"
    assert resumed == f"{begins}its checkpoint is kept. Next: run the same command again"


def test_a_second_stop_while_the_process_ends_shows_no_traceback():
    done = python(
        "import atexit, os, signal, sys, isimed_index\n"
        "from isimed_cli.main import main\n"
        "def stop(*_, **__): os.kill(os.getpid(), signal.SIGINT)\n"
        "isimed_index.open = stop\n"
        "atexit.register(stop)\n"
        "sys.argv = ['isimed', 'info']\n"
        "sys.exit(main())"
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr.startswith("error[interrupted]: info was stopped")
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_pipe_is_silent(tmp_path: Path):
    script = tmp_path / "rows.py"
    script.write_text(
        "import sys, isimed_index\n"
        "from types import SimpleNamespace\n"
        "from isimed_cli.main import main\n"
        "rows = {'n': list(range(100_000))}\n"
        "table = SimpleNamespace(to_pydict=lambda: rows)\n"
        "isimed_index.open = lambda *_, **__: SimpleNamespace(log=lambda: table)\n"
        "sys.exit(main(['log', '--format', 'csv']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
