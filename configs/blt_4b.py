"""An old name of configs/blt.py:4b, until the next release."""

ALIAS = "blt.py:4b"
