"""The order of a stream's records: a new permutation in every epoch, computed without a list.

A Feistel network permutes the numbers below a power of four. Numbers outside the range are permuted
again until they are back in it, which keeps it a permutation. So any index of any epoch is found
directly, a restored stream resumes anywhere, and memory doesn't grow with the corpus. Indices are
computed in blocks, because numpy is fast with many and slow with one.
"""

import numpy as np

BLOCK = 1024  # indices computed together
ROUNDS = 6
KEYS = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def mixed(x_Q: np.ndarray) -> np.ndarray:
    """uint64 to uint64, each bit of the result depending on all bits: the finisher of SplitMix."""
    x_Q = (x_Q ^ (x_Q >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_Q = (x_Q ^ (x_Q >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_Q ^ (x_Q >> np.uint64(31))


def permuted(indices_Q: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [Q]: the images of indices under the permutation of range(length) for a seed and
    epoch."""
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = mixed(KEYS + mixed(np.array([seed], np.uint64) << np.uint64(32)) + np.uint64(epoch))

    def network(x_Q):
        left_Q, right_Q = x_Q >> half, x_Q & mask
        for key in keys:
            left_Q, right_Q = right_Q, left_Q ^ (mixed(right_Q + key) & mask)
        return (left_Q << half) | right_Q

    found_Q = network(indices_Q.astype(np.uint64))
    while (outside_Q := found_Q >= length).any():
        found_Q[outside_Q] = network(found_Q[outside_Q])
    return found_Q.astype(np.int64)


class Order:
    """`order[i]`: the i-th of `length` records in the endless order of a seed."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self.epoch, self.begin, self.block = -1, 0, np.zeros(0, np.int64)

    def __getitem__(self, index: int) -> int:
        epoch, offset = divmod(index, self.length)
        if epoch != self.epoch or not 0 <= offset - self.begin < len(self.block):
            self.epoch, self.begin = epoch, offset - offset % BLOCK
            indices_Q = np.arange(self.begin, min(self.begin + BLOCK, self.length))
            self.block = permuted(indices_Q, self.length, self.seed, epoch)
        return int(self.block[offset - self.begin])
