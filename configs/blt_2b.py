"""An old name of configs/blt.py:2b, until the next release."""

ALIAS = "blt.py:2b"
