"""The public names and signatures, pinned: a change here is a change for users."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
from cohorts import COPIES, Cohort

import isimed_index
from isimed_index.api import Store

SIGNATURES = {
    "add": "paths, labels=None, label_names=None, metadata=None, subject_from=None, spacing_mm=None, workers=1, "
    "progress=None, surrogate_key=None, volume=None, surrogate_ids=False, keep_source=False, allow_burned_in=False, "
    "layout='auto', thumbnails=None, analyze_axes=None",
    "pretrain": "method=None, preset='default', config=None, epochs=None, batch_scans=None, "
    "patches_per_scan=None, device='auto', resume=False, name=None, where=None, seed=None, progress=None, "
    "tensorboard=None, wandb=None",
    "index": "encoder=None, stride_mm=None, where=None, scheduler='threads', device='auto', min_recall=0.98, "
    "max_ram=None, progress=None, runtime='auto', precision='fp32', max_latency_ms=None, refit=False",
    "plan_index": "encoder=None, stride_mm=None, where=None, scheduler='threads', device='auto', progress=None, "
    "runtime='auto', precision='fp32'",
    "similar": "scan, label=None, k=10, where=None, same_subject='exclude', pooling='mean', encoder=None",
    "keep": "matches, question",
    "register": "to=None, kind='rigid', rounds=2, where=None, workers=1, redo=False, progress=None",
    "transform": "scan, reference=None, kind=None",
    "lookup": "point, scan, space='ras', k=10, where=None, within_mm=None, same_subject='exclude', cycle=False, "
    "exact=False, encoder=None, min_confidence=None",
    "propagate": "landmarks, scan, space=None, where=None, same_subject='include', cycle=False, encoder=None, "
    "progress=None",
    "search": "vectors, k=10, where=None, within=None, exact=False, encoder=None",
    "search_like": "patches, k=10, where=None, within=None, same_subject='exclude', exact=False, encoder=None",
    "search_pairs": "k=10, of=None, where=None, within=None, same_subject='exclude', exact=False, encoder=None",
    "row_ids": "where=None, within=None, encoder=None",
    "canonical": "point, scan, space='ras', encoder=None",
    "search_patches": "point, scan, space='ras', k=10, where=None, within_mm=None, same_subject='exclude', "
    "cycle=False, exact=False, encoder=None",
    "sql": "query, params=None, timeout_s=30.0",
    "scans": "",
    "encoders": "",
    "encoder": "encoder=None",
    "log": "",
    "info": "",
    "index_card": "encoder=None",
    "evaluate": "encoder=None, where=None, label_where=None, pairs=60, seed=0, progress=None",
    "plot": "figure, out, encoder=None, point=None, scan=None, space='ras', k=3, where=None, seed=0",
    "export": "out, layout='parquet', where=None, encoder=None, voxels=False, vectors=False, progress=None",
    "export_scan": "scan, out=None, labels=None, force=False",
    "import_": "path, card=None, space='ras', scans=None, progress=None",
    "export_encoder": "encoder, out",
    "import_encoder": "path, card=None, name=None",
    "embeddings": "where=None, encoder=None, output=None",
    "delete": "where, what='scans', dry_run=False",
    "delete_encoder": "encoder, dry_run=False",
    "purge": "subject, progress=None, report=None, unknown=False",
    "compact": "progress=None",
    "gc": "keep=10, dry_run=False",
    "tag": "name, generation=None",
    "untag": "name",
    "tags": "",
    "restore": "generation=None, tag=None",
    "refresh": "",
    "close": "",
}
PROPERTIES = {"path", "generation", "snapshot"}


def signature(function) -> str:
    parameters = list(inspect.signature(function).parameters.values())
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters if p.name != "self")


def test_exported_names():
    types = [
        "Ball",
        "Cuboid",
        "EncoderCard",
        "IsimedError",
        "Label",
        "Matches",
        "NearestNeighbors",
        "PatchGrid",
        "Scan",
    ]
    names = [*types, "Store", "check", "create", "open", "repair"]
    assert isimed_index.__all__ == names
    assert dir(isimed_index) == sorted([*names, "__version__"])
    for name in names:
        assert getattr(isimed_index, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = isimed_index.no_such_name


def test_open_and_create():
    assert signature(isimed_index.open) == "path, mode='a', generation=None, tag=None, trust=None"
    assert signature(isimed_index.check) == "path, read=0.0, progress=None, phi=False, phi_list=None, recall=False"
    assert signature(isimed_index.repair) == "path, progress=None"
    assert signature(isimed_index.create) == "path, trust=None"


def test_store_methods_and_signatures():
    public = {name: member for name, member in vars(Store).items() if not name.startswith("_")}
    assert {name for name, member in public.items() if isinstance(member, property)} == PROPERTIES
    assert {name: signature(public[name]) for name in public.keys() - PROPERTIES} == SIGNATURES
    assert all(member.__doc__ for member in public.values())


def modules_of(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "monai", "scipy", "pandas", "nibabel", "zarr", "dask", "distributed", "duckdb", "pyarrow", "faiss"}
HEAVY |= {"matplotlib", "sklearn", "umap", "nilearn"}


def test_importing_loads_no_heavy_package():
    assert not modules_of("import isimed_index; dir(isimed_index)") & (HEAVY | {"numpy"})
    assert not modules_of("import isimed_index; isimed_index.open; isimed_index.Matches") & HEAVY


@pytest.mark.parametrize("more", ["", "'--patches',"])
def test_a_query_of_a_stored_scan_loads_neither_torch_nor_monai(cohort: Cohort, more: str):
    loaded = modules_of(
        "from isimed_cli.main import main\n"
        f"code = main(['query', '--point', '10,20,30', '--scan', {COPIES[0].stem!r}, '-s', {str(cohort.store)!r},"
        f" {more} '--cycle' if not {bool(more)} else '-q'])\n"
        "assert code == 0, code"
    )
    assert not loaded & {"torch", "monai", "dask", "distributed", "matplotlib"}
    assert "duckdb" not in loaded  # SQL has a process of its own
