"""Open an encoder in a runtime, run it patch by patch or over whole volumes, keep it as safetensors beside its card."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from isimed_index.encoders.passes import passes_hold
from isimed_index.encoders.protocol import BATCH, Encoder, Vectors
from isimed_index.encoders.runtimes.ahead import in_a_row
from isimed_index.encoders.runtimes.by_onnxruntime import onnx_run
from isimed_index.encoders.runtimes.by_openvino import openvino_run
from isimed_index.encoders.runtimes.by_torch import TorchRun, quick
from isimed_index.encoders.runtimes.checked import Checked
from isimed_index.encoders.runtimes.exported import graph_of
from isimed_index.encoders.runtimes.kind import AUTO, NATIVE, Run, Runtime, need_packages
from isimed_index.encoders.trust import is_ours
from isimed_index.errors import EncoderMismatch, IsimedWarning, UsageError
from isimed_index.grid import Box, PatchGrid
from isimed_index.scans.prepare import Volume

# Which rows of the result a pass fills, where in its maps (n, i, j, k) these stand, and its values (n, 1, x, y, z).
_Pass = tuple[tuple[NDArray[np.int64], tuple[Any, Any, Any, Any]], NDArray[np.float32]]

TILE = 24  # vectors along the edge of what one pass gives at most


def choose_device(device: str) -> torch.device:
    """`auto`, `cpu` or `cuda` → a device that is there; `UsageError` otherwise."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"expected device auto, cpu or cuda, found {device!r}", next_step="for a GPU, --device cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device is available", next_step="use --device cpu")
    return torch.device(device)


