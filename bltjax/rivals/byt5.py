"""ByT5: an encoder and a decoder over bytes, T5 1.1 without a tokenizer (arXiv 2105.13626).

    encoder   t h e _ S0 _ b e S1 E            a document's positions see each other, both sides
                   |
                   v  cross-attention: the document of the same number
    decoder   0  S0 p a t c h S1 g i n s       causal
    logits    S0 p  a t c h S1 g i n s E

An example is one window of a document (data/objectives/spans.py); it has the same number in the
encoder's row and in the decoder's. Nothing crosses documents, and of positions only differences
count, so a document scores the same alone and packed.

Attention is `dense` or `xla` (attention/biased.py). Kernels have no place for its bias, so a run
whose `attention` names one, or auto, computes by `xla` here.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from flax import linen as nn

from bltjax.config.fields import MAY_CHANGE, one_of, positive, setting, within
from bltjax.config.model import REMAT, ModelConfig
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.flops import visible_keys
from bltjax.model.layers import embedded, project
from bltjax.rivals.byt5_stack import Stack, StackSize, cross_ranges, normal, whole_ranges
from bltjax.text.alphabet import ALPHABETS
from bltjax.text.segments import Ranges, index_like, window_ranges
from bltjax.text.sentinels import START, masked


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The part of a window that the decoder writes: masked spans (published), or its end."""

    kind: str = "spans"  # spans, or prefix: a window split anywhere
    noise: float = 0.15  # spans: the share of bytes in them
    mean_span: float = 20.0  # spans: bytes

    def __post_init__(self):
        one_of("objective.kind", self.kind, ("spans", "prefix"))
        within(self, "(0, 1)", "noise")
        within(self, "[1, inf)", "mean_span")


@dataclasses.dataclass(frozen=True)
class ByT5Config:
    """A ByT5; the defaults are the sizes of the published small one."""

    group: typing.ClassVar[str] = "byt5"

    encoder_layers: int = 12
    decoder_layers: int = 4
    width: int = 1472  # D
    heads: int = 6  # H
    channels: int = 64  # C; heads x channels need not be the width
    hidden: int = 3584  # F
    buckets: int = 32  # W, of distances
    farthest: int = 128  # bytes, from where on all distances are one
    norm_eps: float = 1e-6
    tied: bool = False  # whether the head is the embedding
    alphabet: str = "blt"  # or byt5, with the ids of released weights
    objective: ObjectiveConfig = ObjectiveConfig()
    remat: str = setting("none", resume=MAY_CHANGE)  # one of REMAT, for both stacks

    def __post_init__(self):
        positive(self, "encoder_layers", "decoder_layers", "width", "heads", "channels", "hidden")
        positive(self, "norm_eps")
        one_of("byt5.alphabet", self.alphabet, ("blt", "byt5"))
        one_of("byt5.remat", self.remat, REMAT)
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(
                f"byt5.buckets ({self.buckets}) must be a multiple of 4: half for each side, half"
                " of these for single distances"
            )
        if self.farthest <= self.buckets // 2:
            raise ValueError(
                f"byt5.farthest ({self.farthest}) must exceed byt5.buckets / 2"
                f" ({self.buckets // 2}), the decoder's buckets of single distances"
            )

    @property
    def vocabulary(self) -> int:
        """V."""
        return ALPHABETS[self.alphabet].size

    @property
    def split_by_tensor(self) -> dict[str, int]:
        """Sizes that must be divisible by a mesh's `tensor`, by the names of their settings."""
        return {"byt5.heads": self.heads}

    def summary(self) -> str:
        """The sizes, in one line."""
        return (
            f"encoder {self.encoder_layers} and decoder {self.decoder_layers} layers of"
            f" {self.width}, {self.heads} heads of {self.channels}, objective {self.objective.kind}"
        )

    def layers_in_arrays(self, stacked: bool) -> int:
        """The most layers of a stack with arrays of their own; stacked layers share theirs."""
        return 0 if stacked else max(self.encoder_layers, self.decoder_layers)

    def stack(self, part: str) -> StackSize:
        """The sizes of the encoder, or of the decoder."""
        layers = {"encoder": self.encoder_layers, "decoder": self.decoder_layers}[part]
        return StackSize(
            layers, part == "decoder", self.width, self.heads, self.channels, self.hidden,
            self.buckets, self.farthest, self.norm_eps,
        )  # fmt: skip


