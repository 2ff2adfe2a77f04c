"""The names of runtimes and precisions, and which of them this machine has; imports none of them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import MissingExtra, UsageError

Maps = Mapping[str, NDArray[np.float32]]  # output name → (n, d, i, j, k)
Run = Callable[[NDArray[np.float32]], Maps]  # of a network: (n, 1, x, y, z) → maps

AUTO = "auto"
# Runtime → the packages that it needs, as they are imported; the first one says its version.
_PACKAGES: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "openvino": ("openvino", "onnx"),
    "onnx": ("onnxruntime", "onnx"),
}
NAMES = tuple(_PACKAGES)
PRECISIONS: dict[str, tuple[str, ...]] = {"fp32": NAMES, "bf16": ("torch", "openvino")}


@dataclass(frozen=True, slots=True)
class Auto:
    """The job that `auto` chose a runtime for; what is left of it, if it is interrupted, is no longer than it was."""

    patches: int  # at most that many were to be encoded
    trial: bool  # whether a trial chose it; else the job was short, or there was nothing to choose


@dataclass(frozen=True, slots=True)
class Runtime:
    """Which program runs a network, and in what precision; `auto` is the one that an encoder needs no trial for."""

    name: str = AUTO  # auto, torch, openvino or onnx
    precision: str = "fp32"  # fp32, or bf16 where vectors with an error of up to 1 % will do
    auto: Auto | None = field(default=None, compare=False)  # None: it was named

    def __post_init__(self) -> None:
        if self.name not in (AUTO, *NAMES):
            raise UsageError(
                f"expected the runtime {AUTO}, {', '.join(NAMES)}, found {self.name!r}", next_step="--runtime auto"
            )
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"expected the precision {' or '.join(PRECISIONS)}, found {self.precision!r}",
                next_step="--precision fp32",
            )
        if self.name not in (AUTO, *PRECISIONS[self.precision]):
            raise UsageError(
                f"the runtime {self.name} has no precision {self.precision}",
                next_step=f"--runtime {' or '.join(PRECISIONS[self.precision])}, or --precision fp32",
            )

    def __str__(self) -> str:
        return self.name if self.precision == "fp32" else f"{self.name} {self.precision}"

    def record(self) -> dict[str, Any]:
        """What a segment keeps of it: name, precision, the version of the program where it has run here; the job."""
        # The module says it, because its distribution may have another name: onnxruntime-gpu.
        program = sys.modules.get(_PACKAGES[self.name][0]) if self.name in _PACKAGES else None
        version = getattr(program, "__version__", None)
        said = {"name": self.name, "precision": self.precision, "version": None if version is None else str(version)}
        return said if self.auto is None else {**said, "auto": asdict(self.auto)}


NATIVE = Runtime()


def missing_packages(name: str) -> list[str]:
    """The packages that a runtime needs and this machine lacks."""
    return [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]


def need_packages(name: str) -> None:
    """Raise `MissingExtra`, with the extra to install, unless this machine has what a runtime needs."""
    missing = missing_packages(name)
    if missing:
        raise MissingExtra(
            f"the runtime {name} needs the package {missing[0]}, which is not installed",
            next_step=f"pip install 'isimed-index[{name}]', or --runtime torch",
        )
