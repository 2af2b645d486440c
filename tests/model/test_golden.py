"""Vectors from the reference implementation, loaded by parameter name: 2e-5 in fp32 throughout."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.model.blt.config import BLTConfig, CrossConfig, LatentConfig, LocalConfig
from bltjax.model.blt.model import BLT
from bltjax.model.byte_lm import ByteLM, ByteLMConfig, entropies_of
from bltjax.text.alphabet import EOS
from bltjax.text.ngram_hash import HashConfig, hash_ids

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("by_tiles")]

GOLDEN = Path(__file__).parents[1] / "golden"
META = json.loads((GOLDEN / "meta.json").read_text())
TOLERANCE = 2e-5


def arrays(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def weights_of(golden):
    return {k.removeprefix("param/"): v for k, v in golden.items() if k.startswith("param/")}


def block_weights(w, prefix, heads, letters="EG", stacked=""):
    """One reference block (out, in) as ours, named by shape."""
    width, head = letters
    attention, ffn = f"{prefix}.attention", f"{prefix}.feed_forward"

    def into_heads(name):
        return w[f"{attention}.{name}.weight"].T.reshape(
            -1, heads, w[f"{attention}.{name}.weight"].shape[0] // heads
        )

    shared = "J" if letters == "DH" else head
    L = stacked
    return {
        f"attention_norm_{L}{width}": w[f"{prefix}.attention_norm.weight"],
        f"q_{L}{width}{head}C": into_heads("wq"),
        f"k_{L}{width}{shared}C": into_heads("wk"),
        f"v_{L}{width}{shared}C": into_heads("wv"),
        f"o_{L}{head}C{width}": w[f"{attention}.wo.weight"].T.reshape(
            heads, -1, w[f"{attention}.wo.weight"].shape[0]
        ),
        f"feed_forward_norm_{L}{width}": w[f"{prefix}.ffn_norm.weight"],
        f"gate_{L}{width}F": w[f"{ffn}.w1.weight"].T,
        f"up_{L}{width}F": w[f"{ffn}.w3.weight"].T,
        f"down_{L}F{width}": w[f"{ffn}.w2.weight"].T,
    }


def cross_weights(w, prefix, heads):
    width = w[f"{prefix}.wq.weight"].shape[0]

    def into_heads(name):
        return w[f"{prefix}.{name}.weight"].T.reshape(width, heads, width // heads)

    return {
        "norm_q_E": w[f"{prefix}.cross_attn_norm_q.weight"],
        "norm_kv_E": w[f"{prefix}.cross_attn_norm_kv.weight"],
        "q_EGC": into_heads("wq"),
        "k_EGC": into_heads("wk"),
        "v_EGC": into_heads("wv"),
        "o_GCE": w[f"{prefix}.wo.weight"].T.reshape(heads, width // heads, width),
    }


def blt_weights(w, config: BLTConfig):
    local, cross, latent, hashed = config.local, config.cross, config.latent, config.hash
    E, K, D = local.width, cross.slots, latent.width
    tables = [w[f"encoder_hash_tok_embedding.{i}.weight"] for i in range(hashed.tables)]
    pad = hashed.stored_rows - hashed.rows
    layers = [
        block_weights(w, f"global_transformer.layers.{i}", latent.heads, "DH", "L")
        for i in range(latent.layers)
    ]
    return {
        "encoder": {
            "bytes_VE": w["local_encoder.tok_embeddings.weight"],
            "ngrams_RME": np.stack([np.pad(table, ((0, pad), (0, 0))) for table in tables]),
            "pool_EKE": w["local_encoder.patch_embedding_projection.weight"].T.reshape(E, K, E),
            "cross_0": cross_weights(w, "local_encoder.cross_attn_layers.0", cross.heads),
            **{
                f"block_{i}": block_weights(w, f"local_encoder.layers.{i}", local.heads)
                for i in range(local.encoder_layers)
            },
        },
        "latent": {
            "widen_KED": w["global_transformer.token_embedding_projection.weight"].T.reshape(
                K, E, D
            ),
            "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
        },
        "decoder": {
            "narrow_DKE": w["local_decoder.patch_embedding_projection.weight"].T.reshape(D, K, E),
            "norm_E": w["local_decoder.norm.weight"],
            "head_EV": w["local_decoder.output.weight"].T,
            **{
                f"block_{i}": block_weights(w, f"local_decoder.layers.{i}", local.heads)
                for i in range(local.decoder_layers)
            },
            **{
                f"cross_{i}": cross_weights(w, f"local_decoder.cross_attn_layers.{i}", cross.heads)
                for i in range(local.decoder_layers)
            },
        },
    }


def starts_from_lengths(lengths_BP, length):
    starts_BN1 = np.zeros((len(lengths_BP), length + 1), bool)
    for row, lengths in enumerate(lengths_BP):
        begins = np.concatenate([[0], np.cumsum(lengths)])[:-1][np.asarray(lengths) > 0]
        starts_BN1[row, begins] = True
    return starts_BN1


def eos_documents(x_BN):
    ended = np.cumsum(x_BN == EOS, axis=1)
    return np.concatenate([np.zeros((len(x_BN), 1), int), ended[:, :-1]], axis=1) + 1


@pytest.mark.parametrize("implementation", ["dense", "xla"])
@pytest.mark.parametrize("name", ["causal", "blocklocal"])
def test_blt(name, implementation):
    golden, args = arrays(f"blt_{name}"), META[name]["args"]
    x_BN = golden["x"]
    length = x_BN.shape[1]
    config = BLTConfig(
        LocalConfig(
            encoder_layers=2,
            decoder_layers=2,
            width=32,
            heads=4,
            hidden=96,
            # The `causal` set has plain causal masks: a window as long as the row, one document.
            window=args["local_attention_window_len"] if name == "blocklocal" else length,
            rope_theta=args["rope_theta"],
        ),
        CrossConfig(slots=2, heads=2, encoder="last", decoder="all"),
        LatentConfig(layers=2, width=48, heads=4, key_value_heads=4, hidden=128, remat="none"),
        HashConfig(
            sizes=tuple(args["encoder_hash_byte_group_size"]),
            functions=args["encoder_hash_byte_group_nb_functions"],
            rows=args["encoder_hash_byte_group_vocab"],
            crosses_documents=True,
        ),
    )
    documents_BN = eos_documents(x_BN) if name == "blocklocal" else np.ones_like(x_BN)
    patches = golden["patch_lengths"].shape[1]
    params = blt_weights(weights_of(golden), config)
    model = BLT(config, row_patches=patches, implementation=implementation)
    logits_BNV, out = jax.jit(model.apply)(
        {"params": params},
        jnp.asarray(x_BN, jnp.int32),
        jnp.asarray(documents_BN, jnp.int32),
        jnp.asarray(starts_from_lengths(golden["patch_lengths"], length)),
    )
    found = out["patches"]
    assert (found.patch_of_BN == golden["enc_patch_ids"]).all()
    assert (found.read_ranges.start_BQ == golden["dec_patch_ids"]).all()
    close = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)  # noqa: E731
    close(out["embeds_BNE"], golden["act/embeds"])
    close(out["states_BNE"], golden["act/h_encoder"])
    close(out["slots_BSE"], golden["act/h_cross"])
    # The reference lets patches without bytes attend to others; their results are not used.
    filled_BP = np.asarray(found.pool_ranges.end_BQ > found.pool_ranges.start_BQ)
    close(np.asarray(out["latent_BPD"])[filled_BP], golden["act/global_out"][filled_BP])
    close(logits_BNV, golden["logits"])
    assert logits_BNV.argmax(-1).tolist() == META[name]["argmax"]


@pytest.mark.parametrize("name", ["causal", "blocklocal"])
def test_hash_ids(name):
    golden = arrays(f"blt_{name}")
    config = HashConfig(sizes=(3, 4, 8), functions=2, rows=97, crosses_documents=True)
    assert (hash_ids(config, jnp.asarray(golden["x"], jnp.int32)) == golden["hash_ids"]).all()


@pytest.mark.parametrize("implementation", ["dense", "xla"])
def test_byte_lm(implementation):
    golden = arrays("entropy_lm")
    w = weights_of(golden)
    config = ByteLMConfig(layers=2, width=32, heads=4, hidden=96, window=6)
    params = {
        "bytes_VE": w["tok_embeddings.weight"],
        "norm_E": w["norm.weight"],
        "head_EV": w["output.weight"].T,
        **{f"block_{i}": block_weights(w, f"layers.{i}", config.heads) for i in range(2)},
    }
    x_BN = jnp.asarray(golden["x"], jnp.int32)
    documents_BN = jnp.asarray(eos_documents(golden["x"]), jnp.int32)
    model = ByteLM(config, implementation=implementation)
    logits_BNV, _ = jax.jit(model.apply)({"params": params}, x_BN, documents_BN)
    np.testing.assert_allclose(logits_BNV, golden["logits"], atol=TOLERANCE, rtol=0)
    entropies_BN = np.asarray(entropies_of(logits_BNV))
    np.testing.assert_allclose(entropies_BN, golden["entropies"], atol=TOLERANCE, rtol=0)
