"""SpaceByte: a byte transformer with a larger one in the middle, at the bytes that end a word
(arXiv 2404.14408; computed as kjslag/spacebyte does).

    byte            BOS t h e _ p a t c h . _        _: a space
    slot             0        1             2        the first space-like byte after one that isn't

    h = bytes + positions ──► initial blocks ──► h ────────────────────────► + ──► final blocks
                                                 │ at slots, widened         ▲
                                                 └──► global blocks ──► last E channels

The byte of a slot is the last of one of our space patches: it is followed by a start. The byte
stacks see a window; a slot sees all slots of its document. Positions and slots count from a
document's beginning; all slots of a row are numbered along it, at most P. A slot beyond those, or
beyond the `global_context` of a document, is dropped: its byte gets nothing from the global stack.
"""

import dataclasses
import typing

import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention.kv_cache import CachePositions
from bltjax.attention.pattern import Sliding
from bltjax.config.fields import MAY_CHANGE, positive, setting
from bltjax.config.model import ModelConfig
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.layers import embedded, project
from bltjax.rivals.norms import layer_norm
from bltjax.rivals.relu_block import (
    ReluStack,
    check_settings,
    moved,
    normal,
    published_flops,
    row_again,
    row_flops,
)
from bltjax.text.alphabet import ALPHABETS, OFFSET
from bltjax.text.patching import space_ended
from bltjax.text.segments import row_patches

FORWARD_INPUTS = ("tokens", "targets")
STATES = ("initial_out", "global_in", "global_out", "final_in")  # of `forward`, besides logits
CERTAIN = 1e4  # the logit of an id that the public implementation forces; minus it, of others


@dataclasses.dataclass(frozen=True)
class SpaceByteConfig:
    """A SpaceByte."""

    group: typing.ClassVar[str] = "spacebyte"

    window: int = 512  # bytes that a position of the byte stacks sees, itself included
    context: int = 6144  # positions of a document that have an embedding
    global_context: int = 1024  # slots of a document that have one
    initial_layers: int = 8  # of the local layers: those before the global ones
    global_layers: int = 16
    global_width: int = 1024  # D
    global_heads: int = 16  # H
    local_layers: int = 16
    local_width: int = 512  # E
    local_heads: int = 8  # G
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    alphabet: str = "blt"  # or spacebyte, of imported weights
    remat: str = setting("none", resume=MAY_CHANGE)  # one of REMAT, for all stacks

    def __post_init__(self):
        positive(self, "window", "global_context", "initial_layers")
        check_settings(self)
        if self.initial_layers >= self.local_layers:
            raise ValueError(
                f"spacebyte.initial_layers ({self.initial_layers}) must be fewer than"
                f" spacebyte.local_layers ({self.local_layers}), of which the last follow"
            )
        if self.local_width > self.global_width:
            raise ValueError(
                f"spacebyte.local_width ({self.local_width}) must not exceed"
                f" spacebyte.global_width ({self.global_width})"
            )

    @property
    def longest(self) -> int:
        """The most positions of a document; later ones would have the last one's embedding."""
        return self.context

    @property
    def most_slots(self) -> int:
        """The most slots of a document; later ones would have no embedding."""
        return self.global_context

    @property
    def vocabulary(self) -> int:
        """V."""
        return ALPHABETS[self.alphabet].size

    def summary(self) -> str:
        """The sizes, in one line."""
        return (
            f"global {self.global_layers} layers of {self.global_width} after"
            f" {self.initial_layers} of {self.local_layers} local layers of {self.local_width},"
            f" window {self.window}, documents up to {self.context} positions and"
            f" {self.global_context} slots"
        )

    def layers_in_arrays(self, stacked: bool) -> int:
        """The most layers of a stack with arrays of their own; stacked global layers share
        theirs."""
        local = max(self.initial_layers, self.local_layers - self.initial_layers)
        return local if stacked else max(local, self.global_layers)

    @property
    def split_by_tensor(self) -> dict[str, int]:
        """Sizes that must be divisible by a mesh's `tensor`, by the names of their settings."""
        return {"spacebyte.global_heads": self.global_heads}


def opens_slot(alphabet: str, ids, before):
    """Whether bytes have slots, elementwise; before: the ids of the bytes before them."""
    known = ALPHABETS[alphabet]
    shift = OFFSET - known.offset
    return space_ended(jnp, ids + shift, before + shift) | (ids == known.bos)


