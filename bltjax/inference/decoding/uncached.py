"""The whole model on the whole prefix for every byte: slow, and simple enough to trust.

The reference for cached decoding in tests and in the benchmark. Buffers are padded to a power of
two, so that few programs are compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.attention import fastest
from bltjax.configured import batch_logits, make_model, resolved, rows_of, vocabulary
from bltjax.data.batches import ByteBatch, one_row
from bltjax.families import family_of
from bltjax.family import Model
from bltjax.inference.decoding.prefill import power_of_two, row_of
from bltjax.inference.entropy import contexts
from bltjax.model.byte_cnn import table_entropies
from bltjax.model.byte_lm import entropies_of
from bltjax.text.alphabet import encode
from bltjax.text.patching import force_starts, patch_starts


class Predictor:
    """Logits of the byte after a prefix, for a byte LM or for a BLT with its byte LM."""

    def __init__(self, model: Model):
        self.params, self.patching = model.params, model.config.patching
        self.rows = rows_of(model.config)
        self.vocabulary = vocabulary(model.config)
        self.byte_lm = model.entropy_model if model.config.by_entropy else None
        self.table = None
        if self.byte_lm is not None:
            scorer = self.byte_lm.config.model
            make_table = family_of(scorer).entropy_table
            self.table = make_table and make_table(scorer, self.byte_lm.params)

        device = jax.devices()[0]
        dtype = jnp.dtype(resolved(model.config, device).compute_dtype)
        attention = fastest(device)

        # Compiled once per bucket of N and P.
        @jax.jit
        def entropies(params, bytes_BN, documents_BN):
            module = make_model(self.byte_lm.config.model, 0, jnp.float32, attention)
            with jax.default_matmul_precision("highest"):
                logits_BNV = batch_logits(module, params, ByteBatch(bytes_BN, documents_BN))
            return entropies_of(logits_BNV)

        @functools.partial(jax.jit, static_argnames="patches")
        def last_logits(params, batch, last, patches):
            module = make_model(model.config.model, patches, dtype, attention)
            return batch_logits(module, params, batch)[0, last]

        self.entropies, self.last_logits = entropies, last_logits

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """float32 [V]: logits of the byte after `ids`, which start with BOS."""
        starts_N1 = None
        if self.patching is not None:
            entropies_N = self.prefix_entropies(ids, power_of_two(len(ids)))
            # The rules know our own ids.
            ours = encode(self.vocabulary.decode(ids), eos=False)
            starts_N1 = force_starts(patch_starts(self.patching, ours, entropies_N))
        batch, patches = row_of(ids, starts_N1, self.rows.kind, self.rows.grid)
        return np.asarray(self.last_logits(self.params, batch, len(ids) - 1, patches=patches))

    def prefix_entropies(self, ids: np.ndarray, length: int) -> np.ndarray | None:
        """float32 [len]: the entropy after each position of the prefix, if patches need it."""
        if self.byte_lm is None:
            return None
        contexts_N = contexts(ids, self.patching.newline_reset)
        if self.table is not None:
            return table_entropies(self.table, ids, contexts_N)
        documents_BN = np.zeros((1, length), np.int32)
        documents_BN[0, : len(ids)] = contexts_N
        bytes_BN = one_row(ids, None, length).bytes_BN
        scored_BN = self.entropies(self.byte_lm.params, bytes_BN, documents_BN)
        return np.asarray(scored_BN)[0, : len(ids)]

    def greedy(self, prompt: str | bytes, max_bytes: int) -> tuple[bytes, list[float]]:
        """The greedy continuation of a prompt, and the margin of each byte over the runner-up."""
        ids, margins, alphabet = self.vocabulary.prompt(prompt), [], self.vocabulary.alphabet
        allowed = alphabet.writable()
        prompt_size = len(ids)
        for _ in range(max_bytes):
            logits_V = np.array(self(ids))
            logits_V[~allowed] = -np.inf
            second, first = np.sort(logits_V)[-2:]
            margins.append(float(first - second))
            chosen = int(np.argmax(logits_V))
            if chosen == alphabet.eos:
                break
            ids = np.append(ids, np.int32(chosen))
        return self.vocabulary.decode(ids[prompt_size:]), margins
