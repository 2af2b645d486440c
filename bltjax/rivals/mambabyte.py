"""MambaByte (arXiv 2401.13660): a stack of selective scans over bytes; no patches, no attention.

    bytes --embedding--> x --layers (mamba_block.py)--> x --norm, head--> logits

Its state is of constant size, whatever the length of the text, and restarts at every document.
"""

import dataclasses
import math
import typing

import jax.numpy as jnp
from flax import linen as nn

from bltjax.config.fields import MAY_CHANGE, one_of, positive, setting, within
from bltjax.config.model import REMAT, ModelConfig
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.blt.latent_transformer import unscanned
from bltjax.model.layers import embedded, project, rematerialised
from bltjax.rivals.mamba_block import MambaBlock, Places, normed, places_of, uniform
from bltjax.scan import OUTCOME
from bltjax.text.alphabet import ALPHABETS
from bltjax.text.segments import index_like

FORWARD_INPUTS = ("tokens", "next_token")


@dataclasses.dataclass(frozen=True)
class MambaByteConfig:
    """A MambaByte; the defaults are the paper's 353M."""

    group: typing.ClassVar[str] = "mambabyte"

    layers: int = 53
    width: int = 1024  # D
    expand: int = 2  # I / D
    states: int = 16  # U, of each inner channel
    taps: int = 4  # A, of the convolution
    step_rank: int = 0  # Z; 0: a sixteenth of the width, rounded up
    norm: str = "rms"  # or "layer", with a bias
    tied: bool = True  # whether the head is the embedding
    norm_eps: float = 1e-5
    alphabet: str = "blt"  # a key of ALPHABETS
    remat: str = setting("none", resume=MAY_CHANGE)  # one of REMAT

    def __post_init__(self):
        positive(self, "layers", "width", "expand", "states", "taps", "norm_eps")
        within(self, "[0, inf)", "step_rank")
        one_of("mambabyte.norm", self.norm, ("rms", "layer"))
        one_of("mambabyte.alphabet", self.alphabet, tuple(ALPHABETS))
        one_of("mambabyte.remat", self.remat, REMAT)

    @property
    def inner(self) -> int:
        """Channels of the scan."""
        return self.expand * self.width

    @property
    def rank(self) -> int:
        """Rank of the step's projection."""
        return self.step_rank or math.ceil(self.width / 16)

    @property
    def vocabulary(self) -> int:
        return ALPHABETS[self.alphabet].size

    @property
    def split_by_tensor(self) -> dict[str, int]:
        """Sizes that must be divisible by a mesh's `tensor`, by the names of their settings."""
        return {"mambabyte.expand x mambabyte.width": self.inner}

    def summary(self) -> str:
        """The sizes, in one line."""
        return (
            f"{self.layers} layers of {self.width}, {self.inner} channels of {self.states} states"
        )

    def layers_in_arrays(self, stacked: bool) -> int:
        """The most layers with arrays of their own: none if they are stacked."""
        return 0 if stacked else self.layers


def scan_implementation(attention: str | None) -> str | None:
    """The scan's implementation for a setting of attention; there are no kernels for GPUs yet."""
    return "xla" if attention is not None and attention.startswith("pallas_gpu") else attention


