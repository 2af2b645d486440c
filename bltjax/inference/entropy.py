"""Entropies of documents under a byte LM: exact for any length, with almost no padding.

Documents are laid end to end into lanes of about equal length (longest first). Each step scores
one chunk of the lanes that have most left, and carries their window to the next chunk:

    lane 0   [BOS doc 3 ............][BOS doc 7 ....]
    lane 1   [BOS doc 1 .......][BOS doc 2 ........]
             |  chunk  |  chunk  |  chunk  | chunk ..   only a lane's last chunk is padded

The document mask keeps documents apart, so a document's lane and neighbours make no difference
beyond rounding. A step runs a power of two of lanes, so few programs are compiled.
"""

import functools
import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bltjax.attention import fastest
from bltjax.config.data import SourceConfig
from bltjax.config.model import Patching
from bltjax.configured import make_model
from bltjax.data.records import NEWLINE_RESET, Document, RecordDocuments
from bltjax.data.sources.by_path import Documents, open_source
from bltjax.distributed.processes import is_primary
from bltjax.families import family_of
from bltjax.family import Model
from bltjax.inference.finite import first_not_finite, not_finite
from bltjax.model.byte_cnn import table_entropies
from bltjax.model.byte_lm import entropies_of
from bltjax.progress import Progress
from bltjax.text.alphabet import BOS, OFFSET, encode
from bltjax.weights.export import load_params
from bltjax.weights.workdir import identity

# Lanes and chunk: an accelerator needs large steps, a CPU needs them to fit in its cache.
CPU_BATCH, DEVICE_BATCH = (8, 512), (64, 1024)
# Lanes and chunks shrink until padding, at most one chunk per lane, is at most 1 / 64 of the work.
PADDING_SHARE = 64
PREVIEW = 20  # bytes of a text shown in an error


class EntropyModel(NamedTuple):
    """A byte LM that places the patches of a BLT, and whether newlines reset its context."""

    model: Model
    newline_reset: bool
    identity: str  # stored in records; another newline_reset is another identity


def as_scorer(model: Model, newline_reset: bool) -> EntropyModel:
    """A byte LM as an EntropyModel; reads its parameters once, for their checksum."""
    named = identity(model.params) + newline_reset * NEWLINE_RESET
    return EntropyModel(model, newline_reset, named)


def scorer_of(model: Model) -> EntropyModel | None:
    """The byte LM that places a model's patches, or None."""
    if model.entropy_model is None or not model.config.by_entropy:
        return None
    return as_scorer(model.entropy_model, model.config.patching.newline_reset)


def load_entropy_model(path, *, newline_reset: bool) -> EntropyModel:
    """The byte LM or byte CNN of a run or an export.

    Raises:
      ValueError: for a model without entropies of bytes, or a folder that is neither.
    """
    model = load_params(path)
    family = family_of(model.config)
    if family.rows != "bytes" or not (family.empty_carry or family.entropy_table):
        raise ValueError(
            f"{path} is a {family.title}, not a byte LM; entropies come from a byte LM"
            + (
                f" (that of this {family.title} is {path}/byte_lm)"
                if model.config.by_entropy
                else ""
            )
        )
    return as_scorer(model, newline_reset)


def contexts(ids_N: np.ndarray, newline_reset: bool) -> np.ndarray:
    """int32 [N], ascending from 1: the number of the context of each position of documents that
    lie end to end. A context begins with BOS or, with newline_reset, also with a newline."""
    begins_N = ids_N == BOS
    if newline_reset:
        begins_N |= ids_N == OFFSET + ord("\n")
    return np.cumsum(begins_N, dtype=np.int32)


def power_of_two_below(value: float) -> int:
    """The largest power of two not above value, at least 1."""
    return 1 << max(0, int(value).bit_length() - 1)


def device_of(params) -> jax.Device:
    """The device of parameters; for host arrays, the default device."""
    leaf = jax.tree.leaves(params)[0]
    return next(iter(leaf.devices())) if isinstance(leaf, jax.Array) else jax.devices()[0]


@functools.lru_cache(maxsize=4)
def scoring_step(config, implementation: str):
    model = make_model(config, 0, np.float32, implementation)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, carry, lanes_B, bytes_BN, documents_BN):
        mine = jax.tree.map(lambda x: x[lanes_B], carry)
        # Boundaries are thresholds on entropies: TPU matrix products must not round to bf16 here.
        with jax.default_matmul_precision("highest"):
            logits_BNV, mine = model.apply({"params": params}, bytes_BN, documents_BN, mine)
        carry = jax.tree.map(lambda x, new: x.at[lanes_B].set(new), carry, mine)
        return carry, entropies_of(logits_BNV)

    return step


def score_documents(
    config,
    params,
    texts: Sequence,
    *,
    newline_reset: bool = False,
    lanes: int | None = None,
    chunk: int | None = None,
    scored: Callable[[int], None] = lambda positions: None,
    name: Callable[[int], str] | None = None,
) -> tuple[list[np.ndarray], int]:
    """float32 entropies [len + 1] in nats of each text, and the number of padding positions.

    Entry i of a document follows i of its bytes (entry 0 follows BOS). config: settings of a family
    of byte models. `scored` is called with the number of positions done at each step. name: the
    name of a text in errors, by its number.

    Raises:
      FloatingPointError: for an entropy that is not finite, naming the text and the position.
    """
    if family_of(config).entropy_table is not None:
        found = look_up(config, params, texts, newline_reset, scored), 0
    else:
        found = run_documents(config, params, texts, newline_reset, scored, lanes, chunk)
    for index, entropies_N in enumerate(found[0]):
        # No patch would begin where an entropy is NaN.
        if (position := first_not_finite(entropies_N)) is not None:
            text = bytes(texts[index][:PREVIEW]).decode("utf-8", errors="replace")
            called = name(index) if name else f"text {index + 1} of {len(texts)}"
            raise not_finite(
                f"{called} ({text!r}, {len(texts[index]):,} bytes): the entropy after its first"
                f" {position} bytes is",
                {"": params},
            )
    return found


