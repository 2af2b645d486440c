"""An old name of configs/blt.py:400m, until the next release."""

ALIAS = "blt.py:400m"
