"""Inner states: weights of the cross-attentions between bytes and slots, for drawing; embeddings by
an encoder of characters; and whatever a family's public forward pass shows.

An implementation of attention never stores weights, so they are recomputed from the queries and
keys of the model's forward pass.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np

from bltjax.configured import make_model, resolved
from bltjax.data.batches import one_row
from bltjax.families import family_of
from bltjax.family import Model
from bltjax.inference.decoding.prefill import power_of_two
from bltjax.inference.finite import first_not_finite, not_finite
from bltjax.model.blt.config import BLTConfig
from bltjax.text.alphabet import VOCABULARY, as_bytes
from bltjax.text.characters import document_characters


class CrossWeights(NamedTuple):
    """Weights of one text per cross-attention layer, indexed by byte as logits are: 0 is BOS.

    encoder_LKGN: weight of this byte in slot k of its own patch, by head g; they sum to 1 over the
    bytes of a patch. decoder_LKGN: weight of slot k of the patch that the byte reads, which is the
    one before its own unless it closes that; they sum to 1 over k.
    """

    encoder_LKGN: np.ndarray
    decoder_LKGN: np.ndarray


def softmax(scores: np.ndarray, axis: int) -> np.ndarray:
    raised = np.exp(scores - scores.max(axis=axis, keepdims=True))
    return raised / raised.sum(axis=axis, keepdims=True)


def cross_weights(config: BLTConfig, model, params, batch, length: int) -> CrossWeights:
    """The weights of a batch of one row, of which the first `length` bytes are text."""
    inputs = (batch.bytes_BN, batch.documents_BN, batch.starts_BN1)
    (_, out), met = model.apply({"params": params}, *inputs, mutable=["cross"])
    patch_of_N = np.asarray(out["patches"].patch_of_BN[0, :length])
    reads_N = np.asarray(out["patches"].read_ranges.start_BQ[0, :length])
    slots = config.cross.slots

    def scores(part: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each layer, in order, queries and keys of the row, [Q, G, C] and [T, G, C]."""
        layers = met.get("cross", {}).get(part, {})
        names = sorted(layers, key=lambda name: int(name.removeprefix("cross_")))
        kept = [layers[name]["queries_keys"][0] for name in names]
        return [tuple(np.asarray(array[0], np.float64) for array in layer) for layer in kept]

    encoder = [np.zeros((0, slots, config.cross.heads, length), np.float32)]
    decoder = [np.zeros((0, slots, config.cross.heads, length), np.float32)]
    for q_SGC, k_NGC in scores("encoder"):
        q_PKGC = q_SGC.reshape(-1, slots, *q_SGC.shape[1:])
        weights_KGN = np.einsum("NKGC,NGC->KGN", q_PKGC[patch_of_N], k_NGC[:length])
        weights_KGN /= np.sqrt(k_NGC.shape[-1])
        for patch in np.unique(patch_of_N):
            there_N = patch_of_N == patch
            weights_KGN[:, :, there_N] = softmax(weights_KGN[:, :, there_N], axis=2)
        encoder.append(weights_KGN[None].astype(np.float32))
    for q_NGC, k_SGC in scores("decoder"):
        k_PKGC = k_SGC.reshape(-1, slots, *k_SGC.shape[1:])
        weights_KGN = np.einsum("NGC,NKGC->KGN", q_NGC[:length], k_PKGC[reads_N])
        weights_KGN = softmax(weights_KGN / np.sqrt(k_SGC.shape[-1]), axis=0)
        decoder.append(weights_KGN[None].astype(np.float32))
    return CrossWeights(np.concatenate(encoder), np.concatenate(decoder))


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


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def public_states(run, config, dtype, attention, params, arrays):
    with jax.default_matmul_precision("highest"):
        return run(config, params, arrays, dtype, attention)


def forward_states(model: Model, arrays: dict, device) -> dict[str, np.ndarray]:
    """As `LoadedModel.forward`, on a device's platform."""
    config, family = model.config, family_of(model.config)
    run, known = family.require("forward"), ", ".join(family.inputs)
    if unknown := sorted(arrays.keys() - set(family.inputs)):
        raise ValueError(f"forward of a {family.title} takes {known}; not {unknown[0]}")
    settings = resolved(config, device)
    given = {name: checked_input(config.model, name, array) for name, array in arrays.items()}
    dtype = jax.numpy.dtype(settings.compute_dtype)
    try:
        found = public_states(run, config, dtype, settings.attention, model.params, given)
        return jax.device_get(found)
    except KeyError as error:
        raise ValueError(f"forward of a {family.title} needs {error}: it takes {known}") from None


OF_ROWS = ("next_token", "token_counts", "text0", "text1")  # inputs with one axis
OF_IDS = ("bytes_BN", "input_ids", "labels", "next_token", "targets", "tokens")


def checked_input(model, name: str, array) -> np.ndarray:
    """An input of `forward_states`, if it has the rank and the ids that it can have.

    Raises:
      ValueError: naming the array, with both numbers.
    """
    array, axes = np.asarray(array), 1 if name in OF_ROWS else 2
    if array.dtype.kind not in "biu" or array.ndim != axes:
        raise ValueError(
            f"{name} is {array.dtype} {list(array.shape)}, not whole numbers of {axes} axes"
        )
    size = getattr(model, "vocabulary", VOCABULARY)
    if name not in OF_IDS or not array.size or not isinstance(size, int):
        return array
    # Labels and targets that are left out are negative.
    least = -100 if name in ("labels", "targets") else 0
    if array.min() < least or (model.group != "canine" and array.max() >= size):
        raise ValueError(
            f"{name} has ids from {array.min()} to {array.max()}; a model of {size} ids takes"
            f" {least} to {size - 1}"
        )
    return array
