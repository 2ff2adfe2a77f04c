"""`add`: image files → scans in the store; bad files are refused by name and the rest lands.

`choose`: find files ─▶ `crew`: this process or several `worker`s, each of which does `take`: read, known content?,
write OME-Zarr ─▶ `add`: one commit per batch, with
`rows` of scans, subjects and labels

`choose` has folders that are data sets read by `scans.layouts`; `agree` refuses what contradicts itself before anything
is read; `late` fills in what is said of scans that are stored already.
"""
