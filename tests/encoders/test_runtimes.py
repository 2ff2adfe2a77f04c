"""Runtimes: each gives the vectors of the plain network, the same bits each time, and is refused when it does not."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from isimed_index import __version__
from isimed_index.config import PretrainConfig
from isimed_index.encoders import runtime as running
from isimed_index.encoders.card import read_card
from isimed_index.encoders.module import our_network
from isimed_index.encoders.networks import build_network
from isimed_index.encoders.protocol import Encoder, Vectors, encode_grid
from isimed_index.encoders.runtime import TorchEncoder, load_encoder, weights_file, write_encoder
from isimed_index.encoders.runtimes import by_torch, exported
from isimed_index.encoders.runtimes.checked import BOUNDS, Checked, Errors, relative_errors
from isimed_index.encoders.runtimes.kind import NAMES, PRECISIONS, Runtime, missing_packages
from isimed_index.errors import EncoderMismatch, MissingExtra, RuntimeMismatch, UsageError
from isimed_index.grid import PatchGrid
from isimed_index.pretrain.trainer import new_card
from isimed_index.testing.conformance import EncoderConformance

CPU = torch.device("cpu")
DENSENET = "isimed_index.encoders.networks:PatchDenseNet121"


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def alone(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, small tiles, and a cache that is not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_cache))
    monkeypatch.setattr(running, "TILE", 3)
    torch.set_num_threads(1)
    torch.manual_seed(1)


def keep(folder: Path, network: Literal["stem", "valid", "densenet"] = "stem") -> Path:
    """An encoder folder whose batch norms have seen data: fresh ones would hide a fold that leaves them out."""
    folder.mkdir(exist_ok=True)
    config = PretrainConfig(network="stem" if network == "densenet" else network, width=3, embedding_dim=4)
    card = new_card(config, "test", "tiny")
    if network == "densenet":
        card = replace(card, factory=DENSENET, network={}, outputs={"embedding": 1024}, match_output="embedding")
    net = build_network(card.factory, card.outputs, card.network)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    net.train()
    with torch.no_grad():
        for seed in range(2 if network == "densenet" else 8):
            net(torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (4, 1, 32, 32, 32)).astype(np.float32)))
    write_encoder(folder, card, net.state_dict())
    return folder


def plain(folder: Path) -> Encoder:
    """The network as it is, on PyTorch in float32."""
    card = read_card(folder)
    return TorchEncoder(card, our_network(card, weights_file(folder, card)), CPU)


def error(found: Vectors, expected: Vectors) -> float:
    """Of the vector that is furthest off."""
    return relative_errors(
        *({name: y[:, :, None, None, None] for name, y in vectors.items()} for vectors in (found, expected))
    ).worst


def same_bits(found: Vectors, expected: Vectors) -> None:
    for name, vectors in expected.items():
        np.testing.assert_array_equal(found[name], vectors, err_msg=name)


class RuntimeConformance(EncoderConformance):
    """The contract of a runtime: that of `Encoder`, the plain network's vectors, and the same bits each time."""

    runtime: str
    network: Literal["stem", "valid"] = "stem"

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        if missing := missing_packages(self.runtime):
            pytest.skip(f"the runtime {self.runtime} needs {missing[0]}")
        self.kept = keep(tmp_path / "encoder", self.network)

    def make(self, precision: str = "fp32") -> Encoder:
        return load_encoder(self.kept, "cpu", runtime=Runtime(self.runtime, precision))

    def test_patches_have_the_vectors_of_the_plain_network(self) -> None:
        encoder = self.make()
        patches = self.patches(encoder, 7)
        assert error(encoder.encode(patches), plain(self.kept).encode(patches)) <= BOUNDS["fp32"]

    def test_volumes_have_the_vectors_of_the_plain_network(self) -> None:
        encoder, expected = self.make(), plain(self.kept)
        shape = (61, 40, 33)
        volume = self.volume(shape)
        for stride in (4, 2, 8, 3):
            grid = PatchGrid(shape, 32, stride, volume.affine)
            numbers = np.random.default_rng(stride).choice(len(grid), 25, replace=False)
            found = encode_grid(encoder, volume, grid, numbers)
            assert error(found, encode_grid(expected, volume, grid, numbers)) <= BOUNDS["fp32"], stride

    def test_the_same_bits_each_time_whatever_was_encoded_before(self) -> None:
        first, again = self.make(), self.make()
        patches, volume = self.patches(first, 5), self.volume((50, 41, 36))
        grid = PatchGrid((50, 41, 36), 32, 4, volume.affine)
        numbers = np.arange(len(grid))
        alone = first.encode(patches)
        whole = encode_grid(first, volume, grid, numbers)
        same_bits(first.encode(patches), alone)
        same_bits(encode_grid(again, volume, grid, numbers), whole)
        same_bits(again.encode(patches), alone)

    def test_threads_that_share_it_get_their_own_vectors(self) -> None:
        encoder = self.make()
        parts = [self.patches(encoder, 8)[start:end] for start, end in ((0, 3), (3, 4), (4, 8), (1, 6))]
        expected = [self.make().encode(part) for part in parts]
        with ThreadPoolExecutor(4) as pool:
            for found, right in zip(pool.map(encoder.encode, parts * 3), expected * 3, strict=True):
                same_bits(found, right)

    def test_bfloat16_only_where_it_is_asked_for(self) -> None:
        if self.runtime not in PRECISIONS["bf16"]:
            with pytest.raises(UsageError, match="no precision bf16"):
                self.make("bf16")
            return
        patches, expected = self.patches(self.make(), 6), plain(self.kept)
        try:
            far = error(self.make("bf16").encode(patches), expected.encode(patches))
        except EncoderMismatch as refused:
            if "expected to compute in bf16, found f32" in refused.message:
                pytest.skip("this processor has no bfloat16")
            raise
        assert BOUNDS["fp32"] < far <= BOUNDS["bf16"]


