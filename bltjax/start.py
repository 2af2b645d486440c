"""What a run begins with: its byte LM, its tokenizer, its first parameters."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from bltjax import checkpoint as ckpt
from bltjax.config import PatchingConfig, RunConfig, differences
from bltjax.export import TOKENIZER, load_params, read_config
from bltjax.scoring import EntropyModel, load_entropy_model
from bltjax.weights.llama import llama_leaves


def entropy_model(config: RunConfig, workdir: Path) -> EntropyModel | None:
    """The byte LM that scored a BLT's data; None for runs that don't place patches by entropy.

    A resumed run takes its own copy.
    """
    if config.blt is None or config.patching.mode != "entropy":
        return None
    if not config.entropy_model:
        raise ValueError(
            "entropy patching needs the byte LM that scored the data:"
            " --config.entropy_model=WORKDIR of its training run"
        )
    resumed = bool(ckpt.saved_steps(workdir))
    source = workdir / "byte_lm" if resumed else config.entropy_model
    return load_entropy_model(source, newline_reset=config.patching.newline_reset)


def check_start(config: RunConfig) -> None:
    """Raises ValueError if the weights that training is to begin with don't fit its model."""
    if config.latent_init.path:
        llama_leaves(epath.Path(config.latent_init.path), config.blt.latent)
    if config.init_from:
        models = (read_config(config.init_from).model, config.model)
        lines = differences(*(dataclasses.asdict(model) for model in models))
        lines = [line for line in lines if "remat" not in line]  # memory, not meaning
        if lines:
            raise ValueError(
                f"{config.init_from} holds a model with other settings (its value -> yours):\n  "
                + "\n  ".join(lines)
            )


def started(config: RunConfig, params, shardings):
    """Fresh parameters, replaced by those that training is to begin with, if any are given."""
    if config.init_from:
        loaded = load_params(config.init_from, shardings, jnp.float32)
        print(f"begins with the parameters of {config.init_from}, step {loaded.step}")
        return loaded.params
    if not config.latent_init.path:
        return params
    leaves = llama_leaves(epath.Path(config.latent_init.path), config.blt.latent)
    blocks = params["latent"].pop("blocks")  # freed before the others come
    for name in blocks:
        blocks[name] = placed(leaves[f"latent/blocks/{name}"], shardings["latent"]["blocks"][name])
    params["latent"]["blocks"] = blocks
    print(
        f"the latent transformer begins as {config.latent_init.path}: its learning rate is"
        f" {config.latent_init.lr_multiplier} of the others', from step"
        f" {config.latent_init.frozen_steps} on"
    )
    return params


def placed(leaf, sharding):
    """A stored leaf of stacked layers as a float32 array; a process reads what its devices hold."""

    def part(index):
        layers = range(leaf.shape[0])[index[0]]
        rows = slice(*index[1].indices(leaf.shape[1]))
        found = [leaf.read((layer,), rows)[(slice(None), *index[2:])] for layer in layers]
        return np.stack(found).astype(np.float32)

    return jax.make_array_from_callback(leaf.shape, sharding, part)


def placed_patches(config: RunConfig, workdir: Path) -> PatchingConfig | None:
    """How a BLT's patches are placed; None for a byte LM.

    A resumed run takes its own copy of a tokenizer, whatever has become of the original.
    """
    if config.blt is None:
        return None
    if config.patching.mode != "bpe" or not ckpt.saved_steps(workdir):
        return config.patching
    return dataclasses.replace(config.patching, tokenizer=str(workdir / TOKENIZER))
