"""MambaByte (arXiv 2401.13660): a stack of selective scans over bytes; no patches, no attention.

    x --norm--> value, gate
                value --convolution of 4, silu--> v --> step, in, out
                          v --selective scan--> y;  (y + skip v) silu(gate) --project--> x +

The state of a layer is its last inputs of the convolution and the scan's h [I, U], whatever the
length of the text. Both begin with zeros at every document. The residual x, the step, the scan and
norms are fp32; projections, v and the gate are in `dtype`.
"""

import dataclasses
import math
import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bltjax.config.fields import MAY_CHANGE, one_of, positive, setting, within
from bltjax.config.model import REMAT, ModelConfig
from bltjax.distributed.sharding import constrained, gathered, gathers
from bltjax.model.blt.latent_transformer import unscanned
from bltjax.model.byte_decoding import slice_rows
from bltjax.model.layers import all_but_weights, embedded, project, rms_norm
from bltjax.rivals.norms import layer_norm
from bltjax.scan import OUTCOME, selective_scan
from bltjax.text.alphabet import ALPHABETS
from bltjax.text.segments import document_begins, index_like

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


class Places(NamedTuple):
    """The place of each position in its document, and the real ones; padding counts as one."""

    index_BN: jax.Array
    real_BN: jax.Array


class Past(NamedTuple):
    """The state of a layer between two positions of a document."""

    values_BAI: jax.Array  # the newest inputs of the convolution, the last one newest
    state_BIU: jax.Array


def places_of(documents_BN) -> Places:
    return Places(index_like(documents_BN) - document_begins(documents_BN), documents_BN > 0)


def scan_implementation(attention: str | None) -> str | None:
    """The scan's implementation for a setting of attention; there are no kernels for GPUs yet."""
    return "xla" if attention is not None and attention.startswith("pallas_gpu") else attention


def uniform(fan_in: int, scale: float = 1.0):
    """Uniform on +-scale / sqrt(fan in), as torch initialises a linear layer."""
    bound = scale * fan_in**-0.5
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def initial_step_bias(key, shape):
    """The inverse softplus of steps that are log-uniform from 0.001 to 0.1."""
    step = jnp.exp(jax.random.uniform(key, shape, minval=math.log(1e-3), maxval=math.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))


def initial_log_rates(key, shape):
    """log(1), log(2), ... of the states of each channel."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape)


def normed(module: nn.Module, x, suffix: str):
    """x after the norm of the module's config, whose scale is `norm_` + suffix."""
    config, shape = module.config, x.shape[-1:]
    scale = module.param(f"norm_{suffix}", nn.initializers.ones, shape)
    if config.norm == "rms":
        return rms_norm(x, scale, config.norm_eps)
    bias = module.param(f"norm_bias_{suffix}", nn.initializers.zeros, shape)
    return layer_norm(x, scale, config.norm_eps, bias)


