"""Encoders as goods: they leave a store, travel, and come into another one under the same id, or not at all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cohorts import COPIES, Cohort, add_random_encoder, tiny_scan
from onnx_graphs import EDGE, write_graph
from safetensors.torch import save_file

import isimed_index as isi
from isimed_index.encoders.card import CARD, MODEL, WEIGHTS, EncoderCard
from isimed_index.encoders.networks import build_network
from isimed_index.encoders.runtime import load_encoder
from isimed_index.errors import EncoderMismatch, EncoderNotTrusted, StoreDamaged, UsageError
from isimed_index.store.files import file_digest
from isimed_index.testing.encoder import ToyEncoder

MODULE = """
import torch

def build(width):
    return torch.nn.Sequential(torch.nn.Conv3d(1, width, 8, stride=8), torch.nn.Tanh(), torch.nn.Conv3d(width, 24, 2))

def batch_statistics(width):
    return build(width).append(Whitened())

def dead(width):
    return build(width).append(Scaled(0.0))

def scaled(width, gain):
    return build(width).append(Scaled(gain))

def stateful(width):
    return Stateful(*build(width))

class Scaled(torch.nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain
    def forward(self, y):
        return y * self.gain

class Stateful(torch.nn.Sequential):
    def get_extra_state(self):
        return {"epoch": 1}

class Whitened(torch.nn.Module):
    def forward(self, y):
        return y - y.mean(0)
"""
THEIRS: dict[str, Any] = {
    "name": "theirs",
    "factory": "goods_nets:build",
    "network": {"width": 6},
    "patch_vox": 16,
    "stride_vox": 4,
    "spacing_mm": 4.0,
    "outputs": {"descriptor": {"dim": 24}},
    "match_output": "descriptor",
    "metric": "cosine",
}


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "goods_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "goods_nets", raising=False)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    import goods_nets

    return goods_nets


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An encoder of this library that has left its store."""
    store = isi.create(tmp_path / "first.isimed")
    add_random_encoder(store.path)
    store.export_encoder("random", tmp_path / "random")
    return tmp_path / "random"


def written(folder: Path, nets: Any, **change: Any) -> tuple[Path, Path]:
    """Somebody's weights, and a card for them."""
    save_file(nets.build(6).state_dict(), folder / "their.safetensors")
    (folder / "their.json").write_text(json.dumps({**THEIRS, **change}))
    return folder / "their.safetensors", folder / "their.json"


def refused(store: isi.Store, error: type[Exception], says: str, *asked: Any, **more: Any) -> None:
    """An import that fails leaves no trace: no generation, no file."""
    before = sorted(path.relative_to(store.path) for path in store.path.rglob("*"))
    generation = store.generation
    with pytest.raises(error, match=says) as raised:
        store.import_encoder(*asked, **more)
    store.refresh()
    assert raised.value.next_step
    assert store.generation == generation
    left = {path.relative_to(store.path) for path in store.path.rglob("*")}
    assert sorted(path for path in left if path.parts[0] not in ("leases", "encoders")) == [
        path for path in before if path.parts[0] not in ("leases", "encoders")
    ]
    assert not list((store.path / "encoders").glob("*/*"))


def test_there_and_back(tmp_path: Path, exported: Path) -> None:
    first = isi.open(tmp_path / "first.isimed")
    assert sorted(path.name for path in exported.iterdir()) == [CARD, WEIGHTS]
    second = isi.create(tmp_path / "second.isimed")
    done = second.import_encoder(exported)
    assert (done.added, done.name, done.generation) == (True, "random", second.generation)
    assert second.encoder() == first.encoder(done.id)
    patches = np.random.default_rng(0).normal(size=(2, 32, 32, 32)).astype(np.float32)
    ours, theirs = (load_encoder(store.snapshot.encoder_path(), "cpu").encode(patches) for store in (first, second))
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert isi.check(second.path, read=1.0) == []


def test_the_same_again_changes_nothing(tmp_path: Path, exported: Path) -> None:
    store = isi.create(tmp_path / "second.isimed")
    done = store.import_encoder(exported, name="from the other site")
    again = store.import_encoder(exported)
    assert (again.added, again.id, again.name, again.generation) == (False, done.id, "from the other site", 1)
    assert store.encoders().num_rows == 1
    assert store.encoder("from the other site").id == done.id


def test_an_encoder_is_its_content_whatever_it_is_called(tmp_path: Path, exported: Path) -> None:
    store = isi.create(tmp_path / "second.isimed")
    done = store.import_encoder(exported, name="renamed")
    assert done.id == json.loads((exported / CARD).read_text())["id"]
    assert store.encoder().name == "renamed"
    for name in ("", "a\nb", "x" * 201):
        with pytest.raises(UsageError, match="printable"):
            store.import_encoder(exported, name=name)


@pytest.mark.parametrize("where", ["first.isimed/inside", "occupied", "nowhere/encoder"])
def test_an_export_has_a_place_of_its_own(tmp_path: Path, exported: Path, where: str) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file").touch()
    with pytest.raises(UsageError):
        isi.open(tmp_path / "first.isimed").export_encoder(None, tmp_path / where)


def edited(folder: Path, **change: Any) -> None:
    """The card with other fields, and an id that fits them."""
    fields = {**json.loads((folder / CARD).read_text()), **change}
    fields["id"] = EncoderCard.described(fields).id
    (folder / CARD).write_text(json.dumps(fields))


def other_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changed weights, with a card that has their hash."""
    network = build_network("isimed_index.encoders.networks:ValidNet", {"embedding": 8, "descriptor": 16}, {"width": 4})
    state = dict(network.state_dict())
    change(state)
    save_file(state, folder / WEIGHTS)
    edited(folder, weights_sha256=file_digest(folder / WEIGHTS)[1])


def rewritten(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(data)
    edited(folder, weights_sha256=file_digest(folder / WEIGHTS)[1])


def flipped(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-3] ^= 8
    (folder / WEIGHTS).write_bytes(data)


def tampered(folder: Path) -> None:
    (folder / CARD).write_text((folder / CARD).read_text().replace('"clip": 1.5', '"clip": 2.5'))


def said(folder: Path, before: str, after: str) -> None:
    """A card that says something else, as text: what is put in its place is no value that Python would write."""
    text = (folder / CARD).read_text()
    assert before in text
    (folder / CARD).write_text(text.replace(before, after))


def piped(file: Path) -> None:
    """A pipe that nobody writes into: whoever reads it waits for ever."""
    file.unlink()
    os.mkfifo(file)


OURS = "isimed_index.encoders.networks:ValidNet"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another hash": (flipped, "do not match the hash"),
    "a card whose id is not its hash": (tampered, "hashes to"),
    "a card that was cut": (lambda f: (f / CARD).write_text('{"id":'), "no encoder card"),
    "a deep card": (lambda f: (f / CARD).write_text('{"a":' * 100_000), "no encoder card"),
    "a large card": (lambda f: (f / CARD).write_text(json.dumps({"a": "x" * (1 << 20)})), "no encoder card"),
    "a spacing of NaN": (
        lambda f: (f / CARD).write_text((f / CARD).read_text().replace('"spacing_mm": 4.0', '"spacing_mm": NaN')),
        "no encoder card",
    ),
    **{
        f"{field} beyond all numbers": (lambda f, a=field, b=value: said(f, a, b), "no encoder card|lacks")
        for field, value in (
            ('"spacing_mm": 4.0', '"spacing_mm": 1e999'),
            ('"spacing_mm": 4.0', f'"spacing_mm": 1{"0" * 400}'),
            ('"clip": 1.5', '"clip": 1e999'),
            ('"training": {', '"training": {"rate": -1e999, '),
        )
    },
    "a name that moves the cursor": (lambda f: edited(f, name="a\x1b[31m\nb"), "name of 1 to 200 printable"),
    "a name that is no text": (lambda f: edited(f, name="\ud800"), "name of 1 to 200 printable"),
    "a pipe in place of weights": (lambda f: piped(f / WEIGHTS), "is no plain file"),
    "a list for a card": (lambda f: (f / CARD).write_text("[]"), "no encoder card"),
    "an empty card": (lambda f: (f / CARD).write_text("{}"), "schema"),
    "no card": (lambda f: (f / CARD).unlink(), "holds no card.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "missing or cut off"),
    "weights that were cut": (lambda f: rewritten(f, (f / WEIGHTS).read_bytes()[:999]), "missing or cut off"),
    "a pickle in place of weights": (lambda f: rewritten(f, pickle.dumps({"a": 1}, 4)), "is a pickle"),
    "a torch file in place of weights": (lambda f: torch.save({"a": 1}, f / WEIGHTS), "is a pickle"),
    **{
        f"a file {suffix} beside the weights": (lambda f, s=suffix: (f / f"w{s}").touch(), "called like one")
        for suffix in (".pt", ".pth", ".bin", ".ckpt", ".PKL")
    },
    "a tensor too few": (lambda f: other_weights(f, lambda s: s.pop("heads.descriptor.bias")), "is missing"),
    "a tensor too many": (lambda f: other_weights(f, lambda s: s.update(more=torch.ones(1))), "is not of it"),
    "a tensor of another shape": (
        lambda f: other_weights(f, lambda s: s.update({"heads.descriptor.bias": torch.ones(17)})),
        r"heads\.descriptor\.bias: expected \(16,\).*found \(17,\)",
    ),
    "a NaN among the weights": (
        lambda f: other_weights(f, lambda s: s.update({"heads.descriptor.bias": torch.full((16,), torch.nan)})),
        "NaN or infinite",
    ),
    "another width": (lambda f: edited(f, network={"width": 5}), "do not fit"),
    "a width beyond all memory": (lambda f: edited(f, network={"width": 10**9}), "do not fit|cannot be built"),
    "a width that is none": (lambda f: edited(f, network={"width": -1}), "cannot be built"),
    "a width of text": (lambda f: edited(f, network={"width": "4"}), "cannot be built"),
    "an unknown argument": (lambda f: edited(f, network={"width": 4, "depth": 2}), "depth"),
    "an unknown network": (lambda f: edited(f, factory="isimed_index.encoders.networks:Net"), "expected a network"),
    "one of our functions": (lambda f: edited(f, factory="isimed_index.api:create"), "expected a network"),
    "another patch": (lambda f: edited(f, patch_vox=64), "takes patches of 32"),
    "a patch beyond all memory": (lambda f: edited(f, patch_vox=10**6), "at most 256"),
    "an output too many": (
        lambda f: edited(f, outputs={n: {"dim": 8} for n in ("embedding", "descriptor", "more")}),
        "do not fit",
    ),
    "an output called like a method": (
        lambda f: edited(f, outputs={"keys": {"dim": 8}, "descriptor": {"dim": 16}}),
        "cannot be built|do not fit",
    ),
    "no weights on the card": (lambda f: edited(f, weights_sha256=None), "embeddings only"),
    "a graph that is not there": (
        lambda f: edited(f, weights_sha256=None, model_sha256="0" * 64),
        "goes with the factory|and hashes of",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_refused_and_leaves_no_trace(tmp_path: Path, exported: Path, what: str) -> None:
    spoil, says = BAD[what]
    spoil(exported)
    refused(isi.create(tmp_path / "second.isimed"), EncoderMismatch, says, exported)


def test_a_file_of_pickled_weights_is_refused_by_its_name_and_by_its_content(tmp_path: Path, nets: Any) -> None:
    store = isi.create(tmp_path / "s")
    _, card = written(tmp_path, nets)
    torch.save(nets.build(6).state_dict(), tmp_path / "their.pth")
    shutil.copyfile(tmp_path / "their.pth", tmp_path / "disguised.safetensors")
    refused(store, EncoderMismatch, "pickle", tmp_path / "their.pth")
    refused(store, EncoderMismatch, "pickle", tmp_path / "their.pth", card=card)
    refused(store, EncoderMismatch, "pickle", tmp_path / "disguised.safetensors", card=card)
    refused(store, UsageError, "with card.json, found the file", tmp_path / "their.safetensors")


def test_what_the_store_holds_is_refused_in_the_same_way(tmp_path: Path, exported: Path) -> None:
    """A generation that somebody else wrote is opened with the same care as what is imported."""
    loaded = {"another hash": EncoderMismatch, "a tensor too few": EncoderMismatch, "another patch": EncoderMismatch}
    loaded |= {"a pickle in place of weights": EncoderMismatch, "no weights": StoreDamaged, "no card": StoreDamaged}
    loaded |= {"a width beyond all memory": EncoderMismatch, "a width that is none": EncoderMismatch}
    loaded |= {"one of our functions": EncoderMismatch, "weights that were cut": StoreDamaged}
    for number, (what, error) in enumerate(loaded.items()):
        folder = tmp_path / str(number)
        shutil.copytree(exported, folder)
        BAD[what][0](folder)
        with pytest.raises(error) as raised:
            load_encoder(folder, "cpu")
        assert str(tmp_path) not in str(raised.value), what


# -- of other programs ------------------------------------------------------------------------------------------------


def test_an_encoder_of_another_program_comes_in_by_a_card(tmp_path: Path, nets: Any) -> None:
    weights, card = written(tmp_path, nets)
    store = isi.create(tmp_path / "s", trust="goods_nets")
    done = store.import_encoder(weights, card=card)
    kept = store.encoder()
    assert (done.id, done.added) == (kept.id, True)
    assert kept.weights_sha256 == file_digest(weights)[1]
    assert store.import_encoder(weights, card=card).added is False
    # It travels as ours do, and has the same id there.
    store.export_encoder(None, tmp_path / "travels")
    other = isi.create(tmp_path / "t", trust=["goods_nets:build"])
    assert other.import_encoder(tmp_path / "travels").id == done.id


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": "0" * 16}, "its content hashes to"),
        ({"weights_sha256": "0" * 64}, "another weights_sha256"),
        ({"model_sha256": "0" * 64}, "another model_sha256"),
        ({"metric": "dot"}, "their.json"),
        ({"outputs": {"descriptor": {"dim": 25}}}, r"expected vectors \(\d, 25\)"),
        ({"network": {"width": 7}}, "do not fit"),
        ({"factory": "goods_nets:batch_statistics"}, "when another patch is beside it"),
        ({"factory": "goods_nets:stateful"}, "other things than tensors"),
        ({"factory": "goods_nets:scaled", "network": {"width": 6, "gain": 1e-9}}, "too small .* 16 bits"),
        ({"factory": "goods_nets:scaled", "network": {"width": 6, "gain": 1e9}}, "too large .* 16 bits"),
        ({"factory": "goods_nets:dead"}, "'descriptor' is zero for every patch"),
        ({"factory": "goods_nets:nothing"}, "nothing"),
        ({"axis": "SPL"}, "unknown field 'axis'; did you mean 'axes'"),
        ({"stride_voxels": 4}, "unknown field 'stride_voxels'; did you mean 'stride_vox'"),
        ({"colour": "red"}, "unknown field 'colour'$"),
        (
            {"outputs": {"descriptor": {"dim": 24}, "position": {"dim": 2}}},
            "expected 3 dimensions of the output 'position', .* found 2",
        ),
        (
            {"outputs": {"position": {"dim": 3}}, "match_output": "position"},
            "expected match_output to be an output of vectors, found 'position'",
        ),
        ({"factory": "goods_nets"}, "package.module:callable"),
        ({"patch_vox": 40}, "map of 4×4×4"),
        ({"patch_vox": 4}, "fails on patches of 4³"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(tmp_path: Path, nets: Any, change: dict[str, Any], says: str) -> None:
    weights, card = written(tmp_path, nets, **change)
    refused(isi.create(tmp_path / "s", trust="goods_nets"), EncoderMismatch, says, weights, card=card)


def test_a_card_of_a_newer_version_is_refused_where_it_comes_in_and_says_why(tmp_path: Path, exported: Path) -> None:
    (exported / CARD).write_text(json.dumps({**json.loads((exported / CARD).read_text()), "rotation": "z"}))
    refused(isi.create(tmp_path / "s"), EncoderMismatch, "card.json: unknown field 'rotation'", exported)
    assert load_encoder(exported, "cpu").card.name == "random"  # what a store holds is told by its hash alone


def test_a_folder_in_place_of_weights_needs_no_card(tmp_path: Path, exported: Path, nets: Any) -> None:
    _, card = written(tmp_path, nets)
    (tmp_path / "empty").mkdir()
    store = isi.create(tmp_path / "s")
    for folder, says in ((exported, "leave out --card"), (tmp_path / "empty", "one of its files")):
        with pytest.raises(UsageError, match=f"found the folder {folder.name}") as raised:
            store.import_encoder(folder, card=card)
        assert says in raised.value.next_step


def test_without_trust_their_code_is_not_imported(
    tmp_path: Path, nets: Any, monkeypatch: pytest.MonkeyPatch, cohort: Cohort
) -> None:
    weights, card = written(tmp_path, nets)
    with isi.create(tmp_path / "s", trust="goods_nets") as store:
        store.add(cohort.file(COPIES[0]))
        store.import_encoder(weights, card=card)
        store.export_encoder(None, tmp_path / "travels")
    monkeypatch.delitem(sys.modules, "goods_nets")
    monkeypatch.delenv("ISIMED_TRUST", raising=False)
    store = isi.open(tmp_path / "s")  # as somebody who was sent this store
    with pytest.raises(EncoderNotTrusted, match="goods_nets:build"):
        store.index()
    refused(isi.create(tmp_path / "t"), EncoderNotTrusted, "goods_nets:build", tmp_path / "travels")
    refused(isi.create(tmp_path / "u"), EncoderNotTrusted, "goods_nets:build", weights, card=card)
    assert "goods_nets" not in sys.modules
    monkeypatch.setenv("ISIMED_TRUST", "goods_nets")
    isi.open(tmp_path / "t").import_encoder(tmp_path / "travels")
    assert "goods_nets" in sys.modules


@pytest.mark.parametrize("factory", ["os:system", "subprocess:check_call", "builtins:eval", "shutil:rmtree"])
def test_a_card_cannot_call_the_system(tmp_path: Path, nets: Any, factory: str) -> None:
    target = tmp_path / "fired"
    call = {"command": f"touch {target}"} if factory == "os:system" else {"args": ["touch", str(target)]}
    weights, card = written(tmp_path, nets, factory=factory, network=call)
    refused(isi.create(tmp_path / "s", trust="goods_nets"), EncoderNotTrusted, factory, weights, card=card)
    assert not target.exists()


def test_scans_are_indexed_and_asked_with_it(tmp_path: Path, nets: Any, cohort: Cohort) -> None:
    """The head is the same in all copies, so the place is found to within a lattice step, wherever the copy lies."""
    weights, card = written(tmp_path, nets)
    store = isi.create(tmp_path / "s", trust="goods_nets:build")
    store.add([cohort.file(COPIES[0]), cohort.file(COPIES[2])])
    done = store.index(encoder=store.import_encoder(weights, card=card).id)
    assert (len(done.encoded), done.refused) == (2, [])
    point = (10.0, 20.0, 30.0)
    for scan in (COPIES[0].stem, cohort.outside):  # a stored scan, and a file that has to be encoded first
        at = COPIES[0].moved(point) if isinstance(scan, str) else point
        answers = store.lookup(at, scan, same_subject="include")
        assert len(answers) >= 1
        [found] = [answer.xyz_mm for answer in answers if answer.scan == COPIES[2].stem]
        if isinstance(scan, str):
            assert np.linalg.norm(found - COPIES[2].moved(point)) < 4.0
    assert store.info()["encoders"] == ["theirs"]


def test_a_graph_comes_in_without_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {**THEIRS, "name": "graph", "patch_vox": EDGE, "pool": "mean", "network": {}}
    fields["outputs"] = {"descriptor": {"dim": 5}}
    del fields["factory"]  # follows from the file
    (tmp_path / "graph.json").write_text(json.dumps(fields))
    store = isi.create(tmp_path / "s", trust=())
    store.add(tiny_scan(tmp_path / "one.nii.gz", shape=(24, 20, 16)))
    store.import_encoder(write_graph(tmp_path / "theirs.onnx"), card=tmp_path / "graph.json")
    assert store.encoder().model_sha256 == file_digest(tmp_path / "theirs.onnx")[1]
    assert store.index().encoded == ["one"]
    assert isi.check(store.path, read=1.0) == []
    store.export_encoder("graph", tmp_path / "travels")
    assert sorted(path.name for path in (tmp_path / "travels").iterdir()) == [CARD, MODEL]
    other = isi.create(tmp_path / "t")
    assert other.import_encoder(tmp_path / "travels").id == store.encoder().id
    store.export(tmp_path / "cohort", layout="parquet", voxels=True)  # and with the whole store
    third = isi.create(tmp_path / "third")
    third.import_(tmp_path / "cohort")
    third.add(tiny_scan(tmp_path / "two.nii.gz", seed=1, shape=(24, 20, 16)))
    assert third.index().encoded == ["two"]
    (tmp_path / "travels" / MODEL).write_bytes(b"another graph")
    refused(isi.create(tmp_path / "u"), EncoderMismatch, "hash on its card", tmp_path / "travels")


def test_an_encoder_that_is_known_by_its_embeddings_does_not_travel(tmp_path: Path) -> None:
    from isimed_index.store.repository import Repository
    from isimed_index.store.transaction import Proposal

    store = isi.create(tmp_path / "s")
    with Repository.open(store.path).transaction("import") as transaction:
        directory = transaction.stage("encoder")
        (directory / CARD).write_text(json.dumps(ToyEncoder().card.to_json()))
        artefact = transaction.add("encoder", directory, encoder=ToyEncoder().card.id)
        transaction.commit(lambda _: Proposal(add=[artefact]))
    store.refresh()
    with pytest.raises(UsageError, match="embeddings only"):
        store.export_encoder("toy", tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_a_folder_is_an_encoder_for_index(tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = isi.create(tmp_path / "s")
    store.add(tiny_scan(tmp_path / "one.nii.gz", shape=(70, 70, 50)))
    done = store.index(encoder=exported.name)
    assert (done.encoder, done.encoded) == (json.loads((exported / CARD).read_text())["id"], ["one"])
    (exported / CARD).unlink()
    assert store.index(encoder="random").skipped == ["one"]  # that of the store


def test_reading_and_writing_cards_loads_no_torch(tmp_path: Path, exported: Path) -> None:
    code = (
        "import sys, isimed_index as isi\n"
        f"store = isi.open({str(tmp_path / 'first.isimed')!r}, mode='r')\n"
        f"store.encoder('random'); store.export_encoder('random', {str(tmp_path / 'again')!r})\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
