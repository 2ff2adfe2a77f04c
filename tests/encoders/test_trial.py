"""Which runtime `auto` is: what is asked for, what was used before, or the fastest of a short trial."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from isimed_index.config import PretrainConfig
from isimed_index.encoders.card import CARD, read_card
from isimed_index.encoders.networks import build_network
from isimed_index.encoders.onnx_model import FACTORY as ONNX
from isimed_index.encoders.protocol import Encoder
from isimed_index.encoders.runtime import load_encoder, write_encoder
from isimed_index.encoders.runtimes import trial
from isimed_index.encoders.runtimes.checked import Checked
from isimed_index.encoders.runtimes.kind import Auto, Runtime
from isimed_index.encoders.runtimes.trial import Choice, Job, cheaper_strides, choose, round_of
from isimed_index.errors import EncoderMismatch, UsageError
from isimed_index.pretrain.trainer import new_card

LONG, SHORT = 10**9, 10


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A long job for a small network; every runtime is installed."""
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "_EDGE", 8)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    card = new_card(PretrainConfig(width=2, embedding_dim=4, descriptor_dim=5), "test", "tiny")
    write_encoder(tmp_path, card, build_network(card.factory, card.outputs, card.network).state_dict())
    return Job(str(tmp_path), "cpu", (), Runtime(), LONG, 4)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Patches a second by runtime: what a clock would say would be another thing each time. 0 fails."""
    said: dict[str, float] = {"torch": 100.0, "openvino": 200.0, "onnx": 90.0}

    def round_of(encoder: Encoder, stride_vox: int) -> Callable[[], float]:
        name = {"OpenVinoRun": "openvino", "OnnxRun": "onnx"}.get(type(innermost(encoder)).__name__, "torch")

        def once() -> float:
            if not said[name]:
                raise EncoderMismatch("it fails in /home/somebody/file.cpp")
            return said[name]

        return once

    monkeypatch.setattr(trial, "round_of", round_of)
    return said


def innermost(encoder: Encoder) -> object:
    run = encoder._run  # type: ignore[attr-defined]
    return run._run if isinstance(run, Checked) else run


@pytest.mark.parametrize(
    ("stride", "near"), [(1, []), (2, []), (4, []), (12, []), (3, [2, 4]), (6, [4, 8]), (7, [4, 8]), (9, [8, 12])]
)
def test_strides_that_share_work_are_named_beside_one_that_does_not(job: Job, stride: int, near: list[int]) -> None:
    assert cheaper_strides(replace(job, stride_vox=stride)) == near


def test_the_fastest_is_chosen(job: Job, rates: dict[str, float]) -> None:
    assert choose(job) == Choice(Runtime("openvino"), rates)
    rates["onnx"] = 300.0
    assert choose(job).runtime == Runtime("onnx")


def test_one_that_is_hardly_faster_is_not(job: Job, rates: dict[str, float]) -> None:
    """Noise must not decide: the bits of a rerun would change with it."""
    rates["openvino"] = 119.0
    assert choose(job) == Choice(Runtime("torch"), rates)
    rates["openvino"] = 121.0
    assert choose(job).runtime == Runtime("openvino")


def test_what_fails_is_left_aside_and_said(job: Job, rates: dict[str, float]) -> None:
    rates["openvino"] = 0.0
    found = choose(job)
    assert found.runtime == Runtime("torch")
    assert found.patches_per_s == {"torch": 100.0, "onnx": 90.0}
    assert found.failed == {"openvino": "it fails in file.cpp"}


def test_a_short_job_is_not_worth_a_trial(job: Job, rates: dict[str, float]) -> None:
    assert choose(replace(job, patches=5_999)) == Choice(Runtime("torch"))
    assert choose(replace(job, patches=6_000)).runtime == Runtime("openvino")


def test_of_a_few_patches_nothing_is_measured(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trial, "round_of")
    assert choose(replace(job, patches=999)) == Choice(Runtime("torch"))


def test_what_was_used_before_is_used_again(job: Job, rates: dict[str, float]) -> None:
    """A rerun after an interruption goes on as it began, however little is left to do."""
    rates["onnx"] = 300.0
    assert choose(replace(job, before="openvino", patches=SHORT)) == Choice(Runtime("openvino"))
    assert choose(replace(job, before="torch")).runtime == Runtime("onnx")


def test_pytorch_that_was_settled_on_is_used_again(job: Job, rates: dict[str, float]) -> None:
    """A second trial of an interrupted job might end otherwise, and mix the bits of two runtimes in one store."""
    rates["openvino"] = 110.0
    tried = choose(job)
    assert (tried.runtime, tried.runtime.auto) == (Runtime("torch"), Auto(LONG, trial=True))
    rates["openvino"] = 300.0
    assert choose(replace(job, before="torch", settled=True)) == Choice(Runtime("torch"))
    assert choose(replace(job, before="openvino", settled=True, patches=SHORT)) == Choice(Runtime("openvino"))
    assert choose(replace(job, before="torch", settled=False)).runtime == Runtime("openvino")


def test_what_auto_chose_says_for_how_long_a_job_and_what_was_named_does_not(job: Job, rates: dict[str, float]) -> None:
    assert choose(job).runtime.record()["auto"] == {"patches": LONG, "trial": True}
    assert choose(replace(job, patches=SHORT)).runtime.record()["auto"] == {"patches": SHORT, "trial": False}
    assert choose(replace(job, patches=5_999)).runtime.auto == Auto(5_999, trial=False)
    assert choose(replace(job, before="onnx", patches=7)).runtime.auto == Auto(7, trial=False)
    assert "auto" not in choose(replace(job, asked=Runtime("torch"))).runtime.record()


def test_what_was_used_before_may_not_be_installed_here(
    job: Job, rates: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert choose(replace(job, before="openvino")).runtime == Runtime("torch")
    assert choose(replace(job, before="something newer")).runtime == Runtime("torch")


def test_what_was_asked_for_is_taken(job: Job) -> None:
    assert choose(replace(job, asked=Runtime("onnx"), before="openvino")) == Choice(Runtime("onnx"))


@pytest.mark.parametrize("asked", [Runtime("auto", "bf16"), Runtime("openvino"), Runtime("torch", "bf16")])
def test_an_encoder_of_another_program_runs_in_one_way(job: Job, asked: Runtime) -> None:
    """And what is advised is not refused in its turn."""
    folder = Path(job.encoder)
    card = replace(read_card(folder), factory=ONNX, weights_sha256=None, model_sha256="0" * 64)
    (folder / CARD).write_text(json.dumps(card.to_json()), encoding="utf-8")
    with pytest.raises(UsageError, match=f"is run by onnx in fp32, found {asked}") as refused:
        choose(replace(job, asked=asked))
    assert refused.value.next_step == "--runtime onnx --precision fp32"
    assert choose(replace(job, asked=Runtime("onnx"))) == choose(job) == Choice(Runtime("onnx"))


def test_bfloat16_is_tried_where_there_is_any(job: Job, rates: dict[str, float]) -> None:
    rates["onnx"] = 900.0
    found = choose(replace(job, asked=Runtime("auto", "bf16")))
    assert found.runtime in (Runtime("openvino", "bf16"), Runtime("torch", "bf16"))
    assert "onnx" not in found.patches_per_s


def test_a_gpu_has_no_trial(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "choose_device", lambda device: torch.device("cuda"))
    assert choose(job) == Choice(Runtime("torch"))


def test_without_another_runtime_there_is_no_trial(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delattr(trial, "round_of")
    assert choose(job) == Choice(Runtime("torch"))


def test_a_real_trial(job: Job) -> None:
    found = choose(job)
    assert not found.failed
    assert set(found.patches_per_s) == {"torch", "openvino", "onnx"}
    assert all(0 < rate < 1e9 for rate in found.patches_per_s.values())
    assert found.runtime.name in found.patches_per_s


@pytest.mark.parametrize(("stride", "patches"), [(4, 8), (2, 64), (16, 1), (3, 16)])
def test_a_trial_encodes_as_the_job_will(job: Job, monkeypatch: pytest.MonkeyPatch, stride: int, patches: int) -> None:
    """In passes over a volume where the lattice allows it, else patch by patch (a step of 3 against one of 4)."""
    encoder = load_encoder(Path(job.encoder), "cpu")
    seen: list[tuple[int, ...]] = []
    run = encoder._run  # type: ignore[attr-defined]
    encoder._run = lambda values: (seen.append(values.shape), run(values))[1]  # type: ignore[attr-defined]
    counted: list[int] = []
    monkeypatch.setattr(trial, "_rate", lambda work, n: (work(), counted.append(n), 1.0)[2])
    assert round_of(encoder, stride)() == 1.0
    assert counted == [patches]
    assert (max(shape[0] for shape in seen) > 1) == (stride == 3)
    assert np.prod(seen[0][2:]) >= 32**3
