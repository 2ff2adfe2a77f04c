"""Help for tests and demonstrations: phantoms with known truth."""
