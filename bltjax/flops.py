"""Floating-point operations of a forward pass, by our exact shapes.

Convention: a multiply-add is 2; matrix products and attention only (norms, rotary angles, softmax
and table look-ups are 0, so hash tables cost nothing); attention counts the keys that a query may
see in a row that is one document, so causal attention is halved; patches count at the row's full
P. Training is three times the forward pass; rematerialisation is not counted.
"""

from bltjax.alphabet import VOCABULARY
from bltjax.config import BLTConfig, ByteCNNConfig, ByteLMConfig


def seen_keys(queries: int, span: int) -> int:
    """Keys seen by all queries of a causal window: sum of min(i + 1, span)."""
    span = min(span, queries)
    return span * (span + 1) // 2 + (queries - span) * span


def block_flops(positions, span, width, hidden, key_value_width) -> int:
    projections = 2 * width * (2 * width + 2 * key_value_width + 3 * hidden)
    return positions * projections + 4 * width * seen_keys(positions, span)


def cross_flops(queries: int, keys: int, pairs: int, width: int) -> int:
    return 4 * width * width * (queries + keys) + 4 * width * pairs


def row_forward_flops(
    config: ByteLMConfig | ByteCNNConfig | BLTConfig, row_bytes: int, row_patches: int
) -> int:
    """FLOPs of one row of N bytes and P patches, forward."""
    N, P = row_bytes, row_patches
    if isinstance(config, ByteCNNConfig):
        pointwise = config.layers * 3 * config.hidden + config.context * config.width
        return 2 * N * config.width * (pointwise + VOCABULARY)
    if isinstance(config, ByteLMConfig):
        blocks = config.layers * block_flops(
            N, config.window, config.width, config.hidden, config.width
        )
        return blocks + 2 * N * config.width * VOCABULARY
    local, cross, latent = config.local, config.cross, config.latent
    E, K, D = local.width, cross.slots, latent.width
    encoder_block = block_flops(N, local.window, E, local.encoder_hidden or local.hidden, E)
    decoder_block = block_flops(N, local.window, E, local.hidden, E)
    total = local.encoder_layers * encoder_block + local.decoder_layers * decoder_block
    total += 2 * N * E * VOCABULARY
    total += 2 * P * E * K * E  # pooled vector -> K queries
    attends = {"none": 0, "last": 1, "all": local.encoder_layers}[cross.encoder]
    total += attends * cross_flops(P * K, N, N * K, E)
    if K * E != D:
        total += 2 * P * K * E * D
    key_value_width = D // latent.heads * latent.key_value_heads
    total += latent.layers * block_flops(P, P, D, latent.hidden, key_value_width)
    attends = {"none": 0, "first": 1, "all": local.decoder_layers}[cross.decoder]
    total += 2 * P * D * E * (K if attends else 1)
    return total + attends * cross_flops(N, P * K, N * K, E)


def training_flops(config, rows: int, row_bytes: int, row_patches: int) -> int:
    """FLOPs of one optimizer step over `rows` rows."""
    return 3 * rows * row_forward_flops(config, row_bytes, row_patches)
