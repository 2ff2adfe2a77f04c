"""float32 on a GPU without TF32: PyTorch and cuDNN would else round what they multiply to 10 bits, unasked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")

_TURN = threading.Lock()  # the switches belong to the whole process: another thread must not put them back too soon


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Within it, what is begun on a GPU multiplies float32 in full; afterwards the process has its switches back.

    Threads take turns in it. On a CPU, where nothing is rounded, it does nothing.
    """
    if device.type != "cuda":
        yield
        return
    with _TURN, _switched():
        yield


@contextmanager
def _switched() -> Iterator[None]:
    """PyTorch 2.9 has newer switches beside the older ones, and passes fail where the two disagree: both are set."""
    backends: Any = torch.backends
    products, cudnn = backends.cuda.matmul, backends.cudnn
    newer = [products, cudnn.conv, cudnn.rnn] if hasattr(cudnn, "conv") else []
    # The older switch of products is one with that of the CPU, which is put back with it.
    kept = [(owner, owner.fp32_precision) for owner in (*newer, *([backends.mkldnn.matmul] if newer else []))]
    before = _read(torch.get_float32_matmul_precision, "highest")
    convolutions = _read(lambda: cudnn.allow_tf32, False)
    try:
        products.allow_tf32 = cudnn.allow_tf32 = False
        for owner in newer:
            owner.fp32_precision = "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        cudnn.allow_tf32 = convolutions
        for owner, precision in kept:
            owner.fp32_precision = precision


def _read(older: Callable[[], _T], contradicted: _T) -> _T:
    """An older switch; where newer ones contradict it, it cannot be read, and these decide."""
    try:
        return older()
    except RuntimeError:
        return contradicted
