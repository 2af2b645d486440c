"""A kind of model: the type of an entry in the table of families, and of a model in memory."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bltjax.config.model import ModelConfig, Patching

# Reasons for abilities that most families lack.
REASONS = {"embed": "only a CANINE embeds texts: other models predict what follows"}


class Model(NamedTuple):
    """A model in memory."""

    config: ModelConfig
    params: Any
    entropy_model: "Model | None" = None  # the byte LM that places the patches, or None
    step: int = 0  # of its training


class Family(NamedTuple):
    """A kind of model: its settings, its computations, and the reasons for abilities that it lacks.

    N and P are a row's bytes and patches; a module is the result of `module`, which has `config`.
    What `decoding` makes is hashable and has `patched`, `prepared`, `prefill`, `predict` and
    `advance`, as `CachedBytes` (model/byte_decoding.py); its memory has `count_B`.
    tests/toy_family.py is the smallest family.
    """

    name: str  # the group of its settings in a config, and its Config's `group`
    title: str  # for people
    Config: type  # a frozen dataclass
    rows: str  # the kind of its batches: one of config/rows.py's KINDS
    limits: tuple[str, ...]  # of a row, by their names in a ModelConfig; the last counts positions
    module: Callable  # (config, P, dtype, attention) -> module
    init: Callable  # (config, key) -> params
    logits: Callable  # (module, params, batch) -> float32 [B, N, V]
    forward_flops: Callable  # (config, N, P) -> FLOPs of one row
    recomputed_flops: Callable  # (config, N, P) -> of one row, by the backward pass
    paper_flops: Callable  # (config, N, P) -> FLOPs of one byte, as the paper counts
    decoding: Callable | None = None  # (ModelConfig, scorer's config, dtype, draft, attention)
    empty_carry: Callable | None = None  # (config, lanes) -> the first carry of a long text
    entropy_table: Callable | None = None  # (config, params) -> entropies of all its contexts
    row_settings: Callable | None = None  # (ModelConfig) -> fields of its Rows (config/rows.py)
    measure: Callable | None = None  # (config) -> its Measure (model/loss.py); None: bits per byte
    causal: bool = True  # whether logits of a text are those of each next byte, from those before
    unscored: Callable | None = None  # (config) -> why a model predicts nothing; "" if it does
    embed: Callable | None = None  # (module, params, batch) -> hidden [B, N, D], pooled [B, D]
    forward: Callable | None = None  # (ModelConfig, params, arrays, dtype, attention) -> arrays
    inputs: tuple[str, ...] = ()  # names of the arrays that `forward` takes
    own_patching: Patching | None = None  # where a family places its patches by one rule alone
    verbs: Mapping[str, str] = MappingProxyType({})  # reasons for missing abilities

    def require(self, ability: str) -> Any:
        """An ability by its field's name.

        Raises:
          ValueError: with the reason, if the family lacks it.
        """
        found = getattr(self, ability, None)
        if found is None or found is False or ability in self.verbs:
            reason = REASONS.get(ability, f"a {self.title} has no {ability}")
            raise ValueError(self.verbs.get(ability, reason))
        return found


def flax_init(module: Callable, *inputs) -> Callable:
    """(config, key) -> params of a flax module; sizes don't depend on the row, so a minimal one is
    used."""
    return lambda config, key: module(config).init(key, *map(jnp.asarray, inputs))["params"]


def flax_logits(*names: str) -> Callable:
    """(module, params, batch) -> logits of a flax module whose inputs are those arrays of a
    batch."""

    def logits(module, params, batch) -> jax.Array:
        return module.apply({"params": params}, *(getattr(batch, name) for name in names))[0]

    return logits


def flax_forward(module: Callable, *names: str) -> Callable:
    """(ModelConfig, params, arrays, dtype, attention) -> arrays by name: logits, and the states
    that a flax module returns beside them. names: of a batch's fields, all required.

    module: (config, P, dtype, attention) -> the module; P is a row's bytes, so no patch is lost.
    """

    def forward(config, params, arrays, dtype, attention) -> dict:
        made = module(config.model, arrays[names[0]].shape[1], dtype, attention)
        logits, states = made.apply({"params": params}, *(arrays[name] for name in names))
        states = states if isinstance(states, dict) else {}
        found = {name: x for name, x in states.items() if isinstance(x, jax.Array)}
        return {"logits": logits} | found

    return forward
