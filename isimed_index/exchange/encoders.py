"""Encoders as goods: a folder that travels alone, and what comes from elsewhere looked at before it is stored.

store ─▶ export_encoder ─▶ card.json + weights.safetensors | model.onnx
                                    │
a card of one's own + weights  ─────┴─▶ import_encoder ─▶ no pickle · id = hash · hash of the weights · they fit
                                        the network · it encodes two patches of noise ─▶ one commit, or nothing
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from isimed_index.encoders.card import (
    CARD,
    LONGEST_NAME,
    MODEL,
    WEIGHTS,
    EncoderCard,
    is_name,
    parse_fields,
    refuse_odd_position,
    refuse_unknown_fields,
)
from isimed_index.encoders.protocol import halved
from isimed_index.errors import EncoderMismatch, NotFound, StoreDamaged, UsageError
from isimed_index.exchange.folder import becoming
from isimed_index.scans.prepare import Intensity
from isimed_index.store.files import file_digest
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib")
_SAFETENSORS = "load it where it was made, and save its state_dict by safetensors.torch.save_file"
_LARGEST_PATCH = 256  # voxels an edge; one such patch has 64 MiB
_LARGEST_CARD = 1 << 20  # bytes
_SAME = 1e-3  # of the largest number in a vector: what rounding may change with the batch
_AGAIN = "copy the folder again, or export it again"


@dataclass(frozen=True, slots=True)
class KeptEncoder:
    """What an import did: the encoder's id, its name in the store, and whether it is new there."""

    id: str
    name: str
    added: bool
    generation: int


def export_encoder(snapshot: Snapshot, encoder: str | None, out: Path) -> EncoderCard:
    """Write an encoder (id, beginning of one, or name; None: the newest) into a new folder; returns its card.

    `StoreDamaged` when it is not as it was stored, `UsageError` when `out` is occupied or there is nothing to run.
    """
    directory = snapshot.encoder_path(encoder)
    card = _card_of(directory / CARD)
    names = [name for name in (WEIGHTS, MODEL) if (directory / name).is_file()]
    if not names:
        raise UsageError(
            f"encoder {card.name!r} is known by its embeddings only: there is nothing that could encode elsewhere",
            next_step="isimed export --parquet DIR exports its embeddings",
        )
    with becoming(out) as folder:
        folder.mkdir()
        for name in (CARD, *names):
            shutil.copyfile(directory / name, folder / name)
    return card


def import_encoder(
    repository: Repository,
    source: Path,
    card_file: Path | None = None,
    name: str | None = None,
    trust: Sequence[str] = (),
) -> KeptEncoder:
    """Store an encoder under its id; one that the store has already is left as it is.

    Args:
        source: a folder that `export_encoder` wrote; or with `card_file`, weights (.safetensors) or a graph (.onnx).
        card_file: a card that somebody wrote; id and hash are filled in where it lacks them.
        name: in the store, in place of the card's.
        trust: code outside of this library that the encoder may run, as `trust.trusted` gives it.

    Errors: `EncoderMismatch` for pickles, for a card whose id or hash is not that of its content, for weights that do
    not fit the network, and for an encoder that cannot encode; `EncoderNotTrusted` for one whose code is not trusted.
    Nothing is stored then.
    """
    card, file = _in_folder(source) if card_file is None else _described(card_file, source)
    if name is not None:
        if not is_name(name):
            raise UsageError(
                f"expected a name of 1 to {LONGEST_NAME} printable characters", next_step="give another --name"
            )
        card = replace(card, name=name)
    elif not is_name(card.name):
        raise EncoderMismatch(
            f"expected a card with a name of 1 to {LONGEST_NAME} printable characters", next_step="give a --name"
        )
    refuse_odd_position(card)
    _try_out(card, file, trust)
    with repository.transaction("import") as transaction:
        directory = transaction.stage("encoder")
        shutil.copyfile(file, directory / (WEIGHTS if card.model_sha256 is None else MODEL))
        text = json.dumps(card.to_json(), indent=1, sort_keys=True) + "\n"
        (directory / CARD).write_text(text, encoding="utf-8")
        artefact = transaction.add("encoder", directory, encoder=card.id)  # hashes the copy against the card
        known: list[str] = []

        def propose(head: Snapshot) -> Proposal:
            there = [kept for kept in head.artefacts("encoder") if kept.fields["encoder"] == card.id]
            known[:] = [str(head.card(kept)["name"]) for kept in there]
            return Proposal(add=[] if there else [artefact])

        now = transaction.commit(propose)
    return KeptEncoder(card.id, known[-1] if known else card.name, not known, now.generation)


def _in_folder(folder: Path) -> tuple[EncoderCard, Path]:
    """The card of a folder, and the file that belongs to it."""
    if not folder.is_dir():
        _refuse_pickle(folder)
        raise UsageError(
            f"expected a folder with {CARD}, found the file {folder.name}",
            next_step="isimed encoders import FILE --card FILE for weights with a card of your own",
        )
    for file in sorted(folder.iterdir()):
        _refuse_pickle(file)
    if not (folder / CARD).is_file():
        raise EncoderMismatch(f"{folder.name} holds no {CARD}, so it is no encoder", next_step=_AGAIN)
    fields = _fields(folder / CARD)
    refuse_unknown_fields(fields, CARD, "use the version of isimed-index that exported it, or a newer one")
    card = _checked(fields)
    file = folder / (WEIGHTS if card.model_sha256 is None else MODEL)
    if card.weights_sha256 is None and card.model_sha256 is None:
        raise EncoderMismatch(
            f"encoder {card.name!r} is known by its embeddings only and has no weights to import",
            next_step="isimed import its embeddings",
        )
    if file.exists() and not file.is_file():
        raise EncoderMismatch(f"{file.name} in {folder.name} is no plain file", next_step=_AGAIN)
    return card, file


