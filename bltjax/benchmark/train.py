"""The steps that `benchmark train` and `benchmark rows` time: the trainer's, and the peer's.

Both take one optimizer step of the same model on the same batch, in fp32, AdamW included. A side
imports what only it needs, since the memory of each process is measured.
"""

import os
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.config.data import DataConfig
from bltjax.config.run import OptimizerConfig, RunConfig
from bltjax.configured import initial_params, model_config, module_of, resolved
from bltjax.data.batches import PatchBatch, target_bytes_of
from bltjax.model.blt.config import BLTConfig, CrossConfig, LatentConfig, LocalConfig
from bltjax.system.environment import random_key
from bltjax.text.alphabet import BOS, OFFSET
from bltjax.text.ngram_hash import HashConfig
from bltjax.weights.released.hf import port_settings

MEAN_PATCH = 4.49  # bytes
MODEL = BLTConfig(
    local=LocalConfig(encoder_layers=1, decoder_layers=4, width=256, heads=4, hidden=768),
    cross=CrossConfig(slots=2, heads=4, encoder="last", decoder="all"),
    latent=LatentConfig(layers=6, width=512, heads=8, key_value_heads=8, hidden=1536, remat="none"),
    hash=HashConfig(rows=30000),
)


def run_config(rows: int, row_bytes: int) -> RunConfig:
    data = DataConfig(batch_size=rows, seq_len=row_bytes, max_patches=round(row_bytes / MEAN_PATCH))
    return RunConfig(MODEL, data=data, optimizer=OptimizerConfig(), compute_dtype="float32")


def text() -> bytes:
    """English of the standard library."""
    return "".join(topics.values()).encode()


def sample_batch(data: DataConfig) -> PatchBatch:
    """English of the standard library, one document per row, with P patches of random lengths."""
    random = np.random.default_rng(0)
    english = np.frombuffer(text(), np.uint8)
    B, N, P = data.batch_size, data.seq_len, data.max_patches
    begins_B = random.integers(0, len(english) - N, B)
    ids_BN1 = np.stack([english[begin : begin + N + 1] for begin in begins_B]).astype(np.int32)
    ids_BN1 += OFFSET
    ids_BN1[:, 0] = BOS
    starts_BN1 = np.zeros((B, N + 1), bool)
    starts_BN1[:, [0, 1, N]] = True
    for starts_N1 in starts_BN1:
        starts_N1[random.choice(np.arange(2, N), P - 2, replace=False)] = True
    targets_BN, weights_BN = ids_BN1[:, 1:], np.ones((B, N), np.float32)
    return PatchBatch(
        ids_BN1[:, :-1], np.ones((B, N), np.int32), starts_BN1, targets_BN, weights_BN,
        target_bytes_of(targets_BN, weights_BN),
    )  # fmt: skip


def our_step(config: RunConfig, batch=None):
    """() -> its loss: one optimizer step of the real trainer, on the device and back.

    batch: None for `sample_batch`'s.
    """
    from bltjax.training.step import TrainState, make_train_step, run_optimizer

    config = resolved(config, jax.devices()[0])
    model, optimizer = module_of(model_config(config)), run_optimizer(config)
    params = jax.jit(lambda key: initial_params(config.model, key))(random_key(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
    step = jax.jit(make_train_step(config, model, optimizer), donate_argnums=0)
    batch = jax.device_put(sample_batch(config.data) if batch is None else batch)

    def run() -> dict:
        nonlocal state
        state, out = step(state, batch)
        jax.block_until_ready(state)
        return {"loss": float(out["sums"].loss)}

    return run


PRODUCT_SIDE = 2048  # of square matrices: large enough for a CPU's best rate
PRODUCTS = 4  # per step
PRODUCTS_FLOPS = PRODUCTS * 2 * PRODUCT_SIDE**3


def matrix_products():
    """() -> nothing: large products in fp32, whose rate bounds any step on this machine."""
    a, b = jax.random.normal(random_key(0), (2, PRODUCT_SIDE, PRODUCT_SIDE))
    product = jax.jit(jnp.matmul)

    def run() -> dict:
        for _ in range(PRODUCTS):
            jax.block_until_ready(product(a, b))
        return {}

    return run


def peer_libraries() -> tuple:
    """torch and transformers, of the extra `parity`."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f"the peer is not installed ({error}): pip install '.[parity]'") from None
    return torch, transformers


def transformers_step(config: RunConfig, *, fused: bool):
    """The same for `transformers`: eager, sdpa; fused AdamW is its fastest on a CPU."""
    torch, transformers = peer_libraries()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    # Its byte LM is not used: patch lengths are given.
    settings = port_settings(model_config(config), None)
    peer_config = transformers.BltConfig(**settings, attn_implementation="sdpa")
    peer = transformers.BltForCausalLM(peer_config).train()
    trained = [weight for weight in peer.parameters() if weight.requires_grad]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        trained,
        lr=settings.lr,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=fused or None,  # None is torch's default
    )
    batch = sample_batch(config.data)
    ids, targets = (torch.tensor(x).long() for x in (batch.bytes_BN, batch.targets_BN))
    begins = [np.flatnonzero(row) for row in batch.starts_BN1]
    # Its lengths cover the row and not the next byte, which opens a patch: a last length of zero.
    lengths = torch.tensor(np.stack([np.append(np.diff(row), 0) for row in begins]))

    def run() -> dict:
        optimizer.zero_grad(set_to_none=True)
        logits = peer(ids, patch_lengths=lengths, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return {"loss": float(loss.detach())}

    return run