class TestTorch(RuntimeConformance):
    runtime = "torch"


class TestTorchOfEveryVoxel(RuntimeConformance):
    runtime = "torch"
    network = "valid"


class TestOpenVino(RuntimeConformance):
    runtime = "openvino"


class TestOpenVinoOfEveryVoxel(RuntimeConformance):
    runtime = "openvino"
    network = "valid"


class TestOnnxRuntime(RuntimeConformance):
    runtime = "onnx"


# Each Core of OpenVINO gives its thread a signal stack, and takes it away when it ends, whatever came since.
IN_TURN = """
import gc, signal, sys
from pathlib import Path
from isimed_index.encoders.runtime import load_encoder
from isimed_index.encoders.runtimes.kind import Runtime

caught = []
signal.signal(signal.SIGTERM, lambda *_: caught.append("caught"))
first, second, third = (load_encoder(Path(sys.argv[1]), "cpu", runtime=Runtime("openvino")) for _ in range(3))
for _ in range(3):
    first, second, third = second, third, None
    gc.collect()
    signal.raise_signal(signal.SIGTERM)
print(*caught)
"""


@pytest.mark.skipif(bool(missing_packages("openvino")), reason="needs openvino")
def test_a_signal_is_survived_after_encoders_were_let_go(tmp_path: Path) -> None:
    folder = keep(tmp_path / "encoder")
    command = [sys.executable, "-X", "faulthandler", "-c", IN_TURN, str(folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["caught"] * 3


@pytest.mark.skipif(bool(missing_packages("openvino")), reason="needs openvino")
def test_openvino_forgets_the_shapes_of_long_ago(tmp_path: Path) -> None:
    """Boxes of tiles are as varied as patients: 60 more of them took 66 MiB when all were kept, and 12 since."""
    run = load_encoder(keep(tmp_path / "encoder"), "cpu", runtime=Runtime("openvino"))._run  # type: ignore[attr-defined]
    shapes = np.random.default_rng(0).permutation(list(itertools.product(range(32, 60, 4), repeat=3)))[:120]
    process, mib = psutil.Process(), []
    for x, y, z in shapes.tolist():
        run(np.zeros((1, 1, x, y, z), np.float32))
        mib.append(process.memory_info().rss / 2**20)
    assert mib[-1] - mib[59] < 35


def test_the_papers_network_in_every_runtime(tmp_path: Path) -> None:
    folder = keep(tmp_path / "encoder", "densenet")
    patches = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 32)).astype(np.float32)
    expected = plain(folder).encode(patches)
    for name in NAMES:
        if not missing_packages(name):
            found = load_encoder(folder, "cpu", runtime=Runtime(name)).encode(patches)
            assert error(found, expected) <= BOUNDS["fp32"], name


