"""A convolutional byte LM with a context of two or three bytes, and its entropies as a table.

    x[n - 1] x[n]  --embed--> one convolution --> pointwise layers --> logits of x[n + 1]

So small a receptive field has few contexts: the entropy after each is computed once, and scoring a
text is a table look-up (paper 4.2). Bytes before the document count as BOE.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bltjax.config.fields import positive
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.byte_lm import entropies_of
from bltjax.model.layers import embedded, project, rms_norm, truncated_normal
from bltjax.text.alphabet import BOE, VOCABULARY
from bltjax.text.segments import document_begins, index_like


@dataclasses.dataclass(frozen=True)
class ByteCNNConfig:
    """A convolutional byte LM that sees only the last few bytes: the paper's CNN scorer (fig. 3).

    Its entropies are compiled to a table with an entry for every context.
    """

    group: typing.ClassVar[str] = "byte_cnn"

    context: int = 2  # bytes; three make a table of 17.6 million entries
    width: int = 128  # E
    layers: int = 2
    hidden: int = 384  # F
    norm_eps: float = 1e-5

    def __post_init__(self):
        positive(self, "context", "width", "layers", "hidden", "norm_eps")
        if self.context > 3:
            raise ValueError(f"byte_cnn.context ({self.context}) must be 1 ... 3")

    def summary(self) -> str:
        """The sizes, in one line."""
        return f"context {self.context}, {self.layers} layers of {self.width}"

    def layers_in_arrays(self, stacked: bool) -> int:
        """The number of layers, each with arrays of its own."""
        return self.layers


class ByteCNN(nn.Module):
    config: ByteCNNConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, bytes_BN, documents_BN):
        """Logits, float32 [B, N, V], of the byte after each byte; None, as there is no carry."""
        config = self.config
        E, F = config.width, config.hidden

        def weight(name, shape, fan_in):
            return gathered(self.param(name, truncated_normal(fan_in), shape), name, self.dtype)

        def normed(name, x_BNE):
            return rms_norm(x_BNE, self.param(name, nn.initializers.ones, (E,)), config.norm_eps)

        bytes_VE = weight("bytes_VE", (VOCABULARY, E), E)
        since_BN = index_like(bytes_BN) - document_begins(documents_BN)
        x_BNE = 0
        for distance in range(config.context):
            past_BN = jnp.pad(bytes_BN, ((0, 0), (distance, 0)))[:, : bytes_BN.shape[1]]
            past_BN = jnp.where(since_BN >= distance, past_BN, BOE)
            tap_EE = weight(f"tap_{distance}_EE", (E, E), E * config.context)
            x_BNE += project(constrained(embedded(bytes_VE, past_BN), "x_BNE"), tap_EE)
        for layer in range(config.layers):
            y_BNE = normed(f"norm_{layer}_E", x_BNE)
            gate_BNF = project(y_BNE, weight(f"gate_{layer}_EF", (E, F), E))
            up_BNF = project(y_BNE, weight(f"up_{layer}_EF", (E, F), E))
            x_BNE += project(nn.silu(gate_BNF) * up_BNF, weight(f"down_{layer}_FE", (F, E), F))
        head_EV = weight("head_EV", (E, VOCABULARY), E)
        return project(normed("norm_E", x_BNE), head_EV).astype(jnp.float32), None


@functools.partial(jax.jit, static_argnums=0)
def whole_table(config: ByteCNNConfig, params):
    """float32 [V, ..., V], one axis per byte of context: nats after each context."""
    model, sizes = ByteCNN(config), (VOCABULARY,) * config.context
    run = VOCABULARY ** min(2, config.context)  # contexts that are run at once

    def entropies_from(begin):
        contexts_BN = jnp.stack(jnp.unravel_index(begin + jnp.arange(run), sizes), axis=1)
        with jax.default_matmul_precision("highest"):
            logits_BNV, _ = model.apply({"params": params}, contexts_BN, jnp.ones_like(contexts_BN))
        return entropies_of(logits_BNV[:, -1:])[:, 0]

    begins = jnp.arange(0, VOCABULARY**config.context, run)
    return jax.lax.map(entropies_from, begins).reshape(sizes)


def entropy_table(config: ByteCNNConfig, params) -> np.ndarray:
    """`whole_table` on the host, where corpora are scored."""
    return jax.device_get(whole_table(config, params))


def table_entropies(table, ids_N, documents_N):
    """float32 [..., N]: the entropy after each position, looked up; documents count from 1."""
    xp = jnp if isinstance(ids_N, jax.Array) else np
    index = []
    for distance in reversed(range(table.ndim)):
        before = [(0, 0)] * (ids_N.ndim - 1) + [(distance, 0)]
        past_N = xp.pad(ids_N, before)[..., : ids_N.shape[-1]]
        same_N = xp.pad(documents_N, before)[..., : ids_N.shape[-1]] == documents_N
        index.append(xp.where(same_N, past_N, BOE))
    return table[tuple(index)]
