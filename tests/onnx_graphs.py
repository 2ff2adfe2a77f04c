"""Small ONNX graphs with known answers, built node by node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

EDGE = 8


def weights(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Kernel (5, 1, 4, 4, 4) and bias (5,) of the one convolution."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(5, 1, 4, 4, 4)).astype(np.float32) / 8, rng.normal(size=5).astype(np.float32)


def write_graph(
    file: Path,
    *,
    batch: int | str = "n",
    channels: int = 1,
    edge: int | str = EDGE,
    kind: int = TensorProto.FLOAT,
    names: Sequence[str] = ("descriptor", "embedding"),
    extra_input: bool = False,
    kernel: TensorProto | None = None,
) -> Path:
    """`descriptor` is tanh of a convolution with stride 4, a map; `embedding` is its mean over the places."""
    w, b = weights()
    inputs = [helper.make_tensor_value_info("patch", kind, [batch, channels, edge, edge, edge])]
    if extra_input:
        inputs.append(helper.make_tensor_value_info("spacing", TensorProto.FLOAT, [3]))
    nodes = [
        helper.make_node("Conv", ["patch", "w", "b"], ["conv"], strides=[4, 4, 4]),
        helper.make_node("Tanh", ["conv"], [names[0]]),
        helper.make_node("ReduceMean", [names[0]], [names[1]], axes=[2, 3, 4], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        inputs,
        [helper.make_tensor_value_info(name, kind, None) for name in names],
        [kernel or numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )
    file.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    return file


def kernel_elsewhere(location: str) -> onnx.TensorProto:
    """The kernel, said to lie in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=weights()[0].shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor
