"""Exported programs give the output of `Decoder`, where there is no bltjax at all."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from test_commands import error_of
from test_decoding import BYTE_LM, TEXT, made, random_params

from bltjax.benchmark.generate import without_specials
from bltjax.config.model import ModelConfig, Patching
from bltjax.family import Model
from bltjax.inference.decoding.decoder import Decoder
from bltjax.inference.serving import ServingConfig, ServingPrograms
from bltjax.model.params import flattened
from bltjax.text.alphabet import OFFSET, encode
from bltjax.weights.export import load_model
from bltjax.weights.lazy import leaf_of
from bltjax.weights.stored import ModelFiles

ROOT = Path(__file__).parents[2]
# launch/serve_export.py runs in a process that can import neither our code nor flax or orbax.
WITHOUT_US = """
import json, runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("bltjax", "flax", "orbax"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""
RUN = """
program, export, *prompts = json.loads(sys.argv[1])
server = runpy.run_path(program)["Server"](export)
assert not {"bltjax", "flax", "orbax"} & sys.modules.keys()
for prompt in prompts:
    print(bytes(server.continued(bytes.fromhex(prompt), 40)).hex())
"""
MAIN = """
program, export = json.loads(sys.argv.pop())
sys.argv[1:] = [export, "--max_bytes=40"]
runpy.run_path(program, run_name="__main__")
"""
SERVER = str(ROOT / "launch" / "serve_export.py")


def without_us(code: str, words: list, lines: bytes = b"") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US + code, json.dumps(words)],
        input=lines, env={"JAX_PLATFORMS": "cpu"}, capture_output=True,
    )  # fmt: skip


def greedy(decoder: Decoder, prompt: bytes, max_bytes: int) -> bytes:
    return b"".join(piece.text for piece in decoder.generate([prompt], max_bytes=max_bytes))


def test_bad_input(runs, tmp_path, capsys):
    def error(*words):
        said = error_of(capsys, "convert", runs.byte_lm, tmp_path / "out", *words)
        assert list(tmp_path.iterdir()) == []
        return said

    assert "--serving is 63 positions, not >= 64" in error("--serving=63")
    few = error("--serving=64", "--serving_patches=65")
    assert "--serving_patches (65) must be from 16 to the 64 positions" in few
    assert "--serving_rows is 0" in error("--serving=64", "--serving_rows=0")
    assert "are settings of --serving" in error("--serving_rows=2")
    assert "not into --to meta" in error("--serving=64", "--to=meta")
    files = files_of("newline")
    config = ServingConfig(64, 32, 1)
    with pytest.raises(ValueError, match="needs a byte LM"):
        ServingPrograms(files._replace(byte_lm=None), config)
    bpe = Patching(mode="bpe", tokenizer="tokenizer.json")
    with pytest.raises(ValueError, match="where a token ends"):
        ServingPrograms(
            files._replace(config=dataclasses.replace(files.config, patching=bpe)), config
        )


def test_a_server_without_our_code_writes_the_same(runs, tmp_path, capsys):
    folder = tmp_path / "served"
    runs.run("convert", runs.blt, folder, "--serving=128", "--serving_patches=128")
    assert "serving: 4 programs" in capsys.readouterr().out
    prompts = [b"", b"the patch", b"\xff\xfe zl", TEXT.encode()[:70], TEXT.encode()[:125]]
    words = [SERVER, str(folder), *(prompt.hex() for prompt in prompts)]
    done = without_us(RUN, words)
    assert done.returncode == 0, done.stderr.decode()
    decoder = Decoder(load_model(folder))
    *expected, beginning = [greedy(decoder, prompt, 40) for prompt in prompts]
    *found, cut = [bytes.fromhex(line) for line in done.stdout.decode().splitlines()]
    assert found == expected and len(expected[1]) > 10
    # After BOS and 125 bytes there is room for 2 more, and the byte after them; one fewer if they
    # were as many patches.
    assert beginning[:2] == cut[:2] and beginning.startswith(cut) and len(cut) <= 3

    # The program itself: a prompt per line, a text per line. A prompt that is too long ends it.
    lines = b"\n".join([prompts[1], prompts[2], b"x" * 128])
    done = without_us(MAIN, [SERVER, str(folder)], lines)
    assert done.returncode == 1
    assert b"128 bytes; this export takes at most 127" in done.stderr
    written = [prompts[1] + expected[1], prompts[2] + expected[2]]
    assert done.stdout == b"".join(text + b"\n" for text in written)

    about = json.loads((folder / "serving" / "serving.json").read_text())
    assert about["prompts"] == [64, 128] and about["compute_dtype"] == "float32"
    for found in about["arrays"]:
        assert (folder / found["path"] / ".zarray").exists()
    for name in ("prepare", "prefill_64", "prefill_128", "step"):
        stored = bytearray((folder / "serving" / f"{name}.bin").read_bytes())
        program = export.deserialize(stored)
        assert program.platforms == ("cpu", "tpu")
        assert "custom_call" not in program.mlir_module()
    # The manifest gives a program's arguments.
    sizes = [len(about["weights"]), len(about["memory"]), 1, 1]
    assert len(program.in_avals) == sum(sizes)
    listed = [*about["weights"], *about["memory"]]
    for aval, found in zip(program.in_avals, listed, strict=False):
        assert list(aval.shape) == found["shape"] and aval.dtype.name == found["dtype"]