def biased_implementation(name: str | None) -> str:
    """The way to compute attention with a bias, for a run's setting: `xla` unless it is `dense`."""
    return "xla" if name in (None, "auto") or name.startswith("pallas") else name


class ByT5(nn.Module):
    config: ByT5Config
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None
    scanned: bool = True

    def setup(self):
        config, D, V = self.config, self.config.width, self.config.vocabulary
        parts = (config.remat, self.dtype, biased_implementation(self.implementation), self.scanned)
        self.bytes_VD = self.param("bytes_VD", normal(1.0), (V, D))
        self.encoder = Stack(config.stack("encoder"), *parts)
        self.decoder = Stack(config.stack("decoder"), *parts)
        if not config.tied:
            # Published: variance 1, for Adafactor. With AdamW the first loss is 16 nats then, and
            # learning slower for hundreds of steps.
            self.head_DV = self.param("head_DV", normal(1 / D), (D, V))

    def embedded(self, bytes_BN):
        x_BND = embedded(gathered(self.bytes_VD, "bytes_VD", self.dtype), bytes_BN)
        return constrained(x_BND, "x_BND")

    def logits(self, x_BND):
        """Logits of the decoder's normed states, float32 [B, N, V]; not scaled."""
        if self.config.tied:
            head_DV = gathered(self.bytes_VD, "bytes_VD", self.dtype).T
        else:
            head_DV = gathered(self.head_DV, "head_DV", self.dtype)
        return constrained(project(x_BND, head_DV).astype(jnp.float32), "logits_BNV")

    def encoded(self, bytes_BT, ranges: Ranges):
        """The encoder's normed states [B, T, D]."""
        return self.encoder(self.embedded(bytes_BT), ranges)[0]

    def decoded(self, bytes_BN, ranges: Ranges, encoded_BTD, reads: Ranges):
        """The decoder's normed states [B, N, D], and the keys and values of its layers."""
        return self.decoder(self.embedded(bytes_BN), ranges, encoded_BTD, reads)

    def __call__(self, encoder_bytes_BT, encoder_documents_BT, bytes_BN, documents_BN):
        """Logits, float32 [B, N, V], of the target of each of the decoder's positions, and states.

        documents: 1, 2, ... in a row, 0 in padding at its end; the decoder's document m reads the
        encoder's document m.
        """
        encoded_BTD = self.encoded(encoder_bytes_BT, whole_ranges(encoder_documents_BT))
        decoded_BND, _ = self.decoded(
            bytes_BN,
            window_ranges(documents_BN, documents_BN.shape[1]),
            encoded_BTD,
            cross_ranges(encoder_documents_BT, documents_BN),
        )
        states = {"encoder_BTD": encoded_BTD, "decoder_BND": decoded_BND}
        return self.logits(decoded_BND), states

    def step(self, id_B, held_B, slot_B, caches, crossed, read_B1T):
        """Logits [B, V] after one more id of the decoder, and the updated caches."""
        x_B1D, caches = self.decoder.step(
            self.embedded(id_B[:, None]), held_B, slot_B, caches, crossed, read_B1T
        )
        return self.logits(x_B1D)[:, 0], caches

    def bias_rows(self, keys: int, queries: int):
        """The bias of the encoder's first and last query and the decoder's last, [H, keys]."""
        farthest = self.config.farthest

        def row(stack, query, size):
            away = jnp.clip(jnp.arange(size) - query, -farthest, farthest)
            return stack.bias_HW()[:, away + farthest]

        return (
            row(self.encoder, 0, keys),
            row(self.encoder, keys - 1, keys),
            row(self.decoder, queries - 1, queries),
        )


