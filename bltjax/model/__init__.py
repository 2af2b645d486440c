"""BLT and the byte models: flax modules, their parameters, FLOPs, loss and incremental decoding."""

from bltjax.model.blt.model import BLT
from bltjax.model.byte_lm import ByteLM

__all__ = ["BLT", "ByteLM"]
