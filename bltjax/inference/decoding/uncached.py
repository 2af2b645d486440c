"""The whole model on the whole prefix for every byte: slow, and plainly right.

What cached decoding is compared with, by tests and by the benchmark. Buffers are padded to a power
of two, so that few programs are compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.attention import fastest
from bltjax.config.model import ByteCNNConfig, PatchingConfig
from bltjax.config.run import RunConfig
from bltjax.inference.entropy import EntropyModel, contexts
from bltjax.model.build import batch_logits, make_model, resolved
from bltjax.model.byte_cnn import entropy_table, table_entropies
from bltjax.model.byte_lm import ByteLM, entropies_of
from bltjax.text.alphabet import EOS, OFFSET, encode
from bltjax.text.patching import force_starts, patch_starts

SHORTEST = 64  # bytes in the smallest buffer


def bucket(size: int) -> int:
    return max(SHORTEST, 1 << (size - 1).bit_length())


class Predictor:
    """Logits of the byte after a prefix, for a byte LM or a BLT with the byte LM it needs."""

    def __init__(
        self,
        config: RunConfig,
        params,
        patching: PatchingConfig | None,
        byte_lm: EntropyModel | None,
    ):
        self.config, self.params, self.patching, self.byte_lm = config, params, patching, byte_lm
        self.table = None
        if byte_lm is not None and isinstance(byte_lm.config, ByteCNNConfig):
            self.table = entropy_table(byte_lm.config, byte_lm.params)

        device = jax.devices()[0]
        dtype, attention = jnp.dtype(resolved(config, device).compute_dtype), fastest(device)

        # Compiled once per bucket of N and P.
        @jax.jit
        def entropies(params, bytes_BN, documents_BN):
            model = ByteLM(byte_lm.config, implementation=attention)
            with jax.default_matmul_precision("highest"):
                logits_BNV, _ = model.apply({"params": params}, bytes_BN, documents_BN)
            return entropies_of(logits_BNV)

        @functools.partial(jax.jit, static_argnames="patches")
        def last_logits(params, batch, last, patches):
            model = make_model(config.model, patches, dtype, attention)
            return batch_logits(model, params, batch)[0, last]

        self.entropies, self.last_logits = entropies, last_logits

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """float32 [V]: logits of the byte after `ids`, which begin with BOS."""
        length, patches = bucket(len(ids)), 0
        bytes_BN = np.zeros((1, length), np.int32)
        bytes_BN[0, : len(ids)] = ids
        documents_BN = (np.arange(length) < len(ids)).astype(np.int32)[None]
        batch = {"bytes_BN": bytes_BN, "documents_BN": documents_BN}
        if self.patching is not None:
            entropies_N = self.prefix_entropies(ids, bytes_BN)
            starts_N1 = force_starts(patch_starts(self.patching, ids, entropies_N))
            batch["starts_BN1"] = np.zeros((1, length + 1), bool)
            batch["starts_BN1"][0, : len(ids) + 1] = starts_N1
            patches = min(length, bucket(int(starts_N1[:-1].sum())))
        return np.asarray(self.last_logits(self.params, batch, len(ids) - 1, patches=patches))

    def prefix_entropies(self, ids: np.ndarray, bytes_BN: np.ndarray) -> np.ndarray | None:
        """float32 [len]: the entropy after each position of the prefix, if patches need it."""
        if self.byte_lm is None:
            return None
        contexts_N = contexts(ids, self.byte_lm.newline_reset)
        if self.table is not None:
            return table_entropies(self.table, ids, contexts_N)
        documents_BN = np.zeros(bytes_BN.shape, np.int32)
        documents_BN[0, : len(ids)] = contexts_N
        scored_BN = self.entropies(self.byte_lm.params, bytes_BN, documents_BN)
        return np.asarray(scored_BN)[0, : len(ids)]

    def greedy(self, prompt: str | bytes, max_bytes: int) -> tuple[bytes, list[float]]:
        """What the model writes after a prompt, and by how much each byte was ahead of the next."""
        ids, margins = encode(prompt, eos=False), []
        begun = len(ids)
        for _ in range(max_bytes):
            logits_V = np.array(self(ids))
            logits_V[[i for i in range(OFFSET) if i != EOS]] = -np.inf
            second, first = np.sort(logits_V)[-2:]
            margins.append(float(first - second))
            chosen = int(np.argmax(logits_V))
            if chosen == EOS:
                break
            ids = np.append(ids, np.int32(chosen))
        return (ids[begun:] - OFFSET).astype(np.uint8).tobytes(), margins
