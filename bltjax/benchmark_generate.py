"""The sides of `benchmark generate`: one random model, written on by three decoders.

    cached    ours
    whole     our whole model for every byte: what cached decoding has to beat
    port      transformers' generate, without a cache, the only one that is right there

All have the same weights, with a byte LM of 4 layers, and write the same text greedily. A random
model's greedy text runs in circles, some of which have no boundary, or hardly anything else; so the
prompt is a place in the text after which the first side writes patches of 3.5 to 5.5 bytes, with
the threshold for patches of 4.49 in the text itself. Specials have no weight in the head: a random
model would end its text at any byte.
"""

import functools

import numpy as np

from bltjax.alphabet import OFFSET, VOCABULARY, encode
from bltjax.config import BLTConfig, ByteLMConfig, DataConfig, PatchingConfig, RunConfig

BYTE_LM = ByteLMConfig(layers=4, width=256, heads=4, hidden=768)
BYTES, WHOLE_BYTES = 128, 16  # the whole model's cost is that of a buffer, whatever is in it
MEAN_PATCH = 4.49
PLACES = 64  # tried for a prompt
LONGEST = 32768


def text() -> bytes:
    """English of the standard library."""
    from pydoc_data.topics import topics

    return "".join(topics.values()).encode()


def random_params(run: RunConfig, seed: int) -> dict:
    """Parameters as training begins with them, but for the head's columns of specials."""
    import jax

    from bltjax.model import initial_params, make_model

    model = make_model(run.model, 2, np.float32, None)
    params = jax.jit(lambda key: initial_params(model, key))(jax.random.key(seed))
    owner = params["decoder"] if run.blt else params
    owner["head_EV"] = owner["head_EV"] * (np.arange(VOCABULARY) >= OFFSET)[None]
    return params


@functools.cache
def model_parts(model: BLTConfig):
    """(RunConfig, parameters, patching, byte LM), the same in every process."""
    from bltjax.scoring import EntropyModel, score_documents

    data = DataConfig(row_bytes=LONGEST, row_patches=LONGEST)
    byte_lm_run = RunConfig(byte_lm=BYTE_LM, data=data, compute_dtype="float32")
    byte_lm = EntropyModel(BYTE_LM, random_params(byte_lm_run, 1), "", False, byte_lm_run, 0)
    sample = np.frombuffer(text()[:8192], np.uint8)
    entropies, _ = score_documents(BYTE_LM, byte_lm.params, [sample])
    threshold = float(np.quantile(entropies[0], 1 - 1 / MEAN_PATCH))
    patching = PatchingConfig(threshold=round(threshold, 4))
    run = RunConfig(blt=model, data=data, patching=patching, compute_dtype="float32")
    return run, random_params(run, 0), patching, byte_lm


def prompt_at(begin: int, prompt_bytes: int) -> bytes:
    found = text()[begin : begin + prompt_bytes]
    if len(found) < prompt_bytes:
        raise ValueError(
            f"--prompt_bytes ({prompt_bytes}) exceeds the text there is ({len(found)})"
        )
    return found


def cached_side(model: BLTConfig, prompt_bytes: int, begin: int):
    """() -> what our decoder writes; a negative `begin` is sought."""
    from bltjax.decoding import Decoder

    decoder = Decoder(*model_parts(model))

    def write(begin: int) -> dict:
        pieces = decoder.generate([prompt_at(begin, prompt_bytes)], max_bytes=BYTES)
        written = b"".join(piece.text for piece in pieces)
        return {"begin": begin, "text": written.hex(), "patches": decoder.counts.patches}

    for place in range(PLACES * (begin < 0)):
        begin = place * 997
        if 3.5 <= BYTES / max(1, write(begin)["patches"]) <= 5.5:
            break
    return lambda: write(begin)


def whole_side(model: BLTConfig, prompt_bytes: int, begin: int):
    """() -> the beginning of the same text, by the whole model for every byte."""
    from bltjax.decoding.whole import Predictor

    predictor, prompt = Predictor(*model_parts(model)), prompt_at(begin, prompt_bytes)
    return lambda: {"text": predictor.greedy(prompt, WHOLE_BYTES)[0].hex()}


def port_side(model: BLTConfig, prompt_bytes: int, begin: int):
    """() -> the same text by transformers, with our weights."""
    from bltjax.convert import port_model
    from bltjax.weights.model_files import ModelFiles
    from bltjax.weights.tensors import flattened, leaf_of

    try:
        import torch
    except ImportError as error:
        raise ValueError(f"the peer is not installed ({error}): pip install '.[parity]'") from None

    def files(run: RunConfig, params, **more) -> ModelFiles:
        leaves = {path: leaf_of(np.asarray(x)) for path, x in flattened(params).items()}
        return ModelFiles(run, leaves, "run", {}, **more)

    run, params, _, byte_lm = model_parts(model)
    peer = port_model(files(run, params, byte_lm=files(byte_lm.run, byte_lm.params)))
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
