"""The sides of `benchmark generate`: one random model, continued by three decoders.

    cached    ours
    whole     our whole model for every byte: the baseline of cached decoding
    port      transformers' generate, without a cache, the only mode of it that is correct
    context   ours, from byte to byte alone, after a prompt of any length, of this model or of any
              config; it samples

All have the same weights, with a byte LM of 4 layers, and generate the same text greedily. A random
model's greedy text runs in circles, some of which have no boundary, or hardly anything else; so the
prompt is a place in the text after which the first side generates patches of 3.5 to 5.5 bytes, with
the threshold for patches of 4.49 in the text itself. Specials have no weight in the head: a random
model would end its text at any byte.
"""

import dataclasses
import time

import jax
import numpy as np

from bltjax.benchmark.train import MEAN_PATCH, MODEL, peer_libraries, text
from bltjax.config.model import ModelConfig, Patching
from bltjax.configured import initial_params, load_config, model_config, resolved
from bltjax.family import Model
from bltjax.model.byte_lm import ByteLMConfig
from bltjax.model.params import cast_weights, flattened
from bltjax.progress import quantity
from bltjax.system.environment import random_key
from bltjax.text.alphabet import OFFSET, VOCABULARY, encode
from bltjax.weights.lazy import leaf_of
from bltjax.weights.stored import ModelFiles

BYTE_LM = ByteLMConfig(layers=4, width=256, heads=4, hidden=768)
BYTES, WHOLE_BYTES = 128, 16  # the whole model costs as much as its buffer, full or not
PLACES = 64  # tried for a prompt
CHUNK, CHUNKS = 32, 3  # bytes timed per context: all chunks but the first
PATCH_BYTES, NEVER = 4, 100.0  # of a context's patches: longest, and a threshold above them all
LONGEST = 32768
TRIES = 20


def without_specials(params: dict) -> dict:
    """The parameters of a model, with the head's weights of specials set to zero in place."""
    owner = params.get("decoder", params)
    owner["head_EV"] = owner["head_EV"] * (np.arange(VOCABULARY) >= OFFSET)[None]
    return params


def random_params(config: ModelConfig, seed: int) -> dict:
    """Initial parameters of training, except the head's columns of specials; in the run's compute
    dtype, except norms, so that no more is ever held."""
    dtype = resolved(config, jax.devices()[0]).compute_dtype

    @jax.jit
    def drawn(key):
        return cast_weights(without_specials(initial_params(config.model, key)), dtype)

    return drawn(random_key(seed))


def random_byte_lm(settings: ByteLMConfig) -> Model:
    """A byte LM with random parameters."""
    config = ModelConfig(settings, None, LONGEST, LONGEST, "float32")
    return Model(config, random_params(config, 1))


def random_model() -> Model:
    """A BLT with random parameters and a byte LM, the same in every process."""
    from bltjax.inference.entropy import score_documents

    byte_lm = random_byte_lm(BYTE_LM)
    sample = np.frombuffer(text()[:8192], np.uint8)
    entropies, _ = score_documents(BYTE_LM, byte_lm.params, [sample])
    threshold = float(np.quantile(entropies[0], 1 - 1 / MEAN_PATCH))
    patching = Patching(threshold=round(threshold, 4))
    config = ModelConfig(MODEL, patching, LONGEST, LONGEST, "float32")
    return Model(config, random_params(config, 0), byte_lm)


def model_of_config(path: str) -> Model:
    """`random_model` of a config file's BLT, in its compute dtype; the byte LM has the sizes of the
    released one, and is None where patches need none."""
    config = model_config(load_config(path))
    if config.patching is None:
        raise ValueError(f"{path} trains a byte model: --contexts is of a BLT")
    byte_lm = random_byte_lm(ByteLMConfig()) if config.by_entropy else None
    return Model(config, random_params(config, 0), byte_lm)


def context_side(path: str | None, context_bytes: int):
    """() -> ms per byte after a context, and the bytes read from caches for each.

    path: a config file of a BLT; None for `random_model`.
    """
    from bltjax.inference.decoding.decoder import Decoder
    from bltjax.inference.decoding.loop import run_loop
    from bltjax.inference.decoding.sampling import Sampling

    # Patches of one length after every context, or their number would decide; the byte LM still
    # scores each byte.
    made = model_of_config(path) if path else random_model()
    patching = Patching(
        mode="entropy" if made.entropy_model else "static",
        threshold=NEVER, max_patch_bytes=PATCH_BYTES, patch_bytes=PATCH_BYTES,
    )  # fmt: skip
    config = dataclasses.replace(made.config, patching=patching)
    decoder = Decoder(made._replace(config=config))
    prompt = prompt_at(0, context_bytes)
    sampling = Sampling(temperature=1.0)  # a random model's greedy text runs in circles

    def write() -> dict:
        # A text that ends early would cost less; try the next seed.
        for seed in range(TRIES):
            if figures := timed(seed):
                return figures
        raise ValueError(f"{TRIES} texts in a row ended within {CHUNK * CHUNKS} bytes")

    def timed(seed: int) -> dict | None:
        # Room for one patch per byte, so that no buffer is doubled while the clock runs.
        state, asked = decoder.start([prompt], 4 * CHUNK * CHUNKS, sampling, seed, [])
        latent = sum(x.nbytes for x in jax.tree.leaves(state.memory.latent))
        rings = (state.memory.scorer, state.memory.encoder, state.memory.decoder)
        rings = sum(x.nbytes for x in jax.tree.leaves(rings))
        for chunk in range(CHUNKS):
            if chunk == 1:
                before, started_at = int(state.costs.latent_runs.sum()), time.perf_counter()
            shape = (decoder.model, sampling.steps(), CHUNK)
            state, out, full_B2 = run_loop(*shape, decoder.params, asked, state)
            if full_B2.any():
                raise RuntimeError("there is no room for all patches, or for an open one")
            if int(out.count_B[0]) < CHUNK:
                return None
        seconds, written = time.perf_counter() - started_at, CHUNK * (CHUNKS - 1)
        patches = int(state.costs.latent_runs.sum()) - before
        return {
            "ms_per_byte": 1000 * seconds / written,
            "mean_patch_bytes": written / max(1, patches),
            "latent_cache_bytes_read_per_byte": latent * patches / written,
            "ring_bytes_read_per_byte": rings,
        }

    return write


