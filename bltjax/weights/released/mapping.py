"""How the tensors of a released checkpoint lie in our parameters, both ways, without a loop of its
own for any layout.

A `Piece` says that one place of one of our leaves is one tensor of theirs (or rows of it):

    same         the same array
    matrix       theirs is (out, in), ours [in ..., out ...]: a transpose and a reshape
    half_split   matrix, whose rotary channels are paired (i, i + C / 2) there, (2i, 2i + 1) here
    table        rows `first` and following; ours has padding rows after them

`Names` is what differs between Meta's files and the transformers port; shapes don't.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from bltjax.config.run import BLTConfig, ByteLMConfig, LatentConfig
from bltjax.weights.lazy import DTYPES, Leaf, Tensor, finite, stacked

STORED = (DTYPES["float32"], DTYPES["bfloat16"])  # what our exports hold


class Piece(NamedTuple):
    path: str
    place: tuple[int, ...]
    name: str
    kind: str
    first: int = 0  # table: the tensor's row that is our row 0
    rows: int = 0  # table: how many


class Names(NamedTuple):
    """The words of one layout; `{}` is a layer's or a table's number."""

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


def inner_shape(piece: Piece, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what is at a piece's place."""
    return shapes[piece.path][len(piece.place) :]


def two_dimensional(path: str, inner: tuple[int, ...]) -> tuple[int, int]:
    """(in, out) of one of our matrices: o and widen have two axes of input, the others one."""
    noun = path.rpartition("/")[2].partition("_")[0]
    axes = 2 if noun in ("o", "widen") else 1
    return int(np.prod(inner[:axes])), int(np.prod(inner[axes:]))


def tensor_shapes(
    pieces: list[Piece], shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shape that each of their tensors must have, given those of our leaves."""
    found: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        inner = inner_shape(piece, shapes)
        if piece.kind == "table":
            rows = max(found.get(piece.name, (0,))[0], piece.first + piece.rows)
            found[piece.name] = (rows, inner[1])
        elif piece.kind == "same":
            found[piece.name] = inner
        else:
            found[piece.name] = two_dimensional(piece.path, inner)[::-1]
    return found


def check_tensors(
    tensors: dict[str, Tensor],
    pieces: list[Piece],
    shapes: dict[str, tuple[int, ...]],
    where: str,
) -> None:
    """Raises ValueError unless `tensors` are just those of `pieces`, in shape and dtype."""
    expected = tensor_shapes(pieces, shapes)
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{where} lacks tensor {missing[0]} of shape {expected[missing[0]]}{more}; its config"
            f" asks for {len(expected)} tensors, the files have {len(tensors)}"
        )
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ValueError(
            f"{tensors[extra[0]].where} has tensor {extra[0]} of shape {tensors[extra[0]].shape}"
            f"{more}, which its config has no place for"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{tensors[name].where}: tensor {name} has shape {tensors[name].shape}; its config"
                f" asks for {shape}"
            )
        if tensors[name].dtype not in DTYPES.values():
            raise ValueError(
                f"{tensors[name].where}: tensor {name} has dtype {tensors[name].dtype}, which is"
                f" not one of {', '.join(DTYPES)}"
            )


def into_ours(piece: Piece, tensor: np.ndarray, inner: tuple[int, ...]) -> np.ndarray:
    if piece.kind == "same":
        return tensor
    if piece.kind == "half_split":
        width, heads, channels = inner
        split = tensor.reshape(heads, 2, channels // 2, width)
        return split.transpose(3, 0, 2, 1).reshape(inner)
    return tensor.T.reshape(inner)


def into_theirs(piece: Piece, array: np.ndarray) -> np.ndarray:
    if piece.kind == "same":
        return array
    rows, columns = two_dimensional(piece.path, array.shape)
    return array.reshape(rows, columns).T


def leaves_of(
    tensors: dict[str, Tensor], pieces: list[Piece], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Leaf]:
    """Our leaves, read from their tensors; float16 becomes float32, which holds all of it.

    A read raises NotFinite for a tensor that holds NaN or infinity.
    """
    tensors = {piece.name: finite(tensors[piece.name], piece.name) for piece in pieces}
    by_path: dict[str, dict[tuple[int, ...], Piece]] = {}
    for piece in pieces:
        by_path.setdefault(piece.path, {})[piece.place] = piece
    return {path: joined_leaf(tensors, found, shapes[path]) for path, found in by_path.items()}


def joined_leaf(
    tensors: dict[str, Tensor], pieces: dict[tuple[int, ...], Piece], shape: tuple[int, ...]
) -> Leaf:
    dtypes = {tensors[piece.name].dtype for piece in pieces.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else DTYPES["float32"]
    dtype = dtype if dtype in STORED else DTYPES["float32"]

    def read(place: tuple[int, ...], rows: slice) -> np.ndarray:
        piece = pieces[place]
        tensor, inner = tensors[piece.name], shape[len(place) :]
        begin, end, _ = rows.indices(inner[0])
        if piece.kind != "table":
            return into_ours(piece, tensor.all(), inner)[begin:end].astype(dtype)
        held = max(begin, min(end, piece.rows))  # what lies beyond is padding, and zero
        found = tensor.read(piece.first + begin, piece.first + held)
        padded = np.zeros((end - begin, *inner[1:]), dtype)
        padded[: held - begin] = found
        return padded

    return Leaf(shape, dtype, read)


def tensors_of(
    leaves: dict[str, Leaf], pieces: list[Piece], dtypes: dict[str, np.dtype]
) -> dict[str, Tensor]:
    """Their tensors, read from our leaves, in the leaf's dtype unless `dtypes` names another."""
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    expected = tensor_shapes(pieces, shapes)
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)

    def tensor_of(name: str, found: list[Piece]) -> Tensor:
        leaf = leaves[found[0].path]
        dtype = dtypes.get(name, leaf.dtype)

        def read(begin: int, end: int) -> np.ndarray:
            if found[0].kind != "table":
                array = leaf.read(found[0].place, slice(None))
                return into_theirs(found[0], array)[begin:end].astype(dtype)
            parts = []
            for piece in found:
                low, high = max(begin, piece.first), min(end, piece.first + piece.rows)
                if low < high:
                    rows = slice(low - piece.first, high - piece.first)
                    parts.append(leaf.read(piece.place, rows))
            return np.concatenate(parts).astype(dtype)

        return Tensor(expected[name], dtype, read, "")

    return {name: tensor_of(name, found) for name, found in by_name.items()}


def odd_dtypes(tensors: dict[str, Tensor], leaves: dict[str, Leaf], pieces: list[Piece]) -> dict:
    """Tensors by name whose dtype differs from the leaf they became part of: to give it back."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    return {
        piece.name: names[tensors[piece.name].dtype]
        for piece in pieces
        if tensors[piece.name].dtype != leaves[piece.path].dtype
    }


def check_stacked(paths: Iterable[str], pieces: list[Piece]) -> None:
    """Every one of our leaves has its pieces: a mistake of ours if not, found before any copy."""
    covered = {piece.path for piece in pieces}
    lost = sorted(set(paths) - covered)
    odd = sorted(piece.path for piece in pieces if stacked(piece.path) != bool(piece.place))
    if lost or odd:
        raise RuntimeError(f"parameters without a tensor: {lost}; of another rank: {odd}")
