"""An old name of configs/blt.py:8b, until the next release."""

ALIAS = "blt.py:8b"
