"""Networks of PyTorch from a card: ours, built from a fixed table, and those of other packages that are trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.networks import Network, build_network
from isimed_index.encoders.runtimes.exact import exact_float32
from isimed_index.encoders.runtimes.prepared import keep_few
from isimed_index.encoders.trust import said_by, trusted_factory
from isimed_index.encoders.weights import check_fit, forms_of, read_forms, read_weights
from isimed_index.errors import EncoderMismatch

_VERSION = "use the version of isimed-index that trained this encoder"


def our_network(card: EncoderCard, weights: Path) -> Network:
    """The network of this library that a card describes, with its weights.

    It is first built without memory and compared with the weights: numbers on a card of unknown origin may ask for a
    network of any size. `EncoderMismatch` when card, code and weights do not belong together.
    """
    with torch.device("meta"):
        described = _built(card)
    if described.patch != card.patch_vox:
        raise EncoderMismatch(
            f"the network {card.factory} takes patches of {described.patch} voxels, its card says {card.patch_vox}",
            next_step=_VERSION,
        )
    check_fit(forms_of(described.state_dict()), read_forms(weights), _whose(card), card.factory)
    state = read_weights(weights, str(card.weights_sha256), _whose(card))
    network = _built(card)
    network.load_state_dict(state)
    keep_few(network)
    return network


def _built(card: EncoderCard) -> Network:
    try:
        return build_network(card.factory, card.outputs, card.network)
    except EncoderMismatch as error:
        raise EncoderMismatch(error.message, next_step=error.next_step or _VERSION) from error
    except Exception as error:  # arguments of unknown origin may fail anywhere in a constructor
        raise EncoderMismatch(
            f"the network {card.factory} cannot be built with what its card says: {type(error).__name__}",
            next_step=_VERSION,
        ) from error


class ForeignModule:
    """A module of another package that answers with a tensor, or with tensors by name."""

    def __init__(self, card: EncoderCard, module: nn.Module, device: torch.device) -> None:
        self._card = card
        self._module = module.eval().to(device)
        self._device = device

    def run(self, patches: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
        """Patches (n, 1, p, p, p) → {output: array}; `EncoderMismatch` when the module fails."""
        with torch.inference_mode(), exact_float32(self._device):
            try:
                given = self._module(torch.from_numpy(patches).to(self._device))
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # their code may fail in any other way
                raise EncoderMismatch(
                    f"the module of {_whose(self._card)} fails on patches of {self._card.patch_vox}³ voxels "
                    f"({type(error).__name__}: {said_by(error)})",
                    next_step="correct patch_vox on the card, or the factory",
                ) from error
            return {name: y.float().cpu().numpy() for name, y in self._named(given).items()}

    def _named(self, given: Any) -> dict[str, torch.Tensor]:
        if isinstance(given, torch.Tensor) and len(self._card.outputs) == 1:
            return {self._card.match_output: given}
        if isinstance(given, Mapping):
            return {name: given[name] for name in given if isinstance(given[name], torch.Tensor)}
        raise EncoderMismatch(
            f"the module of {_whose(self._card)}: expected a dictionary of tensors, or one tensor where the card has "
            f"one output, found {type(given).__name__}",
            next_step="have the factory wrap the module so that it gives that",
        )


def foreign_module(card: EncoderCard, weights: Path, trust: Sequence[str], device: torch.device) -> ForeignModule:
    """Build the module that a card's factory names, and give it its weights.

    `EncoderNotTrusted` before anything of theirs is imported, unless `trust` covers it.
    """
    factory = trusted_factory(card.factory, trust)
    try:
        module = factory(**card.network)
    except Exception as error:  # their code may fail in any way
        raise EncoderMismatch(
            f"the factory {card.factory} fails ({type(error).__name__}: {said_by(error)})",
            next_step="correct `network` on the card: it holds the factory's arguments",
        ) from error
    if not isinstance(module, nn.Module):
        raise EncoderMismatch(
            f"the factory {card.factory}: expected a torch.nn.Module, found {type(module).__name__}",
            next_step="name a callable that builds the module",
        )
    state = module.state_dict()
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise EncoderMismatch(
            f"the module of {card.factory} has other things than tensors in its state, which safetensors cannot hold",
            next_step="have the factory build a module without get_extra_state",
        )
    check_fit(forms_of(state), read_forms(weights), _whose(card), card.factory)
    module.load_state_dict(read_weights(weights, str(card.weights_sha256), _whose(card)))
    return ForeignModule(card, module, device)


def _whose(card: EncoderCard) -> str:
    return f"encoder {card.id}"
