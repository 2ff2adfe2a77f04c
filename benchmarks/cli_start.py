"""How long `isimed --help` takes to start, beside the interpreter alone: must stay under 0.3 s.

Run from the repository: python benchmarks/cli_start.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

ROUNDS = 15
LIMIT_S = 0.3
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "isimed --help": ["-m", "isimed_cli.main", "--help"],
    "isimed query --help": ["-m", "isimed_cli.main", "query", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one fresh interpreter."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> int:
    """Print medians, and ratios to the bare interpreter, as JSON; 1 when the limit is passed."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):  # interleaved, so that other load falls on all alike
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    medians = {name: statistics.median(values) for name, values in times.items()}
    bare = medians["python -c pass"]
    for name, median in medians.items():
        print(json.dumps({"command": name, "median_s": round(median, 4), "ratio": round(median / bare, 1)}))
    return int(medians["isimed --help"] > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
