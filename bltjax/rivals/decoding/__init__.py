"""Incremental decoding of the rivals: whole prompts at once, then byte by byte."""