# -- PyTorch, folded ------------------------------------------------------------------------------------------------


def test_folding_leaves_no_batch_norm_behind_a_convolution_and_the_network_as_it_was(tmp_path: Path) -> None:
    folder = keep(tmp_path / "encoder")
    card = read_card(folder)
    network = our_network(card, weights_file(folder, card))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fast = by_torch.quick(network)
    assert not [module for module in fast.modules() if isinstance(module, nn.BatchNorm3d)]
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_folded_convolution_by_hand(bias: bool, affine: bool) -> None:
    """A kernel of one voxel: γ (w x + b − μ) / √(σ² + ε) + β."""
    layers = nn.Sequential(nn.Conv3d(1, 1, 1, bias=bias), nn.BatchNorm3d(1, eps=0.5, affine=affine)).eval()
    convolution, norm = layers[0], layers[1]
    convolution.weight.data.fill_(3.0)
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(3.5)
    if bias:
        convolution.bias.data.fill_(7.0)
    if affine:
        norm.weight.data.fill_(5.0)
        norm.bias.data.fill_(-1.0)
    gamma, beta = (5.0, -1.0) if affine else (1.0, 0.0)
    by_hand = gamma * (3.0 * 11.0 + (7.0 if bias else 0.0) - 2.0) / 2.0 + beta
    found = by_torch.quick(layers)(torch.full((1, 1, 1, 1, 1), 11.0))
    assert found.item() == pytest.approx(by_hand, rel=1e-6)


def test_a_batch_norm_before_a_convolution_stays() -> None:
    layers = nn.Sequential(nn.BatchNorm3d(1), nn.Conv3d(1, 1, 1)).eval()
    assert [type(layer) for layer in by_torch.quick(layers)] == [nn.BatchNorm3d, nn.Conv3d]


# -- the check of the first batch -----------------------------------------------------------------------------------


def maps(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(2, 4, 3, 1, 1)).astype(np.float32), "b": np.ones((2, 1, 3, 1, 1), np.float32)}


def test_relative_errors_by_hand() -> None:
    expected, found = maps(), maps()
    assert relative_errors(found, expected) == Errors(0.0, 0.0)
    found["a"][1, :, 2, 0, 0] += [0.0, 3e-3, 0.0, 4e-3]  # one vector of six, moved by 5e-3
    length = np.sqrt(np.mean([np.linalg.norm(expected["a"][n, :, i, 0, 0]) ** 2 for n in range(2) for i in range(3)]))
    errors = relative_errors(found, expected)
    assert errors.worst == pytest.approx(5e-3 / length, rel=1e-4)
    assert errors.overall == pytest.approx(5e-3 / length / np.sqrt(6), rel=1e-4)
    found["b"][0] = 2.0  # three of six vectors, by all their length: the output that is furthest off counts
    assert relative_errors(found, expected) == Errors(pytest.approx(np.sqrt(0.5)), pytest.approx(1.0))


def test_relative_errors_of_what_cannot_be_compared() -> None:
    infinite = Errors(np.inf, np.inf)
    assert relative_errors({"a": maps()["a"]}, maps()) == infinite
    assert relative_errors({**maps(), "b": np.ones((2, 1, 1, 1, 1), np.float32)}, maps()) == infinite
    zeros = {"a": np.zeros((1, 2, 1, 1, 1), np.float32)}
    assert relative_errors(zeros, zeros) == Errors(0.0, 0.0)
    assert relative_errors({"a": zeros["a"] + 1}, zeros) == infinite
    for name in ("a", "b"):
        errors = relative_errors({**maps(), name: maps()[name] * np.nan}, maps())
        assert np.isnan([errors.overall, errors.worst]).all()
        assert not errors.within(BOUNDS["fp32"])


def test_the_bounds() -> None:
    assert Errors(1e-5, 5e-5).within(BOUNDS["fp32"])
    assert not Errors(1.1e-5, 2e-5).within(BOUNDS["fp32"])
    assert not Errors(5e-6, 5.1e-5).within(BOUNDS["fp32"])
    assert Errors(1e-2, 4e-2).within(BOUNDS["bf16"])
    assert not Errors(1e-3, 6e-2).within(BOUNDS["bf16"])  # one wrong vector among thousands