class NetworkEncoder:
    """An `Encoder` on a network of ours; one that is exactly convolutional encodes a grid in one tiled pass.

    `own_stride` is the network's stride over a volume, None when it has to be run patch by patch.
    """

    def __init__(self, card: EncoderCard, run: Run, own_stride: int | None) -> None:
        self.card = card
        self._run = run
        self._own_stride = own_stride

    def encode(self, patches: NDArray[np.float32]) -> Vectors:
        """Patches (n, x, y, z), scaled as the card says, → {output: (n, dim) float32}."""
        edge = self.card.patch_vox
        if patches.shape[1:] != (edge, edge, edge):
            raise EncoderMismatch(f"expected patches of {edge}³ voxels, found {patches.shape[1:]}")
        if not len(patches):
            return {name: np.empty((0, dim), np.float32) for name, dim in self.card.outputs.items()}
        return {name: y[:, :, 0, 0, 0] for name, y in self._run(patches[:, None]).items()}

    def shares_work(self, stride: int) -> bool:
        """Whether a lattice of that many voxels is encoded in passes over the volume, not patch by patch."""
        own = self._own_stride
        return own is not None and not (stride % own and own % stride)

    def strides_near(self, stride: int) -> list[int]:
        """The nearest strides (voxels) that share work, below and above one that does not; none where all are alike."""
        own = self._own_stride
        if own is None or self.shares_work(stride):
            return []
        shared = [near for near in range(1, stride + own + 1) if self.shares_work(near)]
        return [max(near for near in shared if near < stride), min(near for near in shared if near > stride)]

    def parts(self, grid: PatchGrid, numbers: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The patches `numbers` (n,) in parts that cost together what they cost apart: tiles, or batches."""
        own = self._own_stride
        if own is None or not self.shares_work(grid.stride):
            return [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]
        tiles = grid.ijk(numbers) // math.prod(_tiling(own, grid.stride))
        _, tile = np.unique(tiles, axis=0, return_inverse=True)
        return [numbers[tile.ravel() == n] for n in range(tile.max(initial=-1) + 1)]

    def encode_grid(self, volume: Volume, grid: PatchGrid, numbers: NDArray[np.int64]) -> Vectors:
        """The same vectors as `encode` of each patch `numbers` (n,) of `grid`.

        A network without padding shares its work between overlapping patches: the lattice is cut into tiles and each
        tile is one pass. A lattice finer than the network's stride takes several passes, shifted against each other.
        """
        if grid.patch != self.card.patch_vox:
            raise EncoderMismatch(f"expected a grid of patches of {self.card.patch_vox} voxels, found {grid.patch}")
        own = self._own_stride
        if own is None or not self.shares_work(grid.stride):
            passes = self._batches(volume, grid, numbers)
        else:
            passes = self._tiles(volume, grid, numbers, own)
        result = {name: np.empty((len(numbers), dim), np.float32) for name, dim in self.card.outputs.items()}
        for (rows, (n, i, j, k)), maps in in_a_row(self._run, passes):
            for name, found in maps.items():
                result[name][rows] = found[n, :, i, j, k]  # (rows, d)
        return result

    def _batches(self, volume: Volume, grid: PatchGrid, numbers: NDArray[np.int64]) -> Iterator[_Pass]:
        """Patches one by one, a batch at a time."""
        for start in range(0, len(numbers), BATCH):
            patches = grid.extract(volume.values, numbers[start : start + BATCH], volume.background)
            n = np.arange(len(patches))
            yield (start + n, (n, 0, 0, 0)), patches[:, None]

    def _tiles(self, volume: Volume, grid: PatchGrid, numbers: NDArray[np.int64], own: int) -> Iterator[_Pass]:
        """The boxes of the lattice's tiles, each no larger than the patches in it that are asked for."""
        ijk = grid.ijk(numbers)
        phases, tile_points = _tiling(own, grid.stride)
        for phase in itertools.product(range(phases), repeat=3):
            rows = np.flatnonzero((ijk % phases == phase).all(axis=1))
            tiles = ijk[rows] // phases // tile_points
            for tile in np.unique(tiles, axis=0):
                here = rows[(tiles == tile).all(axis=1)]
                starts = np.array(grid.first_start) + ijk[here] * grid.stride
                low = starts.min(axis=0)
                i, j, k = ((starts - low) // own).T
                yield (here, (0, i, j, k)), self._block(volume, low, starts.max(axis=0))[None, None]

    def _block(self, volume: Volume, first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.float32]:
        """The box (x, y, z) from the patch that starts at `first` to the one that starts at `last`."""
        x, y, z = first.tolist()
        i, j, k = (last + self.card.patch_vox).tolist()
        box = Box((x, y, z), (i, j, k))
        source, target = box.slices(volume.values.shape)
        block = np.full(box.shape, volume.background, np.float32)
        block[target] = volume.values[source]
        return block


class TorchEncoder(NetworkEncoder):
    """A network as it is on PyTorch in float32: what every other way of running it is compared with."""

    def __init__(self, card: EncoderCard, network: Network, device: torch.device) -> None:
        stride = _own_stride(card, network)
        super().__init__(card, TorchRun(network, device), stride)


def _tiling(own: int, stride: int) -> tuple[int, int]:
    """For a lattice of `stride`: how many passes along each axis are shifted against each other, and points of each."""
    return max(1, own // stride), max(1, TILE * own // max(own, stride))


def _own_stride(card: EncoderCard, network: Network) -> int | None:
    """The stride of a network's passes over a volume; None, with a warning, when it only says that it has them."""
    if not network.exactly_convolutional:
        return None
    if passes_hold(network, network.patch, network.stride):
        return network.stride
    warnings.warn(
        f"encoder {card.name!r}: a pass of its network over a volume does not give the vectors of patches, so it is "
        "run patch by patch: the same answers, much later",
        IsimedWarning,
        stacklevel=2,
    )
    return None


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


def load_encoder(
    directory: Path, device: str = "auto", trust: Sequence[str] = (), runtime: Runtime = NATIVE
) -> Encoder:
    """Load an encoder directory; see `open_encoder`."""
    card = read_card(directory)
    return open_encoder(card, weights_file(directory, card), device, trust, runtime)


def weights_file(directory: Path, card: EncoderCard) -> Path:
    """The file of an encoder directory that holds its weights, or its ONNX graph."""
    return directory / (WEIGHTS if card.model_sha256 is None else MODEL)


def open_encoder(
    card: EncoderCard, file: Path, device: str = "auto", trust: Sequence[str] = (), runtime: Runtime = NATIVE
) -> Encoder:
    """The encoder of a card and of the file with its weights, or its ONNX graph.

    `StoreDamaged` when the file is missing or cut off, `EncoderMismatch` when it does not belong to card or network,
    or is a pickle; `EncoderNotTrusted` when the card names code of others that `trust` does not cover; `UsageError`
    when `runtime` cannot run it or not there, `MissingExtra` when its package is not installed.
    """
    if card.factory == ONNX and card.model_sha256 is not None and card.weights_sha256 is None:
        refuse_other(card, runtime)
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
    if is_ours(card.factory):
        return _our_encoder(card, file, device, runtime)
    refuse_other(card, runtime)
    return ForeignEncoder(card, foreign_module(card, file, trust, choose_device(device)).run)


def native_runtime(card: EncoderCard) -> str:
    """The runtime that an encoder was made for, and that needs no trial."""
    return "onnx" if card.factory == ONNX else "torch"


def refuse_other(card: EncoderCard, runtime: Runtime) -> None:
    """`UsageError` when an encoder of another program is asked to run otherwise than it was made for."""
    native = native_runtime(card)
    if runtime.name not in (AUTO, native) or runtime.precision != "fp32":
        raise UsageError(
            f"encoder {card.name!r} comes from another program and is run by {native} in fp32, found {runtime}",
            next_step=f"--runtime {native} --precision fp32",
        )


def _our_encoder(card: EncoderCard, file: Path, device: str, runtime: Runtime) -> Encoder:
    """A network of ours in a runtime; each but PyTorch in float32 on a CPU is compared with that on its first batch."""
    on = choose_device("cpu" if device == "auto" and runtime.name in ("openvino", "onnx") else device)
    network = our_network(card, file)
    stride, threads = _own_stride(card, network), torch.get_num_threads()
    if runtime.name in (AUTO, "torch"):
        run: Run = TorchRun(quick(network), on, runtime.precision)
        if runtime.precision == "fp32" and on.type == "cpu":
            return NetworkEncoder(card, run, stride)
    elif on.type != "cpu":
        raise UsageError(
            f"the runtime {runtime.name} computes on the CPU, found --device {device}",
            next_step="--device cpu, or --runtime torch",
        )
    elif runtime.name == "openvino":
        need_packages(runtime.name)
        run = openvino_run(graph_of(card, network), list(card.outputs), runtime.precision, threads)
    else:
        need_packages(runtime.name)
        run = onnx_run(graph_of(card, network), list(card.outputs), threads)
    # By the network as it is, on the CPU, where nothing rounds float32 unasked.
    reference = TorchRun(network, torch.device("cpu"))
    return NetworkEncoder(card, Checked(run, reference, runtime, f"encoder {card.name!r}"), stride)


def _files(card: EncoderCard) -> str:
    named = {WEIGHTS: card.weights_sha256, MODEL: card.model_sha256}
    return " and ".join(name for name, sha256 in named.items() if sha256 is not None)
