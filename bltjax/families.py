"""The table of model families: what each can do, and how a config names it.

All differences between families go through `family_of(config)`; no other code looks at a config's
type. A family is one entry here, and one file (or folder) with its settings and its computations.
An ability that a family lacks is None, and `require` gives the reason.
"""

import numpy as np

from bltjax.config.model import ModelConfig, Patching
from bltjax.config.rows import CharacterRows, PairRows
from bltjax.family import Family, flax_forward, flax_init, flax_logits
from bltjax.model import byte_cnn, byte_lm, flops
from bltjax.model.blt.config import BLTConfig
from bltjax.model.blt.decoding import cached_blt
from bltjax.model.blt.model import BLT
from bltjax.model.byte_decoding import cached_bytes
from bltjax.model.loss import Measure
from bltjax.rivals import byt5, llama, mambabyte, megabyte, spacebyte
from bltjax.rivals.canine import model as canine
from bltjax.rivals.decoding.byt5 import cached_byt5
from bltjax.rivals.decoding.llama import cached_llama
from bltjax.rivals.decoding.mambabyte import cached_mambabyte
from bltjax.rivals.decoding.megabyte import cached_megabyte
from bltjax.rivals.decoding.spacebyte import cached_spacebyte

TWO_BN = np.ones((1, 2), np.int32)
THREE_BN1 = np.ones((1, 3), bool)
NO_LATENT = "only a BLT drafts: other models have no latent transformer to spare"
NO_SCORER = "only the entropies of a byte LM or a byte CNN place patches"
NO_PROGRAMS = "programs for a server are written of a BLT, a byte LM or a byte CNN"
NO_SLOTS = "only a BLT has cross-attentions between bytes and slots of patches"
BYTE_MODEL = {"draft": NO_LATENT, "cross_weights": NO_SLOTS}
RIVAL = BYTE_MODEL | {"empty_carry": NO_SCORER, "serving": NO_PROGRAMS}
ENCODES = (
    "a CANINE is an encoder that sees both sides of a character: it has no next byte. `embed` gives"
    " its states, `evaluate` how well it predicts masked characters"
)
READS_FIRST = (
    "a ByT5 writes a text after it has read one: `evaluate` gives its bits, `generate` continues"
    " a prompt"
)
NO_HEAD = (
    "this CANINE has no head for masked characters (canine.predicts is False, as of released"
    " weights): it has no loss to be trained or evaluated by"
)
BYTES, PATCHES = ("bytes_BN", "documents_BN"), ("bytes_BN", "documents_BN", "starts_BN1")


def of_positions(forward, recomputed, paper):
    """The FLOPs of a row of P tokens: in all, recomputed, and by the paper per byte of N."""
    return (
        lambda config, N, P: forward(config, P, P),
        lambda config, N, P: recomputed(config, P, P),
        lambda config, N, P: paper(config, P, P) * P / N,
    )


def byte_lm_module(config, P, dtype, attention):
    return byte_lm.ByteLM(config, dtype, attention)


def byte_cnn_module(config, P, dtype, attention):
    return byte_cnn.ByteCNN(config, dtype)


def pair_rows(config: ModelConfig) -> dict:
    """The rows of a ByT5: windows of a row's bytes."""
    encoder, decoder = byt5.row_sizes(config.model, config.max_bytes)
    made = config.model.objective
    return {
        "pairs": PairRows(config.max_bytes, encoder, decoder, made.kind, made.noise, made.mean_span)
    }


def pair_measure(config: byt5.ByT5Config) -> Measure:
    """Bits of bytes in spans whose both sides are known, or of a text's end after its beginning."""
    spans = config.objective.kind == "spans"
    return Measure("masked-span bits per byte" if spans else "conditional bits per byte")


