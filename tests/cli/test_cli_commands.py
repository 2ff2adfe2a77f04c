"""Each command parses its options, calls one function of the library with them, and renders what comes back."""

from __future__ import annotations

import inspect
import io
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import isimed_index
from isimed_cli.main import app, main
from isimed_index.api import Store
from isimed_index.encode.forecast import IndexPlan
from isimed_index.errors import (
    EncoderMismatch,
    Incompatible,
    OutsideScan,
    RecallBelowTarget,
    ScanRefused,
    SqlRefused,
    StoreDamaged,
    StoreFull,
    StoreLocked,
    StoreNotFound,
    StoreWarning,
    TrainingWarning,
    UsageError,
    WorkerFailed,
)
from isimed_index.indexing import IndexReport, IndexStopped
from isimed_index.ingest.report import AddReport
from isimed_index.report import added

ROWS = pa.table({"scan": ["a", "b"], "x_mm": [1.25, -7.0], "voxel": [[1, 2, 3], [4, 5, 6]]})
LANDMARKS = pa.table({"source": ["a", "a", "b"], "label": [3, 4, 3], "lookup_mm": [1.5, 2.5, 0.5]})
REFUSAL = SimpleNamespace(name="bad.nii", kind="scan_refused", reason="not a NIfTI file", next_step="convert it")


