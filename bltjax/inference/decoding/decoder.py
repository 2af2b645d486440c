"""Generation: exact, cached, with one latent step per patch, on the device from byte to byte.

`Decoder` is the interface. It runs prompts in one pass, padded to a few lengths so that few
programs are compiled, then the loop of `loop.py`, which returns its output every few bytes, or when
a buffer is full; then the buffer is doubled and the loop continues. Finished rows leave the batch
when they are at least half of it. Under a mesh (`placement.py`) rows are shared among groups of
devices, each of which runs the loop by itself; empty places count as finished rows.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bltjax.attention import fastest
from bltjax.configured import resolved, vocabulary
from bltjax.family import Model
from bltjax.inference.decoding.loop import (
    AT_LIMIT,
    AT_STOP,
    FINISH_REASONS,
    NOT_FINITE,
    RUNNING,
    STOPS,
    Request,
    State,
    initial_state,
    run_loop,
)
from bltjax.inference.decoding.pieces import Piece, Rest, TokenRest
from bltjax.inference.decoding.placement import on_mesh, row_shardings, weight_shardings
from bltjax.inference.decoding.prefill import (
    CHUNK,
    cached_model,
    grow,
    padded_length,
    power_of_two,
    prefill,
    prefill_bytes,
    prepare_weights,
    score_prompts,
    select_rows,
)
from bltjax.inference.decoding.request import CONTEXT, fitting_prompts, prompt_names
from bltjax.inference.decoding.sampling import GREEDY, Sampling, utf8_state
from bltjax.inference.decoding.speculation import run_rounds
from bltjax.inference.finite import not_finite
from bltjax.text.alphabet import as_bytes
from bltjax.text.vocabulary import TokenVocabulary

ENDED = -1  # the row index of an empty place in the batch
AHEAD = 1024  # bytes to write for which buffers have room from the start


class Counts(NamedTuple):
    """The work of a call, over all its rows."""

    bytes: int = 0
    latent_runs: int = 0  # of the latent transformer, on one row or more
    patches: int = 0  # that it ran on
    passes: int = 0  # of the whole model over a row: one per byte, or one per round of drafts


class Decoder:
    """Continues texts with a trained model."""

    def __init__(
        self,
        model: Model,
        *,
        context: int = CONTEXT,
        draft: int = 0,
        mesh: Mesh | None = None,
        dtype=None,
    ):
        """context: the most bytes of a prompt and its continuation together. draft: bytes that the
        local decoder drafts for the whole model to verify (`speculation.py`), greedily.
        mesh: a `decoding_mesh`; None is one device. dtype: of weights, caches and products (not of
        the byte LM that places patches, whose entropies are exact); None: weights as stored, the
        rest as in training.

        Raises:
          ValueError: for patches that can't be placed during generation, for entropy patches
            without a byte LM, for drafts of a model without patches, and for a mesh that splits
            fsdp or has devices of other processes.
        """
        settings = model.config.model
        self.vocabulary = vocabulary(model.config)
        self.alphabet = self.vocabulary.alphabet
        # Learned positions bound a text; one of them is BOS.
        longest = getattr(settings, "longest", None)
        self.context = context if longest is None else min(context, longest - 1)
        self.draft, self.mesh = draft, mesh
        self.groups = mesh.shape["data"] if mesh else 1
        self.counts = Counts()
        if mesh and (mesh.shape["fsdp"] > 1 or mesh.is_multi_process):
            raise ValueError(
                f"a decoder takes a decoding_mesh of one process: this mesh has fsdp"
                f" {mesh.shape['fsdp']}, not 1, and {mesh.size} devices, {len(mesh.local_devices)}"
                " of them of this process"
            )
        device = mesh.devices.flat[0] if mesh else jax.devices()[0]
        dtype = jnp.dtype(dtype or resolved(model.config, device).compute_dtype)
        scorer = model.entropy_model if model.config.by_entropy else None
        self.model = cached_model(
            model.config, scorer and scorer.config, dtype, draft, fastest(device)
        )
        weights = (self.placed(model.params), scorer and self.placed(scorer.params))
        with on_mesh(self.mesh):
            self.params = prepare_weights(self.model, *weights)

    def placed(self, tree, shardings=weight_shardings):
        """Weights, or another tree with its shardings, on the mesh."""
        return jax.device_put(tree, shardings(tree, self.mesh)) if self.mesh else tree

    def generate(
        self,
        prompts: Sequence[str | bytes],
        *,
        max_bytes: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop: Sequence[str | bytes] = (),
        truncate: bool = False,
        chunk: int = CHUNK,
        names: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """The continuation of each prompt, piece by piece as it is generated.

        A row ends at EOS, at a stop string (which is not part of the text) or after `max_bytes`;
        its last piece has the reason. Row i samples with the seed `seed + i` and does not depend on
        its neighbours, up to rounding: a matrix product may sum in another order for more rows.

        truncate: drop the beginning of a prompt that is too long instead of refusing it. names: of
        the prompts, in errors (default: by number).

        Raises:
          ValueError: for a number out of range, or a prompt that is too long for the context.
          FloatingPointError: from the iterator, where logits or entropies are not finite.
        """
        texts = fitting_prompts(
            prompts,
            max_bytes=max_bytes,
            context=self.context,
            draft=self.draft,
            sampling=sampling,
            seed=seed,
            stop=stop,
            truncate=truncate,
            names=names,
            vocabulary=self.vocabulary,
        )
        stops = [as_bytes(text) for text in stop]
        called = prompt_names(len(texts), names)
        return self.pieces(texts, max_bytes, sampling, seed, stops, chunk, called)

    def pieces(self, texts, max_bytes, sampling, seed, stops, chunk, names) -> Iterator[Piece]:
        self.counts = Counts()
        if max_bytes == 0 or not texts:
            nothing = np.zeros(0, np.float32)
            for row in range(len(texts)):
                yield Piece(
                    row, b"", nothing, nothing, nothing.astype(bool), FINISH_REASONS[AT_LIMIT]
                )
            return
        state, request = self.start(texts, max_bytes, sampling, seed, stops, names)
        if self.draft:
            program, shape = run_rounds, (self.draft + 1, max(chunk, 2 * self.draft + 2))
        else:
            program, shape = run_loop, (sampling.steps(self.alphabet), chunk)
        rest, written = [self.rest_of(text, stops, max_bytes) for text in texts], 0
        rows = np.array([*range(len(texts)), *[ENDED] * (len(state.finish_B) - len(texts))])
        while rows.size:
            with on_mesh(self.mesh):
                state, out, full_BG = program(self.model, *shape, self.params, request, state)
            out, finish_B, full_BG, costs = jax.device_get(
                (out, state.finish_B, full_BG, state.costs)
            )
            broken = np.flatnonzero((finish_B == NOT_FINITE) & (rows >= 0))
            for slot, row in enumerate(rows):
                ids, *values = (x_BN[slot, : out.count_B[slot]] for x_BN in out[1:])
                if row >= 0 and (ids.size or finish_B[slot]):
                    made = rest[row].piece(int(row), ids, values, FINISH_REASONS[finish_B[slot]])
                    written += len(made.text)
                    self.counts = Counts(written, *(int(x.sum()) for x in costs))
                    yield made
            ended_B = np.array([row >= 0 and rest[row].ended for row in rows])
            if (ended_B & (finish_B == RUNNING)).any():
                finish_B = np.where(ended_B, AT_STOP, finish_B)
                placed = self.placed(jnp.asarray(finish_B), row_shardings)
                state = state._replace(finish_B=placed)
            if broken.size:
                row = rows[broken[0]]
                raise self.not_finite(state, int(broken[0]), names[row], len(texts[row]))
            rows = np.where(finish_B == RUNNING, rows, ENDED)
            going = int((rows >= 0).sum())
            if going == 0:
                return
            if full_BG.any():
                state = state._replace(memory=self.doubled(state.memory, full_BG.any(axis=0)))
            size = self.groups * power_of_two(-(-going // self.groups), 1)
            if size < len(rows):
                # Running rows first, in turn to each group; ended ones fill up a power of two.
                order = np.argsort(rows < 0, kind="stable")[:size]
                order = order.reshape(-1, self.groups).T.reshape(-1)
                with on_mesh(self.mesh):
                    state, rows = select_rows(state, order), rows[order]

    def start(self, texts, max_bytes, sampling, seed, stops, names=()) -> tuple[State, Request]:
        """The state after the prompts, and the request for the loop."""
        prompts = [self.vocabulary.prompt(text) for text in texts]
        prompts += [self.vocabulary.prompt(b" ")] * (-len(texts) % self.groups)
        memory = self.memory(prompts, max_bytes, names)
        rows = len(prompts)
        most = max_bytes + self.vocabulary.added  # ids: a token is a byte or more of text
        limit_B = np.where(np.arange(rows) < len(texts), most, 0)
        most = power_of_two(len(stops), STOPS[0])
        longest = power_of_two(max(map(len, stops), default=0), STOPS[1])
        stops_ZT = np.full((most, longest), -1, np.int32)
        for number, text in enumerate(stops):
            if (ids := self.vocabulary.stop_ids(text)) is not None:
                stops_ZT[number, longest - len(text) :] = ids
        used_BV = np.zeros((rows, self.alphabet.size), bool)
        for row, ids in enumerate(prompts):
            used_BV[row, ids] = True
        utf8_B = np.zeros(rows, np.int32)
        utf8_B[: len(texts)] = [utf8_state(text) for text in texts]
        state = initial_state(
            memory,
            seed + jnp.arange(rows, dtype=jnp.int32),
            jnp.asarray(limit_B, jnp.int32),
            jnp.asarray(used_BV),
            jnp.asarray(utf8_B),
            longest,
            self.groups,
        )
        return self.placed(state, row_shardings), Request(sampling.numbers, stops_ZT)

    def rest_of(self, prompt: bytes, stops: list[bytes], max_bytes: int) -> Rest:
        """The way of a row's ids to text."""
        if isinstance(self.vocabulary, TokenVocabulary):
            return TokenRest(stops, self.vocabulary, max_bytes, begins=not prompt)
        return Rest(stops, self.vocabulary)

    @property
    def models(self) -> dict:
        """The parameters, by the prefix of their names."""
        return {"": self.params["model"], "byte_lm/": self.params.get("scorer", {})}

    def not_finite(self, state: State, slot: int, name: str, given: int) -> FloatingPointError:
        """The error for a row whose next byte can't be chosen. given: bytes of its prompt."""
        made, memory = int(jax.device_get(state.made_B)[slot]), state.memory
        found = "logits"
        if self.model.patched:
            entropy_B = jax.device_get(memory.cursor.entropy_B)
            found = "logits" if np.isfinite(entropy_B[slot]) else "entropies"
        written = f" and {made} that were written" if made else ""
        return not_finite(f"{name}: {found} after its {given} bytes{written} are", self.models)

    def memory(self, prompts: list[np.ndarray], room: int = 0, names: Sequence[str] = ()):
        """The memory after texts, ids that start with BOS, in one pass; with room for more bytes.

        Raises:
          FloatingPointError: where an entropy of a prompt is not finite.
        """
        lengths = [len(ids) for ids in prompts]
        bytes_BN = np.zeros((len(prompts), padded_length(max(lengths))), np.int32)
        for row, ids in enumerate(prompts):
            bytes_BN[row, : len(ids)] = ids
        inputs = (self.params, bytes_BN, np.array(lengths, np.int32))
        with on_mesh(self.mesh):
            if not self.model.patched:
                memory = prefill_bytes(self.model, *inputs)
                if not self.model.grows:
                    return memory
                needed = self.model.needs(max(lengths) + min(room, AHEAD))
                have = self.model.capacity(memory)
                return grow(self.model, tuple(map(max, have, map(power_of_two, needed))), memory)
            scored = score_prompts(self.model, *inputs)
        sound_B, closed_B, open_B = jax.device_get((scored.sound_B, scored.closed_B, scored.open_B))
        if (sound_B < lengths).any():
            row = int(np.argmax(sound_B < lengths))
            name = prompt_names(len(prompts), names)[row]
            raise not_finite(
                f"{name}: the entropy after its first {sound_B[row]} bytes is", self.models
            )
        held = int((closed_B + (open_B > 0)).max())
        patches = min(power_of_two(held), bytes_BN.shape[1])
        open_slots = power_of_two(int(open_B.max()) + 1 + self.draft)
        # One patch per four bytes; with more patches, the cache grows when it is full.
        wanted = power_of_two(int(closed_B.max()) + 1 + room // 4)
        with on_mesh(self.mesh):
            memory = prefill(self.model, patches, open_slots, self.params, scored)
            return grow(self.model, (max(patches, wanted), open_slots), memory)

    def doubled(self, memory, full_G):
        """The memory with twice the room in the buffers that are full."""
        sizes = zip(self.model.capacity(memory), full_G, strict=True)
        with on_mesh(self.mesh):
            return grow(self.model, tuple(size * (1 + int(full)) for size, full in sizes), memory)
