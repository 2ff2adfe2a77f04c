"""Encode scans patch by patch, wherever there are cores or GPUs: one task a scan; workers stage, the caller commits.

`task`     what is to be done, under which name, and what came of it
`scan`     what one worker does: read, prepare, encode, stage
`cluster`  where: threads, processes of this machine, its GPUs, or the workers of a Dask scheduler
`stream`   all tasks through all workers: bounded, committed as they end, and tried again where a worker died
"""

from __future__ import annotations

from isimed_index.encode.cluster import Workers, choose_on, workers
from isimed_index.encode.scan import encode_volume, prepared, volume_lattice
from isimed_index.encode.stream import encode_batches
from isimed_index.encode.task import Encoded, EncodeTask, grid_key, stride_in_voxels, task_key

__all__ = [
    "EncodeTask",
    "Encoded",
    "Workers",
    "choose_on",
    "encode_batches",
    "encode_volume",
    "grid_key",
    "prepared",
    "stride_in_voxels",
    "task_key",
    "volume_lattice",
    "workers",
]
