"""Networks that turn patches into embeddings.

`ValidNet` and `StemNet` are *exactly convolutional*: unpadded convolutions whose receptive field is the patch and whose
total stride is the lattice stride. A patch alone, (n, 1, 32, 32, 32) → (n, d, 1, 1, 1), and the same place inside a
whole volume give the same vector, so one pass over a volume replaces thousands of overlapping patches. A zero-padded
network does not have this property and has to be run patch by patch.

`PatchDenseNet121` is the network of the ISImed paper (§2.2.1): MONAI's 3-D DenseNet121, 1024-d, one channel in.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from isimed_index.errors import ConfigError, EncoderMismatch

Outputs = dict[str, torch.Tensor]
_START = 0.1  # of what embeddings would vary by before training
MM_PER_POSITION_UNIT = 100.0  # the position head works in decimetres, so that its loss is of order one


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, kernel, stride=stride, bias=False), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    """Two convolutions of 1³ beside the identity: depth that sees no further."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            _conv(width, 2 * width, 1), nn.Conv3d(2 * width, width, 1, bias=False), nn.BatchNorm3d(width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.inner(x))


class _Convolutional(nn.Module):
    """An unpadded trunk, receptive field 32 voxels, total stride 4, with one linear head per output.

    Input (n, 1, x, y, z) with every side ≥ 32; output per head (n, dim, (x-32)//4+1, …).
    `outputs` maps head names to dimensions; `position` is returned in mm.
    """

    patch = 32
    stride = 4
    exactly_convolutional = True

    def __init__(self, trunk: nn.Sequential, features: int, outputs: Mapping[str, int]) -> None:
        super().__init__()
        self.trunk = trunk
        heads = {name: nn.Conv3d(features, dim, 1) for name, dim in outputs.items()}
        if "embedding" in heads:  # distances of metres would outweigh all else for hundreds of steps
            heads["embedding"].weight.data.mul_(_START)
        self.heads = nn.ModuleDict(heads)

    def forward(self, x: torch.Tensor) -> Outputs:
        features = self.trunk(x)  # (n, features, i, j, k)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round 100 mm to half a millimetre
            exact = features.to(next(self.heads.parameters()).dtype)
            result = {name: head(exact) for name, head in self.heads.items()}
        if "position" in result:
            result["position"] = result["position"] * MM_PER_POSITION_UNIT
        return result


class ValidNet(_Convolutional):
    """Six unpadded convolutions, the first one at every voxel; input and outputs are those of `StemNet`."""

    def __init__(self, outputs: Mapping[str, int], width: int = 16) -> None:
        w = width
        trunk = nn.Sequential(
            _conv(1, w, 3),  # receptive field 3
            _conv(w, 2 * w, 4, stride=2),  # 6
            _conv(2 * w, 2 * w, 3),  # 10
            _conv(2 * w, 4 * w, 4, stride=2),  # 16
            _conv(4 * w, 4 * w, 3),  # 24
            _conv(4 * w, 8 * w, 3),  # 32
        )
        super().__init__(trunk, 8 * w, outputs)


class StemNet(_Convolutional):
    """Four unpadded convolutions, the first two of stride 2, with residual blocks of 1³ where the lattice is coarse.

    Input (n, 1, x, y, z) with every side ≥ 32; output per head (n, dim, (x-32)//4+1, …); `position` in mm. Nothing is
    computed at every voxel, so it costs two thirds of a `ValidNet` of the same width, with three times its parameters.
    """

    def __init__(self, outputs: Mapping[str, int], width: int = 16) -> None:
        w = width
        trunk = nn.Sequential(
            _conv(1, 2 * w, 6, stride=2),  # receptive field 6
            _conv(2 * w, 4 * w, 6, stride=2),  # 16
            _conv(4 * w, 8 * w, 3),  # 24
            _Residual(8 * w),
            _conv(8 * w, 12 * w, 3),  # 32
            _Residual(12 * w),
        )
        super().__init__(trunk, 12 * w, outputs)


class PatchDenseNet121(nn.Module):
    """MONAI DenseNet121 in 3-D with its 1024-d pooled features as the one output, `embedding` (ISImed, §2.2.1).

    Input (n, 1, 32, 32, 32); output {"embedding": (n, 1024, 1, 1, 1)}.
    """

    patch = 32
    stride = 32
    exactly_convolutional = False

    def __init__(self, outputs: Mapping[str, int]) -> None:
        super().__init__()
        from monai.networks.nets import DenseNet121

        if dict(outputs) != {"embedding": 1024}:
            raise ConfigError(f"DenseNet121 has one output, embedding (1024), found {dict(outputs)}")
        net = DenseNet121(spatial_dims=3, in_channels=1, out_channels=1)
        self.features = net.features
        self.pool = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d(1))

    def forward(self, x: torch.Tensor) -> Outputs:
        return {"embedding": self.pool(self.features(x))}


Network = ValidNet | StemNet | PatchDenseNet121
_FACTORIES: dict[str, type[ValidNet] | type[StemNet] | type[PatchDenseNet121]] = {
    "isimed_index.encoders.networks:ValidNet": ValidNet,
    "isimed_index.encoders.networks:StemNet": StemNet,
    "isimed_index.encoders.networks:PatchDenseNet121": PatchDenseNet121,
}


def build_network(factory: str, outputs: Mapping[str, int], arguments: Mapping[str, int]) -> Network:
    """Build the network that `factory` names, freshly initialised; `EncoderMismatch` if this version cannot."""
    if factory not in _FACTORIES:
        raise EncoderMismatch(
            f"expected a network among {sorted(_FACTORIES)}, found {factory!r}",
            next_step="use the version of isimed-index that trained this encoder",
        )
    try:
        return _FACTORIES[factory](outputs=outputs, **arguments)
    except TypeError as error:
        raise EncoderMismatch(f"the network {factory} cannot be built: {error}") from error
