"""A model in memory, with the methods that people and notebooks use; `bltjax.load` makes it.

Texts are str or bytes, of any length that memory allows; programs are compiled for buffers of
powers of two, so that a few serve all texts. A whole text is one document.
"""

import codecs
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from bltjax.attention import fastest
from bltjax.config.data import SourceConfig
from bltjax.configured import batch_logits, check_length, make_model, resolved, rows_of, vocabulary
from bltjax.families import family_of
from bltjax.family import Model
from bltjax.inference import states
from bltjax.inference.decoding.decoder import Decoder
from bltjax.inference.decoding.placement import load_onto, on_mesh, read_mesh
from bltjax.inference.decoding.prefill import row_of
from bltjax.inference.decoding.sampling import Sampling
from bltjax.inference.entropies import write_entropies
from bltjax.inference.entropy import score_documents
from bltjax.inference.finite import first_not_finite, not_finite
from bltjax.inference.states import CrossWeights, Embedding
from bltjax.model.byte_lm import entropies_of
from bltjax.system.environment import check_numbers, check_platform
from bltjax.system.paths import hidden_beside, path_of
from bltjax.text.alphabet import NO_BYTE, as_bytes, encode
from bltjax.text.patching import force_starts, patch_starts
from bltjax.text.segments import split_at
from bltjax.text.vocabulary import Vocabulary
from bltjax.weights.export import check_step, open_stored
from bltjax.weights.exporting import write_export


