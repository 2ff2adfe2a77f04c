"""Weights from anywhere, looked at before they are believed: safetensors alone, and only such as fit their network.

    first bytes ─▶ names and shapes (the header) ─▶ compared with the network ─▶ bytes ─▶ sha256 ─▶ tensors

A pickle runs code when it is loaded, so it is refused by its look, whatever it is called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors

from isimed_index.errors import EncoderMismatch, StoreDamaged

LARGEST_HEADER = 16 << 20  # bytes; that of a network with 700 tensors has 70 kB
_SAFETENSORS = "export the weights as safetensors: safetensors.torch.save_file(module.state_dict(), FILE)"
_RESTORE = "copy the folder of the encoder again, restore the store from a backup, or train again"
_FEW = 2  # tensors that a message names


@dataclass(frozen=True, slots=True)
class Form:
    """What a tensor looks like without its numbers."""

    shape: tuple[int, ...]
    floating: bool

    def __str__(self) -> str:
        return f"{self.shape} of {'floating' if self.floating else 'whole'} numbers"


def forms_of(state: Mapping[str, torch.Tensor]) -> dict[str, Form]:
    """What the tensors of a network's state look like."""
    return {name: Form(tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in state.items()}


def looks_pickled(head: bytes) -> bool:
    """Whether a file that begins like this is a pickle, or a zip file, as torch.save puts one into."""
    return head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05" and len(head) > 1)


def read_forms(file: Path) -> dict[str, Form]:
    """Names, shapes and kinds of the tensors in a safetensors file; their numbers are not read.

    `EncoderMismatch` for a pickle and for a header of more than 16 MiB, `StoreDamaged` when the file is missing or cut.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
        length = int.from_bytes(head[:8], "little")
        # A header of 640 bytes begins like a pickle too, but goes on with a brace where one cannot.
        if looks_pickled(head) and head[8:] != b"{":
            raise EncoderMismatch(
                f"{file.name} is a pickle, which can run code when it is loaded", next_step=_SAFETENSORS
            )
        if length > LARGEST_HEADER and length <= file.stat().st_size - 8:
            raise EncoderMismatch(
                f"{file.name}: expected a header of at most {LARGEST_HEADER >> 20} MiB, found {length >> 20} MiB",
                next_step=_SAFETENSORS,
            )
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 — it is no mapping
            return {
                name: Form(tuple(part.get_shape()), part.get_dtype().startswith(("F", "BF")))
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise StoreDamaged(f"the weights {file.name} are missing or cut off", next_step=_RESTORE) from error


def check_fit(expected: Mapping[str, Form], found: Mapping[str, Form], whose: str, factory: str) -> None:
    """Raise `EncoderMismatch`, naming tensors, unless the weights are those of the network."""
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{name} is not of it" for name in sorted(found.keys() - expected.keys())]
    wrong += [
        f"{name}: expected {form}, found {found[name]}"
        for name, form in expected.items()
        if name in found and found[name] != form
    ]
    if wrong:
        more = f"; {len(wrong) - _FEW} more" if len(wrong) > _FEW else ""
        raise EncoderMismatch(
            f"the weights of {whose} do not fit its network {factory}: {'; '.join(wrong[:_FEW])}{more}",
            next_step="give the weights that belong to this card, and the version of the code that made them",
        )


def read_weights(file: Path, sha256: str, whose: str) -> dict[str, torch.Tensor]:
    """The tensors of a file whose header was read; `EncoderMismatch` when its hash is another one."""
    try:
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise EncoderMismatch(f"the weights of {whose} do not match the hash on its card", next_step=_RESTORE)
        state: dict[str, torch.Tensor] = load_tensors(data)
    except (OSError, SafetensorError) as error:
        raise StoreDamaged(f"the weights {file.name} of {whose} are missing or cut off", next_step=_RESTORE) from error
    return state
