"""Answers that are kept: rows of the table `matches`, which SQL reads like any other."""

from __future__ import annotations

from isimed_index.contracts import arrow_schema, conform
from isimed_index.errors import NotFound, UsageError
from isimed_index.matches import Matches
from isimed_index.store.manifest import utc_now
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal

_LONGEST = 200  # characters of a name


def keep(repository: Repository, matches: Matches, question: str) -> int:
    """Commit the rows of an answer under the name `question`; how many they are.

    `UsageError` for an answer without rows, to a point of a file that is not stored, or under a name that is taken;
    `NotFound` when a scan of it has been deleted since, or the generation that answered is gone. Rows go with the
    scans that they name.
    """
    import pyarrow as pa

    if not 0 < len(question) <= _LONGEST or not question.isprintable():
        raise UsageError(f"expected a name of 1 to {_LONGEST} printable characters", next_step="for example lesion-1")
    if matches.source is None:
        raise UsageError(
            "the point was given in a file that is not in the store; an answer is kept for stored scans",
            next_step="isimed add the file, and ask with its scan id",
        )
    if not len(matches):
        raise UsageError("the answer has no rows to keep", next_step="ask for more")
    asked = matches.asked
    answers = matches.to_arrow()
    names = [field.name for field in arrow_schema("matches") if field.name in answers.column_names]
    said = {
        "question": question,
        **dict(zip(("from_scan", "from_x_mm", "from_y_mm", "from_z_mm"), (asked.scan, *asked.xyz_mm), strict=True)),
        "encoder": asked.encoder,
        "generation": asked.generation,
        "time": utc_now(),
    }
    rows = {name: pa.array([value] * len(answers)) for name, value in said.items()}
    rows |= {"rank": pa.array(range(1, len(answers) + 1)), **{name: answers[name] for name in names}}
    kept = conform("matches", pa.table(rows))

    named = {matches.source, *answers.column("scan").to_pylist()}
    then = repository.snapshot(asked.generation).voxels_of

    def propose(head: Snapshot) -> Proposal:
        if question in head.table("matches").column("question").to_pylist():
            raise UsageError(
                f"an answer is kept under the name {question!r} already",
                next_step=f"another name, or isimed delete \"question = '{question}'\" --from matches",
            )
        gone = sorted(scan for scan in named if head.voxels_of.get(scan) != then[scan])
        if gone:
            raise NotFound(f"scan {gone[0]!r} has been deleted since the question was asked", next_step="ask again")
        return Proposal(tables={"matches": kept})

    with repository.transaction("keep") as transaction:
        transaction.commit(propose)
    return len(answers)
