"""Looking for what identifies a patient, in every file of a store: `leaks` is the verb.

patterns.py      what identifiers look like: UIDs, dates, names with carets, addresses; and columns by their names
identifiers.py   those that the user lists: in any case, in UTF-8, Latin-1 and UTF-16, and in parts
contents.py      a file → texts with their places, and bytes as they were before they were compressed
leaks.py         all of it together → findings that say where, how often and what to do, never what
"""
