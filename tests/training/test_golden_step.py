"""Two AdamW steps on the golden weights: fifteen scalars, by the trainer's own step.

They cover what no forward pass does: the loss and its mask, gradients by part, clipping, decay,
Adam's moments, warm-up and the guard of bad batches. The numbers are this code's own, computed in
float32. They may change only in a commit that means to change training, whose message says why;
then run this file as a program for the new ones:

    PYTHONPATH=.:tests/model python tests/training/test_golden_step.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_golden import META, arrays, blt_weights, eos_documents, starts_from_lengths, weights_of

from bltjax.config.data import DataConfig
from bltjax.config.run import OptimizerConfig, RunConfig
from bltjax.configured import model_config, module_of
from bltjax.data.batches import PatchBatch, target_bytes_of
from bltjax.model.blt.config import BLTConfig, CrossConfig, LatentConfig, LocalConfig
from bltjax.model.loss import Sums
from bltjax.text.alphabet import BOS, EOS
from bltjax.text.ngram_hash import HashConfig
from bltjax.training.step import TrainState, make_train_step, run_optimizer

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("by_tiles")]

EXPECTED = {
    "loss": 6.045744,
    "bits per byte": 8.714339,
    "gradient norm": 2.152117,
    "gradient norm of decoder": 1.264934,
    "gradient norm of encoder": 1.590038,
    "gradient norm of hash_tables": 0.3759323,
    "gradient norm of latent": 0.6016694,
    "update norm of decoder": 0.5395586,
    "update norm of encoder": 0.4578513,
    "update norm of hash_tables": 0.189722,
    "update norm of latent": 0.6045571,
    "loss after a step": 5.176503,
    "gradient norm after a step": 1.887637,
    "mean loss of both": 5.611124,
    "distance after two steps": 2.499583,
}


def golden_batch(golden) -> tuple[PatchBatch, int]:
    """The golden rows as a batch of training, and their patches per row."""
    x_BN, length = golden["x"].astype(np.int32), golden["x"].shape[1]
    targets_BN = np.roll(x_BN, -1, axis=1)
    weights_BN = (targets_BN != BOS).astype(np.float32)
    weights_BN[:, -1] = 0  # the last byte's target lies in no row
    weights_BN[:, :-1] *= x_BN[:, :-1] != EOS  # and EOS is the last of its document
    batch = PatchBatch(
        x_BN,
        eos_documents(golden["x"]).astype(np.int32),
        starts_from_lengths(golden["patch_lengths"], length),
        targets_BN,
        weights_BN,
        target_bytes_of(targets_BN, weights_BN),
    )
    return batch, golden["patch_lengths"].shape[1]


def two_steps() -> dict[str, float]:
    golden, args = arrays("blt_blocklocal"), META["blocklocal"]["args"]
    batch, patches = golden_batch(golden)
    rows, length = golden["x"].shape
    config = RunConfig(
        BLTConfig(
            LocalConfig(
                encoder_layers=2,
                decoder_layers=2,
                width=32,
                heads=4,
                hidden=96,
                window=args["local_attention_window_len"],
                rope_theta=args["rope_theta"],
            ),
            CrossConfig(slots=2, heads=2, encoder="last", decoder="all"),
            LatentConfig(layers=2, width=48, heads=4, key_value_heads=4, hidden=128),
            HashConfig(
                sizes=tuple(args["encoder_hash_byte_group_size"]),
                functions=args["encoder_hash_byte_group_nb_functions"],
                rows=args["encoder_hash_byte_group_vocab"],
                crosses_documents=True,
            ),
        ),
        data=DataConfig(batch_size=rows, seq_len=length, max_patches=patches),
        optimizer=OptimizerConfig(steps=10, lr=1e-2, warmup_steps=4, weight_decay=0.1, clip=0.5),
        compute_dtype="float32",
        attention="xla",
    )
    params = jax.tree.map(jnp.asarray, blt_weights(weights_of(golden), config.model))
    before, optimizer = params, run_optimizer(config)
    step = jax.jit(make_train_step(config, module_of(model_config(config)), optimizer))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    state, first = step(state, batch)
    state, second = step(state, batch)
    sums = Sums(*first["sums"])
    moved = jax.tree.map(lambda new, old: jnp.sum(jnp.square(new - old)), state.params, before)
    found = {
        "loss": sums.nats / sums.weight,
        "bits per byte": sums.text_nats / sums.text_bytes / np.log(2),
        "gradient norm": first["gradient_norm"],
        **{f"gradient norm of {part}": norm for part, norm in first["gradient_norms"].items()},
        **{f"update norm of {part}": norm for part, norm in first["update_norms"].items()},
        "loss after a step": Sums(*second["sums"]).nats / sums.weight,
        "gradient norm after a step": second["gradient_norm"],
        "mean loss of both": second["guard"]["mean_loss"],
        "distance after two steps": jnp.sqrt(sum(jax.tree.leaves(moved))),
    }
    return {name: float(value) for name, value in found.items()}


def test_golden_step():
    found = two_steps()
    assert len(EXPECTED) == 15 and found.keys() == EXPECTED.keys()
    for name, expected in EXPECTED.items():
        assert found[name] == pytest.approx(expected, rel=2e-5), (
            f"{name} is {found[name]!r}, was {expected!r}: training has changed. If that was meant,"
            " say why in the commit and take the new numbers:"
            " PYTHONPATH=.:tests/model python tests/training/test_golden_step.py"
        )


if __name__ == "__main__":
    for name, value in two_steps().items():
        print(f'    "{name}": {value:.7g},')
