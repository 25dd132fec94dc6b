"""Judging files: against the full-precision reference, engine by engine, on the same tokens."""