def _described(card_file: Path, file: Path) -> tuple[EncoderCard, Path]:
    """A card that somebody wrote, with the hash of the file that goes with it."""
    _refuse_pickle(file)
    if file.is_dir():
        raise UsageError(
            f"expected a file .safetensors or .onnx beside the card, found the folder {file.name}",
            next_step="leave out --card: the folder has its own" if holds_encoder(file) else "name one of its files",
        )
    if not file.is_file() or file.suffix not in (".safetensors", ".onnx"):
        raise UsageError(
            f"expected a file .safetensors or .onnx beside the card, found {file.name}", next_step=_SAFETENSORS
        )
    fields = _fields(card_file)
    refuse_unknown_fields(fields, card_file.name, "correct the card: docs/how-to/encoders.md lists its fields")
    sha256 = file_digest(file)[1]
    hashes = {"weights_sha256": sha256} if file.suffix == ".safetensors" else {"model_sha256": sha256}
    for key in ("weights_sha256", "model_sha256"):
        if fields.get(key) is not None and fields[key] != hashes.get(key):
            raise EncoderMismatch(
                f"{card_file.name} has another {key} than {file.name}", next_step=f"leave {key} out of the card"
            )
    if file.suffix == ".onnx":
        from isimed_index.encoders.onnx_model import FACTORY

        fields.setdefault("factory", FACTORY)
    own = {"weights_sha256": None, "network": {}, "training": {}, "intensity": Intensity().fields()}
    try:
        card = EncoderCard.described({**own, **fields, **hashes})
    except EncoderMismatch as error:
        raise EncoderMismatch(f"{card_file.name}: {error.message}", next_step="correct the card") from None
    if fields.get("id", card.id) != card.id:
        raise EncoderMismatch(
            f"{card_file.name} says id {fields['id']}, its content hashes to {card.id}",
            next_step="leave the id out of the card",
        )
    return card, file


def _card_of(file: Path) -> EncoderCard:
    return _checked(_fields(file))


def _checked(fields: Mapping[str, Any]) -> EncoderCard:
    try:
        return EncoderCard.from_json(fields)
    except EncoderMismatch as error:
        raise EncoderMismatch(error.message, next_step=error.next_step or _AGAIN) from error


def _fields(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _LARGEST_CARD:
            raise ValueError
        fields = parse_fields(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {file.name}", next_step="isimed encoders import --help") from None
    except (OSError, ValueError):
        fields = None
    if not isinstance(fields, Mapping):
        raise EncoderMismatch(
            f"{file.name} is no encoder card: expected a JSON object with finite numbers", next_step=_AGAIN
        )
    return dict(fields)


def _refuse_pickle(file: Path) -> None:
    """Raise `EncoderMismatch` for what is called like a pickle, or is one."""
    from isimed_index.encoders.weights import looks_pickled

    head = b""
    if file.is_file():
        with file.open("rb") as stream:
            head = stream.read(9)
    if file.suffix.lower() in _PICKLES or (looks_pickled(head) and head[8:] != b"{"):
        raise EncoderMismatch(
            f"{file.name} is a pickle, or is called like one: a pickle can run code when it is loaded",
            next_step=_SAFETENSORS,
        )


def _try_out(card: EncoderCard, file: Path, trust: Sequence[str]) -> None:
    """Load the encoder and encode two patches of noise, together and alone."""
    from isimed_index.encoders.runtime import open_encoder

    edge, scale = card.patch_vox, card.intensity
    if edge > _LARGEST_PATCH:
        raise EncoderMismatch(
            f"expected patches of at most {_LARGEST_PATCH} voxels an edge, found {edge}", next_step="correct patch_vox"
        )
    try:
        encoder = open_encoder(card, file, "cpu", trust)
    except StoreDamaged as error:
        raise EncoderMismatch(error.message, next_step=_AGAIN) from error
    noise = np.random.default_rng(0).uniform(scale.low, scale.high, (2, edge, edge, edge)).astype(np.float32)
    together, alone = encoder.encode(noise), encoder.encode(noise[1:])
    for output, vectors in together.items():
        if not np.isfinite(vectors).all():
            raise EncoderMismatch(f"output {output!r} of {card.name!r} is NaN or infinite", next_step=_AGAIN)
        if output != "position":
            halved(output, vectors)
        if np.abs(vectors[1:] - alone[output]).max() > _SAME * np.abs(vectors).max():
            raise EncoderMismatch(
                f"output {output!r} of {card.name!r}: a patch has another vector when another patch is beside it",
                next_step="have the factory build a module without randomness and statistics over a batch",
            )


def holds_encoder(folder: Path) -> bool:
    """Whether a folder looks like an exported encoder."""
    return (folder / CARD).is_file()


def known_encoder(snapshot: Snapshot, encoder: str) -> bool:
    """Whether the store has an encoder of that id, beginning of one, or name."""
    try:
        snapshot.encoder_artefact(encoder)
    except NotFound:
        return False
    return True
