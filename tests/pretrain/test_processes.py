"""Two processes, connected by gloo as torchrun does it, learn what one process learns from the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pretraining_ranks
import pytest
import torch
from safetensors.torch import load_file

import isimed_index as isi
from isimed_index.pretrain.processes import ALONE, joined

RANKS = Path(pretraining_ranks.__file__)
CONFIG = """
width = 1
embedding_dim = 2
descriptor_dim = 2
view_vox = 36
crops_per_scan = 1
patches_per_scan = 8
batch_scans = 2
epochs = 2
steps_per_epoch = 2
precision = "float32"
warmup_steps = 2
validation_share = 0.3
"""


def run(*arguments: str) -> str:
    """A Python command with one thread; its standard output."""
    path = os.pathsep.join([str(RANKS.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_losses_gradients_and_statistics_are_those_of_one_process(tmp_path: Path) -> None:
    pretraining_ranks.main(tmp_path / "one")
    run(*TWO, str(RANKS), str(tmp_path / "two"))
    alone, joint = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert alone.keys() == joint.keys()
    assert alone["charts.taken"].count_nonzero() > 4 * 20  # of the whole batch
    for kind in pretraining_ranks.METHODS:
        gradients = [key for key in alone if key.startswith(f"{kind}.gradient")]
        assert any("trunk" in key for key in gradients)
        assert any("method" in key for key in gradients) == (kind in ("regisimed", "coordinate"))
    for key, expected in alone.items():
        kind = key.split(".")[0]  # the rounding of gradients that should be zero is small beside the others
        largest = max(float(alone[other].double().abs().max()) for other in alone if other.startswith(f"{kind}."))
        torch.testing.assert_close(joint[key], expected, rtol=1e-8, atol=1e-12 * largest, msg=key)
    variances = [key for key in alone if key.endswith("running_var")]
    assert variances
    assert all(not torch.equal(alone[key], torch.ones_like(alone[key])) for key in variances)


@pytest.mark.filterwarnings("ignore:the name:isimed_index.errors.IsimedNote")  # trained twice
def test_torchrun_trains_one_encoder_and_one_process_speaks(tmp_path: Path) -> None:
    from cohorts import tiny_scan

    for n in range(4):
        tiny_scan(tmp_path / "in" / f"s{n}.nii", n, (40, 40, 40))
    isi.create(tmp_path / "store").add(tmp_path / "in")
    (tmp_path / "more.toml").write_text(CONFIG)
    options = ("--preset", "tiny", "--config", str(tmp_path / "more.toml"), "--device", "cpu", "--no-progress")
    command = ("-m", "isimed_cli.main", "pretrain", "-s", str(tmp_path / "store"), *options)
    said = run(*TWO, *command).split()
    store = isi.open(tmp_path / "store")
    assert said == [artefact.fields["encoder"] for artefact in store.snapshot.artefacts("encoder")]
    assert not list((tmp_path / "store" / "tmp").glob("pretrain-*"))
    alone = store.pretrain(preset="tiny", config=tmp_path / "more.toml", device="cpu")
    weights = [load_file(path) for path in sorted((tmp_path / "store").glob("encoders/*/weights.safetensors"))]
    assert len(weights) == 2 or alone.id == said[0]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[-1][name], tensor, rtol=1e-3, atol=1e-4)


def test_a_batch_has_to_be_shared_evenly(tmp_path: Path) -> None:
    from pretraining import config, sources

    from isimed_index.errors import UsageError
    from isimed_index.pretrain.processes import Processes
    from isimed_index.pretrain.trainer import train

    with pytest.raises(UsageError, match="multiple of the 2 processes") as refused:
        train(config(batch_scans=3), sources(3), tmp_path, device="cpu", processes=Processes(0, 2))
    assert refused.value.next_step == "--batch-scans 4"


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from isimed_index.errors import UsageError

    for name, value in {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a machine with two GPUs
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="a GPU for each process, found 2") as refused, joined("auto"):
        pass
    assert refused.value.next_step == "torchrun --nproc-per-node 2, or --device cpu"


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for world in (None, "1"):
        if world:
            monkeypatch.setenv("RANK", "0")
            monkeypatch.setenv("WORLD_SIZE", world)
        with joined("cpu") as processes:
            assert processes is ALONE
            tensor = torch.ones(2)
            assert processes.gather(tensor) is tensor
            assert processes.from_first(tensor) is tensor
            assert [processes.any(flag) for flag in (True, False)] == [True, False]
