"""An old name of configs/blt.py:1b, until the next release."""

ALIAS = "blt.py:1b"
