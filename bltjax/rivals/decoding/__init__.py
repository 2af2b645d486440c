"""Incremental decoding of the rivals: one file per generative family."""
