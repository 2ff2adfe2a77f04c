"""Training in the millimetres of a reference: moved copies of one head; transforms are stored as `register` does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cohorts import Copy, head, rigid, write_copy
from numpy.typing import NDArray
from pretraining import config, sources
from scipy.spatial.distance import cdist, pdist

import isimed_index as isi
from isimed_index.errors import ConfigError, NotFound, UsageError
from isimed_index.pretrain import trainer, validation
from isimed_index.pretrain.sampler import Batch, Cohort, batches, draw
from isimed_index.pretrain.trainer import train
from isimed_index.register.align import Alignment, Kind
from isimed_index.register.rows import Registered, replacing, row_of
from isimed_index.scans.chunks import open_chunks
from isimed_index.scans.prepare import Volume
from isimed_index.space import Affine, apply_affine, inverse
from isimed_index.store.repository import Repository
from isimed_index.testing.templates import ellipsoid_head

pytestmark = pytest.mark.usefixtures("short_training")

COPIES = (
    Copy("sub-01_T1w", "RAS", rigid()),
    Copy("sub-02_T1w", "PSR", rigid((8, -6, 25), (37, -12, 5))),
    Copy("sub-03_T1w", "AIL", rigid((-20, 12, 30), (-50, 20, 100))),
)
COMMON = rigid((3, 5, -7), (10, 200, -30))  # where the reference has the head itself: neither upright nor at the origin
MIDDLE = np.full(3, 17.5)  # of a view of 36 voxels
CONFIG = """
pairs = "all"
spacing_mm = 4.0
width = 1
embedding_dim = 2
descriptor_dim = 2
view_vox = 36
crops_per_scan = 3
patches_per_scan = 8
batch_scans = 2
epochs = 1
steps_per_epoch = 1
warmup_steps = 0
validation_share = 0.4
augmentation = { rotation_deg = 0.0, scale = 0.0 }
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the copies, without transforms; treat it as read-only."""
    folder = tmp_path_factory.mktemp("copies")
    isi.create(folder / "store").add([write_copy(folder / "in", copy, head()) for copy in COPIES])
    return folder / "store"


@pytest.fixture
def store(stored: Path, tmp_path: Path) -> Path:
    path = Path(shutil.copytree(stored, tmp_path / "store"))
    for copy in COPIES:
        place(path, copy.stem, COMMON @ inverse(copy.motion))
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that trainings draw, those of held-out subjects too."""
    seen: list[Batch] = []

    def spied(*args: Any, **more: Any) -> Iterator[Batch]:
        for batch in batches(*args, **more):
            seen.append(batch)
            yield batch

    for module in (trainer, validation):
        monkeypatch.setattr(module, "batches", spied)
    return seen


def place(path: Path, scan: str, affine: Affine, reference: str = "atlas", kind: Kind = "rigid") -> None:
    """Store where a scan lies in the frame of a reference."""
    with Repository.open(path).transaction("register") as transaction:
        done = Registered(scan, "voxels", Alignment(affine, 0.5, 1.0, 0.9), np.zeros(3), 1)
        row = row_of(done, reference, kind, "settings")
        transaction.commit(lambda now: replacing(now, [row], []))


def pretrain(path: Path, more: str = "", **options: Any) -> isi.EncoderCard:
    file = path.parent / "more.toml"
    file.write_text(more + CONFIG)
    return isi.open(path).pretrain(preset="tiny", config=file, device="cpu", **options)


REGISTERED = 'registered_to = "atlas"\n'
ONLY = "scan IN (SELECT scan FROM transforms WHERE reference = 'atlas' AND kind = 'rigid')"


def test_copies_of_a_head_are_as_far_from_each_other_as_places_of_the_head() -> None:
    """The same places in both; the transforms are those of a perfect registration."""
    template = ellipsoid_head(4.0)
    values = template.values / template.values.max() * 2 - 1
    motions = (rigid(), rigid((0, 10, 35), (60, -20, 5)))

    def places(motion: Affine, registered_to: str) -> NDArray[np.float64]:
        made = Volume(values, motion @ template.affine, -1.0, values > -0.8)
        cohort = Cohort([lambda: made], 10**9, [COMMON @ inverse(motion)] if registered_to else None)
        setup = config(batch_scans=1, crops_per_scan=8, pairs="all", registered_to=registered_to)
        return np.array([apply_affine(affine, MIDDLE) for affine in draw(cohort, setup, 0).affines])

    one, two = (places(motion, "atlas") for motion in motions)
    np.testing.assert_allclose(cdist(one, two), cdist(one, one), atol=1e-9)
    one, two = (places(motion, "") for motion in motions)
    assert np.abs(cdist(one, two) - cdist(one, one)).max() > 10  # a centroid takes out no rotation


