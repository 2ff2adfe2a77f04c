"""What other programs hand over: an encoder card, and vectors beside the rows that they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.card import EncoderCard, refuse_odd_position, refuse_unknown_fields
from isimed_index.errors import EncoderMismatch, UsageError
from isimed_index.exchange.columns import vectors_of
from isimed_index.scans.prepare import Intensity
from isimed_index.store.segment import PATCHES

if TYPE_CHECKING:
    import pyarrow as pa

FACTORY = "foreign"  # of a card whose encoder is not here: it cannot encode
_TABLES = (PATCHES, "patches.csv", "patches.tsv")  # beside arrays
_TEXT = (
    "scan",
    "subject",
    "session",
    "modality",
    "split",
    "digest",
)  # columns that are no numbers whatever they look like
_MEND = "mend the vectors, or the card"
_ID = "leave the id out of the card"


@dataclass(frozen=True, slots=True)
class Foreign:
    """Embeddings as they were given: one row a patch."""

    rows: pa.Table  # scan, and x_mm, y_mm, z_mm or i, j, k
    outputs: Mapping[str, NDArray[np.floating[Any]]]  # (n, d) by the names on the card


def foreign_card(file: Path) -> EncoderCard:
    """The card of an encoder that is not here, from a JSON file.

    It needs `name`, `patch_vox`, `stride_vox`, `spacing_mm`, `outputs`, `match_output` and `metric`; `factory` is
    `foreign`, `weights_sha256` null, and `id`, when it is given, the one that follows from the rest.
    """
    try:
        fields = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UsageError(f"{file.name} is not a JSON object", next_step="give an encoder card") from None
    refuse_unknown_fields(fields, file.name, "correct the card, or leave the field out")
    if fields.get("factory", FACTORY) != FACTORY or fields.get("weights_sha256") is not None:
        raise EncoderMismatch(
            f"{file.name}: expected factory {FACTORY!r} and no weights, found an encoder that runs here",
            next_step="import the folder that was exported with it, or make a card of its own",
        )
    own = {"factory": FACTORY, "weights_sha256": None, "network": {}, "training": {}, "intensity": Intensity().fields()}
    try:
        card = EncoderCard.described({**own, **fields})
    except EncoderMismatch as error:
        raise EncoderMismatch(f"{file.name}: {error.message}", next_step="complete the card") from None
    if fields.get("id", card.id) != card.id:
        raise EncoderMismatch(f"{file.name} says id {fields['id']}, its content hashes to {card.id}", next_step=_ID)
    refuse_odd_position(card)
    return card


def read_foreign(source: Path, card: EncoderCard) -> Foreign:
    """Read the embeddings; `EncoderMismatch` unless they are finite and have the outputs and dimensions of the card."""
    if source.is_dir():
        rows = read_table(next((source / name for name in _TABLES if (source / name).is_file()), source / PATCHES))
        outputs = {name: _array(source / f"{name}.npy") for name in card.outputs}
    else:
        rows = read_table(source)
        missing = sorted(set(card.outputs) - set(rows.column_names))
        if missing:
            raise EncoderMismatch(
                f"{source.name} lacks the column {missing[0]!r}, an output on the card", next_step=_MEND
            )
        outputs = {name: vectors_of(rows[name], name) for name in card.outputs}
    for name, vectors in outputs.items():
        if vectors.ndim != 2 or vectors.shape != (rows.num_rows, card.outputs[name]):
            raise EncoderMismatch(
                f"output {name}: expected {rows.num_rows} vectors of {card.outputs[name]} numbers as on the card, "
                f"found shape {vectors.shape}",
                next_step=_MEND,
            )
        bad = int((~np.isfinite(vectors).all(axis=1)).sum())
        if bad:
            raise EncoderMismatch(
                f"output {name}: {bad} of {len(vectors)} vectors hold NaN or infinite values",
                next_step="leave them out",
            )
    return Foreign(rows, {name: _stored_type(name, vectors) for name, vectors in outputs.items()})


def _array(file: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise EncoderMismatch(f"there is no {file.name}, the array of an output on the card", next_step=_MEND) from None
    except (OSError, ValueError, EOFError):
        raise UsageError(
            f"{file.name} cannot be read as an array of numbers", next_step="write it by numpy.save"
        ) from None
    if array.dtype.kind != "f":
        raise EncoderMismatch(f"{file.name}: expected floating numbers, found {array.dtype}", next_step=_MEND)
    return array


def _stored_type(name: str, vectors: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    if vectors.dtype in (np.float16, np.float32):
        return vectors
    with np.errstate(over="ignore"):
        single = vectors.astype(np.float32)
    if not np.isfinite(single).all():
        raise EncoderMismatch(f"output {name} holds numbers beyond those of float32", next_step=_MEND)
    return single


def read_table(file: Path) -> pa.Table:
    """A Parquet, CSV or TSV file; ids stay text. `UsageError` when it cannot be read."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            return pq.read_table(file, partitioning=None)
        return pyarrow.csv.read_csv(
            file,
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t" if file.suffix == ".tsv" else ","),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(_TEXT, pa.string())),
        )
    except FileNotFoundError:
        raise UsageError(f"there is no file {file.name}", next_step="isimed import --help") from None
    except (OSError, pa.ArrowException):
        raise UsageError(f"{file.name} cannot be read as a table", next_step="give .parquet, .csv or .tsv") from None
