"""Several processes that train one network, as `torchrun` starts them; one process alone is the same with no others.

    rank 0   views ─▶ network ─┐ gather              ┌▶ method ─▶ loss ─▶ gradients ─┐ mean
    rank 1   views ─▶ network ─┤ outputs and places  ├▶ method ─▶ loss ─▶ gradients ─┤ over ranks
                               └─ of the whole batch ┘                               └▶ the same step everywhere

Every rank computes the loss of the whole batch. The gradient of what was gathered is the sum over the ranks, each of
which has that same loss; the mean over the ranks is therefore the gradient of one process with the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from isimed_index.errors import UsageError
from isimed_index.pretrain.objectives.precision import at_least_float32

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Processes:
    """Which of how many processes this one is; `local` numbers those on one machine, and so its GPU."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors (n, …) of all ranks behind one another (world · n, …), gradients included; shapes must agree."""
        if self.world == 1:
            return tensor
        gathered: torch.Tensor = _Gather.apply(tensor, self)  # type: ignore[no-untyped-call]
        return gathered

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its mean over the ranks, all in one message."""
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        parts = (flat / self.world).split([gradient.numel() for gradient in gradients])  # type: ignore[no-untyped-call]
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        if self.world == 1:
            return flag
        count = torch.tensor(int(flag))
        distributed.all_reduce(count)
        return bool(count)

    def from_first(self, value: Value) -> Value:
        """The value that rank 0 has; the others wait for it. It travels pickled, between processes of one training."""
        if self.world == 1:
            return value
        held = [value]
        distributed.broadcast_object_list(held)
        return held[0]

    def convert(self, network: torch.nn.Module) -> torch.nn.Module:
        """The network with batch-norm statistics of the batch of all ranks; names of its state stay."""
        if self.world == 1:
            return network
        if next(network.parameters()).is_cuda:
            converted: torch.nn.Module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
            return converted
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is torch.nn.BatchNorm3d:
                    joint = JointBatchNorm(child.num_features, child.eps, child.momentum).to(child.weight)
                    joint.load_state_dict(child.state_dict())
                    setattr(parent, name, joint)
        return network


ALONE = Processes()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun started this one among, connected until the end; `ALONE` where it did not.

    Tensors on the CPU travel by gloo, those on GPUs by NCCL, one GPU a process; `UsageError` with fewer GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world == 1:
        yield ALONE
        return
    here = Processes(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if here.local >= (gpus := torch.cuda.device_count()):
            raise UsageError(
                f"expected a GPU for each process, found {gpus}",
                next_step=f"torchrun --nproc-per-node {gpus}, or --device cpu",
            )
        torch.cuda.set_device(here.local)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield here
        distributed.barrier()  # none leaves while another one's last message is under way
    finally:
        distributed.destroy_process_group()


class JointBatchNorm(torch.nn.BatchNorm3d):
    """Batch normalisation over the batch of all ranks on the CPU, where torch's SyncBatchNorm does not run.

    Every rank has the same number of values, for it has the same number of scans.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        axes, shape = (0, 2, 3, 4), (1, -1, 1, 1, 1)
        wide = at_least_float32(x)
        count = wide.numel() // wide.shape[1] * distributed.get_world_size()
        mean = _total(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = _total(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr,arg-type]
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased, self.momentum)  # type: ignore[union-attr,arg-type]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def _total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, with the gradient of a sum over ranks of losses."""
    total: torch.Tensor = _Sum.apply(tensor)  # type: ignore[no-untyped-call]
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, processes: Processes) -> torch.Tensor:
        ctx.rows = slice(processes.rank * len(tensor), (processes.rank + 1) * len(tensor))
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(processes.world)]
        distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total[ctx.rows], None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total
