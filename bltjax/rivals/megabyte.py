"""MegaByte: fixed patches, a global transformer over them, a local one within each
(arXiv 2305.07185; computed as kjslag/spacebyte does).

With patches of p = 4 bytes, slot k predicts its document's positions 4k + 1 ... 4k + 4:

    position          0 1 2 3   4 5 6 7   8 9
    byte             BOS a b c   d e f g   h i
    slot               0         1         2              the last one is ragged
    global input      pad      a b c d   e f g h          what slot k - 1 predicted
    local input      * a b c   * e f g   * i              *: local_pad, for the slot's first byte

The global state of a slot is cut into p pieces, of which each is added to the local input of one
place. Byte 4k reaches slot k only through the global transformer, and byte 0, which is BOS, nothing
at all. Slots, positions and places count from a document's beginning; all slots of a row are
numbered along it, at most P.

    Y = D / p   the width of a byte in the global input
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention import fastest
from bltjax.attention.kv_cache import CachePositions
from bltjax.attention.pattern import Blocks, Sliding
from bltjax.config.fields import MAY_CHANGE, divides, positive, setting
from bltjax.config.model import ModelConfig
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.flops import visible_keys
from bltjax.model.layers import embedded, project
from bltjax.rivals.norms import layer_norm
from bltjax.rivals.relu_block import (
    HIDDEN,
    ReluStack,
    check_settings,
    moved,
    normal,
    published_flops,
    relu_flops,
    row_again,
    row_flops,
)
from bltjax.text.alphabet import ALPHABETS
from bltjax.text.segments import Ranges, document_begins, index_like, row_patches

FORWARD_INPUTS = ("tokens", "targets")
STATES = ("global_in", "global_out", "local_in")  # of `forward`, besides logits


@dataclasses.dataclass(frozen=True)
class MegaByteConfig:
    """A MegaByte."""

    group: typing.ClassVar[str] = "megabyte"

    patch_bytes: int = 4  # p
    context: int = 4096  # positions of a document that have an embedding
    global_layers: int = 16
    global_width: int = 1024  # D
    global_heads: int = 16  # H
    local_layers: int = 16
    local_width: int = 512  # E
    local_heads: int = 8  # G
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    alphabet: str = "blt"  # or spacebyte, of imported weights
    remat: str = setting("none", resume=MAY_CHANGE)  # one of REMAT, for both stacks

    def __post_init__(self):
        positive(self, "patch_bytes")
        check_settings(self)
        for name in ("context", "global_width"):
            size = getattr(self, name)
            divides("megabyte.patch_bytes", self.patch_bytes, f"megabyte.{name}", size)

    @property
    def longest(self) -> int:
        """The most positions of a document; later ones would have the last one's embedding."""
        return self.context

    @property
    def vocabulary(self) -> int:
        """V."""
        return ALPHABETS[self.alphabet].size

    def summary(self) -> str:
        """The sizes, in one line."""
        return (
            f"patches of {self.patch_bytes} bytes, global {self.global_layers} layers of"
            f" {self.global_width}, local {self.local_layers} layers of {self.local_width},"
            f" documents up to {self.context} positions"
        )

    def layers_in_arrays(self, stacked: bool) -> int:
        """The most layers of a stack with arrays of their own; stacked global layers share
        theirs."""
        return self.local_layers if stacked else max(self.local_layers, self.global_layers)

    @property
    def split_by_tensor(self) -> dict[str, int]:
        """Sizes that must be divisible by a mesh's `tensor`, by the names of their settings."""
        return {"megabyte.global_heads": self.global_heads}


class Slots(typing.NamedTuple):
    """The slots of rows, each with places for p bytes."""

    begin_BP: jax.Array  # index in the row of the first byte
    byte_BPA: jax.Array  # index of each place's byte; negative for none
    place_BN: jax.Array  # each byte's place, numbered along the row; negative for none
    ranges: Ranges  # slots see those of their document; their positions are numbers in it


def slots_of(documents_BN, patch_bytes: int, slots: int) -> Slots:
    """The grid of each document; bytes beyond the row's first `slots` slots have no place."""
    real_BN = documents_BN > 0
    within_BN = (index_like(documents_BN) - document_begins(documents_BN)) % patch_bytes
    starts_BN1 = jnp.pad((within_BN == 0) & real_BN, ((0, 0), (0, 1)))
    patches = row_patches(documents_BN, starts_BN1, slots, 1)
    begin_BP, end_BP, _ = patches.pool_ranges
    byte_BPA = begin_BP[..., None] + jnp.arange(patch_bytes)[None, None]
    byte_BPA = jnp.where(byte_BPA < end_BP[..., None], byte_BPA, -1)
    slot_BN = patches.patch_of_BN
    place_BN = jnp.where(slot_BN < slots, slot_BN * patch_bytes + within_BN, -1)
    return Slots(begin_BP, byte_BPA, place_BN, patches.latent_ranges)


