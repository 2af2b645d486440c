"""Held-out bits per byte of parameters on a mesh, over prepared batches."""

import jax
import numpy as np
from jax.sharding import Mesh

from bltjax.distributed.rows import own_part
from bltjax.distributed.sharding import replicated, row_sharding, under
from bltjax.model.build import batch_logits
from bltjax.model.loss import Sums, target_sums


def jitted_scores(model, shardings, mesh: Mesh):
    """Jitted (params, batch) -> Sums, every process' own copy: evaluation.

    shardings: of the parameters.
    """

    def scores(params, batch) -> Sums:
        logits_BNV = batch_logits(model, params, batch)
        return target_sums(logits_BNV, batch["targets_BN"], batch["weights_BN"])

    return jax.jit(
        under(mesh, scores),
        in_shardings=(shardings, row_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def held_out_bits(scores, params, batches, sharding) -> float:
    total = [0.0, 0.0]
    for batch in batches:
        sums = jax.device_get(scores(params, own_part(batch, sharding)))
        total[0] += float(sums.text_nats)
        total[1] += float(sums.text_bytes)
    return total[0] / np.log(2.0) / max(total[1], 1.0)
