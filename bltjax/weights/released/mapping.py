"""The mapping between tensors of a released checkpoint and our parameters, both ways, in one table
per layout.

A `Piece` maps one place of one of our leaves to one tensor of theirs (or rows of it):

    same         the same array
    matrix       theirs is (out, in), ours [in ..., out ...]: a transpose and a reshape
    half_split   matrix, whose rotary channels are paired (i, i + C / 2) there, (2i, 2i + 1) here
    table        rows `first` and following; ours has padding rows after them

`Names` holds the differences between Meta's files and the transformers port; shapes are the same.
"""

from collections.abc import Iterable
from typing import NamedTuple

from bltjax.model.blt.config import BLTConfig, LatentConfig
from bltjax.model.byte_lm import ByteLMConfig


class Piece(NamedTuple):
    path: str
    place: tuple[int, ...]
    name: str
    kind: str
    first: int = 0  # table: the tensor's row that is our row 0
    rows: int = 0  # table: how many


class Names(NamedTuple):
    """The names of one layout; `{}` is a layer's or a table's number."""

    encoder: str
    latent: str
    decoder: str
    byte_lm: str
    table: str
    head: str
    byte_lm_head: str
    embedding: str
    attention: tuple[str, str, str, str]  # q, k, v, o, within a block
    cross: tuple[str, str, str, str]
    feed_forward: tuple[str, str, str]  # gate, up, down
    block_norms: tuple[str, str]
    cross_norms: tuple[str, str]


META = Names(
    encoder="local_encoder.",
    latent="global_transformer.",
    decoder="local_decoder.",
    byte_lm="",
    table="encoder_hash_tok_embedding.{}.weight",
    head="local_decoder.output.weight",
    byte_lm_head="output.weight",
    embedding="tok_embeddings",
    attention=("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    cross=("wq", "wk", "wv", "wo"),
    feed_forward=("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
    block_norms=("attention_norm", "ffn_norm"),
    cross_norms=("cross_attn_norm_q", "cross_attn_norm_kv"),
)
PORT = Names(
    encoder="model.local_encoder.",
    latent="model.global_transformer.",
    decoder="model.local_decoder.",
    byte_lm="model.patcher.",
    table="model.encoder_hash_tok_embedding.weight",  # all tables in one tensor
    head="lm_head.weight",
    byte_lm_head="model.patcher.lm_head.weight",
    embedding="embed_tokens",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    cross=("q_proj", "k_proj", "v_proj", "o_proj"),
    feed_forward=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    block_norms=("input_layernorm", "post_attention_layernorm"),
    cross_norms=("q_norm", "k_norm"),
)
LLAMA = PORT._replace(latent="model.")


def block_pieces(
    names: Names, ours: str, theirs: str, letters: str, place=(), rotary="matrix"
) -> Iterable[Piece]:
    """One transformer block; `letters` are its width, query heads and key/value heads."""
    D, H, J = letters
    L = "L" if place else ""
    q, k, v, o = names.attention
    gate, up, down = names.feed_forward
    attention_norm, feed_forward_norm = names.block_norms
    for leaf, tensor, kind in (
        (f"attention_norm_{L}{D}", attention_norm, "same"),
        (f"q_{L}{D}{H}C", q, rotary),
        (f"k_{L}{D}{J}C", k, rotary),
        (f"v_{L}{D}{J}C", v, "matrix"),
        (f"o_{L}{H}C{D}", o, "matrix"),
        (f"feed_forward_norm_{L}{D}", feed_forward_norm, "same"),
        (f"gate_{L}{D}F", gate, "matrix"),
        (f"up_{L}{D}F", up, "matrix"),
        (f"down_{L}F{D}", down, "matrix"),
    ):
        yield Piece(f"{ours}/{leaf}", place, f"{theirs}.{tensor}.weight", kind)


def cross_pieces(names: Names, ours: str, theirs: str) -> Iterable[Piece]:
    for leaf, tensor in zip(("norm_q_E", "norm_kv_E"), names.cross_norms, strict=True):
        yield Piece(f"{ours}/{leaf}", (), f"{theirs}.{tensor}.weight", "same")
    for leaf, tensor in zip(("q_EGC", "k_EGC", "v_EGC", "o_GCE"), names.cross, strict=True):
        yield Piece(f"{ours}/{leaf}", (), f"{theirs}.{tensor}.weight", "matrix")


def blt_pieces(names: Names, config: BLTConfig) -> list[Piece]:
    """Every tensor of a BLT; needs both cross-attentions."""
    local, cross, hashed = config.local, config.cross, config.hash
    projection = "patch_embedding_projection.weight"
    pieces = [
        Piece("encoder/bytes_VE", (), f"{names.encoder}{names.embedding}.weight", "same"),
        Piece("encoder/pool_EKE", (), names.encoder + projection, "matrix"),
        Piece("decoder/narrow_DKE", (), names.decoder + projection, "matrix"),
        Piece("decoder/norm_E", (), f"{names.decoder}norm.weight", "same"),
        Piece("decoder/head_EV", (), names.head, "matrix"),
    ]
    fused = "{}" not in names.table
    for table in range(hashed.tables):
        first = table * hashed.rows if fused else 0
        name = names.table.format(table)
        pieces.append(Piece("encoder/ngrams_RME", (table,), name, "table", first, hashed.rows))
    if cross.slots * local.width != config.latent.width:
        name = f"{names.latent}token_embedding_projection.weight"
        pieces.append(Piece("latent/widen_KED", (), name, "matrix"))
    for layer in range(local.encoder_layers):
        theirs = f"{names.encoder}layers.{layer}"
        pieces += block_pieces(names, f"encoder/block_{layer}", theirs, "EGG")
    for layer in range(local.encoder_layers if cross.encoder == "all" else 1):
        theirs = f"{names.encoder}cross_attn_layers.{layer}"
        pieces += cross_pieces(names, f"encoder/cross_{layer}", theirs)
    for layer in range(local.decoder_layers):
        theirs = f"{names.decoder}layers.{layer}"
        pieces += block_pieces(names, f"decoder/block_{layer}", theirs, "EGG")
    for layer in range(local.decoder_layers if cross.decoder == "all" else 1):
        theirs = f"{names.decoder}cross_attn_layers.{layer}"
        pieces += cross_pieces(names, f"decoder/cross_{layer}", theirs)
    return pieces + latent_pieces(names, config.latent, rotary="matrix")


def latent_pieces(names: Names, config: LatentConfig, *, rotary: str) -> list[Piece]:
    pieces: list[Piece] = []
    for layer in range(config.layers):
        theirs = f"{names.latent}layers.{layer}"
        pieces += block_pieces(names, "latent/blocks", theirs, "DHJ", (layer,), rotary)
    return pieces


def byte_lm_pieces(names: Names, config: ByteLMConfig) -> list[Piece]:
    pieces = [
        Piece("bytes_VE", (), f"{names.byte_lm}{names.embedding}.weight", "same"),
        Piece("norm_E", (), f"{names.byte_lm}norm.weight", "same"),
        Piece("head_EV", (), names.byte_lm_head, "matrix"),
    ]
    for layer in range(config.layers):
        theirs = f"{names.byte_lm}layers.{layer}"
        pieces += block_pieces(names, f"block_{layer}", theirs, "EGG")
    return pieces


# The mapping of each family, by name; others have no released layout.
PIECES = {"blt": blt_pieces, "byte_lm": byte_lm_pieces}