def by_kernel(implementation: str | None) -> bool:
    """Whether kernels compute the local attention, of all slots of a row at once.

    Their tiles hold many slots. Without kernels a slot is a row of its own, so no score is computed
    in vain; but a TPU pads p scores to 128, in memory too.
    """
    return (implementation or fastest(jax.devices()[0])).startswith("pallas")


def uniform(bound: float):
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class MegaByte(nn.Module):
    config: MegaByteConfig
    row_patches: int  # P
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None
    scanned: bool = True  # False: the global layers' parameters are apart

    def setup(self):
        config, one = self.config, nn.initializers.normal(1.0)
        V, A, D, E = config.vocabulary, config.patch_bytes, config.global_width, config.local_width
        Y = D // A
        self.global_bytes_VY = self.param("global_bytes_VY", one, (V, Y))
        self.global_positions_NY = self.param("global_positions_NY", one, (config.context, Y))
        self.global_pad_D = self.param("global_pad_D", one, (D,))
        self.global_stack = ReluStack(
            config, "global", config.global_layers, Sliding(self.row_patches), self.dtype,
            self.implementation, self.scanned, name="global",
        )  # fmt: skip
        self.narrow_YE = self.param("narrow_YE", uniform(Y**-0.5), (Y, E))
        self.narrow_bias_E = self.param("narrow_bias_E", uniform(Y**-0.5), (E,))
        self.local_bytes_VE = self.param("local_bytes_VE", one, (V, E))
        self.local_positions_AE = self.param("local_positions_AE", one, (A, E))
        self.local_pad_E = self.param("local_pad_E", one, (E,))
        self.local_stack = ReluStack(
            config, "local", config.local_layers, Blocks(A), self.dtype,
            self.implementation if by_kernel(self.implementation) else "dense", name="local",
        )  # fmt: skip
        self.norm_E = self.param("norm_E", nn.initializers.ones, (E,))
        self.head_EV = self.param("head_EV", normal(E), (E, V))

    def global_inputs(self, before_BS, number_BP):
        """Global inputs [B, P, D] of slots by their number; before: the p ids up to the first of
        each."""
        positions_NY = gathered(self.global_positions_NY, "global_positions_NY", self.dtype)
        positions_PD = positions_NY.reshape(-1, self.config.global_width)
        x_BSY = embedded(gathered(self.global_bytes_VY, "global_bytes_VY", self.dtype), before_BS)
        x_BPD = x_BSY.reshape(*number_BP.shape, -1)
        x_BPD += embedded(positions_PD, jnp.minimum(number_BP, len(positions_PD) - 1))
        pad_11D = self.global_pad_D.astype(self.dtype)[None, None]
        return constrained(jnp.where(number_BP[..., None] == 0, pad_11D, x_BPD), "x_BPD")

    def pieces(self, x_BPD):
        """Each slot's global state as pieces for its places, [B, P, A, E]."""
        pieces_BPAY = x_BPD.reshape(*x_BPD.shape[:2], self.config.patch_bytes, -1)
        pieces_BPAE = project(pieces_BPAY, gathered(self.narrow_YE, "narrow_YE", self.dtype))
        return pieces_BPAE + self.narrow_bias_E.astype(self.dtype)[None, None, None]

    def local_inputs(self, ids_BT, place_BT, pieces_BTE):
        """Local inputs [B, T, E] of places 0 ... p - 1 of slots, with their bytes and pieces."""
        positions_AE = gathered(self.local_positions_AE, "local_positions_AE", self.dtype)
        bytes_VE = gathered(self.local_bytes_VE, "local_bytes_VE", self.dtype)
        y_BTE = embedded(bytes_VE, ids_BT) + embedded(positions_AE, place_BT)
        pad_11E = self.local_pad_E.astype(self.dtype)[None, None]
        return jnp.where(place_BT[..., None] == 0, pad_11E, y_BTE) + pieces_BTE

    def head(self, y_BNE):
        """Logits, float32 [B, N, V]."""
        y_BNE = layer_norm(y_BNE, self.norm_E, self.config.norm_eps)
        head_EV = gathered(self.head_EV, "head_EV", self.dtype)
        return constrained(project(y_BNE, head_EV).astype(jnp.float32), "logits_BNV")

    def __call__(self, bytes_BN, documents_BN):
        """Logits, float32 [B, N, V], of the byte after each byte; intermediate states, and the keys
        and values of each layer: of slots, and of the places of slots [B * P, A, G, C]."""
        A, E = self.config.patch_bytes, self.config.local_width
        rows, length = bytes_BN.shape
        P = min(self.row_patches, length)
        slots = slots_of(documents_BN, A, P)

        def ids(offset: int):
            at_BPA = slots.begin_BP[..., None] + jnp.arange(offset, offset + A)[None, None]
            at_BS = jnp.clip(at_BPA, 0, length - 1).reshape(rows, -1)
            return jnp.take_along_axis(bytes_BN, at_BS, axis=1)

        global_BPD = self.global_inputs(ids(1 - A), slots.ranges.position_BT)
        global_out_BPD, global_kv = self.global_stack(global_BPD, slots.ranges)
        pieces_BPAE = self.pieces(global_out_BPD)
        place_BS = jnp.broadcast_to(jnp.arange(P * A)[None] % A, (rows, P * A))
        # Places without a byte come last in their slot, so that no other place sees them.
        local_BSE = self.local_inputs(ids(0), place_BS, pieces_BPAE.reshape(rows, P * A, E))
        if by_kernel(self.implementation):
            index_BS = index_like(place_BS)
            local_in, place = local_BSE, place_BS
            ranges = Ranges(index_BS - place_BS, index_BS + 1, place_BS)
        else:
            local_in, place = local_BSE.reshape(-1, A, E), place_BS.reshape(-1, A)
            ranges = Ranges(jnp.zeros_like(place), place + 1, place)
        y, local_kv = self.local_stack(local_in, ranges)
        local_kv = jax.tree.map(lambda x: x.reshape(-1, A, *x.shape[2:]), local_kv)
        byte_BS = slots.byte_BPA.reshape(rows, -1)
        y_BNE = moved(y.reshape(local_BSE.shape), slots.place_BN, byte_BS)
        out = {
            "global_in": global_BPD,
            "global_out": global_out_BPD,
            "pieces_BPAE": pieces_BPAE,
            "local_in": local_BSE.reshape(rows, P, A, E),
            "global_kv": global_kv,
            "local_kv": local_kv,
        }
        return self.head(constrained(y_BNE, "x_BNE")), out

    def open_slot(self, before_BA, number_B, positions: CachePositions, caches):
        """The pieces [B, A, E] of the next slot of each row, and the updated caches; before: the
        newest p ids."""
        x_B1D = self.global_inputs(before_BA, number_B[:, None])
        x_B1D, caches = self.global_stack.step(x_B1D, positions, caches)
        return self.pieces(x_B1D)[:, 0], caches

    def step(self, id_B, place_B, piece_BE, positions: CachePositions, caches):
        """Logits [B, V] after one byte more in each row's slot, and the updated caches."""
        x_B1E = self.local_inputs(id_B[:, None], place_B[:, None], piece_BE[:, None])
        x_B1E, caches = self.local_stack.step(x_B1E, positions, caches)
        return self.head(x_B1E)[:, 0], caches