class MambaBlock(nn.Module):
    """x + mixer(norm(x)), of one layer."""

    config: MambaByteConfig
    dtype: typing.Any
    implementation: str | None
    stacked: str = ""  # "L" when parameters of all layers are stacked along a first axis

    @nn.compact
    def __call__(self, x_BND, places: Places, past: Past | None = None):
        """x, float32 [B, N, D], after the layer, and (x, Past) for probing and decoding.

        past: of the row's one document, whose positions go on.
        """
        config, L, fp32 = self.config, self.stacked, jnp.float32
        D, I, U, A, Z = config.width, config.inner, config.states, config.taps, config.rank

        def weight(name, shape, init, dtype=self.dtype):
            noun, _, letters = name.rpartition("_")
            stored = self.param(f"{noun}_{L}{letters}", init, shape)
            return gathered(stored, name, dtype)  # inside the scan it has lost its L

        y = normed(self, x_BND, f"{L}D").astype(self.dtype)
        value = constrained(project(y, weight("value_DI", (D, I), uniform(D))), "value_BNI")
        gate = constrained(project(y, weight("gate_DI", (D, I), uniform(D))), "gate_BNI")

        # Tap a looks A - 1 - a positions back, and sees zeros before the document.
        if past is None:
            before = jnp.zeros((value.shape[0], A - 1, I), value.dtype)
        else:
            before = past.values_BAI[:, 1:].astype(value.dtype)
        value = jnp.concatenate([before, value], axis=1)
        taps_AI = weight("taps_AI", (A, I), uniform(A), fp32)
        total = jnp.broadcast_to(weight("taps_bias_I", (I,), uniform(A), fp32), gate.shape)
        for a in range(A):
            seen = (places.index_BN >= A - 1 - a)[..., None]
            tap = jnp.broadcast_to(taps_AI[a], gate.shape)
            total += jnp.where(seen, value[:, a : a + gate.shape[1]] * tap, 0)
        v = constrained(nn.silu(total).astype(self.dtype), "v_BNI")

        narrow = [
            weight(name, (I, size), uniform(I))
            for name, size in (("rank_IZ", Z), ("in_IU", U), ("out_IU", U))
        ]
        # One product; over `tensor` its terms are summed here.
        together = constrained(project(v, jnp.concatenate(narrow, axis=1)), "together_BNU")
        rank, into, out = jnp.split(together, (Z, Z + U), axis=-1)
        step = project(rank, weight("step_ZI", (Z, I), uniform(Z))).astype(fp32)
        step += jnp.broadcast_to(weight("step_bias_I", (I,), initial_step_bias, fp32), step.shape)
        # Padding has no step, so the state after a row is that after its last document, and no
        # output.
        real = places.real_BN[..., None]
        step = constrained(jnp.where(real, nn.softplus(step), 0), "step_BNI")
        y, state = selective_scan(
            v,
            step,
            weight("log_rates_IU", (I, U), initial_log_rates, fp32),
            into,
            jnp.where(real, out, 0),
            (places.index_BN == 0) & places.real_BN,
            None if past is None else past.state_BIU,
            implementation=self.implementation,
        )
        y += jnp.broadcast_to(weight("skip_I", (I,), nn.initializers.ones, fp32), v.shape) * v
        y = (y * nn.silu(gate.astype(fp32))).astype(self.dtype)
        down = weight("project_ID", (I, D), uniform(I, config.layers**-0.5))
        x_BND = x_BND + constrained(project(y, down), "x_BND").astype(fp32)
        length_B = places.real_BN.sum(axis=1, dtype=jnp.int32)
        return x_BND, (x_BND, Past(slice_rows(value, length_B - 1, A), state))


def rematerialised(remat: str, *, scanned: bool):
    """MambaBlock, rematerialised by the policy of `config.REMAT`."""
    policies = jax.checkpoint_policies
    if remat == "none":
        if not gathers():
            return MambaBlock
        policy = all_but_weights
    elif remat == "products":
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(OUTCOME)
        )
    else:
        policy = policies.nothing_saveable
    return nn.remat(MambaBlock, prevent_cse=not scanned, policy=policy)


class MambaByte(nn.Module):
    config: MambaByteConfig
    dtype: typing.Any = jnp.float32
    implementation: str | None = None  # of attention; see `scan_implementation`
    scanned: bool = True  # False: a plain loop over layers whose parameters are apart

    @nn.compact
    def stack(self, bytes_BN, places: Places, past=None):
        config = self.config
        V, D = config.vocabulary, config.width
        block = rematerialised(config.remat, scanned=self.scanned)
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
    """FLOPs of one row that the backward pass recomputes: states, without their outputs, in any
    case; the convolution, unless it keeps everything; all but the last product if it keeps
    nothing."""
    layer = layer_flops(config)
    again = 4 * config.inner * config.states
    if config.remat == "products":
        again += layer["taps"]
    elif config.remat == "full":
        again += sum(layer.values()) - layer["out"]
    return N * config.layers * again


def paper_flops(config: MambaByteConfig, N: int, P: int) -> float:
    """FLOPs of one byte, forward; the published figures are those of our count."""
    return forward_flops(config, N, P) / N


def forward(config: ModelConfig, params, arrays: dict, dtype, implementation: str | None) -> dict:
    """What the public implementation computes from `tokens` [B, N], one document per row.

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
