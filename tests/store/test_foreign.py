"""Another tool reads a store by its spec, without a line of ours."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
from store_builders import patch_rows, vectors, whole_store


def canonical(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def tree_digest(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    lines = []
    for file in files:
        relative = "" if file == path else file.relative_to(path).as_posix()
        lines.append(f"{relative}\0{file.stat().st_size}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def test_a_store_is_readable_with_duckdb_and_pyarrow_alone(tmp_path: Path) -> None:
    root = whole_store(tmp_path / "c").path
    parent = None
    for file in sorted((root / "manifests").glob("*.json")):
        manifest = json.loads(file.read_text())
        seal = manifest.pop("sha256")
        assert hashlib.sha256(canonical(manifest)).hexdigest() == seal
        assert manifest["parent"] == parent
        parent = {"generation": int(file.stem), "sha256": seal}
    for artefact in manifest["artefacts"]:
        assert tree_digest(root / artefact["path"]) == artefact["sha256"]

    pieces = [str(root / a["path"]) for a in manifest["artefacts"] if a["kind"] == "table" and a["table"] == "scans"]
    rows = duckdb.execute("SELECT scan, artefact FROM read_parquet($1, union_by_name = true)", [pieces]).fetchall()
    scan_of = {artefact: scan for scan, artefact in rows}
    assert sorted(scan_of.values()) == ["sub-01_T1w", "sub-02_ct"]

    for segment in (a for a in manifest["artefacts"] if a["kind"] == "segment"):
        scan = scan_of[segment["scan_artefact"]]
        patches = pq.read_table(root / segment["path"] / "patches.parquet")
        assert patches.to_pylist() == patch_rows(scan, segment["rows"]).to_pylist()
        for name, expected in vectors(segment["rows"]).items():
            found = np.load(root / segment["path"] / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            assert [list(found.shape), found.dtype.name] == [
                [segment["rows"], segment["outputs"][name]["dim"]],
                segment["outputs"][name]["dtype"],
            ]
            np.testing.assert_array_equal(found, expected)
