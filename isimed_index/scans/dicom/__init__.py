"""DICOM: files by content → series → slices by geometry → one volume, or the reason why there is none.

files.py    is it DICOM, and the safe reading of one data set
frames.py   one data set → its images, each with its place, scaling and pixel type
series.py   many files → series, with surrogates for every identifier
slices.py   images of one series → sorted, checked, one affine
volumes.py  which volume of a series that holds several
pixels.py   the voxels of a series, decoded once
"""
