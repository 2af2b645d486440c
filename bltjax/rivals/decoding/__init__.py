"""Incremental decoding of the rivals."""
