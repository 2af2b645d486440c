"""Buckets of relative distances, by which a T5's bias is learned (arXiv 1910.10683)."""

import numpy as np


def distance_buckets(buckets: int, farthest: int, *, both_sides: bool) -> np.ndarray:
    """The bucket of each distance key - query from -farthest to farthest, int32 [2 farthest + 1].

    both_sides: keys after the query have the upper half of the buckets; otherwise they share bucket
    0, since a causal query sees none. Half of a side's buckets hold one distance each, the others
    grow geometrically. Logarithms are fp32, as in the published models.
    """
    distance = np.arange(-farthest, farthest + 1)
    side = buckets // 2 if both_sides else buckets
    away = np.abs(distance) if both_sides else np.maximum(-distance, 0)
    exact = side // 2
    ratio = np.maximum(away, 1).astype(np.float32) / np.float32(exact)
    growth = np.log(ratio) / np.float32(np.log(farthest / exact)) * np.float32(side - exact)
    far = np.minimum(exact + growth.astype(np.int32), side - 1)
    found = np.where(away < exact, away, far)
    return (found + side * (both_sides & (distance > 0))).astype(np.int32)