class MambaByte(nn.Module):
    config: MambaByteConfig
    dtype: typing.Any = jnp.float32
    implementation: str | None = None  # of attention; see `scan_implementation`
    scanned: bool = True  # False: a plain loop over layers whose parameters are apart

    @nn.compact
    def stack(self, bytes_BN, places: Places, past=None):
        config = self.config
        V, D = config.vocabulary, config.width
        block = rematerialised(config.remat, scanned=self.scanned, block=MambaBlock, kept=OUTCOME)
        parts = (config, self.dtype, scan_implementation(self.implementation))
        stored = self.param("bytes_VD", nn.initializers.normal(0.02), (V, D))
        bytes_VD = gathered(stored, "bytes_VD", self.dtype)
        x = constrained(embedded(bytes_VD, bytes_BN).astype(jnp.float32), "x_BND")
        if self.scanned:
            blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=config.layers,
            )(*parts, "L", name="blocks")
            x, (states, past) = blocks(x, places, past)
        else:
            states, new = [], []
            for i in range(config.layers):
                of_layer = None if past is None else past[i]
                x, (state, after) = block(*parts, name=f"block_{i}")(x, places, of_layer)
                states.append(state)
                new.append(after)
            past = new
        x = normed(self, x, "D")
        y = x.astype(self.dtype)
        if config.tied:
            logits = project(y, bytes_VD.T)
        else:
            stored = self.param("head_DV", uniform(D), (D, V))
            logits = project(y, gathered(stored, "head_DV", self.dtype))
        logits = constrained(logits.astype(jnp.float32), "logits_BNV")
        return logits, {"states": states, "last": x, "past": past}

    def __call__(self, bytes_BN, documents_BN):
        """Logits, float32 [B, N, V], of the byte after each byte, and a dict: x after each
        layer (`states`) and after the final norm (`last`), and each layer's `past` after the row
        (lists, or stacked if the layers are scanned)."""
        return self.stack(bytes_BN, places_of(documents_BN))

    def step(self, bytes_BQ, count_B, past):
        """Logits [B, Q, V] of the positions from `count` on, and each layer's new state."""
        places = Places(
            count_B[:, None] + index_like(bytes_BQ), jnp.ones(bytes_BQ.shape, jnp.bool_)
        )
        logits, out = self.stack(bytes_BQ, places, past)
        return logits, out["past"]


def layer_flops(config: MambaByteConfig) -> dict[str, int]:
    """FLOPs of a position in a layer, forward: two per multiply-add, of which the scan has three
    per state."""
    D, I, U, Z = config.width, config.inner, config.states, config.rank
    return {
        "in": 4 * D * I, "taps": 2 * config.taps * I, "narrow": 2 * I * (Z + 2 * U),
        "step": 2 * Z * I, "scan": 6 * I * U, "out": 2 * I * D,
    }  # fmt: skip


def forward_flops(config: MambaByteConfig, N: int, P: int) -> int:
    """FLOPs of one row of N bytes, forward."""
    layer = sum(layer_flops(config).values())
    return N * (config.layers * layer + 2 * config.width * config.vocabulary)


def recomputed_flops(config: MambaByteConfig, N: int, P: int) -> int:
    """FLOPs of one row that the backward pass recomputes: the convolution, and the states without
    their outputs; by "full", before these, all but the last product."""
    layer = layer_flops(config)
    again = layer["taps"] + 4 * config.inner * config.states
    if config.remat == "full":
        again += sum(layer.values()) - layer["out"]
    return N * config.layers * again


def paper_flops(config: MambaByteConfig, N: int, P: int) -> float:
    """FLOPs of one byte, forward; the published figures are those of our count."""
    return forward_flops(config, N, P) / N


def forward(config: ModelConfig, params, arrays: dict, dtype, implementation: str | None) -> dict:
    """The public implementation's outputs for `tokens` [B, N], one document per row.

    Returns logits, hidden_states [B, L + 1, N, D] (after each layer, and the last one normed), and
    each layer's newest inputs of the convolution, conv_state [B, L, I, A], and states, ssm_state
    [B, L, I, U]; with `next_token` [B], next_logits of one cached step.
    """
    tokens = arrays["tokens"]
    model = MambaByte(config.model, dtype, implementation, scanned=False)
    variables = {"params": unscanned(params)}
    logits, out = model.apply(variables, tokens, jnp.ones_like(tokens))
    hidden = [*out["states"], out["last"]]
    found = {"logits": logits, "hidden_states": jnp.stack(hidden, axis=1)}
    past = out["past"]
    if "next_token" in arrays:
        count_B = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        token_B1 = arrays["next_token"][:, None]
        next_logits, _ = model.apply(variables, token_B1, count_B, past, method="step")
        found["next_logits"] = next_logits[:, 0]
    found["conv_state"] = jnp.stack([x.values_BAI.swapaxes(1, 2) for x in past], axis=1)
    found["ssm_state"] = jnp.stack([x.state_BIU for x in past], axis=1)
    return found
