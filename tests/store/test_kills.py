"""Four processes change one store at once and are killed at random moments; what they were promised holds.

`ISIMED_KILLS=500 pytest tests/store/test_kills.py` kills more often than the default; `ISIMED_SEED` repeats a run.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from store_builders import start

KILLS = int(os.environ.get("ISIMED_KILLS", "100"))
ROUND = 100  # kills between two verifications


def test_nothing_acknowledged_is_lost_and_nothing_deleted_comes_back(tmp_path: Path) -> None:
    seed = os.environ.get("ISIMED_SEED") or str(secrets.randbits(32))
    process = start("from store_kills import main; main()", str(tmp_path), str(KILLS), str(ROUND), seed)
    output, errors = process.communicate(timeout=280 + KILLS)
    print(f"seed {seed}, {KILLS} kills\n{output}")
    assert process.returncode == 0, f"seed {seed}: {errors}"
    found = [json.loads(line) for line in output.splitlines()]
    assert len(found) == -(-KILLS // ROUND)
    assert found[-1]["commits"] > KILLS // 2
