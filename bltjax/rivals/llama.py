"""A Llama over tokens (arXiv 2302.13971, 2307.09288, 2407.21783): the BLT paper's baseline.

    tokens ──► tokens_VD ──► L blocks ──► norm_D ──► head_DV ──► logits of the next token

The block is that of the latent transformer: grouped heads, SwiGLU, rotary positions that count from
the document's beginning. Its layers are scanned, and rematerialised by `llama.remat`. A tied model
has no `head_DV`: its head is the embedding, transposed.

The only inputs are ids; which text they stand for is the tokenizer's (text/tokens.py). So here N is
tokens in a row, and everything that is counted per byte is divided by bytes per token elsewhere.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention.kv_cache import CachePositions
from bltjax.attention.pattern import Sliding
from bltjax.attention.rope import RopeScalingConfig, scaled_rates
from bltjax.config.fields import (
    MAY_CHANGE,
    SAME_CONTENT,
    divides,
    expand,
    one_of,
    positive,
    setting,
    within,
)
from bltjax.config.model import REMAT, ModelConfig
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.blt.latent_transformer import unscanned
from bltjax.model.flops import paper_transformer, visible_keys
from bltjax.model.layers import (
    Block,
    BlockSize,
    embedded,
    project,
    rematerialised,
    rms_norm,
    through,
    truncated_normal,
)
from bltjax.text.segments import Ranges, window_ranges

ALL = 1 << 30  # positions that a position may see: all of its document's before it
SENTENCEPIECE_BOS = 1  # of the tokenizers that put a space before a text; Llama 2's


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A Llama over tokens; as it stands, Llama 3's 8B."""

    group: typing.ClassVar[str] = "llama"

    layers: int = 32
    width: int = 4096  # D
    heads: int = 32  # H
    key_value_heads: int = 8  # J
    channels: int = 0  # C, per head; 0: width / heads
    hidden: int = 14336  # F
    vocabulary: int = 128256  # V: ids, specials among them
    rope_theta: float = 5e5
    rope_scaling: RopeScalingConfig | None = None
    norm_eps: float = 1e-5
    tied: bool = False  # the head is the embedding, transposed
    tokenizer: str = setting("", resume=SAME_CONTENT)  # a Hugging Face tokenizers file
    remat: str = setting("none", resume=MAY_CHANGE)  # one of REMAT

    def __post_init__(self):
        positive(self, "layers", "width", "heads", "key_value_heads", "hidden", "vocabulary")
        positive(self, "rope_theta", "norm_eps")
        within(self, "[0, inf)", "channels")
        expand(self, "tokenizer")
        one_of("llama.remat", self.remat, REMAT)
        if not self.channels:
            divides("llama.heads", self.heads, "llama.width", self.width)
        divides("llama.key_value_heads", self.key_value_heads, "llama.heads", self.heads)
        divides("2", 2, "llama channels per head", self.head_channels)

    @property
    def head_channels(self) -> int:
        """C, channels per head."""
        return self.channels or self.width // self.heads

    @property
    def block_size(self) -> BlockSize:
        return BlockSize(
            self.width,
            self.heads,
            self.key_value_heads,
            self.hidden,
            self.norm_eps,
            self.rope_theta,
            letters="DHJ",
            stacked="L",
            rope_scaling=self.rope_scaling,
            head_channels=self.head_channels,
        )

    def summary(self) -> str:
        """The sizes, in one line."""
        head = "tied" if self.tied else "untied"
        return (
            f"{self.layers} layers of {self.width}, {self.heads} heads over"
            f" {self.key_value_heads}, {self.vocabulary:,} tokens, {head}"
        )

    def layers_in_arrays(self, stacked: bool) -> int:
        """The number of layers with arrays of their own; stacked layers share theirs."""
        return 1 if stacked else self.layers

    @property
    def split_by_tensor(self) -> dict[str, int]:
        """Sizes that must be divisible by a mesh's `tensor`, by the names of their settings."""
        return {"llama.heads": self.heads, "llama.key_value_heads": self.key_value_heads}