def moved(by: float) -> Checked:
    return Checked(lambda values: {"a": values + by}, lambda values: {"a": values}, Runtime("openvino"), "encoder 'e'")


ONES = np.ones((2, 1, 1, 1, 1), np.float32)


def test_a_runtime_within_the_bound_is_believed_and_pytorch_let_go() -> None:
    calls = []

    def reference(values: np.ndarray) -> dict[str, np.ndarray]:
        calls.append(values)
        return {"a": values}

    checked = Checked(lambda values: {"a": values + np.float32(5e-6)}, reference, Runtime("openvino"), "encoder 'e'")
    for _ in range(3):
        checked(ONES)
    assert len(calls) == 1
    assert checked._reference is None


@pytest.mark.parametrize(("by", "found"), [(1e-4, "1.0e-04 (1.0e-04)"), (np.nan, "nan (nan)")])
def test_a_runtime_beyond_the_bound_is_refused_for_every_batch(by: float, found: str) -> None:
    said = re.escape(f"at most 1e-05 (5e-05 of a single vector), found {found} on the first batch")
    checked = moved(by)
    for _ in range(2):
        with pytest.raises(RuntimeMismatch, match=said) as refused:
            checked(ONES)
    assert "openvino" in refused.value.message
    assert "encoder 'e'" in refused.value.message
    assert refused.value.next_step == "--runtime torch"
    assert (refused.value.kind, refused.value.exit_code) == ("encoder_mismatch", 13)


def test_where_pytorch_itself_is_refused_it_is_the_device() -> None:
    checked = Checked(lambda values: {"a": values + 1}, lambda values: {"a": values}, Runtime("torch"), "e")
    with pytest.raises(RuntimeMismatch, match="that PyTorch gives on a CPU") as refused:
        checked(ONES)
    assert refused.value.next_step == "--device cpu"


def test_what_is_refused_in_bfloat16_may_be_right_in_float32() -> None:
    checked = Checked(lambda values: {"a": values + 1}, lambda values: {"a": values}, Runtime("torch", "bf16"), "e")
    with pytest.raises(RuntimeMismatch, match="at most 1e-02") as refused:
        checked(ONES)
    assert refused.value.next_step == "--precision fp32, or --runtime torch"


# -- the cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An encoder folder, and a cache that no other test sees."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return keep(tmp_path / "encoder")


def opened(folder: Path) -> Encoder:
    return load_encoder(folder, "cpu", runtime=Runtime("openvino"))


def graphs() -> list[Path]:
    folder = exported.cache_folder()
    assert folder is not None
    return sorted(folder.iterdir()) if folder.is_dir() else []


def no_export(*_: object) -> bytes:
    raise AssertionError("exported again")


def test_a_graph_is_exported_once_and_kept_by_the_cards_id(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(path.name for path in kept.iterdir())
    opened(kept)
    (graph,) = graphs()
    assert graph.name == exported.graph_name(read_card(kept))
    assert graph.name.startswith(f"{read_card(kept).id}-isimed{__version__}-torch{torch.__version__}")
    assert sorted(path.name for path in kept.iterdir()) == before  # nothing is written beside the weights
    monkeypatch.setattr(exported, "export", no_export)
    opened(kept)


def test_a_graph_of_another_version_is_not_used(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network does with its weights is code, of which the card's id says nothing."""
    opened(kept)
    monkeypatch.setattr(exported, "version", lambda name: {"isimed-index": "0.0.9"}[name])
    opened(kept)
    first, second = graphs()
    assert first.name != second.name
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert exported.graph_name(read_card(kept)) not in {first.name, second.name}


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "a folder"])
def test_a_damaged_graph_is_exported_again(kept: Path, damage: str) -> None:
    opened(kept)
    (graph,) = graphs()
    whole = graph.read_bytes()
    if damage == "a folder":
        graph.unlink()
        graph.mkdir()
    else:
        flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
        graph.write_bytes({"cut": whole[:-9], "flipped": flipped, "empty": b""}[damage])
    patches = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 32)).astype(np.float32)
    assert error(opened(kept).encode(patches), plain(kept).encode(patches)) <= BOUNDS["fp32"]
    assert graphs() == [graph]
    if damage != "a folder":
        assert graph.read_bytes() == whole


