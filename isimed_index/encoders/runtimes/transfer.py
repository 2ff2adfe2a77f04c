"""Arrays to a device and maps back, while the device computes on; on a CPU nothing is moved.

host     stage 1 │ stage 2 │ … wait for 1, stage 3 │ … wait for 2 …
copies      1    │    2    │           3
device           │ pass 1  │  pass 2   │ pass 3
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from isimed_index.encoders.runtimes.kind import Maps


class Transfers:
    """To and from one device, through memory that is pinned, so that neither side waits for the other.

    Pinned memory comes from PyTorch's own store of it, which gives none of it out again before its copy has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def give(self, values: NDArray[np.float32]) -> torch.Tensor:
        """`values` on the device, for what is begun there next; the copy goes on beside what is computed by now."""
        source = torch.from_numpy(np.ascontiguousarray(values))
        if self._copies is None:
            return source
        with torch.cuda.stream(self._copies):
            given = source.pin_memory().to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copies)
        given.record_stream(computing)  # its memory is not to be given to another copy while it is computed on
        return given

    def take(self, outputs: Mapping[str, torch.Tensor]) -> Callable[[], Maps]:
        """Begin to copy outputs back, as float32; what is returned waits until they are there, and gives them."""
        exact = {name: y.float() for name, y in outputs.items()}
        if self._copies is None:
            return lambda: {name: y.numpy() for name, y in exact.items()}
        back = {
            name: torch.empty(y.shape, dtype=y.dtype, pin_memory=True).copy_(y, non_blocking=True)
            for name, y in exact.items()
        }
        there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there.record(torch.cuda.current_stream(self._device))

        def wait() -> Maps:
            there.synchronize()
            return {name: y.numpy().copy() for name, y in back.items()}

        return wait