class SpaceByte(nn.Module):
    config: SpaceByteConfig
    row_patches: int  # P
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None
    scanned: bool = True  # False: the global layers' parameters are apart

    def setup(self):
        config, one = self.config, nn.initializers.normal(1.0)
        V, D, E = config.vocabulary, config.global_width, config.local_width
        self.bytes_VE = self.param("bytes_VE", one, (V, E))
        self.local_positions_NE = self.param("local_positions_NE", one, (config.context, E))
        self.global_positions_PD = self.param(
            "global_positions_PD", one, (config.global_context, D)
        )
        final_layers, window = config.local_layers - config.initial_layers, Sliding(config.window)
        parts = self.dtype, self.implementation
        self.initial_stack = ReluStack(
            config, "local", config.initial_layers, window, *parts, name="initial"
        )
        self.global_stack = ReluStack(
            config, "global", config.global_layers, Sliding(self.row_patches), *parts, self.scanned,
            name="global",
        )  # fmt: skip
        self.final_stack = ReluStack(config, "local", final_layers, window, *parts, name="final")
        self.norm_E = self.param("norm_E", nn.initializers.ones, (E,))
        self.head_EV = self.param("head_EV", normal(E), (E, V))

    def at_positions(self, name: str, position_BT):
        """Embeddings of positions; beyond the table, of its last one."""
        table_TE = gathered(getattr(self, name), name, self.dtype)
        return embedded(table_TE, jnp.minimum(position_BT, len(table_TE) - 1))

    def local_inputs(self, ids_BN, position_BN):
        """Inputs [B, N, E] of the initial blocks."""
        x_BNE = embedded(gathered(self.bytes_VE, "bytes_VE", self.dtype), ids_BN)
        return constrained(x_BNE + self.at_positions("local_positions_NE", position_BN), "x_BNE")

    def global_inputs(self, y_BPE, number_BP):
        """Inputs [B, P, D] of the global blocks: the states of slots after D - E zeros."""
        zeros = self.config.global_width - self.config.local_width
        y_BPD = jnp.pad(y_BPE, ((0, 0), (0, 0), (zeros, 0)))
        return constrained(y_BPD + self.at_positions("global_positions_PD", number_BP), "x_BPD")

    def narrowed(self, y_BPD):
        """The share of slots in the states of their bytes: the last E channels."""
        return y_BPD[..., self.config.global_width - self.config.local_width :]

    def head(self, x_BNE):
        """Logits, float32 [B, N, V]."""
        x_BNE = layer_norm(x_BNE, self.norm_E, self.config.norm_eps)
        head_EV = gathered(self.head_EV, "head_EV", self.dtype)
        return constrained(project(x_BNE, head_EV).astype(jnp.float32), "logits_BNV")

    def __call__(self, bytes_BN, documents_BN, starts_BN1):
        """Logits, float32 [B, N, V], of the byte after each byte; intermediate states, and the keys
        and values of each layer."""
        P = min(self.row_patches, bytes_BN.shape[1])
        opens_BN = starts_BN1[:, 1:] & (documents_BN > 0)
        # As patches that begin with the byte of a slot.
        patches = row_patches(
            documents_BN, jnp.pad(opens_BN, ((0, 0), (0, 1))), P, self.config.window
        )
        begin_BP, end_BP, _ = patches.pool_ranges
        number_BP = patches.latent_ranges.position_BT
        exists_BP = (begin_BP < end_BP) & (number_BP < self.config.global_context)
        byte_BP = jnp.where(exists_BP, begin_BP, -1)
        slot_BN = jnp.clip(patches.patch_of_BN, 0, P - 1)
        has_slot_BN = opens_BN & (patches.patch_of_BN < P)
        has_slot_BN &= jnp.take_along_axis(exists_BP, slot_BN, axis=1)
        slot_BN = jnp.where(has_slot_BN, slot_BN, -1)

        x_BNE = self.local_inputs(bytes_BN, patches.bytes_ranges.position_BT)
        initial_BNE, initial_kv = self.initial_stack(x_BNE, patches.bytes_ranges)
        global_BPD = self.global_inputs(moved(initial_BNE, byte_BP, slot_BN), number_BP)
        global_out_BPD, global_kv = self.global_stack(global_BPD, patches.latent_ranges)
        middle_BNE = initial_BNE + moved(self.narrowed(global_out_BPD), slot_BN, byte_BP)
        final_BNE, final_kv = self.final_stack(
            constrained(middle_BNE, "x_BNE"), patches.bytes_ranges
        )
        out = {
            "initial_out": initial_BNE,
            "global_in": global_BPD,
            "global_out": global_out_BPD,
            "final_in": middle_BNE,
            "has_slot_BN": has_slot_BN,
            "kv": {"initial": initial_kv, "global": global_kv, "final": final_kv},
        }
        return self.head(final_BNE), out

    def begin(self, ids_B1, count_B, positions: CachePositions, caches):
        """States [B, 1, E] after the initial blocks of one byte more, and the updated caches."""
        x_B1E = self.local_inputs(ids_B1, count_B[:, None])
        return self.initial_stack.step(x_B1E, positions, caches)

    def visit(self, x_B1E, number_B, positions: CachePositions, caches):
        """The share of each row's next slot in its byte's state, and the updated caches."""
        y_B1D = self.global_inputs(x_B1E, number_B[:, None])
        y_B1D, caches = self.global_stack.step(y_B1D, positions, caches)
        return self.narrowed(y_B1D), caches

    def finish(self, x_B1E, positions: CachePositions, caches):
        """Logits [B, V] of the byte after, and the updated caches."""
        x_B1E, caches = self.final_stack.step(x_B1E, positions, caches)
        return self.head(x_B1E)[:, 0], caches


