"""Run an encoder with PyTorch, patch by patch or over whole volumes, and keep it as safetensors beside its card."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors

from isimed_index.encoders.card import CARD, MODEL, WEIGHTS, EncoderCard, read_card
from isimed_index.encoders.foreign import ForeignEncoder
from isimed_index.encoders.module import foreign_module, our_network
from isimed_index.encoders.networks import Network
from isimed_index.encoders.onnx_model import FACTORY as ONNX
from isimed_index.encoders.onnx_model import open_onnx
from isimed_index.encoders.protocol import Encoder, Vectors, encode_patches
from isimed_index.encoders.trust import is_ours
from isimed_index.errors import EncoderMismatch, UsageError
from isimed_index.grid import Box, PatchGrid
from isimed_index.scans.prepare import Volume

TILE = 24  # vectors along the edge of what one pass gives at most


def choose_device(device: str) -> torch.device:
    """`auto`, `cpu` or `cuda` → a device that is there; `UsageError` otherwise."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"expected device auto, cpu or cuda, found {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device is available", next_step="use --device cpu")
    return torch.device(device)


class TorchEncoder:
    """An `Encoder` on PyTorch; exactly convolutional networks encode a grid in one tiled pass."""

    def __init__(self, card: EncoderCard, network: Network, device: torch.device) -> None:
        self.card = card
        self.network = network.eval().to(device)
        self.device = device

    def encode(self, patches: NDArray[np.float32]) -> Vectors:
        """Patches (n, x, y, z), scaled as the card says, → {output: (n, dim) float32}."""
        edge = self.card.patch_vox
        if patches.shape[1:] != (edge, edge, edge):
            raise EncoderMismatch(f"expected patches of {edge}³ voxels, found {patches.shape[1:]}")
        return {name: y[:, :, 0, 0, 0] for name, y in self._run(patches[:, None]).items()}

    def encode_grid(self, volume: Volume, grid: PatchGrid, numbers: NDArray[np.int64]) -> Vectors:
        """The same vectors as `encode` of each patch `numbers` (n,) of `grid`.

        A network without padding shares its work between overlapping patches: the lattice is cut into tiles and each
        tile is one pass. A lattice finer than the network's stride takes several passes, shifted against each other.
        """
        if grid.patch != self.card.patch_vox:
            raise EncoderMismatch(f"expected a grid of patches of {self.card.patch_vox} voxels, found {grid.patch}")
        own = self.network.stride
        if not self.network.exactly_convolutional or (grid.stride % own and own % grid.stride):
            return encode_patches(self, volume, grid, numbers)
        result = {name: np.empty((len(numbers), dim), np.float32) for name, dim in self.card.outputs.items()}
        ijk = grid.ijk(numbers)
        phases = max(1, own // grid.stride)
        tile_points = max(1, TILE * own // max(own, grid.stride))
        for phase in itertools.product(range(phases), repeat=3):
            rows = np.flatnonzero((ijk % phases == phase).all(axis=1))
            tiles = ijk[rows] // phases // tile_points
            for tile in np.unique(tiles, axis=0):
                here = rows[(tiles == tile).all(axis=1)]
                self._encode_tile(volume, grid, ijk[here], here, result)
        return result

    def _encode_tile(
        self, volume: Volume, grid: PatchGrid, ijk: NDArray[np.int64], rows: NDArray[np.int64], result: Vectors
    ) -> None:
        """One pass over the box that holds the patches `ijk` (n, 3); fills `rows` (n,) of `result`."""
        own = self.network.stride
        starts = np.array(grid.first_start) + ijk * grid.stride
        low = starts.min(axis=0)
        x, y, z = low.tolist()
        i, j, k = (starts.max(axis=0) + grid.patch).tolist()
        box = Box((x, y, z), (i, j, k))
        source, target = box.slices(volume.values.shape)
        block = np.full(box.shape, volume.background, np.float32)
        block[target] = volume.values[source]
        at = tuple(((starts - low) // own).T)
        for name, found in self._run(block[None, None]).items():
            result[name][rows] = found[0][(slice(None), *at)].T

    def _run(self, values: NDArray[np.float32]) -> Vectors:
        with torch.inference_mode():
            outputs = self.network(torch.from_numpy(np.ascontiguousarray(values)).to(self.device))
            return {name: y.float().cpu().numpy() for name, y in outputs.items()}


def weights_bytes(state: Mapping[str, torch.Tensor]) -> bytes:
    """A network's state as the content of a safetensors file."""
    data: bytes = save_tensors({name: tensor.contiguous().cpu() for name, tensor in state.items()})
    return data


def write_encoder(directory: Path, card: EncoderCard, state: Mapping[str, torch.Tensor]) -> EncoderCard:
    """Write `card.json` and `weights.safetensors` into `directory`; returns the card with the weights' hash."""
    data = weights_bytes(state)
    final = replace(card, weights_sha256=hashlib.sha256(data).hexdigest())
    (directory / WEIGHTS).write_bytes(data)
    (directory / CARD).write_text(json.dumps(final.to_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return final


def load_encoder(directory: Path, device: str = "auto", trust: Sequence[str] = ()) -> Encoder:
    """Load an encoder directory; see `open_encoder`."""
    card = read_card(directory)
    return open_encoder(card, directory / (WEIGHTS if card.model_sha256 is None else MODEL), device, trust)


def open_encoder(card: EncoderCard, file: Path, device: str = "auto", trust: Sequence[str] = ()) -> Encoder:
    """The encoder of a card and of the file with its weights, or its ONNX graph.

    `StoreDamaged` when the file is missing or cut off, `EncoderMismatch` when it does not belong to card or network,
    or is a pickle; `EncoderNotTrusted` when the card names code of others that `trust` does not cover.
    """
    if card.factory == ONNX and card.model_sha256 is not None and card.weights_sha256 is None:
        return ForeignEncoder(card, open_onnx(card, file, device).run)
    if card.weights_sha256 is None and card.model_sha256 is None:
        raise EncoderMismatch(
            f"encoder {card.name!r} is known by its embeddings only and cannot encode",
            next_step="import the embeddings of these scans too, or choose scans that have them by --where",
        )
    if card.weights_sha256 is None or card.model_sha256 is not None or card.factory == ONNX:
        raise EncoderMismatch(
            f"the card of encoder {card.name!r} says {card.factory} and hashes of {_files(card)}",
            next_step=f"{MODEL} goes with the factory {ONNX}, {WEIGHTS} with all others",
        )
    on = choose_device(device)
    if is_ours(card.factory):
        return TorchEncoder(card, our_network(card, file), on)
    return ForeignEncoder(card, foreign_module(card, file, trust, on).run)


def _files(card: EncoderCard) -> str:
    named = {WEIGHTS: card.weights_sha256, MODEL: card.model_sha256}
    return " and ".join(name for name, sha256 in named.items() if sha256 is not None)
