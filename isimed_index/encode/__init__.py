"""Encode scans patch by patch, wherever there are cores or GPUs: one task a scan; workers stage, the caller commits.

`task`     what is to be done, under which name, and what came of it
`scan`     what one worker does: read, prepare, encode, stage
`cluster`  where: threads, processes of this machine, its GPUs, or the workers of a Dask scheduler
`forecast` what it will take, measured on a few scans before anything is done
`pace`     how fast it goes, while it goes
`stream`   all tasks through all workers: bounded, committed as they end, and tried again where a worker died
"""

from __future__ import annotations

from isimed_index.encode.cluster import Workers, ask, check_scheduler, choose_on, workers
from isimed_index.encode.forecast import IndexPlan, Probe, Size, foresee, lattice_points, measure, most_telling
from isimed_index.encode.pace import Pace
from isimed_index.encode.scan import encode_volume, prepared, volume_lattice
from isimed_index.encode.stream import Losses, encode_batches
from isimed_index.encode.task import Encoded, EncodeTask, grid_key, stride_in_voxels, stride_of_grid, task_key

__all__ = [
    "EncodeTask",
    "Encoded",
    "IndexPlan",
    "Losses",
    "Pace",
    "Probe",
    "Size",
    "Workers",
    "ask",
    "check_scheduler",
    "choose_on",
    "encode_batches",
    "encode_volume",
    "foresee",
    "grid_key",
    "lattice_points",
    "measure",
    "most_telling",
    "prepared",
    "stride_in_voxels",
    "stride_of_grid",
    "task_key",
    "volume_lattice",
    "workers",
]