def character_rows(config: ModelConfig) -> dict:
    """The rows of a CANINE."""
    predicted = config.model.predicted(config.max_bytes)
    sizes = (config.max_bytes, config.max_patches, predicted)
    return {"characters": CharacterRows(*sizes, config.model.rate, config.model.classes)}


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "byte_lm", "byte LM", byte_lm.ByteLMConfig, "bytes", ("max_bytes",),
            byte_lm_module,
            flax_init(byte_lm.ByteLM, TWO_BN, TWO_BN),
            flax_logits(*BYTES),
            flops.byte_lm_forward, flops.byte_lm_recomputed, flops.byte_lm_paper,
            cached_bytes, empty_carry=byte_lm.empty_carry, verbs=BYTE_MODEL,
            forward=flax_forward(byte_lm_module, *BYTES), inputs=BYTES,
        ),
        Family(
            "byte_cnn", "byte CNN", byte_cnn.ByteCNNConfig, "bytes", ("max_bytes",),
            byte_cnn_module,
            flax_init(byte_cnn.ByteCNN, TWO_BN, TWO_BN),
            flax_logits(*BYTES),
            flops.byte_cnn_forward, flops.byte_cnn_recomputed, flops.byte_cnn_paper,
            cached_bytes, entropy_table=byte_cnn.entropy_table, verbs=BYTE_MODEL,
            forward=flax_forward(byte_cnn_module, *BYTES), inputs=BYTES,
        ),
        Family(
            "blt", "BLT", BLTConfig, "patches", ("max_bytes", "max_patches"),
            BLT,
            flax_init(lambda config: BLT(config, 2), TWO_BN, TWO_BN, THREE_BN1),
            flax_logits(*PATCHES),
            flops.blt_forward, flops.blt_recomputed, flops.blt_paper,
            cached_blt, forward=flax_forward(BLT, *PATCHES), inputs=PATCHES,
        ),
        Family(
            "llama", "Llama", llama.LlamaConfig, "tokens", ("max_bytes", "max_patches"),
            lambda config, P, dtype, attention: llama.Llama(config, dtype, attention),
            flax_init(llama.Llama, TWO_BN, TWO_BN),
            flax_logits("tokens_BN", "documents_BN"),
            *of_positions(
                llama.forward_flops, llama.recomputed_flops, llama.paper_flops
            ),
            cached_llama, verbs=RIVAL,
            forward=llama.forward, inputs=llama.FORWARD_INPUTS,
        ),
        Family(
            "megabyte", "MegaByte", megabyte.MegaByteConfig, "bytes", ("max_bytes", "max_patches"),
            megabyte.MegaByte,
            flax_init(lambda config: megabyte.MegaByte(config, 2), TWO_BN, TWO_BN),
            flax_logits(*BYTES),
            megabyte.forward_flops, megabyte.recomputed_flops, megabyte.paper_flops,
            cached_megabyte, verbs=RIVAL,
            row_settings=lambda config: {"grid": config.model.patch_bytes},
            forward=megabyte.forward, inputs=megabyte.FORWARD_INPUTS,
        ),
        Family(
            "spacebyte", "SpaceByte", spacebyte.SpaceByteConfig, "patches",
            ("max_bytes", "max_patches"),
            spacebyte.SpaceByte,
            flax_init(lambda config: spacebyte.SpaceByte(config, 2), TWO_BN, TWO_BN, THREE_BN1),
            flax_logits(*PATCHES),
            spacebyte.forward_flops, spacebyte.recomputed_flops, spacebyte.paper_flops,
            cached_spacebyte, verbs=RIVAL, own_patching=Patching("space"),
            forward=spacebyte.forward, inputs=spacebyte.FORWARD_INPUTS,
        ),
        Family(
            "mambabyte", "MambaByte", mambabyte.MambaByteConfig, "bytes", ("max_bytes",),
            lambda config, P, dtype, attention: mambabyte.MambaByte(config, dtype, attention),
            flax_init(mambabyte.MambaByte, TWO_BN, TWO_BN),
            flax_logits(*BYTES),
            mambabyte.forward_flops, mambabyte.recomputed_flops, mambabyte.paper_flops,
            cached_mambabyte, verbs=RIVAL,
            forward=mambabyte.forward, inputs=mambabyte.FORWARD_INPUTS,
        ),
        Family(
            "canine", "CANINE", canine.CanineConfig, "characters", ("max_bytes", "max_patches"),
            canine.Canine,
            flax_init(lambda config: canine.Canine(config, 2), TWO_BN, TWO_BN),
            canine.masked_logits,
            canine.forward_flops, canine.recomputed_flops, canine.paper_flops,
            verbs=RIVAL | {
                "decoding": "a CANINE is an encoder: it writes no text",
                "causal": ENCODES,
            },
            row_settings=character_rows, causal=False, embed=canine.embedded_documents,
            measure=lambda config: Measure("bits per masked character", True, "masked accuracy"),
            unscored=lambda config: "" if config.predicts else NO_HEAD,
            forward=canine.forward, inputs=canine.FORWARD_INPUTS,
        ),
        Family(
            "byt5", "ByT5", byt5.ByT5Config, "pairs", ("max_bytes",),
            lambda config, P, dtype, attention: byt5.ByT5(config, dtype, attention),
            flax_init(byt5.ByT5, TWO_BN, TWO_BN, TWO_BN, TWO_BN),
            flax_logits("encoder_bytes_BT", "encoder_documents_BT", "bytes_BN", "documents_BN"),
            byt5.forward_flops, byt5.recomputed_flops, byt5.paper_flops,
            cached_byt5, verbs=RIVAL | {"causal": READS_FIRST},
            row_settings=pair_rows, causal=False, measure=pair_measure,
            forward=byt5.forward, inputs=byt5.FORWARD_INPUTS,
        ),
    )
}  # fmt: skip


def groups() -> dict[str, type]:
    """The settings class of each family, by the config group that names it."""
    return {name: family.Config for name, family in FAMILIES.items()}


def family_of(config) -> Family:
    """The family of a ModelConfig, a RunConfig, or a family's own settings."""
    return FAMILIES[getattr(config, "model", config).group]
