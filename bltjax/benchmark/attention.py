"""Times of BLT's attentions on this device, forward and backward, by each implementation.

The sizes are those of the 8B's rows; every implementation gets the same arrays, and its output and
gradients are compared with those of `xla` in float32. `library` is jax's own attention, cuDNN's
on a GPU, where it can express the mask: a window, or causal.
"""

import argparse
import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.attention import fastest, range_attention
from bltjax.attention.pattern import Pooling, Reading, Sliding

SLOTS, WINDOW, MEAN_PATCH = 4, 512, 4
LOCAL_HEADS, LATENT_HEADS, LATENT_KEY_VALUE_HEADS = 20, 32, 8
LOCAL_CHANNELS, LATENT_CHANNELS = 64, 128
MOST_DENSE = 8192  # queries; above this, dense scores of all pairs are too large
IMPLEMENTATIONS = ("ours", "xla", "dense", "library")


def attentions(row_bytes: int) -> dict[str, tuple]:
    """By name: pattern, start_Q, end_Q, keys, query heads, key heads, channels."""
    random = np.random.default_rng(0)
    patches = row_bytes // MEAN_PATCH
    cuts = np.sort(random.choice(np.arange(1, row_bytes), patches - 1, replace=False))
    begins_P, ends_P = np.append(0, cuts), np.append(cuts, row_bytes)
    byte_N, patch_P = np.arange(row_bytes), np.arange(patches)
    read_N = np.maximum(np.searchsorted(begins_P, byte_N, "right") - 2, 0) * SLOTS
    slots = patches * SLOTS
    local = (LOCAL_HEADS, LOCAL_HEADS, LOCAL_CHANNELS)
    latent = (LATENT_HEADS, LATENT_KEY_VALUE_HEADS, LATENT_CHANNELS)
    begins_Q, ends_Q = np.repeat(begins_P, SLOTS), np.repeat(ends_P, SLOTS)
    window_N = np.maximum(byte_N - WINDOW + 1, 0)
    return {
        "local self": (Sliding(WINDOW), window_N, byte_N + 1, row_bytes, *local),
        "encoder cross": (Pooling(SLOTS), begins_Q, ends_Q, row_bytes, *local),
        "decoder cross": (Reading(SLOTS), read_N, read_N + SLOTS, slots, *local),
        "latent self": (Sliding(patches), 0 * patch_P, patch_P + 1, patches, *latent),
    }


def library(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, pattern, device):
    window = None if pattern.span >= q_BQHC.shape[1] else (pattern.span - 1, 0)
    on_gpu = device.platform == "gpu" and q_BQHC.dtype != jnp.float32
    return jax.nn.dot_product_attention(
        q_BQHC,
        k_BTJC,
        v_BTJC,
        is_causal=True,
        local_window_size=window,
        implementation="cudnn" if on_gpu else "xla",
    )


def functions(name: str, pattern, device) -> tuple:
    """Two jitted functions of (arrays, start_BQ, end_BQ, weight): the output; also gradients."""
    if name == "library":
        attend = functools.partial(library, pattern=pattern, device=device)
    else:
        chosen = fastest(device) if name == "ours" else name
        attend = functools.partial(range_attention, pattern=pattern, implementation=chosen)

    def forward(arrays, start_BQ, end_BQ, weight):
        return attend(*arrays, start_BQ, end_BQ)

    def both(arrays, start_BQ, end_BQ, weight):
        def loss(arrays):
            out = attend(*arrays, start_BQ, end_BQ)
            return (out.astype(jnp.float32) * weight).sum(), out

        gradients, out = jax.grad(loss, has_aux=True)(arrays)
        return out, *gradients

    return jax.jit(forward), jax.jit(both)


def median_ms(function, given, repeats: int) -> float:
    """Time per call among several in a row, so that dispatch is hidden."""
    jax.block_until_ready(function(*given))
    calls, times = 10 if jax.devices()[0].platform != "cpu" else 1, []
    for _ in range(repeats):
        started_at = time.perf_counter()
        jax.block_until_ready([function(*given) for _ in range(calls)])
        times.append(1000 * (time.perf_counter() - started_at) / calls)
    return statistics.median(times)


def errors(found, expected) -> list[float]:
    """|found - expected| / |expected| of the output and of the gradients of q, k and v."""
    found, expected = ([np.asarray(x, np.float32) for x in arrays] for arrays in (found, expected))
    return [
        float(np.linalg.norm(x - y) / np.linalg.norm(y))
        for x, y in zip(found, expected, strict=True)
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="measurements (default: 5)")
    parser.add_argument("--rows", type=int, default=1, help="rows per batch (default: 1)")
    parser.add_argument("--row_bytes", type=int, default=16384, help="per row (default: 16384)")
    parser.set_defaults(run=benchmark_attention)


def benchmark_attention(args: argparse.Namespace) -> tuple[dict, str]:
    device, rows, row_bytes = jax.devices()[0], args.rows, args.row_bytes
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    result = {"device": device.device_kind, "rows": rows, "row_bytes": row_bytes}
    result |= {"dtype": jnp.dtype(dtype).name, "attentions": {}}
    for name, (pattern, start, end, keys, heads, shared, channels) in attentions(row_bytes).items():
        queries, random = len(start), np.random.default_rng(1)
        sizes = ((queries, heads), (keys, shared), (keys, shared), (queries, heads))
        *arrays, weight = (
            jnp.asarray(random.normal(size=(rows, length, count, channels)), dtype)
            for length, count in sizes
        )
        bounds = [jnp.tile(jnp.asarray(x, jnp.int32), (rows, 1)) for x in (start, end)]
        exact = tuple(x.astype(jnp.float32) for x in arrays)
        with jax.default_matmul_precision("highest"):
            both = functions("xla", pattern, device)[1]
            expected = both(exact, *bounds, weight.astype(jnp.float32))
        expected = jax.device_get(expected)
        lines = {}
        for side in IMPLEMENTATIONS:
            if side == "library" and not isinstance(pattern, Sliding):
                continue
            if side == "dense" and max(queries, keys) > MOST_DENSE:
                continue
            forward, both = functions(side, pattern, device)
            given = (tuple(arrays), *bounds, weight)
            lines[side] = {
                "forward_ms": median_ms(forward, given, args.repeats),
                "both_ms": median_ms(both, given, args.repeats),
                "errors": errors(both(*given), expected),
            }
            print(line_words(name, side, lines), file=sys.stderr, flush=True)
        result["attentions"][name] = lines
    return result, attention_words(result)


def line_words(name: str, side: str, lines: dict) -> str:
    found = lines[side]
    return (
        f"{name:14s} {side:8s} {found['forward_ms']:9.3f} {found['both_ms']:9.3f}"
        f"   {max(found['errors']):.1e}   {found['both_ms'] / lines['ours']['both_ms']:.2f} x ours"
    )


def attention_words(result: dict) -> str:
    head = (
        "{device}: {rows} rows of {row_bytes} bytes, {dtype}; ms forward, with backward,"
        " and the largest error".format(**result)
    )
    attentions = result["attentions"].items()
    lines = [line_words(name, side, found) for name, found in attentions for side in found]
    return "\n".join([head, *lines])
