"""Encoder cards: the id is the hash of what changes an embedding, and a card on disk is checked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isimed_index.contracts import validate
from isimed_index.encoders.card import CARD, EncoderCard, read_card
from isimed_index.errors import EncoderMismatch, StoreDamaged
from isimed_index.scans.prepare import Intensity

MADE = EncoderCard(
    name="first",
    factory="isimed_index.encoders.networks:ValidNet",
    network={"width": 2},
    weights_sha256="ab" * 32,
    patch_vox=32,
    stride_vox=4,
    spacing_mm=2.0,
    outputs={"embedding": 4, "position": 3, "descriptor": 8},
    match_output="descriptor",
    metric="cosine",
    training={"seed": 3, "augmentation": {"noise": 0.1}},
)

CHANGES: dict[str, Any] = {
    "factory": "other:Net",
    "network": {"width": 3},
    "weights_sha256": "cd" * 32,
    "patch_vox": 16,
    "stride_vox": 8,
    "spacing_mm": 2.5,
    "outputs": {"embedding": 4, "position": 3, "descriptor": 9},
    "match_output": "embedding",
    "metric": "l2",
    "intensity": Intensity(clip=2.0),
    "model_sha256": "ef" * 32,
    "axes": "LPS",
    "pool": "centre",
}


def test_the_id_depends_on_all_that_changes_an_embedding_and_on_nothing_else() -> None:
    ids = [replace(MADE, **{field: value}).id for field, value in CHANGES.items()]
    assert len({MADE.id, *ids}) == len(CHANGES) + 1
    assert replace(MADE, name="second", training={}).id == MADE.id
    assert replace(MADE, outputs=dict(reversed(MADE.outputs.items()))).id == MADE.id


@pytest.mark.parametrize("card", [MADE, *(replace(MADE, **{field: value}) for field, value in CHANGES.items())])
def test_round_trip_through_json(card: EncoderCard) -> None:
    fields = json.loads(json.dumps(card.to_json()))
    validate("card", fields)
    assert EncoderCard.from_json(fields) == card


def test_ids_of_earlier_cards_stay() -> None:
    """What the version before `model_sha256`, `axes` and `pool` gave this card."""
    assert MADE.id == "27b259f26524604a"
    assert MADE.to_json().keys() == {
        *("id", "name", "factory", "network", "weights_sha256", "patch_vox", "stride_vox", "spacing_mm"),
        *("outputs", "match_output", "metric", "intensity", "training"),
    }


def test_arguments_of_a_network_may_be_of_any_kind() -> None:
    card = replace(MADE, network={"layers": [2, 2], "norm": "batch", "scale": 0.5, "bias": False, "head": None})
    assert EncoderCard.from_json(json.loads(json.dumps(card.to_json()))) == card


@pytest.mark.parametrize("axes", ["RA", "RRS", "RLS", "XYZ", "ras", "RASA", ""])
def test_axes_are_one_letter_of_each_pair(axes: str) -> None:
    with pytest.raises(EncoderMismatch):
        EncoderCard.from_json(MADE.to_json() | {"axes": axes})
    with pytest.raises(EncoderMismatch, match="expected axes"):
        replace(MADE, axes=axes)


def test_a_pool_is_one_that_is_known() -> None:
    with pytest.raises(EncoderMismatch, match="pool"):
        EncoderCard.from_json(MADE.to_json() | {"pool": "max"})
    with pytest.raises(EncoderMismatch, match="mean, centre"):
        replace(MADE, pool="max")  # type: ignore[arg-type]


def test_a_card_without_weights() -> None:
    card = replace(MADE, weights_sha256=None)
    validate("card", card.to_json())
    assert EncoderCard.from_json(card.to_json()) == card


def test_a_window_is_part_of_a_card_and_of_its_id() -> None:
    windowed = replace(MADE, intensity=Intensity(window_low=-1000.0, window_high=1000.0))
    assert windowed.id != MADE.id
    assert EncoderCard.from_json(windowed.to_json()) == windowed
    assert "window_low" not in MADE.to_json()["intensity"]  # the ids of earlier cards stay


def test_a_card_without_a_clip_says_so() -> None:
    """A card without the field is an earlier one, whose values are cut off; 0 is not left out."""
    whole = replace(MADE, intensity=Intensity(clip=0.0))
    assert whole.to_json()["intensity"]["clip"] == 0
    assert EncoderCard.from_json(json.loads(json.dumps(whole.to_json()))).intensity.clip == 0
    assert whole.id != MADE.id


def test_a_position_is_in_millimetres() -> None:
    assert MADE.to_json()["outputs"]["position"] == {"dim": 3, "unit": "mm"}
    assert MADE.dim == 8


@pytest.mark.parametrize("field", ["spacing_mm", "metric", "weights_sha256", "outputs", "intensity"])
def test_a_tampered_card_is_refused(field: str) -> None:
    fields = MADE.to_json() | {field: replace(MADE, **{field: CHANGES[field]}).to_json()[field]}
    with pytest.raises(EncoderMismatch, match="hashes to"):
        EncoderCard.from_json(fields)


@pytest.mark.parametrize("field", sorted(set(MADE.to_json()) - {"id", "name"}))
def test_a_card_that_lacks_a_field_is_refused(field: str) -> None:
    fields = MADE.to_json()
    del fields[field]
    with pytest.raises(EncoderMismatch):
        EncoderCard.from_json(fields)


@pytest.mark.parametrize(
    "intensity", [{"gamma": 1.0}, {"low_percentile": 80.0, "high_percentile": 20.0}, {"clip": "high"}], ids=str
)
def test_a_card_with_an_impossible_intensity_is_refused(intensity: dict[str, Any]) -> None:
    with pytest.raises(EncoderMismatch):
        EncoderCard.from_json(MADE.to_json() | {"intensity": intensity})


def test_matches_are_searched_in_an_output_that_exists() -> None:
    with pytest.raises(EncoderMismatch, match="match_output"):
        replace(MADE, match_output="position_")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"a":' * 99_999, b'{"a": NaN}', None],
    ids=["empty", "cut", "bytes", "deep", "a NaN", "missing"],
)
def test_an_unreadable_card_is_damage(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / CARD).write_bytes(content)
    with pytest.raises(StoreDamaged, match=CARD):
        read_card(tmp_path)


@pytest.mark.parametrize("content", ["[1]", "3", "null", "{}"])
def test_json_that_is_no_card_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / CARD).write_text(content)
    with pytest.raises(EncoderMismatch):
        read_card(tmp_path)