class Llama(nn.Module):
    config: LlamaConfig
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None
    scanned: bool = True  # False: a plain loop over layers whose parameters are apart

    def setup(self):
        config = self.config
        D, V = config.width, config.vocabulary
        self.tokens_VD = self.param("tokens_VD", truncated_normal(D), (V, D))
        size, parts = config.block_size, (Sliding(ALL), self.dtype, self.implementation)
        if self.scanned:
            self.blocks = nn.scan(
                rematerialised(config.remat, scanned=True),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=config.layers,
            )(size, *parts, name="blocks")
        else:
            size = size._replace(stacked="")
            self.blocks = [Block(size, *parts, name=f"block_{i}") for i in range(config.layers)]
        self.norm_D = self.param("norm_D", nn.initializers.ones, (D,))
        if not config.tied:
            self.head_DV = self.param("head_DV", truncated_normal(D), (D, V))

    def stack(self, tokens_BN, ranges: Ranges | CachePositions, past=None):
        """States after the final norm [B, N, D]; and `states`, the embeddings and each block's
        output (not if scanned), and `new_kv`, each block's keys and values: stacked if scanned."""
        x_BND = embedded(gathered(self.tokens_VD, "tokens_VD", self.dtype), tokens_BN)
        x_BND = constrained(x_BND, "x_BND")
        if self.scanned:
            states = ()
            x_BND, new_kv = self.blocks(x_BND, jax.tree.map(jax.lax.stop_gradient, ranges))
        else:
            after, new_kv = through(self.blocks, x_BND, ranges, past)
            states = (x_BND, *after)
            x_BND = after[-1]
        x_BND = rms_norm(x_BND, self.norm_D, self.config.norm_eps)
        return x_BND, {"states": states, "new_kv": new_kv}

    def logits(self, x_BND):
        """float32 [B, N, V] of states after the final norm."""
        if self.config.tied:
            head_DV = gathered(self.tokens_VD, "tokens_VD", self.dtype).T
        else:
            head_DV = gathered(self.head_DV, "head_DV", self.dtype)
        return constrained(project(x_BND, head_DV).astype(jnp.float32), "logits_BNV")

    def prompt(self, tokens_BN, documents_BN):
        """As `stack`, of whole rows: a position sees those of its document up to itself.

        documents_BN: 1, 2, ... in order, 0 in padding at the row's end.
        """
        return self.stack(tokens_BN, window_ranges(documents_BN, ALL))

    def __call__(self, tokens_BN, documents_BN):
        """Logits, float32 [B, N, V], of the token after each token, and `stack`'s dict with the
        states that they were made from, `last_BND`."""
        x_BND, out = self.prompt(tokens_BN, documents_BN)
        return self.logits(x_BND), out | {"last_BND": x_BND}


# FLOPs of one row of N tokens; P, the patches that other families have, plays no part.


def attention_width(config: LlamaConfig) -> int:
    """H C, which is D unless `channels` is given."""
    return config.heads * config.head_channels


def block_forward(config: LlamaConfig, N: int) -> int:
    inner, shared = attention_width(config), config.key_value_heads * config.head_channels
    projections = 2 * config.width * (2 * inner + 2 * shared + 3 * config.hidden)
    return N * projections + 4 * inner * visible_keys(N, N)


def forward_flops(config: LlamaConfig, N: int, P: int) -> int:
    """FLOPs of one row of N tokens, forward."""
    return config.layers * block_forward(config, N) + 2 * N * config.width * config.vocabulary


def recomputed_flops(config: LlamaConfig, N: int, P: int) -> int:
    """FLOPs of one row of N tokens that the backward pass recomputes; as `flops.block_again`."""
    again = 2 * attention_width(config) * visible_keys(N, N)
    if config.remat == "full":
        again += block_forward(config, N) - 2 * N * config.hidden * config.width
    return config.layers * again


def paper_flops(config: LlamaConfig, N: int, P: int) -> float:
    """FLOPs of one token in a row of N, forward, by the BLT paper's formula (equations 13 to 17).

    Of a byte: this over the bytes per token.
    """
    return paper_transformer(config.width, config.layers, N, config.vocabulary)


FORWARD_INPUTS = ("tokens", "token_counts", "token_bytes", "text0", "text1")


def forward(config: ModelConfig, params, arrays: dict, dtype, implementation: str | None) -> dict:
    """`LlamaForCausalLM`, one document per row.

    arrays: tokens [B, N]; optionally token_counts [B], without which rows are full; and token_bytes
    [B, N], the text bytes of each token, for bits_per_byte: over the bytes of the text, so without
    the space that Llama 2's tokenizer adds.

    Returns logits, hidden_states [B, layers + 1, N, D] (the embeddings first, the last one after
    the final norm), inv_freq [C / 2], token_nats [B, N - 1] of the tokens after the first, and
    loss, their mean.
    """
    llama, tokens_BN = config.model, arrays["tokens"]
    index_1N = jnp.arange(tokens_BN.shape[1])[None]
    counts_B = arrays.get("token_counts", jnp.full(tokens_BN.shape[0], tokens_BN.shape[1]))
    real_BN = index_1N < counts_B[:, None]
    module = Llama(llama, dtype, implementation, scanned=False)
    logits_BNV, out = module.apply(
        {"params": unscanned(params)}, tokens_BN, real_BN.astype(jnp.int32)
    )
    log_probs_BNV = jax.nn.log_softmax(logits_BNV[:, :-1], axis=-1)
    nats_BN = -jnp.take_along_axis(log_probs_BNV, tokens_BN[:, 1:, None], axis=-1)[..., 0]
    predicted_BN = real_BN[:, 1:]
    rate_C = llama.rope_theta ** (
        -jnp.arange(0, llama.head_channels, 2, dtype=jnp.float32) / llama.head_channels
    )
    if llama.rope_scaling is not None:
        rate_C = scaled_rates(rate_C, llama.rope_scaling)
    found = {
        "logits": logits_BNV,
        "hidden_states": jnp.stack([*out["states"][:-1], out["last_BND"]], axis=1),
        "inv_freq": rate_C,
        "token_nats": nats_BN,
        "loss": jnp.where(predicted_BN, nats_BN, 0).sum() / predicted_BN.sum(),
    }
    if "token_bytes" in arrays:
        text_BN = (arrays["token_bytes"][:, 1:] > 0) & predicted_BN
        spaces = (tokens_BN[:, 0] == SENTENCEPIECE_BOS).sum()
        text_bytes = jnp.where(text_BN, arrays["token_bytes"][:, 1:], 0).sum() - spaces
        nats = jnp.where(text_BN, nats_BN, 0).sum()
        found["bits_per_byte"] = nats / (jnp.log(2.0) * text_bytes)
    return found
