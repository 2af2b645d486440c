"""Rank promotion is forbidden in every test; a tiny byte LM and BLT are trained once for all."""

import os
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bltjax.__main__ import main

jax.config.update("jax_numpy_rank_promotion", "raise")
# Runs of one shape are compiled once, however many commands train them, in whichever process.
SESSION = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
CACHE = {
    "jax_compilation_cache_dir": f"{tempfile.gettempdir()}/bltjax-compiled-{SESSION}",
    "jax_persistent_cache_min_compile_time_secs": 0.3,
}
for setting, value in CACHE.items():
    jax.config.update(setting, value)
    os.environ[setting.upper()] = str(value)

TINY = str(Path(__file__).parent / "tiny.py")
WORDS = "the patch begins where the next byte is hard to guess and ends before another one"


def write_text(path: Path, documents: int, seed: int) -> None:
    """JSONL of sentences of random words, some with characters outside ASCII."""
    choose = random.Random(seed)
    with path.open("w") as file:
        for _ in range(documents):
            words = choose.choices([*WORDS.split(), "zażółć", "日本"], k=choose.randint(1, 30))
            file.write('{"text": "' + " ".join(words) + '."}\n')


@pytest.fixture(scope="session")
def byte_level_tokenizer(tmp_path_factory) -> Path:
    """A tokenizer file with a token for every byte, and some for what is frequent in WORDS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Work directories of a tiny byte LM and BLT, made by the commands that a user would run."""
    root = tmp_path_factory.mktemp("runs")
    write_text(root / "train.jsonl", 80, seed=1)
    write_text(root / "held_out.jsonl", 12, seed=2)

    def run(*words) -> None:
        assert main(["--debug", *map(str, words)]) == 0

    def train(model, folder, *more):
        part = root / "records" if model == "blt" else root
        suffix = "" if model == "blt" else ".jsonl"
        run(
            "train",
            f"--config={TINY}:{model}",
            f"--workdir={folder}",
            f"--config.data.train.text.path={part}/train{suffix}",
            f"--config.data.held_out.text.path={part}/held_out{suffix}",
            *more,
        )

    byte_lm, blt = root / "byte_lm", root / "blt"
    train("byte_lm", byte_lm)
    for part in ("train", "held_out"):
        run(
            "entropies",
            f"--byte_lm={byte_lm}",
            f"--source={root / part}.jsonl",
            f"--out={root / 'records' / part}",
            "--shard_bytes=3000",
        )
    # Two arguments that every BLT on these records needs.
    blt_settings = (f"--config.entropy_model={byte_lm}", "--config.patching.threshold=4.0")
    train("blt", blt, *blt_settings)
    return SimpleNamespace(
        root=root, byte_lm=byte_lm, blt=blt, run=run, train=train, blt_settings=blt_settings
    )
