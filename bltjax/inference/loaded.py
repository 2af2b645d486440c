"""The public door for notebooks: a model in memory, and what people ask of it.

Texts are str or bytes, of any length that memory allows; programs are compiled for buffers of
powers of two, so that a few serve all texts. A whole text is one document.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from bltjax.attention import fastest
from bltjax.config.model import BLTConfig, ByteCNNConfig, ByteLMConfig, PatchingConfig
from bltjax.config.run import RunConfig
from bltjax.inference.attention_maps import CrossWeights, cross_weights
from bltjax.inference.decoding.decoder import Decoder
from bltjax.inference.decoding.placement import load_onto, on_mesh, read_mesh
from bltjax.inference.decoding.sampling import Sampling
from bltjax.inference.decoding.uncached import bucket
from bltjax.inference.entropy import EntropyModel, run_patching, score_documents
from bltjax.inference.finite import first_not_finite, not_finite
from bltjax.model.build import batch_logits, make_model, resolved
from bltjax.system.environment import check_numbers, check_platform
from bltjax.system.paths import path_of
from bltjax.text.alphabet import OFFSET, as_bytes, encode, text_stream
from bltjax.text.patching import force_starts, patch_starts


@dataclasses.dataclass(frozen=True)
class LoadedConfig:
    """What a loaded model is: the settings of both models and of the patching between them."""

    blt: BLTConfig | None
    byte_lm: ByteLMConfig | ByteCNNConfig | None
    patching: PatchingConfig | None

    @property
    def threshold(self) -> float | None:
        """Nats, if entropies place the patches."""
        by_entropy = self.patching is not None and self.patching.mode == "entropy"
        return self.patching.threshold if by_entropy else None


class LoadedModel:
    """A BLT with its byte LM, or a byte LM alone, ready for text; `bltjax.load` makes it."""

    def __init__(
        self,
        run: RunConfig,
        params,
        patching: PatchingConfig | None,
        entropy_model: EntropyModel | None,
        mesh: Mesh | None = None,
        dtype: str | None = None,
    ):
        self.run, self.params, self.mesh, self.dtype = run, params, mesh, dtype
        self.entropy_model = entropy_model
        if run.blt is None:  # its own entropies
            self.entropy_model = EntropyModel(run.model, params, "", False, run, 0)
        self.config = LoadedConfig(
            run.blt, self.entropy_model and self.entropy_model.config, patching
        )

        device = mesh.devices.flat[0] if mesh else jax.devices()[0]
        computed = jax.numpy.dtype(resolved(run, device).compute_dtype)

        def model_of(patches: int):
            return make_model(run.model, patches, computed, fastest(device))

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

        Raises:
          ValueError: for entropy patching without a byte LM.
          FloatingPointError: for logits or entropies that are not finite.
        """
        ids = encode(text, eos=False)
        starts_N1 = self.starts(text) if self.config.blt is not None else None
        return self.logits_with(ids, starts_N1)

    def logits_with(self, ids: np.ndarray, starts_N1: np.ndarray | None) -> np.ndarray:
        """The same for ids that begin with BOS and, of a BLT, given patch starts [len + 1]."""
        batch, patches = row_of(ids, starts_N1)
        with on_mesh(self.mesh):
            logits_NV = np.asarray(self.all_logits(self.params, batch, patches=patches))[: len(ids)]
        if (place := first_not_finite(logits_NV)) is not None:
            raise not_finite(f"logits after the text's first {place} bytes are", {"": self.params})
        return logits_NV

    def cross_weights(self, text: str | bytes) -> CrossWeights:
        """What the cross-attentions look at in a text, by layer, slot, head and byte.

        Raises:
          ValueError: for a byte LM.
        """
        ids = encode(text, eos=False)
        batch, patches = row_of(ids, self.starts(text))
        model = self.model_of(patches)
        with on_mesh(self.mesh):
            return cross_weights(self.config.blt, model, self.params, batch, len(ids))

    def entropies(self, text: str | bytes) -> np.ndarray:
        """float32 [len + 1], nats, indexed as logits: how unsure the byte LM is of each next byte.

        Raises:
          ValueError: if there is no byte LM.
          FloatingPointError: for an entropy that is not finite.
        """
        model = self.entropy_model
        if model is None:
            raise ValueError(
                f"this model places patches by {self.config.patching.mode}: it has no byte LM, and"
                " so no entropies"
            )
        texts = [np.frombuffer(as_bytes(text), np.uint8)]
        scored, _ = score_documents(
            model.config,
            model.params,
            texts,
            newline_reset=model.newline_reset,
            name=lambda _: "the text",
        )
        return scored[0]

    def starts(self, text: str | bytes) -> np.ndarray:
        """bool [len + 2]: whether a patch begins at BOS, at each byte, and at the byte to come."""
        patching = self.config.patching
        if patching is None:
            raise ValueError("a byte LM has no patches; load a BLT")
        entropies_N = self.entropies(text) if patching.mode == "entropy" else None
        return force_starts(patch_starts(patching, encode(text, eos=False), entropies_N))

    def patches(self, text: str | bytes) -> list[bytes]:
        """The patches of a text, which join to it; BOS's own is left out.

        Raises:
          ValueError: for a byte LM.
        """
        data, begins = as_bytes(text), np.flatnonzero(self.starts(text)[1:-1])
        ends = np.append(begins[1:], len(data)) if len(data) else begins
        return [data[a:b] for a, b in zip(begins, ends, strict=True)]

    def bits_per_byte(self, text: str | bytes) -> float:
        """Mean of -log2 p over the bytes of a text.

        Raises:
          ValueError: for an empty text.
        """
        data = np.frombuffer(as_bytes(text), np.uint8).astype(np.int32)
        if not len(data):
            raise ValueError("an empty text has no bits per byte")
        log_probs = jax.nn.log_softmax(self.logits(text)[:-1], axis=-1)
        chosen = np.take_along_axis(np.asarray(log_probs), data[:, None] + OFFSET, axis=1)
        return float(-chosen.mean(dtype=np.float64) / np.log(2.0))

    def generate(
        self,
        prompt: str | bytes = "",
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
    ) -> Iterator[str]:
        """Text that continues the prompt, piece by piece, until EOS, `stop` or `max_bytes`.

        temperature 0 is greedy. What is no UTF-8 shows as U+FFFD; valid_utf8 writes none. truncate:
        a prompt that is too long loses its beginning.

        Raises:
          ValueError: for a setting out of range, or patches that can't be placed while writing.
          FloatingPointError: for logits or entropies that are not finite.
        """
        if self.decoder is None:
            patching, model = self.config.patching, self.entropy_model
            self.decoder = Decoder(
                self.run,
                self.params,
                patching,
                patching and model,
                mesh=self.mesh,
                dtype=self.dtype,
            )
        stream = text_stream()
        pieces = self.decoder.generate(
            [prompt],
            max_bytes=max_bytes,
            sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty, valid_utf8),
            seed=seed,
            truncate=truncate,
            stop=[stop] if stop else [],
        )
        for piece in pieces:
            if shown := stream.decode(piece.text):
                yield shown
        if shown := stream.decode(b"", True):
            yield shown


def row_of(ids: np.ndarray, starts_N1: np.ndarray | None) -> tuple[dict, int]:
    """A batch of one row, padded to a power of two, and room for its patches."""
    length = bucket(len(ids))
    bytes_BN = np.zeros((1, length), np.int32)
    bytes_BN[0, : len(ids)] = ids
    documents_BN = (np.arange(length) < len(ids)).astype(np.int32)[None]
    batch, patches = {"bytes_BN": bytes_BN, "documents_BN": documents_BN}, 0
    if starts_N1 is not None:
        batch["starts_BN1"] = np.zeros((1, length + 1), bool)
        batch["starts_BN1"][0, : len(ids) + 1] = starts_N1
        patches = min(length, bucket(int(starts_N1[:-1].sum())))
    return batch, patches


def load(path, *, mesh: str | None = None, dtype: str | None = None) -> LoadedModel:
    """As `bltjax.load`."""
    check_numbers("bltjax.load")
    check_platform()
    path, on = path_of(path), read_mesh(mesh) if mesh else None
    run, params, _ = load_onto(on, path, dtype)
    return LoadedModel(run, params, *run_patching(run, path), on, dtype)
