"""An ONNX file as an encoder: its graph is data, run by onnxruntime, so it needs no trust and no other package.

Only here are onnxruntime and onnx imported (extra `onnx`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.card import MODEL, EncoderCard
from isimed_index.encoders.trust import said_by
from isimed_index.errors import EncoderMismatch, MissingExtra, StoreDamaged, UsageError

FACTORY = "isimed_index.encoders.onnx_model:OnnxModel"
_QUIET = 4  # what goes wrong is raised
_RESTORE = "copy its folder again, or restore the store from a backup"


class OnnxModel:
    """The graph of an ONNX file with one input (n, 1, p, p, p) of float32; n is free or 1."""

    def __init__(self, session: Any, outputs: Iterable[str], whose: str) -> None:
        self._session = session
        self._whose = whose
        self._outputs = list(outputs)
        self._input = session.get_inputs()[0].name
        self._one_by_one = session.get_inputs()[0].shape[0] == 1

    def run(self, patches: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
        """Patches (n, 1, p, p, p) → {output: array}, the card's outputs alone; `EncoderMismatch` when it fails."""
        step = 1 if self._one_by_one else max(1, len(patches))
        batches = [patches[start : start + step] for start in range(0, len(patches), step)]
        try:
            answers = [self._session.run(self._outputs, {self._input: batch}) for batch in batches]
        except Exception as error:  # its errors have no common base
            raise EncoderMismatch(
                f"the ONNX graph of {self._whose} fails on patches of {patches.shape[-1]}³ voxels: {said_by(error)}",
                next_step="export it for that patch, or correct patch_vox on the card",
            ) from error
        return {name: np.concatenate([answer[n] for answer in answers]) for n, name in enumerate(self._outputs)}


def open_onnx(card: EncoderCard, file: Path, device: str = "auto") -> OnnxModel:
    """Load the ONNX file of a card, on `auto`, `cpu` or `cuda`.

    `MissingExtra` without onnxruntime; `StoreDamaged` when the file is missing; `EncoderMismatch` when it is not that
    of the card, no graph, one that needs further files, or one with other inputs or outputs than the card has.
    """
    runtime, onnx = _packages()
    whose = f"encoder {card.name!r}"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise StoreDamaged(f"{file.name} of {whose} cannot be read", next_step=_RESTORE) from error
    if hashlib.sha256(data).hexdigest() != card.model_sha256:
        raise EncoderMismatch(f"{MODEL} of {whose} does not match the hash on its card", next_step=_RESTORE)
    _refuse_other_files(onnx, data, whose)
    options = runtime.SessionOptions()
    options.log_severity_level = _QUIET
    # Its own format, which it knows by four bytes, is none that was looked over for other files.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        session = runtime.InferenceSession(data, options, providers=_providers(runtime, device))
    except UsageError:
        raise
    except Exception as error:  # its errors have no common base
        raise EncoderMismatch(
            f"{MODEL} of {whose} is no ONNX graph that can be run: {said_by(error)}",
            next_step="export it again, with operators that onnxruntime has",
        ) from error
    _check_input(session, card, whose)
    missing = sorted(set(card.outputs) - {output.name for output in session.get_outputs()})
    if missing:
        raise EncoderMismatch(
            f"the ONNX graph of {whose} has the outputs {[output.name for output in session.get_outputs()]} and not "
            f"{missing[0]!r} of its card",
            next_step="name the outputs on the card as the graph does",
        )
    return OnnxModel(session, card.outputs, whose)


def _refuse_other_files(onnx: ModuleType, data: bytes, whose: str) -> None:
    """Raise `EncoderMismatch` for a graph with tensors in other files: the hash says nothing of these.

    onnxruntime looks for them beside the graph, or in the working directory, whatever lies there.
    """
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # its errors have no common base
        raise EncoderMismatch(f"{MODEL} of {whose} is no ONNX graph", next_step="export it again") from error
    if any(tensor.external_data or tensor.data_location for tensor in _tensors(onnx, model)):
        raise EncoderMismatch(
            f"{MODEL} of {whose} keeps its weights in other files",
            next_step="export it again, with its weights inside the file",
        )


def _tensors(onnx: ModuleType, message: Any) -> Iterator[Any]:
    """Every tensor anywhere in a graph: initialisers, constants, those of branches, loops and functions."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if isinstance(value, Iterable) else [value]:
                yield from _tensors(onnx, part)


def _check_input(session: Any, card: EncoderCard, whose: str) -> None:
    given = [(one.type, one.shape) for one in session.get_inputs()]
    expected = [1, *[card.patch_vox] * 3]
    if len(given) == 1:
        kind, shape = given[0]
        free = [not isinstance(size, int) for size in shape]
        fits = kind == "tensor(float)" and len(shape) == 5 and (free[0] or shape[0] == 1)
        if fits and all(free[axis] or shape[axis] == size for axis, size in enumerate(expected, start=1)):
            return
    raise EncoderMismatch(
        f"the ONNX graph of {whose}: expected one input of float32 (n, 1, {card.patch_vox}, {card.patch_vox}, "
        f"{card.patch_vox}), found {', '.join(f'{kind} {shape}' for kind, shape in given)}",
        next_step="export it for such patches, with a free first dimension",
    )


def _providers(runtime: ModuleType, device: str) -> list[tuple[str, dict[str, str]]]:
    there = runtime.get_available_providers()
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"expected device auto, cpu or cuda, found {device!r}", next_step="for a GPU, --device cuda")
    if device == "cuda" and "CUDAExecutionProvider" not in there:
        raise UsageError("this onnxruntime has no CUDA", next_step="use --device cpu, or install onnxruntime-gpu")
    exact: list[tuple[str, dict[str, str]]] = [("CUDAExecutionProvider", {"use_tf32": "0"})]  # it would round float32
    wanted = [*(exact if device != "cpu" else []), ("CPUExecutionProvider", {})]
    return [(name, options) for name, options in wanted if name in there]


def _packages() -> tuple[ModuleType, ModuleType]:
    try:
        import onnx
        import onnxruntime
    except ImportError as missing:
        raise MissingExtra(
            f"an encoder in an ONNX file needs {missing.name or 'onnxruntime'}, which is not installed",
            next_step="pip install 'isimed-index[onnx]'",
        ) from missing
    return onnxruntime, onnx