def forward_flops(config: MegaByteConfig, N: int, P: int) -> int:
    """FLOPs of one row of N bytes and P slots, forward."""
    A, D, E = config.patch_bytes, config.global_width, config.local_width
    local = relu_flops(P * A, P * visible_keys(A, A), E)
    total = config.global_layers * row_flops(P, P, D) + config.local_layers * local
    return total + 2 * P * D * E + 2 * N * E * config.vocabulary


def recomputed_flops(config: MegaByteConfig, N: int, P: int) -> int:
    """FLOPs of one row that the backward pass recomputes.

    The local stack's scores are kept, unless its blocks are rematerialised.
    """
    A, D, E = config.patch_bytes, config.global_width, config.local_width
    attention = P * visible_keys(A, A)
    local = {
        "none": 0,
        "products": 4 * E * attention,
        "full": relu_flops(P * A, attention, E) - 2 * P * A * HIDDEN * E * E,
    }[config.remat]
    return config.global_layers * row_again(config.remat, P, P, D) + config.local_layers * local


def paper_flops(config: MegaByteConfig, N: int, P: int) -> float:
    """FLOPs of one byte, forward, as the SpaceByte paper counts for a MegaByte."""
    A, D, E = config.patch_bytes, config.global_width, config.local_width
    return (
        published_flops(D, config.global_layers, N / A) / A
        + 2 * D / A * E
        + published_flops(E, config.local_layers, A, config.vocabulary)
    )


def forward(config: ModelConfig, params, arrays: dict, dtype, implementation) -> dict:
    """As the public implementation: each row is one text, whatever BOS is in it.

    arrays: tokens, int [B, N]; targets don't change the logits.

    Raises:
      ValueError: for more positions than have an embedding.
    """
    tokens_BN, own = arrays["tokens"], config.model
    length = tokens_BN.shape[1]
    if length > own.context:
        raise ValueError(f"tokens have {length} positions; megabyte.context is {own.context}")
    model = MegaByte(own, -(-length // own.patch_bytes), dtype, implementation)
    logits_BNV, out = model.apply({"params": params}, tokens_BN, jnp.ones_like(tokens_BN))
    return {"logits": logits_BNV} | {name: out[name] for name in STATES}
