"""The rivals' models that `benchmark train --model` times, near the BLT's FLOPs per byte."""

import numpy as np

from bltjax.config.data import DataConfig
from bltjax.config.run import OptimizerConfig, RunConfig
from bltjax.configured import model_config, rows_of
from bltjax.data.batches import Batch, TokenBatch, make_batch
from bltjax.data.pipeline import held_out_batches
from bltjax.data.records import Document
from bltjax.model.byte_lm import ByteLMConfig
from bltjax.rivals.byt5 import ByT5Config
from bltjax.rivals.canine.model import CanineConfig
from bltjax.rivals.llama import LlamaConfig
from bltjax.rivals.mambabyte import MambaByteConfig
from bltjax.rivals.megabyte import MegaByteConfig
from bltjax.rivals.spacebyte import SpaceByteConfig

TOKEN_BYTES = 4.16  # of 8,000 tokens of English
WORD_BYTES = 4.5  # of a SpaceByte's slots
# By family: its model, and the slots of a row of so many bytes.
MODELS = {
    "byte_lm": (ByteLMConfig(layers=14, width=256, heads=4, hidden=768), lambda N: N),
    "llama": (
        LlamaConfig(
            layers=5, width=768, heads=12, key_value_heads=12, hidden=2048, vocabulary=8000
        ),
        lambda N: 64 * -(-N // round(64 * TOKEN_BYTES)),
    ),
    "megabyte": (
        MegaByteConfig(
            patch_bytes=8, context=65536, global_layers=4, global_width=1024, global_heads=16,
            local_layers=5, local_width=256, local_heads=4,
        ),
        lambda N: N // 8 + 1,
    ),
    "spacebyte": (
        SpaceByteConfig(
            window=512, context=65536, global_context=16384, initial_layers=3, local_layers=6,
            local_width=256, local_heads=4, global_layers=8, global_width=512, global_heads=8,
        ),
        lambda N: round(N / WORD_BYTES),
    ),
    "mambabyte": (MambaByteConfig(layers=11, width=384), lambda N: N),
    "byt5": (
        ByT5Config(
            encoder_layers=4, decoder_layers=2, width=512, heads=6, channels=64, hidden=1024
        ),
        lambda N: N,
    ),
    "canine": (
        CanineConfig(layers=4, width=512, heads=8, hidden=2048, context=65536),
        lambda N: N // 4,
    ),
}  # fmt: skip


def rival_config(name: str, rows: int, row_bytes: int) -> RunConfig:
    """A run of a rival, with rows of so many bytes of text."""
    model, slots = MODELS[name]
    data = DataConfig(batch_size=rows, seq_len=row_bytes, max_patches=slots(row_bytes))
    return RunConfig(model, data=data, optimizer=OptimizerConfig(), compute_dtype="float32")


def rival_batch(config: RunConfig, text: bytes) -> Batch:
    """A full batch: one document per row of a text; of tokens, random ones, which take as long."""
    data, rows = config.data, rows_of(model_config(config))
    if rows.kind == "tokens":
        sizes = rows.sizes(data.seq_len, data.max_patches)
        batch: TokenBatch = make_batch("tokens", data.batch_size, sizes, np.ones)
        ids = np.random.default_rng(0).integers(0, config.model.vocabulary, batch.tokens_BN.shape)
        return batch._replace(tokens_BN=ids.astype(np.int32))
    bytes_N = np.frombuffer(text, np.uint8)
    begins = range(0, len(bytes_N) - data.seq_len, data.seq_len)
    documents = [Document(bytes_N[begin : begin + data.seq_len]) for begin in begins]
    batches, _ = held_out_batches(documents[: 4 * data.batch_size], data, rows)
    return batches[0]