class LoadedModel:
    """A model with what places its patches, ready for text; `bltjax.load` makes it.

    config: its ModelConfig. model: the Model itself, as rooms pass it on. path: where it was
    loaded from, if it was.
    """

    def __init__(self, model: Model, mesh: Mesh | None = None, dtype: str | None = None, path=None):
        self.model, self.mesh, self.dtype, self.path = model, mesh, dtype, path
        self.config, self.params = model.config, model.params
        self.rows, self.family = rows_of(self.config), family_of(self.config)
        # Where no other model places patches, a model has entropies of its own.
        placed = self.config.patching is not None and not self.family.own_patching
        self.scores = model.entropy_model if placed else model

        device = mesh.devices.flat[0] if mesh else jax.devices()[0]
        computed = jax.numpy.dtype(resolved(self.config, device).compute_dtype)
        self.computed, self.attention = computed, fastest(device)

        def model_of(patches: int):
            return make_model(self.config.model, patches, computed, self.attention)

        @functools.partial(jax.jit, static_argnames="patches")
        def all_logits(params, batch, patches):
            model = model_of(patches)
            # Logits that people read are exact: a TPU would multiply in bfloat16.
            with jax.default_matmul_precision("highest"):
                return batch_logits(model, params, batch)[0]

        self.all_logits, self.model_of = all_logits, model_of
        self.decoder: Decoder | None = None

    def logits(self, text: str | bytes) -> np.ndarray:
        """float32 [len + 1, 260]: row 0 follows BOS, row i the first i bytes.

        Of a model of tokens, or of another alphabet, a row per id, with its vocabulary's columns;
        without a BOS there is no row 0.

        Raises:
          ValueError: for entropy patching without a byte LM, or a model that isn't causal.
          FloatingPointError: for logits or entropies that are not finite.
        """
        self.family.require("causal")
        starts_N1 = self.starts(text) if self.config.patching is not None else None
        return self.logits_with(self.vocabulary.prompt(text), starts_N1)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The model's ids: of bytes, or of tokens."""
        return vocabulary(self.config)

    def logits_with(self, ids: np.ndarray, starts_N1: np.ndarray | None) -> np.ndarray:
        """The same for ids that begin with BOS and, of a BLT, given patch starts [len + 1]."""
        self.family.require("causal")
        check_length(self.config, len(ids))
        batch, patches = row_of(ids, starts_N1, self.rows.kind, self.rows.grid)
        with on_mesh(self.mesh):
            logits_NV = np.asarray(self.all_logits(self.params, batch, patches=patches))[: len(ids)]
        if (position := first_not_finite(logits_NV)) is not None:
            raise not_finite(
                f"logits after the text's first {position} bytes are", {"": self.params}
            )
        return logits_NV

    def next_bytes(self, text: str | bytes, count: int = 5) -> list[tuple[bytes, float]]:
        """The likeliest next bytes and their probabilities, likeliest first; b"" is the text's end.

        Raises:
          ValueError, FloatingPointError: as `logits`.
        """
        chances_V = np.asarray(jax.nn.softmax(self.logits(text)[-1]))
        ids = np.flatnonzero(self.vocabulary.alphabet.writable())
        likeliest = ids[np.argsort(-chances_V[ids], kind="stable")][:count]
        return [(self.vocabulary.decode([id]), float(chances_V[id])) for id in likeliest]

    def cross_weights(self, text: str | bytes) -> CrossWeights:
        """Cross-attention weights of a text, by layer, slot, head and byte.

        Raises:
          ValueError: for a byte LM.
        """
        ids, starts_N1 = encode(text, eos=False), self.starts(text)
        if reason := self.family.verbs.get("cross_weights"):
            raise ValueError(reason)
        batch, patches = row_of(ids, starts_N1, "patches", 1)
        model = self.model_of(patches)
        with on_mesh(self.mesh):
            return states.cross_weights(self.config.model, model, self.params, batch, len(ids))

    def entropies(self, text: str | bytes) -> np.ndarray:
        """float32 [len + 1], nats, indexed as logits: how unsure the byte LM is of each next byte.

        Raises:
          ValueError: if there is no byte LM.
          FloatingPointError: for an entropy that is not finite.
        """
        self.family.require("causal")
        model, patching = self.scores, self.config.patching
        if model is None:
            raise ValueError(
                f"this model places patches by {patching.mode}: it has no byte LM, and"
                " so no entropies"
            )
        family = family_of(model.config)
        if family.empty_carry is None and family.entropy_table is None:
            return np.asarray(entropies_of(jax.numpy.asarray(self.logits(text))))
        texts = [np.frombuffer(as_bytes(text), np.uint8)]
        reset = patching is not None and patching.newline_reset
        scored, _ = score_documents(
            model.config.model, model.params, texts, newline_reset=reset, name=lambda _: "the text"
        )
        return scored[0]

    def starts(self, text: str | bytes) -> np.ndarray:
        """bool [len + 2]: whether a patch begins at BOS, at each byte, and at the byte to come."""
        patching = self.config.patching
        if patching is None:
            raise ValueError(f"a {self.family.title} has no patches; load a BLT")
        entropies_N = self.entropies(text) if patching.mode == "entropy" else None
        # By our own ids, whatever the model's: the rules know no others.
        return force_starts(patch_starts(patching, encode(text, eos=False), entropies_N))

    def patches(self, text: str | bytes) -> list[bytes]:
        """The patches of a text, which join to it; BOS's own is left out.

        Raises:
          ValueError: for a byte LM.
        """
        return split_at(as_bytes(text), self.starts(text))

    def bits_per_byte(self, text: str | bytes) -> float:
        """Mean of -log2 p over the bytes of a text.

        Raises:
          ValueError: for an empty text, or a model that isn't causal.
        """
        self.family.require("causal")
        ids = self.vocabulary.prompt(text)
        counts = self.vocabulary.text_bytes(ids)[1:]
        text_bytes = int(counts[counts < NO_BYTE].sum(dtype=np.int64))
        if not text_bytes:
            what = "a text of which nothing is predicted" if as_bytes(text) else "an empty text"
            raise ValueError(f"{what} has no bits per byte")
        log_probs = jax.nn.log_softmax(self.logits(text)[:-1], axis=-1)
        chosen = np.take_along_axis(np.asarray(log_probs), ids[1:, None], axis=1)
        nats = -chosen[counts > 0].sum(dtype=np.float64)
        return float(nats / np.log(2.0) / text_bytes)

    def embed(self, text: str | bytes | Sequence[str | bytes]) -> Embedding | list[Embedding]:
        """The states of a text's characters, and one for all of it; a list of them for a list.

        Raises:
          ValueError: for a model that is no encoder of characters, or a text longer than its table
            of positions, with both numbers.
          FloatingPointError: for states that are not finite.
        """
        if not isinstance(text, str | bytes):
            return [self.embed(one) for one in text]
        run = self.family.require("embed")
        with on_mesh(self.mesh):
            return states.embedding(run, self.model, text, self.computed, self.attention)

    def generate(
        self,
        prompt: str | bytes | Sequence[str | bytes] = "",
        *,
        max_bytes: int = 200,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        valid_utf8: bool = False,
        seed: int = 0,
        stop: str | bytes = "",
        truncate: bool = False,
    ) -> Iterator[str] | list[str]:
        """Text that continues a prompt, piece by piece, until EOS, `stop` or `max_bytes`; of a list
        of prompts, which are continued side by side, a list of whole texts.

        temperature 0 is greedy. What is no UTF-8 shows as U+FFFD; valid_utf8 writes none. truncate:
        a prompt that is too long loses its beginning.

        Raises:
          ValueError: for a setting out of range, or patches that can't be placed while writing.
          FloatingPointError: for logits or entropies that are not finite.
        """
        if self.decoder is None:
            self.decoder = Decoder(self.model, mesh=self.mesh, dtype=self.dtype)
        one = isinstance(prompt, str | bytes)
        pieces = self.decoder.generate(
            [prompt] if one else list(prompt),
            max_bytes=max_bytes,
            sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty, valid_utf8),
            seed=seed,
            truncate=truncate,
            stop=[stop] if stop else [],
        )
        if one:
            # A character that is cut between two pieces comes with the second.
            return codecs.iterdecode((piece.text for piece in pieces), "utf-8", errors="replace")
        texts = [b""] * len(prompt)
        for piece in pieces:
            texts[piece.row] += piece.text
        return [text.decode(errors="replace") for text in texts]

    def write_records(self, source, out, *, split_bytes: int = 0) -> None:
        """Scores a corpus with this byte LM: records of its bytes and entropies, on which a BLT is
        trained. The same call resumes it.

        source: a path or pattern of text, JSON lines or Parquet. split_bytes: cut text files into
        documents of about so many bytes.

        Raises:
          ValueError: for a model with patches, one that is in memory alone, or a bad source.
        """
        if self.path is None or self.config.patching is not None:
            raise ValueError("records are written by a byte LM that was loaded from a folder")
        check_step(self.path, self.model)
        write_entropies(SourceConfig(str(source), split_bytes=split_bytes), self.path, path_of(out))

    def forward(self, **arrays) -> dict[str, np.ndarray]:
        """The model's inner states and logits, by name, of arrays by name: `logits`, and what the
        family calls its states.

            llama.forward(tokens=ids_BN)["hidden_states"]

        A model with imported weights computes exactly what the public implementation does, quirks
        included, from that one's inputs: one document per row. A BLT and a byte LM take the fields
        of their batch (`bytes_BN`, `documents_BN`, `starts_BN1`).

        Raises:
          ValueError: for a name that the family doesn't take, or a required one that is missing.
        """
        device = self.mesh.devices.flat[0] if self.mesh else jax.devices()[0]
        with on_mesh(self.mesh):
            return states.forward_states(self.model, arrays, device)

    def export(self, destination) -> None:
        """Writes the model as an export, which `load` takes: settings, weights, what places its
        patches; nothing of the run that trained it.

        Raises:
          ValueError: for a model that is in memory alone, or a destination that exists.
        """
        destination = path_of(destination)
        if self.path is None:
            raise ValueError("only a model that was loaded from a folder is exported")
        if destination.exists():
            raise ValueError(f"{destination} exists; give another destination, or remove it")
        check_step(self.path, self.model)
        partial = hidden_beside(destination, "partial")
        partial.rmtree(missing_ok=True)
        write_export(open_stored(self.path), partial, lambda written: None)
        partial.rename(destination)


def load(path, *, mesh: str | None = None, dtype: str | None = None) -> LoadedModel:
    """As `bltjax.load`."""
    check_numbers("bltjax.load")
    check_platform()
    path, on = path_of(path), read_mesh(mesh) if mesh else None
    return LoadedModel(load_onto(on, path, dtype), on, dtype, path)
