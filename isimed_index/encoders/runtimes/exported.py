"""A network of ours as an ONNX graph, for other runtimes: exported once, then kept in the user's cache folder.

    $XDG_CACHE_HOME/isimed-index/graphs/<card id>-isimed<version>-torch<version>-<n>.graph       (or ~/.cache/…)
        32 bytes: SHA-256 of name and graph · the graph

The card's id covers the weights' hash, so a graph belongs to its weights; the versions are those of the code that made
it, for an id says nothing of what a network does with its weights. A file that is cut off, changed or called by
another name is exported again. Where the cache cannot be written, every process exports for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import nn

from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.networks import Network
from isimed_index.encoders.trust import said_by
from isimed_index.errors import EncoderMismatch

INPUT = "patches"
_OPSET = 17
_FORM = 1  # of the file and of what is in the graph: another number, other files
_DIGEST = 32  # bytes
_ONE_EXPORT = threading.Lock()  # PyTorch's exporter and Python's list of warnings belong to the whole process


def graph_of(card: EncoderCard, network: Network) -> bytes:
    """The ONNX graph of a card's network, from the cache where it is there and whole; `EncoderMismatch` if it fails."""
    name = graph_name(card)
    with _ONE_EXPORT:
        folder = cache_folder()
        graph = None if folder is None else _read(folder / name)
        if graph is None:
            graph = export(network, list(card.outputs), card.patch_vox)
            if folder is not None:
                _keep(folder / name, graph)
        return graph


def graph_name(card: EncoderCard) -> str:
    """Under which a card's graph is kept; another version of this library or of PyTorch exports its own."""
    return f"{card.id}-isimed{version('isimed-index')}-torch{torch.__version__}-{_FORM}.graph"


def export(network: Network, outputs: Sequence[str], edge: int) -> bytes:
    """A network on the CPU as an ONNX graph with a free batch, and free sides where it is exactly convolutional."""
    free = {0: "n", **(dict(enumerate("xyz", start=2)) if network.exactly_convolutional else {})}
    data = io.BytesIO()
    plain: nn.Module = network.eval()
    order = list(outputs_of(plain, edge))
    try:
        with warnings.catch_warnings():
            # The exporter that works on traces is being retired; the new one needs two more packages.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                plain,
                (torch.zeros(1, 1, edge, edge, edge),),
                data,  # type: ignore[arg-type]
                input_names=[INPUT],
                output_names=order,
                dynamic_axes=dict.fromkeys((INPUT, *outputs), free),
                opset_version=_OPSET,
                dynamo=False,
            )
    except Exception as error:  # an exporter may fail in any way
        raise EncoderMismatch(
            f"the network cannot be exported for other runtimes ({type(error).__name__}: {said_by(error)})",
            next_step="--runtime torch",
        ) from error
    return data.getvalue()


def outputs_of(network: nn.Module, edge: int) -> list[str]:
    """The names of a network's outputs in the order in which it gives them."""
    with torch.inference_mode():
        return list(network(torch.zeros(1, 1, edge, edge, edge)))


def cache_folder() -> Path | None:
    """Where graphs are kept; None where the user has no home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "isimed-index" / "graphs"


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    graph = data[_DIGEST:]
    return graph if graph and data[:_DIGEST] == _digest(path.name, graph) else None


def _keep(path: Path, graph: bytes) -> None:
    """Write a graph under its name in one step: a reader sees the whole of it or nothing."""
    with contextlib.suppress(OSError):  # a full or read-only disk costs the next process some seconds
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as stream:
            try:
                stream.write(_digest(path.name, graph) + graph)
                stream.close()
                Path(stream.name).replace(path)
            except BaseException:
                Path(stream.name).unlink(missing_ok=True)
                raise


def _digest(name: str, graph: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + graph).digest()
