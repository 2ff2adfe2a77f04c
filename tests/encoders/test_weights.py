"""Weights from anywhere: pickles, header bombs and misfits are named and refused, without reading what they hold."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from isimed_index.encoders.weights import (
    LARGEST_HEADER,
    Form,
    check_fit,
    forms_of,
    looks_pickled,
    read_forms,
    read_weights,
)
from isimed_index.errors import EncoderMismatch, StoreDamaged

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.steps": torch.tensor(4)}


def test_forms_are_read_without_the_numbers(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    expected = {"a.weight": Form((2, 3), True), "a.steps": Form((), False)}
    assert read_forms(tmp_path / "w.safetensors") == forms_of(STATE) == expected
    check_fit(expected, read_forms(tmp_path / "w.safetensors"), "encoder x", "f")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_numbers_of_any_width_fit(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"w": torch.ones(3, dtype=dtype)}, tmp_path / "w.safetensors")
    assert read_forms(tmp_path / "w.safetensors") == {"w": Form((3,), True)}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"a.weight": torch.ones(2, 3)}, "a.steps is missing"),
        ({**STATE, "b": torch.ones(1)}, "b is not of it"),
        ({**STATE, "a.weight": torch.ones(3, 2)}, r"a.weight: expected \(2, 3\).*found \(3, 2\)"),
        ({**STATE, "a.weight": torch.ones(2, 3, dtype=torch.int32)}, "of whole numbers"),
    ],
)
def test_misfits_are_named(found: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(EncoderMismatch, match=says) as refused:
        check_fit(forms_of(STATE), forms_of(found), "encoder x", "their.nets:build")
    assert "their.nets:build" in str(refused.value)
    assert refused.value.next_step


def test_of_many_misfits_a_few_are_named() -> None:
    many = {f"layer{n}": torch.ones(1) for n in range(40)}
    with pytest.raises(EncoderMismatch, match="38 more") as refused:
        check_fit(forms_of(many), {}, "encoder x", "f")
    assert len(str(refused.value)) < 200


class Bomb:
    """Unpickling one makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("how", ["torch", "old torch", "pickle"])
def test_a_pickle_is_refused_and_not_opened(tmp_path: Path, how: str) -> None:
    file, fired = tmp_path / "weights.safetensors", tmp_path / "fired"
    if how == "pickle":
        file.write_bytes(pickle.dumps(Bomb(fired)))
    else:
        torch.save({"a": Bomb(fired)}, file, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(EncoderMismatch, match="pickle") as refused:
        read_forms(file)
    assert "safetensors" in refused.value.next_step
    assert not fired.exists()


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_a_header_whose_length_begins_like_a_pickle_is_none(tmp_path: Path, length: int) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    data = struct.pack("<Q", length) + header + b"\0\0\0\0"
    assert looks_pickled(data)
    (tmp_path / "w.safetensors").write_bytes(data)
    assert read_forms(tmp_path / "w.safetensors") == {"w": Form((1,), True)}


def bombs(kind: str) -> bytes:
    if kind == "a long header":
        header = b'{"__metadata__":{"a":"' + b"x" * LARGEST_HEADER + b'"}}'
        return struct.pack("<Q", len(header)) + header
    if kind == "a header longer than the file":
        return struct.pack("<Q", 2**60) + b"{}"
    if kind == "a deep header":
        header = b'{"a":' * 100_000
        return struct.pack("<Q", len(header)) + header
    shapes = {
        "a tensor of 2^62": [2**62],
        "a tensor that overflows": [2**40, 2**40],
        "numbers that are not there": [99],
    }
    header = json.dumps({"w": {"dtype": "F32", "shape": shapes[kind], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0\0\0\0"


@pytest.mark.parametrize(
    "kind",
    [
        "a long header",
        "a header longer than the file",
        "a deep header",
        "a tensor of 2^62",
        "a tensor that overflows",
        "numbers that are not there",
    ],
)
def test_header_bombs_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(bombs(kind))
    with pytest.raises((EncoderMismatch, StoreDamaged), match=r"w\.safetensors"):
        read_forms(tmp_path / "w.safetensors")


@settings(max_examples=60)
@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_typed_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(data)
    with pytest.raises((EncoderMismatch, StoreDamaged)):
        read_forms(file)


def test_numbers_are_those_of_the_hash(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file(STATE, file)
    state = read_weights(file, hashlib.sha256(file.read_bytes()).hexdigest(), "encoder x")
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())
    with pytest.raises(EncoderMismatch, match="do not match the hash"):
        read_weights(file, "0" * 64, "encoder x")
    file.unlink()
    with pytest.raises(StoreDamaged):
        read_weights(file, "0" * 64, "encoder x")