def run_documents(
    config, params, texts, newline_reset: bool, scored, lanes: int | None, chunk: int | None
) -> tuple[list[np.ndarray], int]:
    """`score_documents` for a byte LM."""
    if not texts:
        return [], 0
    lengths = [len(text) + 1 for text in texts]
    total = sum(lengths)
    device = device_of(params)
    most_lanes, longest = CPU_BATCH if device.platform == "cpu" else DEVICE_BATCH
    if chunk is None:
        chunk = min(longest, max(8, power_of_two_below(total / PADDING_SHARE)))
    if lanes is None:
        lanes = min(most_lanes, power_of_two_below(total / (PADDING_SHARE * chunk)))

    loads = [(0, lane) for lane in range(lanes)]
    members: list[list[int]] = [[] for _ in range(lanes)]
    for index in sorted(range(len(texts)), key=lambda i: (-lengths[i], i)):
        load, lane = heapq.heappop(loads)
        members[lane].append(index)
        heapq.heappush(loads, (load + lengths[index], lane))
    # The lanes lie end to end, too: lane i has the positions from positions[i] to ends[i].
    order = [index for lane in members for index in lane]
    ids_N = np.concatenate([encode(texts[index], eos=False) for index in order])
    contexts_N = contexts(ids_N, newline_reset)
    entropies_N = np.empty(total, np.float32)
    sizes = [sum(lengths[index] for index in lane) for lane in members]
    ends = np.cumsum(sizes)
    positions = ends - sizes

    step = scoring_step(config, fastest(device))
    carry = family_of(config).require("empty_carry")(config, lanes)
    padding = 0
    while (left := np.flatnonzero(positions < ends)).size:
        left = left[np.argsort(positions[left] - ends[left], kind="stable")]
        now = left[: power_of_two_below(len(left))]
        positions_BN = positions[now, None] + np.arange(chunk)
        inside_BN = positions_BN < ends[now, None]
        bytes_BN = np.where(inside_BN, ids_N.take(positions_BN, mode="clip"), 0)
        documents_BN = np.where(inside_BN, contexts_N.take(positions_BN, mode="clip"), 0)
        inputs = jax.device_put((now.astype(np.int32), bytes_BN, documents_BN))
        carry, entropies_BN = step(params, carry, *inputs)
        entropies_N[positions_BN[inside_BN]] = jax.device_get(entropies_BN)[inside_BN]
        positions[now] = np.minimum(positions[now] + chunk, ends[now])
        advanced = int(inside_BN.sum())
        padding += inside_BN.size - advanced
        scored(advanced)

    ends_of_texts = np.cumsum([lengths[index] for index in order])[:-1]
    by_text = dict(zip(order, np.split(entropies_N, ends_of_texts), strict=True))
    return [by_text[index] for index in range(len(texts))], padding


# The table of the byte CNN used last: a corpus is scored shard by shard.
TABLE: dict[tuple[Any, str], np.ndarray] = {}


def table_of(config, params) -> np.ndarray:
    """Its family's `entropy_table`, made once per model, by its checksum."""
    key = (config, identity(params))
    if key not in TABLE:
        TABLE.clear()
        TABLE[key] = family_of(config).require("entropy_table")(config, params)
    return TABLE[key]


def look_up(config, params, texts, newline_reset: bool, scored) -> list[np.ndarray]:
    """Entropies under a byte CNN, from the table of all its contexts."""
    table, entropies = table_of(config, params), []
    for text in texts:
        ids_N = encode(text, eos=False)
        entropies.append(table_entropies(table, ids_N, contexts(ids_N, newline_reset)))
        scored(len(ids_N))
    return entropies


def scored_source(
    source: SourceConfig,
    patching: Patching | None,
    byte_lm: EntropyModel | None,
    *,
    skip_bad: bool = False,
    documents: Documents | None = None,
) -> Sequence[Document]:
    """The documents of a source, with entropies if `patching` needs them.

    Records that `byte_lm` scored are used as they are; raw text is scored here, in memory.
    documents: the source, if it is already open.

    Raises:
      ValueError: for raw text without a byte LM, and for records of another one.
      FloatingPointError: for an entropy that is not finite.
    """
    identity = None if byte_lm is None else byte_lm.identity
    if documents is None or isinstance(documents, RecordDocuments):
        documents = open_source(source, skip_bad=skip_bad, expected_identity=identity)
    if patching is None or patching.mode != "entropy" or isinstance(documents, RecordDocuments):
        return documents
    if byte_lm is None:
        raise ValueError(f"{source.path} is raw text: entropy patching needs a byte LM to score it")
    texts = [documents[i].text for i in range(len(documents))]
    total = sum(len(text) + 1 for text in texts)
    progress = Progress(f"scoring {source.path}", total, quiet=not is_primary())
    entropies, _ = score_documents(
        byte_lm.model.config.model,
        byte_lm.model.params,
        texts,
        newline_reset=byte_lm.newline_reset,
        scored=progress.advance,
        name=documents.name,
    )
    return [Document(*pair) for pair in zip(texts, entropies, strict=True)]
