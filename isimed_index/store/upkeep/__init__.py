"""Changing and keeping a store: delete, compact, restore, collect, purge; audit and repair."""
