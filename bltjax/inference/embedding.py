"""States of texts from an encoder of characters."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from bltjax.data.batches import one_row
from bltjax.families import make_model
from bltjax.family import Model
from bltjax.inference.decoding.prefill import power_of_two
from bltjax.inference.finite import first_not_finite, not_finite
from bltjax.text.alphabet import as_bytes
from bltjax.text.characters import document_characters


class Embedding(NamedTuple):
    """The states of a text, float32.

    characters: [characters + 2, D], first that of CLS, last that of SEP; a byte that is not UTF-8
    is a character. pooled: [D], of the text as a whole.
    """

    characters: np.ndarray
    pooled: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def all_states(states, config, molecules, dtype, attention, params, batch):
    with jax.default_matmul_precision("highest"):  # as logits that people read
        return states(make_model(config, molecules, dtype, attention), params, batch)


def embedding(states, model: Model, text: str | bytes, dtype, attention: str) -> Embedding:
    """The embedding of a text.

    states: its family's `embed`.

    Raises:
      ValueError: for more characters than positions, with both numbers.
      FloatingPointError: for states that are not finite.
    """
    ids_N, config = document_characters(as_bytes(text)), model.config.model
    if len(ids_N) > config.context:
        raise ValueError(
            f"the text has {len(ids_N):,} characters, CLS and SEP among them, but the model has"
            f" {config.context:,} positions: embed parts of it"
        )
    length = min(power_of_two(len(ids_N)), config.context)
    batch, molecules = one_row(ids_N, None, length, "characters"), max(1, length // config.rate)
    given = (states, config, molecules, dtype, attention, model.params, batch)
    hidden_BND, pooled_BD = all_states(*given)
    found = Embedding(np.asarray(hidden_BND[0])[: len(ids_N)], np.asarray(pooled_BD[0]))
    if first_not_finite(found.characters) is not None or not np.isfinite(found.pooled).all():
        raise not_finite("the states of the text are", {"": model.params})
    return found
