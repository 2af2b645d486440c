"""The mapping between tensors of a released checkpoint and our parameters, both ways, in one table
per layout.

A `TensorPart` maps one place of one of our leaves to one tensor of theirs (or rows of it):

    same         the same array
    matrix       theirs is (out, in), ours [in ..., out ...]: a transpose and a reshape
    half_split   matrix, whose rotary channels are paired (i, i + C / 2) there, (2i, 2i + 1) here
    table        rows `first` and following; ours has padding rows after them
    rows         matrix, of rows `first` and following: q, k and v in one tensor
    taps         a convolution, theirs (out, in, taps), ours [taps, in, out]; (channels, 1, taps) of
                 a depthwise one is [taps, channels] here

`Names` holds the differences between Meta's files and the transformers port; shapes are the same.
"""

from collections.abc import Iterable
from typing import NamedTuple

from bltjax.model.blt.config import BLTConfig, LatentConfig
from bltjax.model.byte_lm import ByteLMConfig


class TensorPart(NamedTuple):
    path: str
    index: tuple[int, ...]
    name: str
    kind: str
    first: int = 0  # table, rows: the tensor's row that is our row 0
    rows: int = 0  # table, rows: how many


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
    # Within a block: attention's norm, q, k, v, o, the feed-forward's norm, gate, up, down.
    block: tuple[str, ...]
    cross: tuple[str, ...]  # norms of queries and of keys and values, q, k, v, o


META = Names(
    encoder="local_encoder.", latent="global_transformer.", decoder="local_decoder.", byte_lm="",
    table="encoder_hash_tok_embedding.{}.weight", head="local_decoder.output.weight",
    byte_lm_head="output.weight", embedding="tok_embeddings",
    block=(
        "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
        "ffn_norm", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2",
    ),
    cross=("cross_attn_norm_q", "cross_attn_norm_kv", "wq", "wk", "wv", "wo"),
)  # fmt: skip
PORT = Names(
    encoder="model.local_encoder.", latent="model.global_transformer.",
    decoder="model.local_decoder.", byte_lm="model.patcher.",
    table="model.encoder_hash_tok_embedding.weight",  # all tables in one tensor
    head="lm_head.weight", byte_lm_head="model.patcher.lm_head.weight", embedding="embed_tokens",
    block=(
        "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj",
    ),
    cross=("q_norm", "k_norm", "q_proj", "k_proj", "v_proj", "o_proj"),
)  # fmt: skip
LLAMA = PORT._replace(latent="model.")


def block_parts(
    names: Names, ours: str, theirs: str, letters: str, index=(), rotary="matrix"
) -> Iterable[TensorPart]:
    """One transformer block; `letters` are its width, query heads and key/value heads."""
    D, H, J = letters
    L = "L" if index else ""
    leaves = (
        f"attention_norm_{L}{D}", f"q_{L}{D}{H}C", f"k_{L}{D}{J}C", f"v_{L}{D}{J}C",
        f"o_{L}{H}C{D}", f"feed_forward_norm_{L}{D}", f"gate_{L}{D}F", f"up_{L}{D}F",
        f"down_{L}F{D}",
    )  # fmt: skip
    for leaf, tensor in zip(leaves, names.block, strict=True):
        kind = "same" if "norm" in leaf else rotary if leaf[0] in "qk" else "matrix"
        yield TensorPart(f"{ours}/{leaf}", index, f"{theirs}.{tensor}.weight", kind)


def cross_parts(names: Names, ours: str, theirs: str) -> Iterable[TensorPart]:
    leaves = ("norm_q_E", "norm_kv_E", "q_EGC", "k_EGC", "v_EGC", "o_GCE")
    for leaf, tensor in zip(leaves, names.cross, strict=True):
        kind = "same" if "norm" in leaf else "matrix"
        yield TensorPart(f"{ours}/{leaf}", (), f"{theirs}.{tensor}.weight", kind)


def blt_parts(names: Names, config: BLTConfig) -> list[TensorPart]:
    """Every tensor of a BLT; needs both cross-attentions."""
    local, cross, hashed = config.local, config.cross, config.hash
    projection = "patch_embedding_projection.weight"
    parts = [
        TensorPart("encoder/bytes_VE", (), f"{names.encoder}{names.embedding}.weight", "same"),
        TensorPart("encoder/pool_EKE", (), names.encoder + projection, "matrix"),
        TensorPart("decoder/narrow_DKE", (), names.decoder + projection, "matrix"),
        TensorPart("decoder/norm_E", (), f"{names.decoder}norm.weight", "same"),
        TensorPart("decoder/head_EV", (), names.head, "matrix"),
    ]
    fused = "{}" not in names.table
    for table in range(hashed.tables):
        first = table * hashed.rows if fused else 0
        name = names.table.format(table)
        parts.append(TensorPart("encoder/ngrams_RME", (table,), name, "table", first, hashed.rows))
    if cross.slots * local.width != config.latent.width:
        name = f"{names.latent}token_embedding_projection.weight"
        parts.append(TensorPart("latent/widen_KED", (), name, "matrix"))
    for stack, theirs, layers, crossed in (
        ("encoder", names.encoder, local.encoder_layers, cross.encoder),
        ("decoder", names.decoder, local.decoder_layers, cross.decoder),
    ):
        for layer in range(layers):
            block = f"{theirs}layers.{layer}"
            parts += block_parts(names, f"{stack}/block_{layer}", block, "EGG")
        for layer in range(layers if crossed == "all" else 1):
            block = f"{theirs}cross_attn_layers.{layer}"
            parts += cross_parts(names, f"{stack}/cross_{layer}", block)
    return parts + latent_parts(names, config.latent, rotary="matrix")


def latent_parts(names: Names, config: LatentConfig, *, rotary: str) -> list[TensorPart]:
    parts: list[TensorPart] = []
    for layer in range(config.layers):
        theirs = f"{names.latent}layers.{layer}"
        parts += block_parts(names, "latent/blocks", theirs, "DHJ", (layer,), rotary)
    return parts


def byte_lm_parts(names: Names, config: ByteLMConfig) -> list[TensorPart]:
    parts = [
        TensorPart("bytes_VE", (), f"{names.byte_lm}{names.embedding}.weight", "same"),
        TensorPart("norm_E", (), f"{names.byte_lm}norm.weight", "same"),
        TensorPart("head_EV", (), names.byte_lm_head, "matrix"),
    ]
    for layer in range(config.layers):
        theirs = f"{names.byte_lm}layers.{layer}"
        parts += block_parts(names, f"block_{layer}", theirs, "EGG")
    return parts


# The mapping of each family, by name; others have no released layout.
PARTS = {"blt": blt_parts, "byte_lm": byte_lm_parts}