def row_sizes(config: ByT5Config, N: int) -> tuple[int, int]:
    """Positions of the encoder's and the decoder's row, for windows of up to N text bytes.

    Spans: exactly those of one window of N bytes. Prefix: of two that are split in places which
    add up to about N, as the packer finds them; 4 are their sentinels, START and EOS.
    """
    if config.objective.kind == "prefix":
        return (N + N // 16 + 4,) * 2
    ids, spans = masked(N, config.objective.noise, config.objective.mean_span)
    return N - ids + spans + 1, ids + spans + 1


def attention_flops(config: ByT5Config, N: int) -> int:
    """FLOPs of scores and weighted sums of one row; the encoder is not causal."""
    encoder, decoder = row_sizes(config, N)
    pairs = config.encoder_layers * encoder**2
    pairs += config.decoder_layers * (visible_keys(decoder, decoder) + decoder * encoder)
    return 4 * config.heads * config.channels * pairs


def projection_flops(config: ByT5Config, N: int) -> int:
    """FLOPs of the layers' products with weights, of one row."""
    encoder, decoder = row_sizes(config, N)
    d, a, f = config.width, config.heads * config.channels, config.hidden
    total = config.encoder_layers * encoder * (8 * d * a + 6 * d * f)
    crossed = 4 * d * a * encoder  # the encoder's keys and values
    return total + config.decoder_layers * (decoder * (12 * d * a + 6 * d * f) + crossed)


def forward_flops(config: ByT5Config, N: int, P: int) -> int:
    """FLOPs of one row of windows of N text bytes, forward: of one, or of two of prefixes."""
    head = 2 * row_sizes(config, N)[1] * config.width * config.vocabulary
    return projection_flops(config, N) + attention_flops(config, N) + head


def recomputed_flops(config: ByT5Config, N: int, P: int) -> int:
    """FLOPs of one row that the backward pass recomputes (model/flops.py)."""
    scores = attention_flops(config, N) // 2
    if config.remat != "full":
        return scores
    encoder, decoder = row_sizes(config, N)
    positions = config.encoder_layers * encoder + config.decoder_layers * decoder
    last = 2 * config.width * config.hidden * positions
    return scores + projection_flops(config, N) + attention_flops(config, N) - last


def paper_flops(config: ByT5Config, N: int, P: int) -> float:
    """FLOPs of one text byte, forward; the paper has no formula, so this is our count."""
    windows = 2 if config.objective.kind == "prefix" else 1
    return forward_flops(config, N, P) / (windows * N)


FORWARD_INPUTS = ("input_ids", "attention_mask", "labels")


def forward(config: ModelConfig, params, arrays: dict, dtype, implementation) -> dict:
    """transformers' T5ForConditionalGeneration of one example per row.

    The decoder reads the labels one position late, after START, with -100 read as START; none of
    its positions is masked. The encoder's keys are those from the first to the last 1 of
    `attention_mask`, for padding's queries too. loss: the mean over labels that are not -100.
    """
    ids_BT, mask_BT = (jnp.asarray(arrays[name]) for name in FORWARD_INPUTS[:2])
    labels_BN = jnp.asarray(arrays["labels"])
    read_BN = jnp.where(labels_BN < 0, START, labels_BN)
    bytes_BN = jnp.pad(read_BN[:, :-1], ((0, 0), (1, 0)), constant_values=START)
    sizes = (ids_BT.shape[1], bytes_BN.shape[1])
    seen_BT = mask_BT > 0
    first_B1 = jnp.argmax(seen_BT, axis=1, keepdims=True).astype(jnp.int32)
    end_B1 = sizes[0] - jnp.argmax(seen_BT[:, ::-1], axis=1, keepdims=True).astype(jnp.int32)

    def seen_by(bytes_BQ):
        return Ranges(*(jnp.broadcast_to(x, bytes_BQ.shape) for x in (first_B1, end_B1)))

    model = ByT5(config.model, dtype, implementation)

    def run(model):
        encoded_BTD = model.encoded(ids_BT, seen_by(ids_BT))
        index_BN = index_like(bytes_BN)
        causal = Ranges(jnp.zeros_like(index_BN), index_BN + 1)
        decoded_BND, _ = model.decoded(bytes_BN, causal, encoded_BTD, seen_by(bytes_BN))
        return encoded_BTD, decoded_BND, model.logits(decoded_BND), model.bias_rows(*sizes)

    encoded_BTD, decoded_BND, logits_BNV, rows = nn.apply(run, model)({"params": params})
    log_probs = jax.nn.log_softmax(logits_BNV, axis=-1)
    nats_BN = -jnp.take_along_axis(log_probs, read_BN[..., None], axis=-1)[..., 0]
    scored_BN = labels_BN >= 0
    return {
        "logits": logits_BNV,
        "encoder_out": encoded_BTD,
        "decoder_out": decoded_BND,
        "encoder_bias_first_row": rows[0],
        "encoder_bias_last_row": rows[1],
        "decoder_bias_last_row": rows[2],
        "loss": jnp.where(scored_BN, nats_BN, 0).sum() / scored_BN.sum(),
    }
