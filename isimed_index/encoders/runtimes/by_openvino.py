"""OpenVINO on a CPU (extra `openvino`); only here is it imported.

What its defaults would do, and why each is set: on machines with AMX or AVX512-BF16 it computes in bfloat16 unless told
not to; it takes all cores, also of a worker that was given one; it binds threads to cores, the same in every process.
Each of its cores gives its thread a stack for signals, and takes it away in the end even where another one's is set
since: the next Ctrl-C would then crash the process, so there is one core in a process, for as long as that lives.
It keeps what it prepared for every shape of input that it has seen, up to 5,000 parts: hundreds of MiB, where the
boxes of tiles are as varied as patients. `CPU_RUNTIME_CACHE_CAPACITY` counts parts, one a convolution and shape.
Its Python package reports every import to its makers, unless their package `openvino_telemetry` cannot be imported.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.runtimes.kind import Maps, need_packages
from isimed_index.encoders.trust import said_by
from isimed_index.errors import EncoderMismatch

_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
_SHAPES = 32  # whose preparation is kept: those of the last scans, full tiles and batches among them
_CORE = threading.Lock()
_cores: list[Any] = []  # one, once it was asked for


class OpenVinoRun:
    """A compiled graph with one stream; threads take turns, so that one batch has all of the runtime's cores."""

    def __init__(self, compiled: Any, outputs: Sequence[str]) -> None:
        self._request = compiled.create_infer_request()
        self._ports = {name: compiled.output(name) for name in outputs}
        self._turn = threading.Lock()

    def __call__(self, values: NDArray[np.float32]) -> Maps:
        """Maps {output: (n, d, i, j, k)} of `values` (n, 1, x, y, z); `EncoderMismatch` when the runtime fails."""
        with self._turn:
            try:
                given = self._request.infer([np.ascontiguousarray(values)], share_inputs=True, share_outputs=False)
            except RuntimeError as error:
                raise _failed(f"on values of shape {values.shape}", error) from error
            return {name: np.asarray(given[port]) for name, port in self._ports.items()}


def openvino_run(graph: bytes, outputs: Sequence[str], precision: str, threads: int) -> OpenVinoRun:
    """An ONNX graph compiled for the CPU; `MissingExtra` without the package, `EncoderMismatch` when it fails."""
    need_packages("openvino")
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
        "EXECUTION_MODE_HINT": "ACCURACY" if precision == "fp32" else "PERFORMANCE",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
    }
    try:
        core = _core()
        model = core.read_model(model=graph, weights=b"")
        convolutions = sum(node.get_type_name() == "Convolution" for node in model.get_ops())
        settings["CPU_RUNTIME_CACHE_CAPACITY"] = _SHAPES * convolutions
        compiled = core.compile_model(model, "CPU", settings)
        used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    except RuntimeError as error:
        raise _failed("to compile the graph", error) from error
    if used != _PRECISIONS[precision]:
        raise EncoderMismatch(
            f"the runtime openvino: expected to compute in {precision}, found {used} on this machine",
            next_step="--precision fp32, or --runtime torch",
        )
    return OpenVinoRun(compiled, outputs)


def _core() -> Any:
    with _CORE:
        if not _cores:
            sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: importing it fails
            import openvino

            _cores.append(openvino.Core())
        return _cores[0]


def _failed(what: str, error: RuntimeError) -> EncoderMismatch:
    return EncoderMismatch(f"the runtime openvino fails {what}: {said_by(error)}", next_step="--runtime torch")
