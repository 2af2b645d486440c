"""Entropies of documents under a byte LM: exact for any length, and hardly any padding.

Documents are laid end to end into lanes of about equal length (longest first); each step scores
one chunk of the lanes that have most left, and carries their window to the next chunk:

    lane 0   [BOS doc 3 ............][BOS doc 7 ....]
    lane 1   [BOS doc 1 .......][BOS doc 2 ........]
             |  chunk  |  chunk  |  chunk  | chunk ..   only a lane's last chunk is padded

The document mask keeps documents apart, so which lane and which neighbours a document gets makes
no difference beyond rounding. A step runs a power of two of lanes, so few programs are compiled.
"""

import functools
import heapq
from collections.abc import Callable, Sequence

import jax
import numpy as np

from bltjax.alphabet import encode
from bltjax.config import ByteLMConfig, PatchingConfig, SourceConfig
from bltjax.data.records import Document, RecordDocuments
from bltjax.data.sources import open_source
from bltjax.metrics import Progress
from bltjax.model.byte_lm import ByteLM, empty_carry, entropies_of

# Lanes and chunk: an accelerator wants work, a CPU wants it to stay in its cache.
CPU_BATCH, DEVICE_BATCH = (8, 512), (64, 1024)
# Lanes and chunks shrink until padding, at most one chunk a lane, is at most 1 / 64 of the work.
PADDING_SHARE = 64


def power_of_two(value: float) -> int:
    """The largest power of two not above value, at least 1."""
    return 1 << max(0, int(value).bit_length() - 1)


@functools.lru_cache(maxsize=4)
def scoring_step(config: ByteLMConfig):
    model = ByteLM(config)

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
    config: ByteLMConfig,
    params,
    texts: Sequence,
    *,
    lanes: int | None = None,
    chunk: int | None = None,
    scored: Callable[[int], None] = lambda positions: None,
) -> tuple[list[np.ndarray], int]:
    """float32 entropies [len + 1] in nats of each text, and the number of padding positions.

    Entry i of a document follows i of its bytes (entry 0 follows BOS). `scored` is called with the
    number of positions done at each step.
    """
    lengths = [len(text) + 1 for text in texts]
    total = sum(lengths)
    most_lanes, longest = CPU_BATCH if jax.default_backend() == "cpu" else DEVICE_BATCH
    if chunk is None:
        chunk = min(longest, max(8, power_of_two(total / PADDING_SHARE)))
    if lanes is None:
        lanes = min(most_lanes, power_of_two(total / (PADDING_SHARE * chunk)))

    loads = [(0, lane) for lane in range(lanes)]
    members: list[list[int]] = [[] for _ in range(lanes)]
    for index in sorted(range(len(texts)), key=lambda i: (-lengths[i], i)):
        load, lane = heapq.heappop(loads)
        members[lane].append(index)
        heapq.heappush(loads, (load + lengths[index], lane))
    ids, documents, results = [], [], []
    for lane in members:
        ids.append(
            np.concatenate([np.zeros(0, np.int32)] + [encode(texts[i], eos=False) for i in lane])
        )
        numbers = np.arange(1, len(lane) + 1, dtype=np.int32)
        documents.append(np.repeat(numbers, [lengths[i] for i in lane]))
        results.append(np.empty(len(ids[-1]), np.float32))

    step = scoring_step(config)
    carry = empty_carry(config, lanes)
    done, padding = [0] * lanes, 0
    while True:
        left = sorted(range(lanes), key=lambda lane: (done[lane] - len(ids[lane]), lane))
        left = [lane for lane in left if done[lane] < len(ids[lane])]
        if not left:
            break
        now = left[: power_of_two(len(left))]
        bytes_BN = np.zeros((len(now), chunk), np.int32)
        documents_BN = np.zeros((len(now), chunk), np.int32)
        for row, lane in enumerate(now):
            piece = ids[lane][done[lane] : done[lane] + chunk]
            bytes_BN[row, : len(piece)] = piece
            documents_BN[row, : len(piece)] = documents[lane][done[lane] : done[lane] + chunk]
        inputs = jax.device_put((np.array(now, np.int32), bytes_BN, documents_BN))
        carry, entropies_BN = step(params, carry, *inputs)
        entropies_BN = jax.device_get(entropies_BN)
        advanced = 0
        for row, lane in enumerate(now):
            size = min(chunk, len(ids[lane]) - done[lane])
            results[lane][done[lane] : done[lane] + size] = entropies_BN[row, :size]
            done[lane] += size
            advanced += size
        padding += bytes_BN.size - advanced
        scored(advanced)

    entropies: list[np.ndarray] = [np.zeros(0, np.float32)] * len(texts)
    for lane, result in zip(members, results, strict=True):
        ends = np.cumsum([lengths[i] for i in lane], dtype=np.int64)
        for index, end in zip(lane, ends, strict=True):
            entropies[index] = result[end - lengths[index] : end]
    return entropies, padding


def scored_source(
    source: SourceConfig, patching: PatchingConfig | None, byte_lm, *, skip_bad: bool = False
) -> Sequence[Document]:
    """The documents of a source, with entropies if `patching` needs them.

    byte_lm: (config, params, identity) of the byte LM that places the patches. Records that it
    scored are used as they are; raw text is scored here, in memory.
    """
    documents = open_source(source, skip_bad=skip_bad, expected_identity=byte_lm and byte_lm[2])
    if patching is None or patching.mode != "entropy" or isinstance(documents, RecordDocuments):
        return documents
    if byte_lm is None:
        raise ValueError(f"{source.path} is raw text: entropy patching needs a byte LM to score it")
    texts = [documents[i].text for i in range(len(documents))]
    progress = Progress(f"scoring {source.path}", sum(len(text) + 1 for text in texts))
    entropies, _ = score_documents(byte_lm[0], byte_lm[1], texts, scored=progress.advance)
    return [Document(*pair) for pair in zip(texts, entropies, strict=True)]
