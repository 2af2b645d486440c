"""The head that predicts masked characters, one after another in a shuffled order: objective C of
CANINE (arXiv 2103.06874, 3.3).

    step t            0         1         2
    its character     state 7   state 3   state 4      in the encoder, which saw a mask there
    the class before  learned   class 7   class 3
    predicts          class 7   class 3   class 4

Each step joins the two, and a causal block over the steps follows, whose last norm is the head's. A
document's steps see no other document's. Without the shift by one, which no published text has, a
step would see what it predicts.
"""

import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention.pattern import Sliding
from bltjax.distributed.sharding import constrained
from bltjax.model.flops import visible_keys
from bltjax.model.layers import embedded, project
from bltjax.rivals.canine.bert_block import BertBlock, BertSize, block_flops, dense, gelu, weight
from bltjax.rivals.canine.molecules import rows_at, shifted
from bltjax.text.segments import document_begins, index_like, window_ranges


class MaskedCharacters(nn.Module):
    size: BertSize
    classes: int  # V
    dtype: jnp.dtype
    implementation: str | None

    @nn.compact
    def __call__(self, hidden_BND, masked_BQ, targets_BQ, documents_BN):
        """Logits, float32 [B, Q, V]; see `Canine.predictions`."""
        (N, D), Q = hidden_BND.shape[1:], masked_BQ.shape[1]
        F, V = self.size.hidden, self.classes
        at_BQ = jnp.minimum(masked_BQ, N - 1)
        document_BQ = jnp.take_along_axis(documents_BN, at_BQ, axis=1)
        document_BQ = jnp.where(masked_BQ < N, document_BQ, 0)
        first_BQ1 = (index_like(masked_BQ) == document_begins(document_BQ))[..., None]

        classes_VD = weight(self, "predicted_characters_VD", (V, D))
        before_BQD = embedded(classes_VD, shifted(targets_BQ, -1))
        first_11D = weight(self, "first_D", (D,))[None, None]
        before_BQD = jnp.where(first_BQ1, first_11D, before_BQD)
        state_BQD = rows_at(hidden_BND.astype(self.dtype), masked_BQ)
        x_BQE = jnp.concatenate([state_BQD, before_BQD], axis=-1)
        x_BQF = gelu(dense(self, x_BQE, "join_EF", "join_bias_F", (2 * D, F)))
        x_BQD = dense(self, constrained(x_BQF, "x_BQF"), "narrow_FD", "narrow_bias_D", (F, D))

        block = BertBlock(self.size, Sliding(Q), self.dtype, self.implementation, name="block")
        x_BQD, _ = block(x_BQD, window_ranges(document_BQ, Q))
        logits_BQV = project(x_BQD, weight(self, "head_DV", (D, V)))
        return constrained(logits_BQV.astype(jnp.float32), "logits_BQV")


def head_flops(size: BertSize, classes: int, Q: int) -> int:
    """FLOPs of the predictions of one row, forward."""
    D, F = size.width, size.hidden
    joined = 2 * (2 * D * F + F * D + D * classes)
    return Q * joined + block_flops(Q, visible_keys(Q, Q), D, F)
