"""Data sets that are laid out in a known way: which folder is one, and what each file in it is.

    recognise: a folder ─▶ which layout, if any
    bids · msd · brats · autopet · totalsegmentator: a root ─▶ `Found`, its images with subject, split, labels, facts

A reader looks at names, tables and side-cars, never at voxels; what it cannot make sense of it leaves out by name.
"""