def endless_params(config):
    """Random parameters of a model whose greedy text never ends: its specials have no weight."""
    return without_specials(jax.tree.map(np.asarray, random_params(config)))


def files_of(mode: str) -> ModelFiles:
    def leaves(params):
        return {name: leaf_of(np.asarray(x)) for name, x in flattened(params).items()}

    if mode == "byte LM":
        config = ModelConfig(BYTE_LM, compute_dtype="float32")
        return ModelFiles(config, leaves(endless_params(BYTE_LM)), "run", {})
    _, config, patching, scorer = made(mode)
    byte_lm = ModelFiles(scorer.config, leaves(scorer.params), "run", {})
    settings = ModelConfig(config, patching, compute_dtype="float32")
    return ModelFiles(settings, leaves(endless_params(config)), "run", {}, byte_lm=byte_lm)


SLOW = ("one long patch", "longest 3", "monotonic", "whole", "space", "cnn", "byte LM")


@pytest.mark.parametrize(
    "mode", ["newline", *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW)]
)
def test_rows_come_stand_and_go(mode):
    """Three rows, one of which pauses at every other byte, give the same text as each of them
    alone."""
    files = files_of(mode)
    programs = ServingPrograms(files, ServingConfig(64, 64, 3))
    weights = jax.jit(programs.prepare)(
        tuple(files_leaf(files, found["path"]) for found in programs.arrays)
    )
    prefill, step = jax.jit(programs.prefill), jax.jit(programs.step)
    prompts = [b"", TEXT.encode()[:30], TEXT.encode()[5:19]]
    logits, room, memories = zip(*(prefill(weights, *padded(p)) for p in prompts), strict=True)
    memory = tuple(jnp.concatenate(parts) for parts in zip(*memories, strict=True))
    assert [(x.shape, x.dtype) for x in memory] == [(x.shape, x.dtype) for _, x in programs.memory]
    logits, room, texts = np.concatenate(logits), np.concatenate(room), [b""] * 3
    count = 24
    for tick in range(2 * count):
        goes = np.array([len(text) < count for text in texts])
        goes[1] &= tick % 2 == 0
        ids = logits.argmax(axis=1).astype(np.int32)
        before = room
        logits, room, memory = step(weights, memory, np.where(goes, ids, 77), goes)
        logits, room = np.array(logits), np.array(room)
        assert (room[~goes] == before[~goes]).all() and (room <= before).all()
        for row in np.flatnonzero(goes):
            texts[row] += bytes([ids[row] - OFFSET])
    decoder = decoder_of(mode)
    for text, prompt in zip(texts, prompts, strict=True):
        assert text == greedy(decoder, prompt, count) and len(text) == count


def padded(prompt: bytes):
    row = np.zeros((1, 64), np.int32)
    row[0, : len(prompt) + 1] = encode(prompt, eos=False)
    return row, np.array([len(prompt) + 1], np.int32)


def files_leaf(files: ModelFiles, path: str):
    *folder, name = path.split("/")
    part = files.byte_lm if folder[0] == "byte_lm" else files
    leaf = part.leaves[name.replace(".", "/")]
    return leaf.read((), slice(0, leaf.shape[0]))


def decoder_of(mode: str) -> Decoder:
    if mode == "byte LM":
        config = ModelConfig(BYTE_LM, compute_dtype="float32")
        return Decoder(Model(config, endless_params(BYTE_LM)))
    _, config, patching, byte_lm = made(mode)
    settings = ModelConfig(config, patching, compute_dtype="float32")
    return Decoder(Model(settings, endless_params(config), byte_lm))
