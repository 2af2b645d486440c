"""CANINE (arXiv 2103.06874): an encoder of characters, and a head for masked ones.

A character's embedding is a row of each of R hash tables, side by side. One block sees blocks of
128 characters; molecules of 4 characters pass through the deep stack; one block sees the document.

    characters B N --> embeddings --> block (128 characters) --> molecules, and [CLS]: slots B P
                                               |                              |
                                               |                         deep blocks
                                               |                              |
              hidden states <-- block (document) <-- convolution <------------+

The layout (molecules.py) says which characters a slot has; nothing crosses documents. Besides
bert_block.py's, these parameters are new: E is 2 D, a character and the molecule that it reads,
side by side; A are the characters that a convolution sees.

A row's characters are code points: [CLS] (0xE000), the text, [SEP] (0xE001); 0 fills the row.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention.pattern import Blocks, Whole
from bltjax.config.fields import MAY_CHANGE, divides, one_of, positive, setting
from bltjax.config.model import REMAT, ModelConfig
from bltjax.distributed.sharding import constrained
from bltjax.model.flops import visible_keys
from bltjax.model.layers import embedded, project, rematerialised
from bltjax.rivals.canine.bert_block import (
    BertBlock,
    BertSize,
    block_again,
    block_flops,
    dense,
    gelu,
    normed,
    weight,
)
from bltjax.rivals.canine.masked_characters import MaskedCharacters, head_flops
from bltjax.rivals.canine.molecules import Layout, layout, padded_layout, rows_at, shifted

# One per hash function.
PRIMES = (31, 43, 59, 61, 73, 97, 103, 113, 137, 149, 157, 173, 181, 193, 211, 223)
FORWARD_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclasses.dataclass(frozen=True)
class CanineConfig:
    """An encoder of characters."""

    group: typing.ClassVar[str] = "canine"

    layers: int = 12  # of the deep stack
    width: int = 768  # D
    heads: int = 12  # H
    hidden: int = 3072  # F
    rate: int = 4  # characters of a molecule
    kernel: int = 4  # characters that the convolution after the deep stack sees
    hashes: int = 8  # R: hash functions, each with a table
    buckets: int = 16384  # M: rows of a table
    block: int = 128  # characters of a block of the first layer
    types: int = 16  # types of characters; in our rows all have type 0
    context: int = 16384  # rows of the table of positions: the longest row
    predicts: bool = True  # whether there is a head for masked characters; released weights: no
    classes: int = 16384  # V, that the head predicts: a code point modulo this
    # Of padded rows of released weights: a molecule is hidden unless the next one has a character.
    judged_by_next: bool = False
    norm_eps: float = 1e-12
    remat: str = setting("none", resume=MAY_CHANGE)  # one of REMAT, for all blocks but the head's

    def __post_init__(self):
        positive(self, "layers", "width", "heads", "hidden", "rate", "kernel", "hashes", "buckets")
        positive(self, "block", "types", "context", "classes", "norm_eps")
        one_of("canine.remat", self.remat, REMAT)
        divides("canine.heads", self.heads, "canine.width", self.width)
        divides("canine.hashes", self.hashes, "canine.width", self.width)
        if self.hashes > len(PRIMES):
            raise ValueError(f"canine.hashes ({self.hashes}) must be 1 ... {len(PRIMES)}")

    def summary(self) -> str:
        """The sizes, in one line."""
        return (
            f"{self.layers} layers of {self.width} over molecules of {self.rate} characters,"
            f" blocks of {self.block}, {self.hashes} hash tables of {self.buckets:,}"
        )

    def layers_in_arrays(self, stacked: bool) -> int:
        """The most layers of a stack with arrays of their own."""
        return 1 if stacked else self.layers

    @property
    def split_by_tensor(self) -> dict[str, int]:
        """Sizes that must be divisible by a mesh's `tensor`, by the names of their settings."""
        return {"canine.heads": self.heads, "canine.hidden": self.hidden}

    @property
    def longest(self) -> int:
        """The most characters of a row."""
        return self.context

    @property
    def size(self) -> BertSize:
        return BertSize(self.width, self.heads, self.hidden, self.norm_eps)

    def predicted(self, characters: int) -> int:
        """The most predicted characters of a row: 320 of 2048, as published."""
        return -(-5 * characters // 32) if self.predicts else 0


class Canine(nn.Module):
    config: CanineConfig
    row_patches: int  # P: the most slots of a row
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None

    def setup(self):
        if self.config.predicts:
            parts = (self.config.size, self.config.classes, self.dtype, self.implementation)
            self.head = MaskedCharacters(*parts)

    def __call__(self, characters_BN, documents_BN):
        """Hidden states, float32 [B, N, D], and the states on the way to them.

        Raises:
          ValueError: for rows longer than the table of positions, with both numbers.
        """
        config = self.config
        found = layout(documents_BN, config.rate, config.block, self.row_patches)
        hidden_BND, out = self.encoded(characters_BN, found)
        if config.predicts and self.is_initializing():
            none_B1 = jnp.full((len(documents_BN), 1), documents_BN.shape[1])
            self.predictions(hidden_BND, none_B1, jnp.zeros_like(none_B1), documents_BN)
        return hidden_BND, out

    def predictions(self, hidden_BND, masked_BQ, targets_BQ, documents_BN):
        """Logits, float32 [B, Q, V], of the classes of masked characters.

        masked_BQ: the t-th predicted character's index in its row: of one document after another,
          shuffled within each; then N, for none.
        targets_BQ: their classes, of which each logit depends on those before it in its document.
        """
        return self.head(hidden_BND, masked_BQ, targets_BQ, documents_BN)

    @nn.compact
    def encoded(self, characters_BN, found: Layout, types_BN=None):
        """As `__call__`, for any layout and types of characters."""
        config, N = self.config, characters_BN.shape[1]
        D, eps = config.width, config.norm_eps
        if config.context < N:
            raise ValueError(f"a row of {N} characters is longer than {config.context} positions")
        size, more = config.size, (self.dtype, self.implementation)
        block = rematerialised(config.remat, block=BertBlock)
        found = jax.tree.map(jax.lax.stop_gradient, found)

        x_BND = constrained(self.embeddings(characters_BN, found.place_BN, types_BN), "x_BND")
        x_BND = normed(self, x_BND, "embedding_norm", "D", eps)
        out = {"embeddings_BND": x_BND}

        initial = block(size, Blocks(config.block), *more, name="initial")
        x_BND, _ = initial(x_BND, found.blocks, found.alike_BN)
        molecules_BPD = self.molecules(x_BND, found)
        out |= {"initial_BND": x_BND, "molecules_in_BPD": molecules_BPD}

        deep = nn.scan(
            rematerialised(config.remat, scanned=True, block=BertBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.layers,
        )(size._replace(stacked="L"), Whole(), *more, name="deep")
        molecules_BPD, _ = deep(molecules_BPD, found.slots)
        pooled_BPD = jnp.tanh(dense(self, molecules_BPD, "pooler_DD", "pooler_bias_D", (D, D)))
        out |= {"molecules_out_BPD": molecules_BPD, "pooled_BPD": pooled_BPD}
        out |= {"pools_BP": found.first_BP}  # the slots that stand for a document

        x_BND = self.upsampled(x_BND, molecules_BPD, found)
        out |= {"upsampled_BND": x_BND}
        x_BND, _ = block(size, Whole(), *more, name="final")(x_BND, found.document)
        return x_BND.astype(jnp.float32), out

    def embeddings(self, characters_BN, place_BN, types_BN):
        """[B, N, D]: of each character's R hashes side by side, its place and its type."""
        config = self.config
        R, M, D = config.hashes, config.buckets, config.width
        prime_11R = jnp.array(PRIMES[:R])[None, None]
        table_11R = jnp.arange(R)[None, None]
        # Below 2^28 before the remainder is taken.
        ids_BNR = (characters_BN[..., None] + 1) * prime_11R % M + M * table_11R
        tables_RMC = weight(self, "characters_RMC", (R, M, D // R))
        rows_BNC = embedded(tables_RMC.reshape(R * M, -1), ids_BNR.reshape(len(ids_BNR), -1))
        x_BND = rows_BNC.reshape(*characters_BN.shape, D)
        types_WD = weight(self, "types_WD", (config.types, D))
        positions_ND = weight(self, "positions_ND", (config.context, D))
        of_type = types_WD[:1][None] if types_BN is None else embedded(types_WD, types_BN)
        return x_BND + of_type + embedded(positions_ND, place_BN)

    def molecules(self, x_BND, found: Layout):
        """[B, P, D]: the slots, of [CLS] and of molecules of `rate` characters."""
        config, N = self.config, x_BND.shape[1]
        A, D = config.rate, config.width
        of_molecule_BP = (found.after_BP < N) & ~found.first_BP
        begin_BP1 = jnp.where(of_molecule_BP, found.after_BP - A, N)[..., None]
        index_BPA = begin_BP1 + jnp.arange(A)[None, None]
        x_BPAD = rows_at(x_BND, index_BPA.reshape(len(x_BND), -1))
        x_BPAD = x_BPAD.reshape(*begin_BP1.shape[:2], A, D)
        pooled_BPD = gelu(dense(self, x_BPAD, "molecules_ADD", "molecules_bias_D", (A, D, D), 2))
        first_BPD = rows_at(x_BND, jnp.where(found.first_BP, found.after_BP, N))
        slots_BPD = jnp.where(found.first_BP[..., None], first_BPD, pooled_BPD)
        return normed(self, constrained(slots_BPD, "x_BPD"), "molecules_norm", "D", config.norm_eps)

    def upsampled(self, x_BND, molecules_BPD, found: Layout):
        """[B, N, D]: characters with the molecules that they read, and their neighbours."""
        config, A, D = self.config, self.config.kernel, self.config.width
        read_BND = rows_at(molecules_BPD, found.reads_BN)
        x_BNE = jnp.concatenate([x_BND, read_BND], axis=-1)
        # One product for all places of the window, whose results then move to where they belong.
        upsample_AED = weight(self, "upsample_AED", (A, 2 * D, D))
        places_BNAD = project(x_BNE, upsample_AED.transpose(1, 0, 2))
        total_BND = weight(self, "upsample_bias_D", (D,), nn.initializers.zeros)[None, None]
        for place in range(A):
            by = place - (A - 1) // 2
            same_BN = shifted(found.documents_BN, by, fill=-1) == found.documents_BN
            moved_BND = shifted(places_BNAD[:, :, place], by)
            total_BND = total_BND + jnp.where(same_BN[..., None], moved_BND, 0)
        total_BND = constrained(gelu(total_BND), "x_BND")
        return normed(self, total_BND, "upsample_norm", "D", config.norm_eps)


def masked_logits(module: Canine, params, batch) -> jax.Array:
    """Logits, float32 [B, Q, V], of a batch's masked characters (data/batches.py)."""

    def run(module: Canine):
        hidden_BND, _ = module(batch.characters_BN, batch.documents_BN)
        given = (batch.masked_BQ, batch.targets_BQ, batch.documents_BN)
        return module.predictions(hidden_BND, *given)

    return nn.apply(run, module)({"params": params})


def embedded_documents(module: Canine, params, batch):
    """float32: hidden states [B, N, D], and the pooled state [B, D] of each row's beginning."""
    given = (batch.characters_BN, batch.documents_BN)
    hidden_BND, out = module.apply({"params": params}, *given)
    return hidden_BND, out["pooled_BPD"][:, 0].astype(jnp.float32)


def stacks(config: CanineConfig, N: int, P: int) -> tuple[tuple[int, int, int], ...]:
    """(layers, positions, pairs of query and key) of each stack, in a row that is one document."""
    blocks, rest = divmod(N, config.block)
    in_blocks = blocks * config.block**2 + rest**2
    return (1, N, in_blocks), (config.layers, P, P * P), (1, N, N * N)


def forward_flops(config: CanineConfig, N: int, P: int) -> int:
    """FLOPs of one row of N characters and P slots, forward, with the head's predictions."""
    D, F = config.width, config.hidden
    total = 2 * P * config.rate * D * D + 2 * N * config.kernel * 2 * D * D  # convolutions
    for layers, positions, pairs in stacks(config, N, P):
        total += layers * block_flops(positions, pairs, D, F)
    return total + head_flops(config.size, config.classes, config.predicted(N))


def recomputed_flops(config: CanineConfig, N: int, P: int) -> int:
    """FLOPs of one row that the backward pass recomputes."""
    D, Q = config.width, config.predicted(N)
    total = block_again("none", Q, visible_keys(Q, Q), D, config.hidden)
    for layers, positions, pairs in stacks(config, N, P):
        total += layers * block_again(config.remat, positions, pairs, D, config.hidden)
    return total


def paper_flops(config: CanineConfig, N: int, P: int) -> float:
    """FLOPs of one character, forward, by the published shapes and without a head."""
    D, per_block = config.width, 8 * config.width**2 + 4 * config.width * config.hidden
    characters = 2 * per_block + 4 * D * (config.block + N) + 2 * D * D + 4 * config.kernel * D * D
    return characters + config.layers * (per_block + 4 * D * N / config.rate) / config.rate


def forward(config: ModelConfig, params, arrays: dict, dtype, implementation) -> dict:
    """The public implementation's outputs, by its names, of its inputs.

    Raises:
      ValueError: for rows shorter than a molecule, with both numbers.
    """
    canine, characters_BN = config.model, arrays["input_ids"]
    N = characters_BN.shape[1]
    if canine.rate > N:
        raise ValueError(f"a row of {N} characters is shorter than a molecule of {canine.rate}")
    seen_BN = arrays["attention_mask"]
    found = padded_layout(seen_BN, canine.rate, canine.block, canine.judged_by_next)
    module = Canine(canine, N // canine.rate, dtype, implementation)
    hidden_BND, out = module.apply(
        {"params": params}, characters_BN, found, arrays["token_type_ids"], method="encoded"
    )
    return {
        "last_hidden_state": hidden_BND,
        "pooler_output": out["pooled_BPD"][:, 0],
        "char_embeddings": out["embeddings_BND"],
        "initial_char_encoding": out["initial_BND"],
        "molecules_in": out["molecules_in_BPD"],
        "molecules_out": out["molecules_out_BPD"],
        "upsampled": out["upsampled_BND"],
    }
