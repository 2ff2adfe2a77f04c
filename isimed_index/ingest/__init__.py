"""`add`: image files → scans in the store; bad files are refused by name and the rest lands.

`choose`: find files ─▶ `take`: read (threads), known content?, stage OME-Zarr ─▶ `add`: one commit per batch, with
`rows` of scans, subjects and labels
"""