def test_a_graph_under_the_name_of_another_card_is_not_believed(kept: Path, tmp_path: Path) -> None:
    opened(kept)
    (graph,) = graphs()
    torch.manual_seed(2)
    other = keep(tmp_path / "other")
    wrong = graph.with_name(graph.name.replace(read_card(kept).id, read_card(other).id))
    wrong.write_bytes(graph.read_bytes())
    patches = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 32)).astype(np.float32)
    assert error(opened(other).encode(patches), plain(other).encode(patches)) <= BOUNDS["fp32"]


def test_a_graph_of_other_weights_is_refused_on_its_first_batch(kept: Path, tmp_path: Path) -> None:
    """Even one with the right name and hash, as only somebody who may write to the cache could leave it."""
    torch.manual_seed(2)
    other = keep(tmp_path / "other")
    card = read_card(other)
    graph = exported.graph_of(card, our_network(card, weights_file(other, card)))
    (path,) = graphs()
    path.unlink()
    exported._keep(path.with_name(path.name.replace(card.id, read_card(kept).id)), graph)
    with pytest.raises(RuntimeMismatch, match="on the first batch"):
        opened(kept).encode(np.ones((1, 32, 32, 32), np.float32))


@pytest.mark.parametrize("where", ["a file in the way", "no home"])
def test_without_a_cache_every_opening_exports(kept: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    if where == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)
    else:
        (kept.parent / "cache").write_text("no folder")
    patches = np.ones((1, 32, 32, 32), np.float32)
    same_bits(opened(kept).encode(patches), opened(kept).encode(patches))


# -- what is asked for ----------------------------------------------------------------------------------------------


def test_runtimes_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="runtime auto, torch, openvino, onnx, found 'tensorrt'"):
        Runtime("tensorrt")
    with pytest.raises(UsageError, match="precision fp32 or bf16, found 'fp8'"):
        Runtime("torch", "fp8")
    with pytest.raises(UsageError, match="onnx has no precision bf16") as refused:
        Runtime("onnx", "bf16")
    assert "--runtime torch or openvino" in refused.value.next_step


@pytest.mark.parametrize(("name", "package"), [("openvino", "openvino"), ("onnx", "onnxruntime"), ("openvino", "onnx")])
def test_a_runtime_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    folder = keep(tmp_path / "encoder")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=f"runtime {name} needs the package {package}") as missing:
        load_encoder(folder, "cpu", runtime=Runtime(name))
    assert missing.value.next_step == f"pip install 'isimed-index[{name}]', or --runtime torch"


def test_other_runtimes_are_for_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = keep(tmp_path / "encoder")
    monkeypatch.setattr(running, "choose_device", lambda device: torch.device("meta" if device == "cuda" else "cpu"))
    with pytest.raises(UsageError, match="openvino computes on the CPU, found --device cuda"):
        load_encoder(folder, "cuda", runtime=Runtime("openvino"))


def test_openvino_reports_to_nobody(tmp_path: Path) -> None:
    """Its package counts every import at its makers' unless `openvino_telemetry` cannot be imported."""
    pytest.importorskip("openvino")
    code = (
        "import sys, socket\n"
        "def refused(*_): raise AssertionError('a connection')\n"
        "socket.socket.connect = refused\n"
        "from isimed_index.encoders.runtimes.by_openvino import openvino_run\n"
        "try: openvino_run(b'no graph', ['a'], 'fp32', 1)\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print(sys.modules['openvino_telemetry'], [name for name in sys.modules if 'telemetry.' in name])\n"
    )
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["EncoderMismatch", "None []"]
    assert not list(tmp_path.iterdir())


def test_a_runtime_is_recorded_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Runtime("torch").record() == {"name": "torch", "precision": "fp32", "version": torch.__version__}
    onnxruntime = pytest.importorskip("onnxruntime")

    def nothing(name: str) -> str:  # the distribution onnxruntime-gpu brings the package onnxruntime
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    assert Runtime("onnx").record()["version"] == onnxruntime.__version__
    monkeypatch.delitem(sys.modules, "onnxruntime")
    assert Runtime("onnx").record()["version"] is None  # it has not run here
    assert type(Runtime("torch", "bf16").record()["version"]) is str  # not PyTorch's own class, which pickles as such
