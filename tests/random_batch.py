"""A batch of random bytes and patches, for tests of training steps."""

import numpy as np

from bltjax.data.batches import PatchBatch, target_bytes_of


def random_batch(data, random: np.random.Generator) -> PatchBatch:
    """A batch as from the pipeline, with the rows of a DataConfig."""
    shape = (data.batch_size, data.seq_len)
    starts = random.random((data.batch_size, data.seq_len + 1)) < 0.3
    starts[:, :2] = True
    bytes_BN = random.integers(4, 260, shape).astype(np.int32)
    targets_BN = random.integers(4, 260, shape).astype(np.int32)
    weights_BN = (random.random(shape) < 0.9).astype(np.float32)
    return PatchBatch(
        bytes_BN, np.ones(shape, np.int32), starts, targets_BN, weights_BN,
        target_bytes_of(targets_BN, weights_BN),
    )  # fmt: skip