def mermaid_chart(title: str, kind: str, x: str, y: str, figures: dict[str, float]) -> str:
    """A Mermaid diagram, which GitHub draws: figures by name, on an axis that starts at zero.

    kind: `bar` or `line`; x: the title of the names, in quotes, or "".
    """
    names = ", ".join(f'"{name}"' for name in figures)
    shown = ", ".join(f"{figure:.4g}" for figure in figures.values())
    return f"""
```mermaid
xychart-beta
    title "{title}"
    x-axis {x}[{names}]
    y-axis "{y}" 0 --> {1.1 * max(figures.values()):.3g}
    {kind} [{shown}]
```"""


def speed_words(result: dict) -> str:
    """The figures of one prompt, and their chart."""
    prompt = result["prompt_bytes"]
    ours, uncached = result["ours_ms_per_byte"], result["uncached_ms_per_byte"]
    lines = [f"after {prompt} bytes: ours {ours:.2f} ms per byte, {uncached:.1f} uncached"]
    bars = {"bltjax": ours, "bltjax, the whole model per byte": uncached}
    if peer := result.get("peer"):
        same = "the same" if result["same_text"] else "another"
        theirs, ratio = result["peer_ms_per_byte"], result["ratio"]
        lines.append(f"{peer} {theirs:.1f} ms, {ratio:.1f} times as long, {same} text")
        bars[peer] = theirs
    title = f"ms per byte after {prompt} bytes"
    return "\n".join([*lines, mermaid_chart(title, "bar", "", "ms per byte", bars)])


def context_words(result: dict) -> str:
    """The figures of each context, and the chart of their speeds."""
    lines = [
        f"{found['context_bytes']:6d} bytes before: {found['ms_per_byte']:6.2f} ms per byte,"
        f" {found['mean_patch_bytes']:.2f} bytes per patch; read for each byte"
        f" {quantity(found['latent_cache_bytes_read_per_byte'])}B of latent caches,"
        f" {quantity(found['ring_bytes_read_per_byte'])}B of rings"
        for found in result["contexts"]
    ]
    speeds = {
        f"{found['context_bytes'] // 1024}k": 1000 / found["ms_per_byte"]
        for found in result["contexts"]
    }
    title, x = "Writing after a context", '"bytes before" '
    return "\n".join([*lines, mermaid_chart(title, "line", x, "bytes per second", speeds)])


def prompt_at(begin: int, prompt_bytes: int) -> bytes:
    found = text()[begin : begin + prompt_bytes]
    if len(found) < prompt_bytes:
        raise ValueError(
            f"--prompt_bytes ({prompt_bytes}) exceeds the text there is ({len(found)})"
        )
    return found


def cached_side(prompt_bytes: int, begin: int):
    """() -> the text of our decoder; a negative `begin` is searched for."""
    from bltjax.inference.decoding.decoder import Decoder

    decoder = Decoder(random_model())

    def write(begin: int) -> dict:
        pieces = decoder.generate([prompt_at(begin, prompt_bytes)], max_bytes=BYTES)
        written = b"".join(piece.text for piece in pieces)
        return {"begin": begin, "text": written.hex(), "patches": decoder.counts.patches}

    for number in range(PLACES * (begin < 0)):
        begin = number * 997
        if 3.5 <= BYTES / max(1, write(begin)["patches"]) <= 5.5:
            break
    return lambda: write(begin)


def whole_side(prompt_bytes: int, begin: int):
    """() -> the beginning of the same text, by the whole model for every byte."""
    from bltjax.inference.decoding.uncached import Predictor

    predictor, prompt = Predictor(random_model()), prompt_at(begin, prompt_bytes)
    return lambda: {"text": predictor.greedy(prompt, WHOLE_BYTES)[0].hex()}


def port_side(prompt_bytes: int, begin: int):
    """() -> the same text by transformers, with our weights."""
    from bltjax.convert.verify import port_model

    torch, _ = peer_libraries()

    def files(one) -> ModelFiles:
        leaves = {path: leaf_of(np.asarray(x)) for path, x in flattened(one.params).items()}
        byte_lm = one.entropy_model and files(one.entropy_model)
        return ModelFiles(one.config, leaves, "run", {}, byte_lm=byte_lm)

    peer = port_model(files(random_model()))
    ids = torch.from_numpy(encode(prompt_at(begin, prompt_bytes), eos=False)).long()[None]

    def write(count: int) -> dict:
        with torch.inference_mode():
            found = peer.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                min_new_tokens=count, do_sample=False, use_cache=False,
            )  # fmt: skip
        written = found[0, ids.shape[1] :].numpy() - OFFSET
        return {"text": np.maximum(written, 0).astype(np.uint8).tobytes().hex()}

    write(2)
    return lambda: write(BYTES)
