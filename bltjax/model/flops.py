"""Floating-point operations, by our exact shapes and by the paper's formula; and the share of a
chip's peak that they reach.

Convention: a multiply-add is 2; matrix products and attention only (norms, rotary angles, softmax
and table look-ups are 0, so hash tables cost nothing); attention counts the keys that a query may
see in a row that is one document, so causal attention is halved; patches count at the row's full
P. Training is three times the forward pass. Recomputation in the backward pass is counted apart,
and not in a model's FLOPs utilisation (MFU).
"""

from bltjax.distributed.topology import chip_of
from bltjax.model.blt.config import BLTConfig
from bltjax.model.byte_cnn import ByteCNNConfig
from bltjax.model.byte_lm import ByteLMConfig
from bltjax.text.alphabet import VOCABULARY


def visible_keys(queries: int, span: int) -> int:
    """Keys seen by all queries of a causal window: sum of min(i + 1, span)."""
    span = min(span, queries)
    return span * (span + 1) // 2 + (queries - span) * span


def block_flops(positions, span, width, hidden, key_value_width) -> int:
    projections = 2 * width * (2 * width + 2 * key_value_width + 3 * hidden)
    return positions * projections + 4 * width * visible_keys(positions, span)


def cross_flops(queries: int, keys: int, pairs: int, width: int) -> int:
    return 4 * width * width * (queries + keys) + 4 * width * pairs


def byte_cnn_forward(config: ByteCNNConfig, N: int, P: int) -> int:
    """FLOPs of one row of N bytes, forward."""
    pointwise = config.layers * 3 * config.hidden + config.context * config.width
    return 2 * N * config.width * (pointwise + VOCABULARY)


def byte_lm_forward(config: ByteLMConfig, N: int, P: int) -> int:
    """FLOPs of one row of N bytes, forward."""
    block = block_flops(N, config.window, config.width, config.hidden, config.width)
    return config.layers * block + 2 * N * config.width * VOCABULARY


def blt_forward(config: BLTConfig, N: int, P: int) -> int:
    """FLOPs of one row of N bytes and P patches, forward."""
    local, cross, latent = config.local, config.cross, config.latent
    E, K, D = local.width, cross.slots, latent.width
    encoder_block = block_flops(N, local.window, E, local.encoder_hidden or local.hidden, E)
    decoder_block = block_flops(N, local.window, E, local.hidden, E)
    total = local.encoder_layers * encoder_block + local.decoder_layers * decoder_block
    total += 2 * N * E * VOCABULARY
    total += 2 * P * E * K * E  # pooled vector -> K queries
    encoder_crosses, decoder_crosses = cross_layers(config)
    total += encoder_crosses * cross_flops(P * K, N, N * K, E)
    if K * E != D:
        total += 2 * P * K * E * D
    key_value_width = D // latent.heads * latent.key_value_heads
    total += latent.layers * block_flops(P, P, D, latent.hidden, key_value_width)
    total += 2 * P * D * E * (K if decoder_crosses else 1)
    return total + decoder_crosses * cross_flops(N, P * K, N * K, E)


def cross_layers(config: BLTConfig) -> tuple[int, int]:
    """Number of cross-attention layers of the encoder and of the decoder."""
    local, cross = config.local, config.cross
    encoder = {"none": 0, "last": 1, "all": local.encoder_layers}[cross.encoder]
    return encoder, {"none": 0, "first": 1, "all": local.decoder_layers}[cross.decoder]


def block_again(policy, positions, span, width, hidden, key_value_width) -> int:
    """FLOPs of one block that the backward pass recomputes.

    That is the scores of every attention, once, because kernels don't store them: half of the
    forward pass of attention. Besides, by the config's policy: "full" recomputes the whole block
    but its last product, whose result is not needed; the other policies keep the results of
    products and of attention.
    """
    scores = 2 * width * visible_keys(positions, span)
    if policy != "full":
        return scores
    block = block_flops(positions, span, width, hidden, key_value_width)
    return scores + block - 2 * positions * hidden * width


def byte_cnn_recomputed(config: ByteCNNConfig, N: int, P: int) -> int:
    """FLOPs of one row that the backward pass recomputes."""
    return 0


def byte_lm_recomputed(config: ByteLMConfig, N: int, P: int) -> int:
    """FLOPs of one row that the backward pass recomputes."""
    width = config.width
    return config.layers * block_again(config.remat, N, config.window, width, config.hidden, width)


def blt_recomputed(config: BLTConfig, N: int, P: int) -> int:
    """FLOPs of one row that the backward pass recomputes."""
    local, latent = config.local, config.latent
    E, D = local.width, latent.width
    key_value_width = D // latent.heads * latent.key_value_heads
    encoder = block_again(local.remat, N, local.window, E, local.encoder_hidden or local.hidden, E)
    decoder = block_again(local.remat, N, local.window, E, local.hidden, E)
    return (
        local.encoder_layers * encoder
        + local.decoder_layers * decoder
        + sum(cross_layers(config)) * 2 * E * config.cross.slots * N
        + latent.layers * block_again(latent.remat, P, P, D, latent.hidden, key_value_width)
    )


def paper_cross(width, layers, context, ratio) -> float:
    """FLOPs of one query through layers of attention; ratio: keys per query."""
    attention = 4 * layers * width * (context + 1) / 2
    return attention + (2 * ratio + 2) * 2 * layers * width**2


def paper_transformer(width, layers, context, vocabulary=0) -> float:
    """FLOPs of one position, forward, as the paper estimates them (equations 13 to 17, table 11).

    Every feed-forward hidden layer counts as four times the width, and cross-attention as causal;
    terms that its formula lacks (pooling, projections between widths) are left out.
    """
    hidden = 2 * layers * 2 * width * 4 * width
    return hidden + paper_cross(width, layers, context, 1) + 2 * width * vocabulary


def byte_cnn_paper(config: ByteCNNConfig, N: int, P: int) -> float:
    """FLOPs of one byte, forward; the paper has no formula for a CNN, so this is our count."""
    return byte_cnn_forward(config, N, P) / N


def byte_lm_paper(config: ByteLMConfig, N: int, P: int) -> float:
    """FLOPs of one byte, forward, by the paper's formula."""
    return paper_transformer(config.width, config.layers, config.window, 256)


def blt_paper(config: BLTConfig, N: int, P: int) -> float:
    """FLOPs of one byte, forward, by the paper's formula."""
    transformer, cross = paper_transformer, paper_cross
    local, latent, slots = config.local, config.latent, config.cross.slots
    E, patch = local.width, N / P
    encoder, decoder = cross_layers(config)
    return (
        transformer(latent.width, latent.layers, P) / patch
        + transformer(E, local.encoder_layers, local.window)
        + transformer(E, local.decoder_layers, local.window, 256)
        + cross(E, encoder, patch, patch / slots) * slots / patch
        + cross(E, decoder, slots, slots / patch)
    )


def utilisation(flops_per_second: float, devices) -> dict[str, float]:
    """FLOP/s per device, and as a share of the peak where that is known."""
    reached = flops_per_second / len(devices)
    chip = chip_of(devices[0].device_kind)
    return {"flops_per_second_per_chip": reached} | ({"mfu": reached / chip.flops} if chip else {})
