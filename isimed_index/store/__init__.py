"""The store on disk: immutable artefacts under one sequenced manifest (see `isimed_schemas/store.md`).

    repository ─▶ snapshot     reads one pinned generation: tables, segments, SQL (`sql/`)
        └───────▶ transaction  commits the next one
    place/     where a store lies: a directory or a bucket; locks, claims, faults
    upkeep/    delete, compact, restore, collect, purge; audit and repair

Importing this package loads neither DuckDB nor Arrow nor zarr; they load when a question needs them.
"""
