"""The store on disk: immutable artefacts under one sequenced manifest (see `isimed_schemas/store.md`).

`repository` opens and creates, `snapshot` reads one pinned generation, `transaction` commits the next one.
Importing this package loads neither DuckDB nor Arrow nor zarr; they load when a question needs them.
"""
