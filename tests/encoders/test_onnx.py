"""ONNX files as encoders: what they answer is what torch computes, and a graph that does not fit is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx_graphs import EDGE, kernel_elsewhere, weights, write_graph

from isimed_index.encoders.card import MODEL, EncoderCard
from isimed_index.encoders.onnx_model import FACTORY
from isimed_index.encoders.protocol import Encoder
from isimed_index.encoders.runtime import load_encoder, open_encoder
from isimed_index.errors import EncoderMismatch, MissingExtra, StoreDamaged, UsageError
from isimed_index.store.files import file_digest
from isimed_index.testing.conformance import EncoderConformance

CARD = EncoderCard(
    name="graph",
    factory=FACTORY,
    network={},
    weights_sha256=None,
    patch_vox=EDGE,
    stride_vox=4,
    spacing_mm=2.0,
    outputs={"descriptor": 5, "embedding": 5},
    match_output="descriptor",
    metric="cosine",
    pool="mean",
)


def opened(file: Path, device: str = "cpu", **change: Any) -> Encoder:
    card = replace(CARD, model_sha256=file_digest(file)[1], **change)
    return open_encoder(card, file, device)


class TestOnnx(EncoderConformance):
    batch: int | str = "n"

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self.file = write_graph(tmp_path / MODEL, batch=self.batch)

    def make(self) -> Encoder:
        return opened(self.file)


class TestOnnxOneByOne(TestOnnx):
    batch = 1


def patches(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (n, EDGE, EDGE, EDGE)).astype(np.float32)


@pytest.mark.parametrize("batch", ["n", 1])
@pytest.mark.parametrize("axes", ["RAS", "LSA"])
def test_vectors_are_those_of_torch(tmp_path: Path, batch: int | str, axes: str) -> None:
    found = opened(write_graph(tmp_path / MODEL, batch=batch), axes=axes).encode(patches())
    shown = patches() if axes == "RAS" else patches().transpose(0, 1, 3, 2)[:, ::-1].copy()
    kernel, bias = map(torch.from_numpy, weights())
    maps = torch.tanh(torch.nn.functional.conv3d(torch.from_numpy(shown)[:, None], kernel, bias, stride=4))
    expected = maps.mean((2, 3, 4)).numpy()
    np.testing.assert_allclose(found["descriptor"], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["embedding"], expected, rtol=0, atol=1e-5)


def test_an_encoder_directory_with_a_graph_is_loaded(tmp_path: Path) -> None:
    import json

    file = write_graph(tmp_path / MODEL)
    card = replace(CARD, model_sha256=file_digest(file)[1])
    (tmp_path / "card.json").write_text(json.dumps(card.to_json()))
    loaded = load_encoder(tmp_path, "cpu")
    assert loaded.card == card
    np.testing.assert_array_equal(loaded.encode(patches())["descriptor"], opened(file).encode(patches())["descriptor"])
    file.unlink()
    with pytest.raises(StoreDamaged, match=MODEL):
        load_encoder(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("graph", "change", "says"),
    [
        ({"channels": 2}, {}, "one input of float32"),
        ({"edge": 16}, {}, r"\(n, 1, 8, 8, 8\)"),
        ({"batch": 4}, {}, "one input of float32"),
        ({"kind": 11}, {}, "no ONNX graph that can be run|one input of float32"),  # float64
        ({"extra_input": True}, {}, "one input of float32"),
        ({"names": ("features", "embedding")}, {}, "not 'descriptor' of its card"),
        ({}, {"outputs": {"descriptor": 6}}, r"expected vectors \(3, 6\)"),
        ({}, {"pool": None}, "map of 2×2×2"),
    ],
)
def test_a_graph_that_does_not_fit_its_card_is_refused(
    tmp_path: Path, graph: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    file = write_graph(tmp_path / MODEL, **graph)
    with pytest.raises(EncoderMismatch, match=says) as refused:
        opened(file, **change).encode(patches())
    assert refused.value.next_step


def test_a_graph_that_fails_when_it_runs_is_a_typed_error(tmp_path: Path) -> None:
    """A free edge says nothing of which patches the graph can take: this one needs four voxels."""
    file = write_graph(tmp_path / MODEL, edge="p")
    assert opened(file).encode(patches())["descriptor"].shape == (3, 5)
    with pytest.raises(EncoderMismatch, match="fails on patches of 3³"):
        opened(file, patch_vox=3).encode(np.zeros((1, 3, 3, 3), np.float32))


@pytest.mark.parametrize("location", ["{folder}/kernel.bin", "kernel.bin", "../kernel.bin", "/etc/hostname"])
def test_a_graph_that_reads_other_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], location: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for folder in (tmp_path, here):  # where onnxruntime would find it, and read it
        (folder / "kernel.bin").write_bytes(weights()[0].tobytes())
    file = write_graph(here / MODEL, kernel=kernel_elsewhere(location.format(folder=here)))
    with pytest.raises(EncoderMismatch, match="in other files") as refused:
        opened(file)
    assert "inside the file" in refused.value.next_step
    assert capfd.readouterr() == ("", "")


def test_a_constant_in_a_branch_that_lies_elsewhere_is_found_too(tmp_path: Path) -> None:
    file = write_graph(tmp_path / MODEL)
    model = onnx.load(file)
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=kernel_elsewhere("kernel.bin"))],
        "inner",
        [],
        [helper.make_tensor_value_info("c", 1, None)],
    )
    branch = helper.make_node("If", ["yes"], ["unused"], then_branch=inner, else_branch=inner)
    model.graph.node.extend([helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("t", 9, [], [True]))])
    model.graph.node.append(branch)
    file.write_bytes(model.SerializeToString())
    with pytest.raises(EncoderMismatch, match="in other files"):
        opened(file)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04.", b"no graph", b"\x08\x07"], ids=["empty", "pickle", "text", "cut"]
)
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MODEL).write_bytes(content)
    with pytest.raises(EncoderMismatch, match=r"no ONNX graph|one input"):
        opened(tmp_path / MODEL)


def test_another_graph_than_that_of_the_card_is_refused(tmp_path: Path) -> None:
    file = write_graph(tmp_path / MODEL)
    with pytest.raises(EncoderMismatch, match="hash on its card"):
        open_encoder(replace(CARD, model_sha256="0" * 64), file, "cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"model_sha256": "0" * 64, "factory": "isimed_index.encoders.networks:ValidNet"},
        {"model_sha256": "0" * 64, "factory": "their_lab:build"},
        {"model_sha256": "0" * 64, "weights_sha256": "0" * 64},
        {"weights_sha256": "0" * 64},
    ],
)
def test_a_card_says_one_kind_of_file(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(EncoderMismatch, match="and hashes of"):
        open_encoder(replace(CARD, **change), write_graph(tmp_path / MODEL), "cpu")


def test_devices(tmp_path: Path) -> None:
    import onnxruntime

    file = write_graph(tmp_path / MODEL)
    opened(file, "auto")
    with pytest.raises(UsageError, match="auto, cpu or cuda"):
        opened(file, "tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(UsageError, match="CUDA"):
            opened(file, "cuda")


def test_without_onnxruntime_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match="onnxruntime") as missing:
        opened(write_graph(tmp_path / MODEL))
    assert "isimed-index[onnx]" in missing.value.next_step


def test_our_own_encoders_do_not_load_onnxruntime() -> None:
    code = "import sys, isimed_index.encoders.runtime; print('onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def small_graph(file: Path, node: onnx.NodeProto, kind: int) -> Path:
    """`descriptor` is the mean of the patch (n, 1), `more` is what `node` makes of it."""
    mean = helper.make_node("ReduceMean", ["patch"], ["descriptor"], axes=[2, 3, 4], keepdims=0)
    graph = helper.make_graph(
        [mean, node],
        "graph",
        [helper.make_tensor_value_info("patch", onnx.TensorProto.FLOAT, ["n", 1, EDGE, EDGE, EDGE])],
        [
            helper.make_tensor_value_info("descriptor", onnx.TensorProto.FLOAT, None),
            helper.make_tensor_value_info("more", kind, None),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    file.write_bytes(model.SerializeToString())
    return file


def test_an_output_that_the_card_does_not_name_may_have_any_shape(tmp_path: Path) -> None:
    loss = helper.make_node("ReduceMean", ["descriptor"], ["more"], keepdims=0)
    encoder = opened(small_graph(tmp_path / MODEL, loss, onnx.TensorProto.FLOAT), outputs={"descriptor": 1})
    patches = np.random.default_rng(0).normal(size=(3, EDGE, EDGE, EDGE)).astype(np.float32)
    found = encoder.encode(patches)
    assert found.keys() == {"descriptor"}
    np.testing.assert_allclose(found["descriptor"][:, 0], patches.mean(axis=(1, 2, 3)), atol=1e-6)


def test_an_output_of_text_is_no_vector(tmp_path: Path) -> None:
    text = helper.make_node("Cast", ["descriptor"], ["more"], to=onnx.TensorProto.STRING)
    file = small_graph(tmp_path / MODEL, text, onnx.TensorProto.STRING)
    encoder = opened(file, outputs={"more": 1}, match_output="more")
    with pytest.raises(EncoderMismatch, match="expected numbers"):
        encoder.encode(np.ones((2, EDGE, EDGE, EDGE), np.float32))


def test_the_runtime_reads_nothing_but_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own format is told by four bytes of the file, and is none that the package onnx could look over."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "own")
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(write_graph(tmp_path / "graph"), options, providers=["CPUExecutionProvider"])
    monkeypatch.setattr("isimed_index.encoders.onnx_model._refuse_other_files", lambda *_: None)
    with pytest.raises(EncoderMismatch, match="no ONNX graph that can be run"):
        opened(tmp_path / "own")
