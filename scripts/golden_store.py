"""Write the golden store of this format version to tests/data/golden-<version>: it must stay readable for ever.

Run it once when the format gets a new version, commit what it wrote, and never write over what is committed.

python scripts/golden_store.py
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "store")]

from cohorts import COPIES, add_random_encoder, head, write_copy  # noqa: E402
from test_golden import FOLDER, answers  # noqa: E402

from isimed_index.api import create  # noqa: E402


def main() -> int:
    """Build a small store with everything that the format knows, and write down the answers that it gives."""
    if FOLDER.exists():
        print(f"{FOLDER.name} is there already, and what is golden is not written again", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        images, path = Path(folder) / "images", Path(folder) / "cohort.isimed"
        for copy in COPIES[:3]:
            write_copy(images, copy, head())
        metadata, names = images / "participants.tsv", images / "names.csv"
        metadata.write_text("participant_id\tage\tsite\nsub-01\t34\ta\nsub-02\t41.5\tb\n")
        names.write_text("label,name\n3,brain\n4,white matter\n")
        with create(path) as store:
            store.add(images, labels="{stem}_seg.nii.gz", label_names=names, metadata=metadata)
            add_random_encoder(path)
            store.index()
            store.delete("foreground < 0.2", "patches")
            store.compact()  # packed segments, without the dead rows
            store.tag("packed")
            store.delete("patch % 11 = 0", "patches")  # tombstones on packed segments
            store.delete("scan = 'sub-01_ses-2_T1w'")  # a packed segment without one of its parts
            store.gc(keep=1)
            found = answers(store)
        FOLDER.mkdir(parents=True)
        shutil.copytree(path, FOLDER / path.name, ignore=shutil.ignore_patterns("*.lock"))
    (FOLDER / "answers.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
