"""`check --phi`: what is seeded in any file of a store is found, is never repeated, and a clean store is clean."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cohorts import tiny_scan
from hypothesis import given
from hypothesis import strategies as st
from store_builders import whole_store
from typer.testing import CliRunner

import isimed_index as isi
from isimed_cli.main import app
from isimed_index.errors import UsageError
from isimed_index.phi.identifiers import Identifiers
from isimed_index.phi.leaks import leaks
from isimed_index.phi.patterns import found_in, is_suspicious
from isimed_index.scans.chunks import write_chunks
from isimed_index.scans.scan import Scan
from isimed_index.store.place.storage import storage_of
from isimed_index.store.upkeep.findings import Finding

GOLDEN = Path(__file__).parent / "data" / "golden-1" / "cohort.isimed"
NAME = "Müstermann^Erika"
KNOWN = Identifiers.of([NAME, "MRN-4711-0815", "2024-02-29", "47110815"])


def found(store: Path, known: Identifiers | None = KNOWN) -> list[Finding]:
    return [finding for finding in leaks(storage_of(store), known) if finding.severity in ("leak", "damage")]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN, tmp_path / "store")


class TestPatterns:
    @pytest.mark.parametrize(
        ("kind", "text"),
        [
            ("phi_uid", "1.2.840.10008.5.1.4.1.1.4"),
            ("phi_uid", "seen in 2.25.329800735698586629295641978511506172918.1.2.3.4 today"),
            ("phi_name", "DOE^JOHN"),
            ("phi_name", "Müller^^Änne"),
            ("phi_date", "20240229"),
            ("phi_date", "scan_19640812_T1"),
            ("phi_date", "2024-02-29"),
            ("phi_date", "2024-02-29T11:22:33"),
            ("phi_date", "29.02.2024"),
            ("phi_date", "2/29/2024"),
            ("phi_time", "11:22:33"),
            ("phi_time", "112233.123456"),
            ("phi_email", "ask erika.m@klinik.example.org"),
            ("phi_phone", "+49 221 478-0815"),
            ("phi_phone", "(555) 123-4567"),
            ("phi_number", "123-45-6789"),
            ("phi_number", "MRN: 00471108"),
            ("phi_number", "patient_id=4711"),
            ("phi_path", "/home/erika/scans/a.nii"),
            ("phi_path", "/pacs/export/study"),
            ("phi_path", "C:\\Users\\erika"),
            ("phi_path", "\\\\fileserver\\scans"),
            ("phi_path", "~/scans"),
            ("phi_path", "ct1.radiology.local"),
            ("phi_path", "192.168.17.4"),
        ],
    )
    def test_are_seen(self, kind, text):
        assert kind in {pattern.kind for pattern in found_in(text)}

    @pytest.mark.parametrize(
        "text",
        [
            *("IXI002-Guys-0828-T1", "sub-01_ses-2_T1w", "BraTS-GLI-00001-000", "BRATS_001", "LIDC-IDRI-0001", "s0011"),
            *(
                "TCGA-02-0003",
                "OAS30001_MR_d0129",
                "amos_0001",
                "PETCT_0011f3deaf",
                "ADNI_002_S_0295",
                "hepaticvessel_001",
            ),
            *("01M82XVARF7NDR564BNNW357P6", "series-1a2b3c4d5e6f", "subject-201401011200", "study-20240229abcd"),
            *("1815ca166bb7781e512e09042dac14ba4f9c322cf3db5bbba08637893b2b3557", "c0ef91e4b3cb379d"),
            *("scans/01M82XVARF7NDR564BNNW357P6.zarr", "patch32-stride4-spacing4mm-fg0.15", "NIfTI-1", "../../"),
            *("isimed_index.encoders.networks:ValidNet", "parquet-cpp-arrow version 26.0.1", "0.5", "IVF4096,PQ32x8"),
            *(
                "SOMATOM Definition AS+",
                "ORIGINAL PRIMARY AXIAL",
                "1.5.2",
                "99999999",
                "20241399",
                "12345678901",
                "1/2",
            ),
            *("{'descr': '<f2', 'fortran_order': False, 'shape': (3513, 16), }", "left kidney/right kidney", "T2*"),
        ],
    )
    def test_are_not_seen_in_what_names_nobody(self, text):
        assert [pattern.kind for pattern in found_in(text)] == []

    def test_names_of_columns(self):
        for column in (
            "patient_name",
            "PatientName",
            "birth date",
            "DOB",
            "MRN",
            "home_address",
            "acq_time",
            "StudyDate",
        ):
            assert is_suspicious(column), column
        for column in (
            "name",
            "subject",
            "age",
            "site",
            "study_day",
            "updated_weight",
            "dx_mm",
            "kvp",
            "diagnosis",
            "scan",
        ):
            assert not is_suspicious(column), column


class TestIdentifiers:
    @given(
        word=st.sampled_from(["Mustermann^Erika", "MRN-4711-0815", "Ångström", "47110815", "Иванова"]),
        encoding=st.sampled_from(["utf-8", "latin-1", "utf-16-le", "utf-16-be"]),
        before=st.binary(max_size=40),
        after=st.binary(max_size=40),
        change=st.sampled_from([str.upper, str.lower, str.title, str]),
    )
    def test_stand_out_of_any_bytes(self, word, encoding, before, after, change):
        text = change(word).encode(encoding, "ignore")
        if len(text) < len(word):
            return
        apart = b"\0\0\xff" if encoding != "utf-16-be" else b"\xff\0\0"
        assert Identifiers.of([word]).in_bytes(before + b"\0\xff\0" + text + apart + after) == {1}

    @given(content=st.binary(max_size=300))
    def test_agree_with_a_plain_search(self, content):
        known = Identifiers.of(["abcabc", "123456"])
        low = content.lower()
        plain = {1} if any("abcabc".encode(code) in low for code in ("utf-8", "utf-16-le", "utf-16-be")) else set()
        assert known.in_bytes(content) - {2} == plain

    def test_are_found_across_blocks(self):
        for start in range(2**22 - 12, 2**22 + 2):
            content = bytearray(2**22 + 40)
            content[start : start + 10] = b"Mustermann"
            assert Identifiers.of(["x", "mustermann"]).in_bytes(bytes(content)) == {2}

    def test_parts_and_dates_and_short_words(self):
        known = Identifiers.of(["DOE^JOHN", "19640812", "Ng", "4711", "Abe"])
        assert known.ignored == (3,)
        for text in ("john_t1", "JOHN", "Doe, John", "doe^john"):
            assert known.in_text(text) == {1}, text
        for text in ("12.08.1964", "1964-08-12", "x 08/12/1964"):
            assert known.in_text(text) == {2}, text
        assert known.in_text("id 4711") == {4}
        assert known.in_text("abe-7") == {5}
        for text in (
            "johnson",
            "adoe",
            "a4711",
            "0.4711",
            "14711",
            "series-d0e4711abe12",
            "01M82X7ABE7NDR564BNNW357P6",
            "c0ef91abe379d7c7c6473f1430f43772",
        ):
            assert known.in_text(text) == set(), text

    def test_digits_inside_of_digests_do_not_count(self):
        assert Identifiers.of(["47110815"]).in_bytes(b'"a47110815c" 0.47110815 347110815') == set()
        assert Identifiers.of(["47110815"]).in_bytes(b'"47110815"') == {1}

    def test_a_list_is_read_or_refused(self, tmp_path):
        (tmp_path / "list").write_bytes("Müller\r\n\r\nNg\r\n".encode("latin-1"))
        known = Identifiers.read(tmp_path / "list")
        assert (known.in_text("MÜLLER"), known.ignored) == ({1}, (3,))
        (tmp_path / "list").write_text("\nx\n")
        with pytest.raises(UsageError, match="the list list holds no identifier"):
            Identifiers.read(tmp_path / "list")
        with pytest.raises(UsageError, match="cannot be read"):
            Identifiers.read(tmp_path)


def in_json(path: Path, value: str) -> None:
    document = json.loads(path.read_text())
    (document[0] if isinstance(document, list) else document)["note"] = [{"deep": value}]
    path.write_text(json.dumps(document))


def as_key(path: Path, value: str) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, value: 1}))


def in_cell(path: Path, value: str) -> None:
    table = pq.read_table(path, partitioning=None)
    cells = [None] * (table.num_rows - 1) + [f"seen by {value}"]
    pq.write_table(table.append_column("note", pa.array(cells, pa.string())), path, compression="zstd")


def in_nested_cell(path: Path, value: str) -> None:
    table = pq.read_table(path, partitioning=None)
    cells = [[{"deep": value}]] * table.num_rows
    pq.write_table(table.append_column("note", pa.array(cells)), path, compression="gzip")


def in_dictionary(path: Path, value: str) -> None:
    table = pq.read_table(path, partitioning=None)
    cells = pa.array([value] * table.num_rows).dictionary_encode()
    pq.write_table(table.append_column("note", cells), path)


def in_binary_cell(path: Path, value: str) -> None:
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.append_column("note", pa.array([value.encode()] * table.num_rows)), path, compression="brotli")


def as_column(path: Path, value: str) -> None:
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.append_column(value, pa.nulls(table.num_rows, pa.int8())), path)


def in_metadata(path: Path, value: str) -> None:
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.replace_schema_metadata({"note": value}), path)


def in_npy_header(path: Path, value: str) -> None:
    content = path.read_bytes()
    room = content.index(b"}") + 1
    text = value.encode("latin-1")
    path.write_bytes(content[:room] + text + content[room + len(text) :])


def in_safetensors_header(path: Path, value: str) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size]) | {"__metadata__": {"note": value}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def behind(path: Path, value: str) -> None:
    path.write_bytes(path.read_bytes() + value.encode("latin-1"))


def in_utf16(path: Path, value: str) -> None:
    path.write_bytes(path.read_bytes() + value.upper().encode("utf-16-le"))


def in_voxels(path: Path, value: str) -> None:
    voxels = np.zeros((70, 65, 10), np.int16)
    text = value.encode("utf-8").ljust(20)
    voxels[69, 33, :] = np.frombuffer(text, np.int16)
    shutil.rmtree(path)
    write_chunks(Scan("x", voxels, np.eye(4)), None, path)
    assert not [file for file in path.rglob("*") if file.is_file() and b"rika" in file.read_bytes()]


def in_attribute(path: Path, value: str) -> None:
    document = json.loads(path.read_text())
    document["attributes"]["isimed"]["attributes"]["note"] = value
    path.write_text(json.dumps(document))


def new_text(path: Path, value: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"verb": "add", "paths": [value]}) + "\n")


def new_gzip(path: Path, value: str) -> None:
    path.write_bytes(gzip.compress(value.encode()))


def new_zstd(path: Path, value: str) -> None:
    path.write_bytes(pa.compress(value.encode() * 3, codec="zstd", asbytes=True))


def new_name(path: Path, value: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / value.split("^")[0]).touch()


SEEDS: dict[str, tuple[str, Callable[[Path, str], None]]] = {
    "format": ("FORMAT.json", in_json),
    "head": ("HEAD.json", in_json),
    "manifest": ("manifests/*9.json", in_json),
    "manifest key": ("manifests/*9.json", as_key),
    "tag": ("tags/packed.json", in_json),
    "zarr group attributes": ("scans/*/zarr.json", in_attribute),
    "zarr array attributes": ("scans/*/0/zarr.json", in_json),
    "label attributes": ("scans/*/labels/anatomy/zarr.json", in_json),
    "voxels": ("scans/*.zarr", in_voxels),
    "shard": ("scans/*/0/c/0/0/0", behind),
    "card": ("encoders/*/card.json", in_json),
    "weights header": ("encoders/*/weights.safetensors", in_safetensors_header),
    "weights": ("encoders/*/weights.safetensors", behind),
    "frame": ("frames/*/frame.json", in_json),
    "charts": ("frames/*/charts.parquet", in_cell),
    "template": ("frames/*/template.npy", in_npy_header),
    "index facts": ("indexes/*/index.json", in_json),
    "index": ("indexes/*/index.faiss", in_utf16),
    "lattice": ("segments/*/lattice.json", in_json),
    "embedding header": ("segments/*/embedding.npy", in_npy_header),
    "row ids": ("segments/*/row_ids.npy", behind),
    "patches": ("segments/*/patches.parquet", in_cell),
    "cell": ("tables/*.parquet", in_cell),
    "nested cell": ("tables/*.parquet", in_nested_cell),
    "dictionary": ("tables/*.parquet", in_dictionary),
    "binary cell": ("tables/*.parquet", in_binary_cell),
    "column": ("tables/*.parquet", as_column),
    "table metadata": ("tables/*.parquet", in_metadata),
    "tombstone": ("tombstones/*.parquet", in_cell),
    "intent": ("intents/01M82XVEDPJS9WPM5XKDT5GXF0.jsonl", new_text),
    "lease": ("leases/01M82XVEDPJS9WPM5XKDT5GXF0.jsonl", new_text),
    "copy": ("manifests/00000000000000000009.json.copy", new_text),
    "gzip in tmp": ("tmp/log.gz", new_gzip),
    "zstd in tmp": ("tmp/log.zst", new_zstd),
    "quarantine": ("quarantine/old.json", new_text),
    "name of a file": ("quarantine/x", new_name),
}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_listed_identifier_is_found_wherever_it_is_and_not_repeated(store: Path, seed: str):
    where, plant = SEEDS[seed]
    targets = sorted(store.glob(where)) or [store / where]
    targets[-1].parent.mkdir(exist_ok=True)  # a checkout has no empty folders
    plant(targets[-1], NAME)
    seen = found(store)
    ours = [finding for finding in seen if finding.kind == "phi_identifier"]
    assert ours, seen
    relative = targets[-1].relative_to(store).as_posix()
    place = "quarantine/…" if seed == "name of a file" else relative
    assert all(finding.artefact.startswith(place) for finding in ours)
    assert all("line 1 of the list" in finding.message for finding in ours)
    told = json.dumps([finding.to_json() for finding in seen], ensure_ascii=False).casefold()
    assert "stermann" not in told
    assert "erika" not in told


@pytest.mark.parametrize(
    "seed", [name for name, (_, plant) in SEEDS.items() if plant in (in_json, in_cell, new_text, as_column)]
)
@pytest.mark.parametrize("value", ["1.2.840.113619.2.55.3.604688", "DOE^JANE", "2024-02-29", "jane@example.org"])
def test_what_looks_like_an_identifier_is_found_without_a_list(store: Path, seed: str, value: str):
    where, plant = SEEDS[seed]
    targets = sorted(store.glob(where)) or [store / where]
    plant(targets[-1], value)
    seen = found(store, None)
    assert seen
    assert value not in json.dumps([finding.to_json() for finding in seen])


def test_columns_by_their_names_dates_and_ages(store: Path):
    path = min(store.glob("tables/*.parquet"))
    table = pq.read_table(path, partitioning=None)
    n = table.num_rows
    more = {
        "PatientName": pa.array(["x"] * n),
        "height": pa.array([19640812] * n),
        "seen": pa.array([0] * n, pa.date32()),
        "empty_address": pa.nulls(n, pa.string()),
        "weight_phone": pa.array([1.5] * n),
    }
    for name, cells in more.items():
        table = table.append_column(name, cells)
    ages = table.drop_columns(["age"]) if "age" in table.column_names else table
    pq.write_table(ages.append_column("age", pa.array([93.0] * n)), path)
    kinds = {(finding.kind, finding.message.split(" in ", 1)[1].split(",")[0]) for finding in found(store, None)}
    assert {
        ("phi_column", "column PatientName"),
        ("phi_date", "column height"),
        ("phi_date", "column seen"),
        ("phi_column", "column weight_phone"),
        ("phi_age", "column age"),
    } <= kinds
    assert not [place for _, place in kinds if place == "column empty_address"]


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.dictionary(pa.int32(), pa.float64())], ids=str)
@pytest.mark.parametrize("listed", ["12345678", "1234567.5"])
def test_an_identifier_among_real_numbers_is_found(store: Path, kind: pa.DataType, listed: str):
    path = min(store.glob("tables/*.parquet"))
    table = pq.read_table(path, partitioning=None)
    cells = [float("nan"), 99999999.5] + [3.0] * table.num_rows
    numbers = pa.array([float(listed), *cells][: table.num_rows])
    numbers = numbers.dictionary_encode() if pa.types.is_dictionary(kind) else numbers.cast(kind)
    pq.write_table(table.append_column("code", numbers), path)
    seen = [finding for finding in found(store, Identifiers.of(["x9x9", listed])) if finding.kind == "phi_identifier"]
    assert [finding.message for finding in seen] == ["the identifier in line 2 of the list in column code"]


def test_a_listed_number_of_a_table_of_metadata_is_found(tmp_path: Path):
    for seed in range(3):
        tiny_scan(tmp_path / "in" / f"s{seed}.nii.gz", seed)
    (tmp_path / "in.csv").write_text("scan,code,born\ns0,12345678,20240229\ns1,99999999.5,0.5\ns2,3,99999999\n")
    with isi.create(tmp_path / "store") as made:
        made.add(tmp_path / "in", metadata=tmp_path / "in.csv")
    kinds = {(finding.kind, finding.message) for finding in found(made.path, Identifiers.of(["12345678"]))}
    assert ("phi_identifier", "the identifier in line 1 of the list in column code") in kinds
    assert ("phi_date", "a date in column born") in kinds


def test_names_of_columns_keys_and_files_are_not_repeated(store: Path):
    path = min(store.glob("tables/*.parquet"))
    table = pq.read_table(path, partitioning=None)
    for name in ("POE^JANE", NAME):
        table = table.append_column(name, pa.array(["2024-02-29"] * table.num_rows))
    pq.write_table(table, path)
    card = min(store.glob("indexes/*/index.json"))
    card.write_text(json.dumps({"ROE^RICHARD": {NAME: "2024-02-29"}}))
    (store / "quarantine").mkdir()
    (store / "quarantine" / "MOE^MAX.parquet").write_bytes(b"PAR1")
    seen = leaks(storage_of(store), KNOWN)
    assert {"phi_date", "phi_name", "phi_identifier", "phi_unread"} <= {finding.kind for finding in seen}
    told = json.dumps([finding.to_json() for finding in seen], ensure_ascii=False)
    assert not [word for word in ("POE", "JANE", "ROE", "MOE", "rika", "2024-02") if word in told]


def test_what_no_generation_names_is_no_damage(store: Path):
    (store / "tables" / "01M836J3QD5V2J5Y2N6W3S9Q0K.parquet").write_bytes(b"PAR1")  # of a writer at work
    (finding,) = leaks(storage_of(store), None)
    assert (finding.kind, finding.severity) == ("phi_unread", "warning")


def test_what_cannot_be_decoded_is_damage_and_not_clean(store: Path):
    min(store.glob("tables/*.parquet")).write_bytes(b"PAR1 rubbish")
    shard = min(store.glob("scans/*/0/c/0/0/0"))
    shard.write_bytes(bytes(len(shard.read_bytes())))
    seen = found(store)
    assert {finding.kind for finding in seen} == {"phi_unread"}
    assert {finding.severity for finding in seen} == {"damage"}
    assert len(seen) == 2


@pytest.mark.parametrize("make", ["small", "cohort", "ids", "golden"])
def test_a_clean_store_is_clean(tmp_path: Path, request: pytest.FixtureRequest, make: str):
    if make == "small":
        path = whole_store(tmp_path / "store").path
    elif make == "cohort":
        path = request.getfixturevalue("cohort").store
    elif make == "golden":
        assert found(GOLDEN) == []
        path = GOLDEN
    else:
        names = (
            "IXI002-Guys-0828-T1",
            "IXI012-HH-1211-T1",
            "BraTS-GLI-00001-000",
            "sub-2012_ses-0101_T1w",
            "LUNG1-001",
        )
        for seed, name in enumerate(names):
            tiny_scan(tmp_path / "in" / f"{name}.nii.gz", seed)
        rows = "".join(f"{name},{40 + seed},Guys,{1990 + seed},12.5\n" for seed, name in enumerate(names))
        (tmp_path / "in.csv").write_text("scan,age,site,cohort_year,score\n" + rows)
        made = isi.create(tmp_path / "store")
        made.add(tmp_path / "in", metadata=tmp_path / "in.csv")
        made.tag("paper-v1")
        made.close()
        path = made.path
    assert found(path, None) == []


class TestCommand:
    def run(self, *arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["check", *arguments])
        return done.exit_code, done.output

    def test_exits_15_and_says_where_but_not_what(self, store: Path, tmp_path: Path):
        (tmp_path / "phi.txt").write_text(f"Hinterhuber^Zenzi\n{NAME}\n", encoding="utf-8")
        arguments = ("--store", str(store), "--json", "--phi-list", str(tmp_path / "phi.txt"))
        code, output = self.run(*arguments)
        assert code == 0, output
        in_json(min(store.glob("indexes/*/index.json")), NAME)
        code, output = self.run(*arguments)
        assert code in (12, 15)  # the file is not as it was committed, either
        assert "line 2 of the list in key note.deep" in output
        assert "stermann" not in output

    def test_of_a_leak_alone(self, tmp_path: Path):
        tiny_scan(tmp_path / "in" / "a.nii.gz")
        (tmp_path / "in.csv").write_text("scan,birth_date\na,1964-08-12\n")
        isi.create(tmp_path / "store").add(tmp_path / "in", metadata=tmp_path / "in.csv")
        code, output = self.run("--store", str(tmp_path / "store"), "--phi")
        assert code == 15
        assert "may identify a patient" in output
        assert "1964" not in output
        assert self.run("--store", str(tmp_path / "store"))[0] == 0

    def test_a_list_that_is_none(self, store: Path, tmp_path: Path):
        (tmp_path / "phi.txt").write_text("\n")
        code, output = self.run("--store", str(store), "--phi-list", str(tmp_path / "phi.txt"))
        assert code == 2
        assert "holds no identifier" in output
