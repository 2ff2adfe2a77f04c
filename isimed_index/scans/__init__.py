"""Files become scans: discover, read, reorient, prepare, and keep as OME-Zarr chunks."""

from isimed_index.scans.scan import LabelMap, Scan

__all__ = ["LabelMap", "Scan"]