class FakeStore:
    """Stands in for the facade: remembers each call, answers with what the test put in `answers`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        matches = SimpleNamespace(to_arrow=lambda: ROWS, source="a")
        self.answers: dict[str, Any] = {
            "add": SimpleNamespace(**asdict(AddReport(added=["a"], unchanged=["b"]))),
            "pretrain": SimpleNamespace(id="c0ffee", name="first"),
            "index": IndexReport(
                encoder="c0ffee",
                encoded=["a"],
                skipped=["b"],
                patches=12,
                recall_at_10=0.99,
                index_kind="flat",
                runtime="openvino",
                precision="fp32",
                trial_patches_per_s={"torch": 125.0, "openvino": 230.0},
                patches_per_s=207.0,
                bare_patches_per_s=230.0,
            ),
            "plan_index": IndexPlan(
                encoder="c0ffee",
                to_encode=["a", "b"],
                skipped=["c"],
                runtime="openvino",
                precision="fp32",
                processes=1,
                patches=12_345,
                patches_per_s=210.4,
                bytes_written=34_100_000,
                seconds=7200.0,
                measured_scans=["a"],
                basis=dict.fromkeys(("patches", "patches_per_s", "bytes_written", "seconds"), "extrapolated"),
            ),
            "lookup": matches,
            "search_patches": matches,
            "similar": ROWS,
            "evaluate": SimpleNamespace(to_arrow=lambda: ROWS, landmarks_to_arrow=lambda: LANDMARKS),
            "sql": ROWS,
            "scans": ROWS,
            "encoders": ROWS,
            "log": ROWS,
            "info": {"scans": 2, "encoders": ["c0ffee"], "bytes": 3.5},
            "plot": None,
        }

    def __getattr__(self, name: str) -> Any:
        if name not in self.answers:
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("progress", None)
            self.calls.append((name, args, kwargs))
            if isinstance(self.answers[name], BaseException):
                raise self.answers[name]
            return self.answers[name]

        return call


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeStore:
    """A fake store behind `isimed_index.open`, in a folder with the files that examples name."""
    fake = FakeStore()
    fake.opened = []  # type: ignore[attr-defined]

    def opened(path: Path, mode: str = "r", generation: int | None = None) -> FakeStore:
        fake.opened.append((Path(path).name, mode))  # type: ignore[attr-defined]
        return fake

    monkeypatch.setitem(vars(isimed_index), "open", opened)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "participants.tsv").write_text("participant_id\tsplit\n")
    (tmp_path / "more.toml").write_text("epochs = 3\n")
    return fake


QUERY = {"space": "ras", "k": 10, "where": None, "within_mm": None, "same_subject": "exclude"}
QUERY |= {"cycle": False, "exact": False, "encoder": None}
IMAGES = Path("images")
# Command line → the one call of the facade that it must make.
CALLS: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    (
        "add images --labels {stem}_seg.nii.gz --metadata images/participants.tsv --subject-from s(..) --volume 2 "
        "--workers 3",
        "add",
        ([IMAGES],),
        {
            "labels": "{stem}_seg.nii.gz",
            "label_names": None,
            "metadata": [IMAGES / "participants.tsv"],
            "layout": "auto",
            "volume": 2,
            "analyze_axes": None,
            "subject_from": "s(..)",
            "spacing_mm": None,
            "workers": 3,
            "surrogate_key": None,
            "surrogate_ids": False,
            "keep_source": False,
            "allow_burned_in": False,
            "thumbnails": None,
        },
    ),
    (
        "pretrain --method simclr --preset tiny --config more.toml --epochs 4 --batch-scans 2 --patches-per-scan 8 "
        "--device cpu --resume --name first --where nx>3 --seed 5 --tensorboard curves --wandb heads",
        "pretrain",
        (),
        {
            "method": "simclr",
            "preset": "tiny",
            "config": Path("more.toml"),
            "epochs": 4,
            "batch_scans": 2,
            "patches_per_scan": 8,
            "device": "cpu",
            "resume": True,
            "name": "first",
            "where": "nx>3",
            "seed": 5,
            "tensorboard": Path("curves"),
            "wandb": "heads",
        },
    ),
    (
        "index --encoder first --stride 8 --where nx>3 --scheduler processes --device cpu --min-recall 0.9 "
        "--max-ram 2G --max-latency 0.5 --runtime openvino --precision bf16 --refit",
        "index",
        (),
        {
            "encoder": "first",
            "stride_mm": 8.0,
            "where": "nx>3",
            "scheduler": "processes",
            "device": "cpu",
            "min_recall": 0.9,
            "max_ram": 2 * 1024**3,
            "max_latency_ms": 0.5,
            "refit": True,
            "runtime": "openvino",
            "precision": "bf16",
        },
    ),
    (
        "index --dry-run --encoder first --stride 8 --where nx>3 --scheduler processes --device cpu --min-recall 0.9 "
        "--runtime openvino --precision bf16",
        "plan_index",
        (),
        {
            "encoder": "first",
            "stride_mm": 8.0,
            "where": "nx>3",
            "scheduler": "processes",
            "device": "cpu",
            "runtime": "openvino",
            "precision": "bf16",
        },
    ),
    (
        "query --point -12,-40,88 --scan a",
        "lookup",
        (),
        {**QUERY, "point": (-12.0, -40.0, 88.0), "scan": "a", "min_confidence": None},
    ),
    (
        "query --point=-1.5,2e1,0 --scan b.nii.gz --space lps -k 3 --where nx>3 --within 20 --same-subject only "
        "--cycle --exact --encoder first --min-confidence 0.5",
        "lookup",
        (),
        {
            "point": (-1.5, 20.0, 0.0),
            "scan": Path("b.nii.gz"),
            "space": "lps",
            "k": 3,
            "where": "nx>3",
            "within_mm": 20.0,
            "same_subject": "only",
            "cycle": True,
            "min_confidence": 0.5,
            "exact": True,
            "encoder": "first",
        },
    ),
    ("query --patches --point 1,2,3 --scan a", "search_patches", (), {**QUERY, "point": (1.0, 2.0, 3.0), "scan": "a"}),
    (
        "similar --scan a --label 7 -k 3 --where nx>3 --same-subject only --pooling mean_sd --encoder first",
        "similar",
        ("a",),
        {"label": "7", "k": 3, "where": "nx>3", "same_subject": "only", "pooling": "mean_sd", "encoder": "first"},
    ),
    (
        "sql SELECT -p n 3 -p name x -p r=0.5 --timeout 2",
        "sql",
        ("SELECT",),
        {"params": {"n": 3, "name": "x", "r": 0.5}, "timeout_s": 2.0},
    ),
    (
        "sql SELECT -p id 007 -p n 1_000 -p x nan -p y=1e3 -p z -4",
        "sql",
        ("SELECT",),
        {"params": {"id": "007", "n": "1_000", "x": "nan", "y": 1000.0, "z": -4}, "timeout_s": 30.0},
    ),
    ("info", "info", (), {}),
    ("ls", "scans", (), {}),
    ("ls encoders", "encoders", (), {}),
    ("log", "log", (), {}),
    (
        "evaluate --pairs 4 --seed 2 --label-where label<9",
        "evaluate",
        (),
        {"encoder": None, "where": None, "label_where": "label<9", "pairs": 4, "seed": 2},
    ),
    ("plot umap --out u.png", "plot", ("umap",), {"out": Path("u.png"), "encoder": None, "where": None, "seed": 0}),
    ("plot training --out t.png", "plot", ("training",), {"out": Path("t.png"), "encoder": None}),
    (
        "plot match --point 1,2,-3 --scan a --out m.png",
        "plot",
        ("match",),
        {
            "out": Path("m.png"),
            "encoder": None,
            "point": (1.0, 2.0, -3.0),
            "scan": "a",
            "space": "ras",
            "k": 3,
            "where": None,
        },
    ),
]
ids = [line[:30] for line, *_ in CALLS]


@pytest.mark.parametrize(("line", "method", "args", "kwargs"), CALLS, ids=ids)
def test_a_command_makes_one_call(store: FakeStore, line: str, method: str, args: tuple[Any, ...], kwargs: Any):
    assert main(line.split()) == 0
    assert store.calls == [(method, args, kwargs)]
    writes = method in ("add", "pretrain", "index")
    assert store.opened == [("cohort.isimed", "a" if writes else "r")]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("line", "method", "args", "kwargs"), CALLS, ids=ids)
def test_the_call_fits_the_facade(line: str, method: str, args: tuple[Any, ...], kwargs: Any):
    inspect.signature(getattr(Store, method)).bind(None, *args, **kwargs)


def test_index_and_pretrain_add_paths_first(store: FakeStore):
    assert main(["index", "images"]) == 0
    assert main(["pretrain", "images"]) == 0
    assert [name for name, *_ in store.calls] == ["add", "index", "add", "pretrain"]


def test_add_makes_a_store_where_there_is_none(store: FakeStore, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def none_there(path: str, **_: Any) -> None:
        raise StoreNotFound("no store at new.isimed", next_step="isimed add")

    made: list[str] = []
    monkeypatch.setitem(vars(isimed_index), "open", none_there)
    monkeypatch.setitem(vars(isimed_index), "create", lambda path: made.append(path) or store)
    assert main(["add", "images", "-s", "new.isimed"]) == 0
    assert made == ["new.isimed"]
    assert main(["ls", "-s", "new.isimed"]) == 10
    assert main(["index", "-s", "new.isimed"]) == 10
    assert capsys.readouterr().err.count("error[store_not_found]") == 2


def test_add_opens_the_store_that_another_process_makes_meanwhile(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    answers: list[Any] = [StoreNotFound("not yet"), store]

    def opened(path: str, **_: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def refused(path: str) -> None:
        raise UsageError(f"{path} is not empty")

    monkeypatch.setitem(vars(isimed_index), "open", opened)
    monkeypatch.setitem(vars(isimed_index), "create", refused)
    assert main(["add", "images"]) == 0
    assert capsys.readouterr().err == ""
    answers += [StoreNotFound("not here"), StoreNotFound("not here")]
    assert main(["add", "images"]) == 2
    assert capsys.readouterr().err == "error[usage]: cohort.isimed is not empty.\n"


class TestOptions:
    def test_every_option_has_an_environment_variable(self, store: FakeStore):
        variables = {
            "ISIMED_STORE": "other.isimed",
            "ISIMED_QUERY_POINT": "-1,-2,-3",
            "ISIMED_QUERY_SCAN": "a",
            "ISIMED_QUERY_K": "4",
            "ISIMED_FORMAT": "ndjson",
        }
        result = CliRunner().invoke(app, ["query"], env=variables)
        assert result.exit_code == 0, result.output
        assert store.calls[0][2]["point"] == (-1.0, -2.0, -3.0)
        assert store.calls[0][2]["k"] == 4
        assert store.opened == [("other.isimed", "r")]  # type: ignore[attr-defined]
        assert json.loads(result.stdout.splitlines()[0])["scan"] == "a"

    @pytest.mark.parametrize("point", ["1,2", "1,2,3,4", "a,b,c", "", "nan,0,0", "1,2,inf", "1;2;3"])
    def test_a_malformed_point_is_one_clear_line(self, store: FakeStore, capsys: Any, point: str):
        assert main(["query", "--point", point, "--scan", "a"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error[usage]: ")
        assert "three" in lines[0]
        assert lines[0].endswith("Next: isimed query --help")
        assert store.calls == []

    @pytest.mark.parametrize(
        "line",
        [
            "query --scan a",
            "query --point 1,2,3 --scan a -k 0",
            "query --point 1,2,3 --scan a --space mni",
            "query --pint 1,2,3 --scan a",
            "add",
            "add nowhere",
            "add images --workers 0",
            "index --max-ram much",
            "index --min-recall 1.5",
            "sql SELECT -p name",
            "plot match --out m.png",
            "plot circle --out m.png",
            "plot umap",
            "nothing",
        ],
    )
    def test_wrong_usage_is_exit_2_and_one_line(self, store: FakeStore, capsys: Any, line: str):
        assert main(line.split()) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert errors[0].startswith("error[usage]: ")
        assert "Next: isimed" in errors[0]
        assert store.calls == []

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("query --point 1,2,3 --scan a -k 0", "expected 1 or more, found 0"),
            ("query --point 1,2,3 --scan a -k x", "expected a whole number, found 'x'"),
            ("query --point 1,2,3 --scan a --within x", "expected a number, found 'x'"),
            ("index --min-recall 1.5", "expected at most 1, found 1.5"),
            ("query --point 1,2,3 --scan a --space mni", "'mni' is not one of 'ras', 'lps', 'voxel', 'canonical'"),
        ],
    )
    def test_wrong_values_are_said_in_our_words(self, store: FakeStore, capsys: Any, line: str, said: str):
        assert main(line.split()) == 2
        told = capsys.readouterr().err
        assert f": {said}. Next: isimed " in told
        assert "nput" not in told
        assert "Value error" not in told

    @pytest.mark.parametrize(
        ("text", "size"), [("4G", 4 * 1024**3), ("512M", 512 * 1024**2), ("1.5GiB", 3 * 1024**3 // 2), ("100", 100)]
    )
    def test_sizes(self, store: FakeStore, text: str, size: int):
        assert main(["index", "--max-ram", text]) == 0
        assert store.calls[0][2]["max_ram"] == size

    def test_a_spacing_is_a_number_of_mm(self, store: FakeStore):
        assert main(["add", "images", "--spacing", "2"]) == 0
        assert store.calls[0][2]["spacing_mm"] == 2.0

    def test_sql_reads_its_statement_from_stdin(self, store: FakeStore, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("sys.stdin", io.StringIO("SELECT 1"))
        assert main(["sql", "-"]) == 0
        assert store.calls[0][1] == ("SELECT 1",)


class TestBatches:
    def test_part_refused_is_exit_3_listed_and_reported(self, store: FakeStore, capsys: Any, tmp_path: Path):
        store.answers["add"].refused = [REFUSAL]
        assert main(["add", "images", "--report", "report.json"]) == 3
        told = capsys.readouterr()
        assert told.out == "added 1 · unchanged 1 · refused 1\n"
        assert told.err == "error[scan_refused]: bad.nii: not a NIfTI file. Next: convert it\n"
        assert json.loads((tmp_path / "report.json").read_text()) == {
            "added": ["a"],
            "unchanged": ["b"],
            "refused": [
                {"name": "bad.nii", "kind": "scan_refused", "reason": "not a NIfTI file", "next_step": "convert it"}
            ],
            "files": [],
        }

    def test_a_reason_that_names_its_file_is_not_prefixed_again(self, store: FakeStore, capsys: Any):
        refusal = SimpleNamespace(name="bad.nii", kind="scan_refused", reason="bad.nii: no image.", next_step="")
        store.answers["add"].refused = [refusal]
        assert main(["add", "images"]) == 3
        assert capsys.readouterr().err == "error[scan_refused]: bad.nii: no image.\n"

    def test_all_refused_is_exit_1(self, store: FakeStore):
        store.answers["add"] = SimpleNamespace(**asdict(AddReport()) | {"refused": [REFUSAL]})
        assert main(["add", "images"]) == 1

    def test_labels_without_a_name_are_noted(self, store: FakeStore, capsys: Any, tmp_path: Path):
        (names := tmp_path / "names.csv").write_text("label,name\n1,brain\n")
        store.answers["add"].unnamed = [3, 87]
        assert main(["add", "images"]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("2 labels have no name")
        assert "(3, 87)" in line
        assert "--label-names FILE" in line
        assert main(["add", "images", "--label-names", str(names)]) == 0
        assert "Next: add them to names.csv;" in capsys.readouterr().err
        assert main(["add", "images", "--quiet"]) == 0
        assert capsys.readouterr().err == ""

    def test_rows_of_an_add(self, store: FakeStore, capsys: Any):
        store.answers["add"].refused = [REFUSAL]
        assert main(["add", "images", "--json"]) == 3
        rows = json.loads(capsys.readouterr().out)
        assert [(row["name"], row["status"], row["kind"]) for row in rows] == [
            ("a", "added", None),
            ("b", "unchanged", None),
            ("bad.nii", "refused", "scan_refused"),
        ]

    def test_index_tells_counts_and_refusals(self, store: FakeStore, capsys: Any, tmp_path: Path):
        store.answers["index"].refused.append(REFUSAL)
        assert main(["index", "--report", "r.json"]) == 3
        told = capsys.readouterr().out
        lines = dict(line.split(maxsplit=1) for line in told.splitlines())
        assert lines["recall_at_10"] == "0.99"
        assert lines["runtime"] == "openvino"
        assert lines["trial_patches_per_s"] == "torch=125.00 openvino=230.00"
        assert (lines["patches_per_s"], lines["share_of_bare"]) == ("207.00", "0.90")
        assert lines["refused"] == "1"
        assert json.loads((tmp_path / "r.json").read_text())["encoded"] == ["a"]

    @pytest.mark.parametrize(
        ("options", "encoded", "told"),
        [
            (["--runtime", "torch"], [], "nothing was encoded anew: the vectors of 3 scans were made by openvino/fp32"),
            (["--runtime", "torch"], ["d"], "the vectors of 3 scans, encoded before, were made by openvino/fp32"),
            (["--runtime", "openvino"], [], ""),
            ([], [], ""),
        ],
    )
    def test_index_tells_that_another_runtime_made_what_is_stored(
        self, store: FakeStore, capsys: Any, options: list[str], encoded: list[str], told: str
    ):
        by = {"openvino/fp32": 3, **({"torch/fp32": 1} if "torch" in options else {})}
        store.answers["index"] = IndexReport("c0ffee", 8.0, encoded, ["a", "b", "c"], recall_at_10=1.0, skipped_by=by)
        assert main(["index", *options]) == 0
        said = capsys.readouterr()
        assert said.err == (f"{told}\n" if told else "")
        assert "skipped_by" in said.out

    def test_an_interrupted_index_writes_its_report(self, store: FakeStore, capsys: Any, tmp_path: Path):
        store.answers["add"].refused.append(REFUSAL)
        store.answers["index"] = KeyboardInterrupt()  # before it knew what to do
        assert main(["index", "images", "--report", "r.json"]) == 130
        told = json.loads((tmp_path / "r.json").read_text())
        assert (told["interrupted"], [item["name"] for item in told["refused"]]) == (True, ["bad.nii"])
        assert "error[interrupted]" in capsys.readouterr().err
        store.answers["index"] = IndexStopped(IndexReport("c0ffee", 8.0, ["a"], interrupted=True), 3)
        assert main(["index", "images", "--report", "r.json"]) == 130
        told = json.loads((tmp_path / "r.json").read_text())
        assert (told["encoded"], told["interrupted"], len(told["refused"])) == (["a"], True, 1)
        assert "of 3 scans 1 are encoded and stay" in capsys.readouterr().err

    def test_an_index_that_fails_writes_its_report(
        self, store: FakeStore, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        (tmp_path / "r.json").write_text('{"of": "an earlier run"}')
        store.answers["add"].refused.append(REFUSAL)
        failed = WorkerFailed("the scheduler was lost", next_step="the same again")
        failed.report = IndexReport("c0ffee", 8.0, ["a"], runtime="torch")
        store.answers["index"] = failed
        assert main(["index", "images", "--report", "r.json"]) == 1
        told = json.loads((tmp_path / "r.json").read_text())
        assert (told["encoded"], told["runtime"], told["interrupted"]) == (["a"], "torch", False)
        assert [item["name"] for item in told["refused"]] == ["bad.nii"]
        kind = {"kind": "worker_failed", "reason": "the scheduler was lost", "next_step": "the same again"}
        assert told["error"] == kind
        said = capsys.readouterr().err
        assert "error[worker_failed]: the scheduler was lost" in said
        assert "error[scan_refused]" in said
        store.answers["index"] = ZeroDivisionError("a bug")
        assert main(["index", "--report", "r.json"]) == 1
        told = json.loads((tmp_path / "r.json").read_text())
        assert (told["error"]["kind"], told["refused"]) == ("internal", [])

    def test_an_index_whose_scans_cannot_be_added_writes_its_report(
        self, store: FakeStore, capsys: Any, tmp_path: Path
    ):
        store.answers["add"] = StoreFull("no room left", next_step="isimed gc")
        assert main(["index", "images", "--report", "r.json"]) == 1
        assert json.loads((tmp_path / "r.json").read_text())["error"]["kind"] == "store_full"
        assert "error[store_full]" in capsys.readouterr().err

    def test_a_dry_run_says_what_its_numbers_are_founded_on(self, store: FakeStore, capsys: Any):
        assert main(["index", "--dry-run"]) == 0
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert (lines["to_encode"], lines["skipped"], lines["damaged"]) == ("2", "1", "0")
        assert lines["patches"] == "12,345 (extrapolated)"
        assert lines["bytes_written"] == "34.1 MB (extrapolated)"
        assert lines["seconds"] == "2.0 h (extrapolated)"
        assert lines["measured_scans"] == "a"
        assert "memory_bytes" not in lines
        assert store.opened == [("cohort.isimed", "r")]  # type: ignore[attr-defined]

    def test_a_dry_run_tells_of_damaged_scans_and_of_nothing_to_do(self, store: FakeStore, capsys: Any, tmp_path: Path):
        store.answers["plan_index"] = IndexPlan("c0ffee", skipped=["a"], damaged=[REFUSAL])
        assert main(["index", "--dry-run", "--json", "--report", "r.json"]) == 0
        told = capsys.readouterr()
        assert json.loads(told.out)["damaged"] == ["bad.nii"]
        assert json.loads(told.out)["to_encode"] == []
        assert "bad.nii: not a NIfTI file" in told.err
        assert json.loads((tmp_path / "r.json").read_text())["refused"][0]["name"] == "bad.nii"
        assert main(["index", "--dry-run"]) == 0
        told = capsys.readouterr()
        assert "there is nothing to encode" in told.err
        names = [line.split()[0] for line in told.out.splitlines()]
        assert names == ["encoder", "to_encode", "skipped", "damaged"]

    def test_a_dry_run_adds_nothing(self, store: FakeStore, capsys: Any):
        assert main(["index", "images", "--dry-run"]) == 2
        assert "Next: isimed add PATH, then isimed index --dry-run" in capsys.readouterr().err
        assert store.calls == []

    def test_refusals_of_added_paths_count_in_index_and_pretrain(self, store: FakeStore, capsys: Any):
        store.answers["add"].refused = [REFUSAL]
        assert main(["pretrain", "images"]) == 3
        assert main(["index", "images"]) == 3
        assert capsys.readouterr().err.count("bad.nii: not a NIfTI file") == 2

    @pytest.mark.parametrize("verb", ["pretrain", "index"])
    def test_refusals_of_added_paths_are_listed_when_the_work_fails(self, store: FakeStore, capsys: Any, verb: str):
        store.answers["add"].refused = [REFUSAL]
        store.answers[verb] = StoreLocked("busy")
        assert main([verb, "images", "--quiet"]) == 11
        assert capsys.readouterr().err.splitlines() == [
            "error[scan_refused]: bad.nii: not a NIfTI file. Next: convert it",
            "error[store_locked]: busy.",
        ]

    @pytest.mark.parametrize("verb", ["add images", "index"])
    def test_refusals_are_listed_when_the_report_cannot_be_written(
        self, store: FakeStore, capsys: Any, monkeypatch: pytest.MonkeyPatch, verb: str
    ):
        store.answers[verb.split()[0]].refused.append(REFUSAL)

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        monkeypatch.setattr(added, "write_added", full)
        assert main([*verb.split(), "--report", "r.json"]) == 1
        assert capsys.readouterr().err.startswith("error[scan_refused]: bad.nii: not a NIfTI file.")

    def test_pretrain_prints_the_card_id_alone(self, store: FakeStore, capsys: Any):
        assert main(["pretrain"]) == 0
        assert capsys.readouterr().out == "c0ffee\n"
        assert main(["pretrain", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"encoder": "c0ffee", "name": "first"}


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (ScanRefused("x"), 1),
            (OutsideScan("x"), 1),
            (SqlRefused("x"), 1),
            (StoreNotFound("x"), 10),
            (StoreLocked("x"), 11),
            (StoreDamaged("x"), 12),
            (Incompatible("x"), 13),
            (EncoderMismatch("x"), 13),
            (RecallBelowTarget("x"), 14),
            (KeyboardInterrupt(), 130),
            (ZeroDivisionError("a bug"), 1),
        ],
    )
    def test_exit_codes_and_one_line(self, store: FakeStore, capsys: Any, error: BaseException, code: int):
        store.answers["sql"] = error
        assert main(["sql", "SELECT 1"]) == code
        told = capsys.readouterr()
        assert told.out == ""
        assert len(told.err.splitlines()) == 1
        assert told.err.startswith(f"error[{getattr(error, 'kind', 'in')}")

    def test_the_traceback_only_with_debug(self, store: FakeStore, capsys: Any):
        store.answers["sql"] = StoreDamaged("a file is short", next_step="isimed repair")
        main(["sql", "SELECT 1", "--debug"])
        told = capsys.readouterr().err
        assert "Traceback" in told
        assert told.splitlines()[-1] == "error[store_damaged]: a file is short. Next: isimed repair"

    def test_a_reader_that_leaves_is_no_error(self, store: FakeStore, capsys: Any):
        store.answers["sql"] = BrokenPipeError()
        assert main(["sql", "SELECT 1"]) == 0
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("category", [StoreWarning, TrainingWarning])
    def test_a_library_warning_is_one_line(self, store: FakeStore, capsys: Any, category: type[Warning]):
        def warn() -> dict[str, int]:
            warnings.simplefilter("always")
            warnings.warn("index missing,\n searched exactly", category, stacklevel=1)
            warnings.warn("some package is old", UserWarning, stacklevel=1)
            return {"scans": 0}

        store.info = warn  # type: ignore[method-assign]
        assert main(["info"]) == 0
        assert capsys.readouterr().err == "warning: index missing, searched exactly\n"
        assert main(["info", "--quiet"]) == 0
        assert capsys.readouterr().err == "warning: index missing, searched exactly\n"


class TestRows:
    def test_formats_say_the_same(self, store: FakeStore, capsys: Any):
        expected = ROWS.to_pylist()
        assert main(["ls", "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out) == expected
        assert main(["ls", "--format", "ndjson"]) == 0
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected
        assert main(["ls", "--format", "csv"]) == 0
        assert capsys.readouterr().out == "scan,x_mm,voxel\na,1.25,1 2 3\nb,-7.0,4 5 6\n"
        assert main(["ls"]) == 0
        assert capsys.readouterr().out.splitlines()[2] == "a      1.25  1 2 3"

    @pytest.mark.parametrize("name", ["r.parquet", "r.arrow", "r.csv", "r.json", "r.ndjson"])
    def test_out_writes_what_the_suffix_names(self, store: FakeStore, tmp_path: Path, capsys: Any, name: str):
        assert main(["sql", "SELECT 1", "--out", name]) == 0
        assert capsys.readouterr().out == ""
        path = tmp_path / name
        if name.endswith("parquet"):
            assert pq.read_table(path).equals(ROWS)
        elif name.endswith("arrow"):
            assert pa.ipc.open_file(pa.OSFile(str(path))).read_all().equals(ROWS)
        elif name.endswith("ndjson"):
            assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS.to_pylist()
        elif name.endswith("json"):
            assert json.loads(path.read_text()) == ROWS.to_pylist()
        else:
            assert path.read_text().startswith("scan,x_mm,voxel\n")

    def test_format_wins_over_the_suffix(self, store: FakeStore, tmp_path: Path, capsys: Any):
        assert main(["ls", "--out", "rows.dat", "--format", "parquet"]) == 0
        assert pq.read_table(tmp_path / "rows.dat").equals(ROWS)
        assert main(["ls", "--out", "rows.txt", "--format", "table"]) == 0
        assert main(["ls"]) == 0
        assert (tmp_path / "rows.txt").read_text() == capsys.readouterr().out

    def test_what_was_written_is_noted(self, store: FakeStore, capsys: Any):
        for command in (["ls"], ["log"], ["sql", "SELECT 1"], ["query", "--point", "1,2,3", "--scan", "a"]):
            assert main([*command, "--out", "r.csv"]) == 0
            told = capsys.readouterr()
            assert (told.out, told.err) == ("", "wrote r.csv\n")
            assert main([*command, "--out", "r.csv", "--quiet"]) == 0
            assert capsys.readouterr().err == ""

    def test_evaluate_writes_every_landmark_and_shows_the_summary(self, store: FakeStore, capsys: Any, tmp_path: Path):
        assert main(["evaluate", "--out", "errors.parquet"]) == 0
        told = capsys.readouterr()
        assert pq.read_table(tmp_path / "errors.parquet").equals(LANDMARKS)
        assert told.err == "wrote errors.parquet\n"
        assert main(["evaluate"]) == 0
        assert capsys.readouterr().out == told.out

    @pytest.mark.parametrize(
        "line",
        ["ls --format arrow", "ls --out rows.dat", "ls --out rows.txt", "ls --out rows", "info --format parquet"],
    )
    def test_what_cannot_be_written_is_a_usage_error(self, store: FakeStore, capsys: Any, line: str, tmp_path: Path):
        assert main(line.split()) == 2
        told = capsys.readouterr().err
        assert told.startswith("error[usage]: ")
        if "--out" in line:
            assert ".csv" in told
            assert ".parquet" in told
        assert not [*tmp_path.glob("rows*")]

    @pytest.mark.parametrize(
        "line",
        [
            "add images --report nodir/r.json",
            "index --report nodir/r.json",
            "add images --report images",
            "ls --out nodir/r.csv",
            "evaluate --out nodir/r.csv",
            "plot umap --out nodir/u.png",
            "ls --out images",
            "add images --format parquet",
            "pretrain images --format arrow",
            "index images --format parquet",
            "evaluate --format arrow",
            "evaluate --out rows.dat",
        ],
    )
    def test_outputs_are_checked_before_any_work(self, store: FakeStore, capsys: Any, tmp_path: Path, line: str):
        words = [str(tmp_path / word) if word.startswith("nodir/") else word for word in line.split()]
        assert main(words) == 2
        told = capsys.readouterr()
        assert told.out == ""
        (message,) = told.err.splitlines()
        assert message.startswith("error[usage]: ")
        assert str(tmp_path) not in message
        assert store.calls == []
        assert store.opened == []  # type: ignore[attr-defined]

    def test_where_nothing_may_be_written_is_a_usage_error(
        self, store: FakeStore, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("os.access", lambda path, mode: False)
        assert main(["ls", "--out", "r.csv"]) == 2
        assert "'r.csv'" in capsys.readouterr().err

    def test_no_answer_says_what_to_do(self, store: FakeStore, capsys: Any):
        store.answers["lookup"] = SimpleNamespace(to_arrow=lambda: ROWS.slice(0, 0))
        ask = ["query", "--point", "1,2,3", "--scan", "a", "--where", "nx > 3"]
        assert main([*ask, "--json"]) == 0
        told = capsys.readouterr()
        assert json.loads(told.out) == []
        assert told.err == "no scan of another subject meets --where. Next: widen --where\n"
        assert main([*ask, "--quiet"]) == 0
        assert capsys.readouterr().err == ""
        assert main([*ask, "--same-subject", "include", "--within", "3"]) == 0
        assert "no other scan meets --where and --within. Next: widen --where or --within" in capsys.readouterr().err
        assert main([*ask[:-2], "--same-subject", "only"]) == 0
        assert "no other scan of this subject is indexed. Next: " in capsys.readouterr().err
        assert main(ask[:-2]) == 0
        assert "Next: --same-subject include" in capsys.readouterr().err

    def test_a_file_that_is_stored_is_named_by_its_id(self, store: FakeStore, capsys: Any):
        ask = ["query", "--point", "1,2,3", "--scan"]
        assert main([*ask, "images/new.nii.gz"]) == 0
        assert capsys.readouterr().err == "new.nii.gz is in the store as a: its stored copy is asked\n"
        assert main([*ask, "a"]) == 0
        store.answers["lookup"].source = None
        assert main([*ask, "images/new.nii.gz"]) == 0
        assert capsys.readouterr().err == ""

    def test_info_is_one_object(self, store: FakeStore, capsys: Any):
        assert main(["info", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"scans": 2, "encoders": ["c0ffee"], "bytes": 3.5}
        assert main(["info"]) == 0
        assert capsys.readouterr().out.splitlines()[0] == "scans     2"
