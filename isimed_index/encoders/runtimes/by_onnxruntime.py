"""ONNX Runtime on a CPU (extra `onnx`) for networks of ours; graphs of others are the affair of `onnx_model`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.runtimes.kind import Maps, need_packages
from isimed_index.encoders.trust import said_by
from isimed_index.errors import EncoderMismatch

_QUIET = 4  # what goes wrong is raised


class OnnxRun:
    """A session on an ONNX graph; threads may run it side by side."""

    def __init__(self, session: Any, outputs: Sequence[str]) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name
        self._outputs = list(outputs)

    def __call__(self, values: NDArray[np.float32]) -> Maps:
        """Maps {output: (n, d, i, j, k)} of `values` (n, 1, x, y, z); `EncoderMismatch` when the runtime fails."""
        try:
            given = self._session.run(self._outputs, {self._input: np.ascontiguousarray(values)})
        except Exception as error:  # its errors have no common base
            raise _failed(f"on values of shape {values.shape}", error) from error
        return dict(zip(self._outputs, given, strict=True))


def onnx_run(graph: bytes, outputs: Sequence[str], threads: int) -> OnnxRun:
    """An ONNX graph in a session on the CPU; `MissingExtra` without the package, `EncoderMismatch` when it fails."""
    need_packages("onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base
        raise _failed("to load the graph", error) from error
    return OnnxRun(session, outputs)


def _failed(what: str, error: Exception) -> EncoderMismatch:
    return EncoderMismatch(f"the runtime onnx fails {what}: {said_by(error)}", next_step="--runtime torch")
