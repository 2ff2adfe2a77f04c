"""Python, the packages and the accelerators: read from metadata, nothing heavy is imported."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from isimed_index.doctor.probe import Probe, failed, ok, warning

PACKAGES = ("torch", "monai", "zarr", "dask", "duckdb", "pyarrow", "numpy")
_PYTHONS = ((3, 11), (3, 13))  # the first and the last that the package is tested with
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)>=([0-9.]+)$")
_BUILD = re.compile(r"(cu|rocm|cpu|xpu)([0-9.]*)")
_FAISS = re.compile(r"faiss(-cpu|-gpu.*)?$")  # conda's is called faiss
_ANSWER_S = 20.0  # how long nvidia-smi may take; a driver that is waking up needs several seconds


def probes() -> list[Probe]:
    """All probes of this module."""
    devices = accelerators()
    return [
        python(sys.version_info[:3]),
        *(package(name, least_versions().get(name, "0")) for name in PACKAGES),
        faiss(),
        devices,
        torch_build(gpu=devices.found.startswith("NVIDIA")),
    ]


def python(version: Sequence[int]) -> Probe:
    """Whether this Python is one that the package is tested with."""
    text = ".".join(map(str, version))
    if _PYTHONS[0] <= tuple(version[:2]) <= _PYTHONS[1]:
        return ok("python", text)
    return failed("python", f"{text}, expected 3.11 to 3.13", "make a new environment with Python 3.11, 3.12 or 3.13")


def least_versions() -> dict[str, str]:
    """The lowest version of each package that this one requires; empty when it was not installed by pip."""
    try:
        requirements = metadata.requires("isimed-index") or []
    except metadata.PackageNotFoundError:
        return {}
    return {found[1]: found[2] for found in map(_REQUIREMENT.match, requirements) if found}


def package(name: str, least: str) -> Probe:
    """The installed version of a package against the lowest that will do."""
    mend = f"pip install '{name}>={least}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return failed(name, "not installed", mend)
    if _release(version) < _release(least):
        return failed(name, f"{version}, expected {least} or newer", mend)
    return ok(name, version)


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, trailing zeros dropped: 2.13.0+cpu is (2, 13)."""
    found = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    numbers = [int(number) for number in found[0].split(".")] if found else [0]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def faiss() -> Probe:
    """Whether exactly one distribution owns the folder `faiss`, and all its files are as that one brought them.

    Every FAISS wheel writes the same folder: installing a second one mixes their files, and removing one of two
    takes files of the other away.
    """
    owners = {_name(owner): owner for owner in metadata.distributions() if _FAISS.match(_name(owner))}
    found = ", ".join(f"{name} {owner.version}" for name, owner in sorted(owners.items()))
    if len(owners) > 1:
        names = " ".join(sorted(owners))
        return failed("faiss", f"{found} share one folder", f"pip uninstall -y {names}, then pip install one of them")
    spec = find_spec("faiss")  # looks for the folder, runs nothing of it
    importable = spec is not None and spec.origin is not None
    if not owners and importable:
        mend = "remove the folder faiss from the environment, then pip install 'isimed-index[cpu]'"
        return failed("faiss", "a folder faiss that no package owns", mend)
    if not owners:
        mend = "pip install 'isimed-index[cpu]'"
        return warning("faiss", "not installed; every search is exact", mend)
    (name, owner) = next(iter(owners.items()))
    mend = f"pip install --force-reinstall --no-deps {name}=={owner.version}"
    if not importable:
        return failed("faiss", f"{found}, but its folder is missing", mend)
    if wrong := _altered(owner):
        return failed("faiss", f"{found}, but {wrong} of its files are missing or another package's", mend)
    return ok("faiss", found)


def _name(distribution: metadata.Distribution) -> str:
    """A distribution's name, normalised; what an interrupted pip left behind has none."""
    name: str | None = distribution.metadata["Name"]
    return re.sub(r"[-_.]+", "-", name or "").lower()


def _altered(owner: metadata.Distribution) -> int:
    """How many of a distribution's files are missing or differ in size from its record."""
    count = 0
    # Not `owner.files`: from Python 3.12 on it leaves out what is missing.
    for name, _, size in csv.reader((owner.read_text("RECORD") or "").splitlines()):
        path = Path(str(owner.locate_file(name)))
        if size:
            count += not path.is_file() or path.stat().st_size != int(size)
    return count


def torch_build(*, gpu: bool) -> Probe:
    """What the installed torch computes on, told by its version and its list of files."""
    try:
        torch = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return failed("torch_build", "torch is not installed", "pip install 'isimed-index[cpu]'")
    kind, release = _build(torch)
    if kind == "cpu" and gpu:
        return warning("torch_build", "CPU only; the GPU is not used", "install a CUDA build of torch")
    words = {"cpu": "CPU only", "cu": "CUDA", "rocm": "ROCm", "xpu": "XPU"}
    return ok("torch_build", f"{words.get(kind, 'unknown')} {release}".strip())


def _build(torch: metadata.Distribution) -> tuple[str, str]:
    """Kind (cpu, cu, rocm, xpu, or empty when unknown) and release of a build of torch."""
    if found := _BUILD.match(torch.version.partition("+")[2]):
        release = found[2]
        return found[1], f"{release[:-1]}.{release[-1]}" if found[1] == "cu" and release.isdecimal() else release
    # Wheels of the public index bear no such label; those with CUDA hold its library.
    names = {file.name for file in torch.files or []}
    if not names:
        return "", ""
    return ("cu" if "libtorch_cuda.so" in names else "cpu"), ""


def accelerators() -> Probe:
    """The names of NVIDIA GPUs, as their driver lists them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ok("accelerators", "none (there is no nvidia-smi)")
    mend = "mend the NVIDIA driver, or go on with --device cpu"
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return warning("accelerators", f"nvidia-smi does not answer ({type(error).__name__})", mend)
    names = re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", done.stdout, re.MULTILINE)
    if done.returncode or not names:
        said = (done.stderr + done.stdout).strip().partition("\n")[0] or f"exit {done.returncode}"
        return warning("accelerators", f"nvidia-smi lists no GPU: {said}", mend)
    return ok("accelerators", ", ".join(name if name.startswith("NVIDIA") else f"NVIDIA {name}" for name in names))