def forward_flops(config: SpaceByteConfig, N: int, P: int) -> int:
    """FLOPs of one row of N bytes and P slots, forward."""
    E = config.local_width
    local = config.local_layers * row_flops(N, config.window, E) + 2 * N * E * config.vocabulary
    return local + config.global_layers * row_flops(P, P, config.global_width)


def recomputed_flops(config: SpaceByteConfig, N: int, P: int) -> int:
    """FLOPs of one row that the backward pass recomputes."""
    local = config.local_layers * row_again(config.remat, N, config.window, config.local_width)
    return local + config.global_layers * row_again(config.remat, P, P, config.global_width)


def paper_flops(config: SpaceByteConfig, N: int, P: int) -> float:
    """FLOPs of one byte, forward, by the paper's formula."""
    return published_flops(config.global_width, config.global_layers, P) * P / N + published_flops(
        config.local_width, config.local_layers, config.window, config.vocabulary
    )


def forward(config: ModelConfig, params, arrays: dict, dtype, implementation) -> dict:
    """As the public implementation: each row is one text, whatever BOS is in it.

    arrays: tokens, int [B, N]; targets are not read, but without them the logits from the first
    slot on that doesn't fit are overwritten, so that BOS follows.

    Raises:
      ValueError: for more positions than have an embedding.
    """
    tokens_BN, own = arrays["tokens"], config.model
    length = tokens_BN.shape[1]
    if length > own.context:
        raise ValueError(f"tokens have {length} positions; spacebyte.context is {own.context}")
    alphabet = ALPHABETS[own.alphabet]
    # The first position has a slot if it is space-like, as if it followed a letter.
    letter = alphabet.offset + ord("a")
    before_BN = jnp.pad(tokens_BN[:, :-1], ((0, 0), (1, 0)), constant_values=letter)
    opens_BN = opens_slot(own.alphabet, tokens_BN, before_BN)
    starts_BN1 = jnp.pad(opens_BN, ((0, 0), (1, 0)))
    model = SpaceByte(own, own.global_context, dtype, implementation)
    arrays_BN = tokens_BN, jnp.ones_like(tokens_BN), starts_BN1
    logits_BNV, out = model.apply({"params": params}, *arrays_BN)
    if "targets" not in arrays:
        lost_BN1 = (jnp.cumsum(opens_BN, axis=1) > own.global_context)[..., None]
        only_V = jnp.where(jnp.arange(own.vocabulary) == alphabet.bos, CERTAIN, -CERTAIN)
        logits_BNV = jnp.where(lost_BN1, only_V[None, None], logits_BNV)
    return {"logits": logits_BNV} | {name: out[name] for name in STATES}
