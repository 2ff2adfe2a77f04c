"""`register`: every scan into a common frame; transforms are stored, images are not resampled.

stored voxels ─▶ `images`: small, upright ─▶ `align`: SimpleITK, to ─▶ `reference`: an atlas, or the cohort's mean
`cohort`: rounds over all scans, committed a group at a time, as `rows` of the table `transforms`
"""
