"""Read-only SQL: the views of one generation, and the process of its own that answers."""