@pytest.mark.filterwarnings("ignore:the name:isimed_index.errors.IsimedNote")  # trained twice
def test_a_training_measures_in_the_millimetres_of_the_reference(store: Path, drawn: list[Batch]) -> None:
    card = pretrain(store, REGISTERED)
    registered = list(drawn)
    assert (card.training["registered_to"], card.training["registered_kind"]) == ("atlas", "rigid")
    drawn.clear()
    file = store.parent / "own.toml"
    file.write_text(CONFIG.replace('"all"', '"within"'))  # patients' own millimetres
    isi.open(store).pretrain(preset="tiny", config=file, device="cpu")
    assert [len(batch.affines) for batch in registered] == [len(batch.affines) for batch in drawn] == [12, 12]
    head_now = isi.open(store).snapshot
    axes = {copy.stem: open_chunks(head_now.chunks_path(copy.stem), copy.stem).affine[:3, :3] for copy in COPIES}
    motions = {copy.stem: copy.motion for copy in COPIES}
    seen = set()
    for ours, own in zip(registered, drawn, strict=True):
        common, of_head = [], []
        for affine, patient in zip(ours.affines, own.affines, strict=True):
            scan = next(name for name, axis in axes.items() if np.allclose(axis, patient[:3, :3], atol=1e-5))
            seen.add(scan)
            common.append(apply_affine(affine, MIDDLE))
            of_head.append(apply_affine(inverse(motions[scan]) @ patient, MIDDLE))
        np.testing.assert_allclose(common, apply_affine(COMMON, of_head), atol=1e-3)
        np.testing.assert_allclose(pdist(common), pdist(of_head), atol=1e-3)
    assert seen == set(motions)  # two are trained on, and one is held out


@pytest.mark.filterwarnings("ignore:the name:isimed_index.errors.IsimedNote")  # trained twice
def test_of_two_kinds_the_one_that_is_named_is_taken(store: Path, drawn: list[Batch]) -> None:
    for copy in COPIES:
        place(store, copy.stem, np.diag([2.0, 2.0, 2.0, 1.0]) @ COMMON @ inverse(copy.motion), kind="affine")
    pretrain(store, REGISTERED)
    pretrain(store, REGISTERED + 'registered_kind = "affine"\n')
    rigidly, stretched = drawn[0], drawn[2]
    np.testing.assert_allclose(stretched.affines[:, :3], 2 * rigidly.affines[:, :3], atol=1e-9)


def test_a_scan_without_the_transform_is_refused_by_name(store: Path, stored: Path) -> None:
    with pytest.raises(NotFound, match=r"sub-01_T1w.*no rigid transform to the reference 'other'") as refused:
        pretrain(store, 'registered_to = "other"\n')
    assert "atlas (rigid)" in refused.value.next_step
    with pytest.raises(NotFound, match=r"sub-01_T1w.*no affine transform") as refused:
        pretrain(store, REGISTERED + 'registered_kind = "affine"\n')
    assert "atlas (rigid)" in refused.value.next_step
    bare = shutil.copytree(stored, store.parent / "bare")
    with pytest.raises(NotFound, match="sub-01_T1w") as refused:
        pretrain(bare, REGISTERED)
    assert refused.value.next_step == "isimed register"
    place(bare, "sub-01_T1w", np.eye(4))
    with pytest.raises(NotFound, match=r"scan 'sub-02_T1w' has no rigid .* one more has none") as refused:
        pretrain(bare, REGISTERED)
    assert f'--where "{ONLY}"' in refused.value.next_step
    assert isi.open(bare).snapshot.matching("scans", ONLY).num_rows == 1


def test_a_training_is_resumed_with_the_transforms_that_it_began_with(store: Path) -> None:
    first = pretrain(store, REGISTERED)
    with pytest.warns(isi.errors.IsimedNote, match="finished already"):
        assert pretrain(store, REGISTERED, resume=True).id == first.id
    place(store, "sub-02_T1w", rigid(shift=(1, 0, 0)) @ COMMON @ inverse(COPIES[1].motion))
    with pytest.raises(UsageError, match="no checkpoint"):
        pretrain(store, REGISTERED, resume=True)


def test_a_reference_is_of_pairs_across_scans_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='pairs "all"'):
        config(registered_to="atlas")
    with pytest.raises(ConfigError, match="registered_to is empty"):
        config(pairs="all", registered_kind="affine")
    with pytest.raises(UsageError, match="transform of every scan"):
        train(config(pairs="all", registered_to="atlas"), sources(3), tmp_path, device="cpu")
    with pytest.raises(UsageError, match="transform of every scan"):
        train(config(pairs="all"), sources(3), tmp_path, device="cpu", frames=[np.eye(4)] * 3)
