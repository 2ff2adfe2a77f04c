"""One batch through network and method, over all processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import functional_call

from isimed_index.config import PretrainConfig
from isimed_index.encoders.networks import Network, Outputs
from isimed_index.errors import UsageError
from isimed_index.pretrain.charts import Charts
from isimed_index.pretrain.methods import Losses, Method, view_lattice
from isimed_index.pretrain.objectives.precision import at_least_float32
from isimed_index.pretrain.processes import Processes
from isimed_index.pretrain.sampler import Batch

Number = TypeVar("Number", np.float64, np.int64)


class Forward:
    """Computes the losses of batches: each process its own views, and then all of them the loss of the whole batch."""

    def __init__(
        self,
        config: PretrainConfig,
        network: Network,
        method: Method,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.config = config
        self.network = network
        self.method = method
        self.device = device
        self.processes = processes
        self.half = in_half(config, device)
        self.places = len(view_lattice(network, config.view_vox))  # patches of one view

    def losses(
        self,
        batch: Batch,
        step: int,
        weights: Mapping[str, torch.Tensor] | None = None,
        charts: Charts | None = None,
    ) -> Losses:
        """The losses of a batch, of which this process has its share; `weights` stand in for the network's own.

        With `charts` the losses are in canonical mm, and the charts take in what the network says of the whole batch.

        What a network or a method draws from torch's stream depends on the seed and the step alone.
        """
        images = batch.images.to(self.device, memory_format=torch.channels_last_3d)
        torch.manual_seed(_seed(self.config.seed, step, self.processes.rank + 1))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            if weights is None:
                outputs: Outputs = self.network(images)
            else:
                outputs = functional_call(self.network, dict(weights), (images,))
        outputs, batch = self._whole(outputs, batch)
        if charts is not None:
            charts.take(outputs["position"], batch, self.method.lattice, step)
            batch = charts.carried(batch, step)
        torch.manual_seed(_seed(self.config.seed, step, 0))
        losses: Losses = self.method(outputs, batch, step)
        return losses

    def _whole(self, outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
        """Outputs and places of the batch of all ranks, its scans in the order in which one process would draw them."""
        if self.processes.world == 1:
            return outputs, batch
        scan_of = self._gathered(batch.scan_of)
        order = np.argsort(scan_of, kind="stable")
        rows = torch.from_numpy(order).to(self.device)
        whole = {name: self.processes.gather(at_least_float32(y))[rows] for name, y in sorted(outputs.items())}
        affines, crop_of = self._gathered(batch.affines)[order], self._gathered(batch.crop_of)[order]
        return whole, Batch(batch.images, affines, scan_of[order], crop_of)

    def _gathered(self, array: NDArray[Number]) -> NDArray[Number]:
        gathered: NDArray[Number] = self.processes.gather(torch.from_numpy(array)).numpy()
        return gathered


def _seed(seed: int, step: int, stream: int) -> int:
    return int(np.random.SeedSequence([seed, 7, step, stream]).generate_state(1, np.uint64)[0] >> 1)


def in_half(config: PretrainConfig, device: torch.device) -> bool:
    """Whether the network runs in bfloat16: where the hardware has it, unless the configuration says.

    Not on a CPU for densenet121: weight gradients of padded convolutions on maps of 2³ are computed there from memory
    that nobody wrote (PyTorch 2.13 with oneDNN, AVX512-BF16; measured). `UsageError` where it is asked for.
    """
    if config.network == "densenet121" and device.type == "cpu":
        if config.precision == "bfloat16":
            raise UsageError(
                "densenet121 cannot be trained in bfloat16 on a CPU", next_step='set precision = "float32" in --config'
            )
        return False
    if config.precision != "auto":
        return config.precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    try:
        features = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in features or "amx_bf16" in features
