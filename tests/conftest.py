"""Rank promotion is forbidden in every test; a tiny byte LM and BLT are trained once for all."""

import logging
import os
import random
import shutil
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest
from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bltjax.__main__ import main
from bltjax.config.data import SourceConfig
from bltjax.configured import load_config
from bltjax.inference.entropies import write_entropies
from bltjax.system.compiling import machine
from bltjax.system.environment import cache_folders, keep_buffers
from bltjax.training.train import train

jax.config.update("jax_numpy_rank_promotion", "raise")
keep_buffers()  # as every program does
# Programs of one shape are compiled once, for any number of commands, processes and test runs.
PROGRAMS = cache_folders()[0] / "tests" / machine()
PROGRAMS_BYTES = 2 << 30  # after which a run begins with none
CACHE = {
    "jax_compilation_cache_dir": str(PROGRAMS),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}
for setting, value in CACHE.items():
    jax.config.update(setting, value)
    os.environ[setting.upper()] = str(value)

TINY = str(Path(__file__).parent / "tiny.py")
WORDS = "the patch begins where the next byte is hard to guess and ends before another one"


def pytest_addoption(parser):
    parser.addoption(
        "--seed",
        default="0",
        help="of what tests draw: a number, or `random` for one that the first line reports",
    )


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        stored = sum(path.stat().st_size for path in PROGRAMS.glob("*"))
        if stored > PROGRAMS_BYTES:
            shutil.rmtree(PROGRAMS)
    # Before workers start, so that all of them have the same.
    if config.option.seed == "random":
        config.option.seed = str(random.SystemRandom().randrange(10**6))
    fixed = config.option.seed == "0"
    hypothesis.settings.register_profile("bltjax", derandomize=fixed)
    hypothesis.settings.load_profile("bltjax")


def pytest_report_header(config):
    return f"seed of random draws: --seed {config.option.seed}"


@pytest.fixture(autouse=True)
def log():
    """The package's logger in its initial state, whatever commands ran before in this process.

    pytest adds its handlers to loggers that don't propagate, so such a one would log twice.
    """
    logger = logging.getLogger("bltjax")
    logger.setLevel(logging.NOTSET)
    logger.propagate, logger.handlers = True, []
    yield logger
    logger.setLevel(logging.NOTSET)
    logger.propagate, logger.handlers = True, []


@pytest.fixture
def by_tiles(monkeypatch):
    """Self-attention by tiles for rows of any length, of which short ones are otherwise dense."""
    monkeypatch.setattr(sys.modules["bltjax.attention.xla"], "SHORT", 0)


@pytest.fixture
def seed(request) -> int:
    """The seed of one test's draws: from its name and --seed, printed when the test fails."""
    found = zlib.crc32(f"{request.config.option.seed} {request.node.nodeid}".encode())
    print(f"draws: seed {found}, by --seed {request.config.option.seed}")
    return found


def write_text(path: Path, documents: int, seed: int) -> None:
    """JSONL of sentences of random words, some with characters outside ASCII."""
    choose = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            words = choose.choices([*WORDS.split(), "zażółć", "日本"], k=choose.randint(1, 30))
            file.write('{"text": "' + " ".join(words) + '."}\n')


@pytest.fixture(scope="session")
def byte_level_tokenizer(tmp_path_factory) -> Path:
    """A tokenizer file with a token for every byte, and some for frequent parts of WORDS."""
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
    """Work directories of a tiny byte LM and BLT, and records of their training text."""
    root = tmp_path_factory.mktemp("runs")
    write_text(root / "train.jsonl", 80, seed=1)
    write_text(root / "held_out.jsonl", 12, seed=2)

    def run(*words) -> None:
        assert main(["--debug", *map(str, words)]) == 0

    def trained(model, folder, *settings):
        part = root / "records" if model == "blt" else root
        suffix = "" if model == "blt" else ".jsonl"
        paths = (
            f"data.train.text.path={part}/train{suffix}",
            f"data.eval.text.path={part}/held_out{suffix}",
        )
        settings = (setting.removeprefix("--config.") for setting in settings)
        train(load_config(f"{TINY}:{model}", [*paths, *settings]), epath.Path(folder))

    byte_lm, blt = root / "byte_lm", root / "blt"
    trained("byte_lm", byte_lm)
    for part in ("train", "held_out"):
        source, out = SourceConfig(f"{root / part}.jsonl"), epath.Path(root / "records" / part)
        write_entropies(source, epath.Path(byte_lm), out, shard_bytes=3000)
    # Two arguments that every BLT on these records needs.
    blt_settings = (f"--config.entropy_model={byte_lm}", "--config.patching.threshold=4.0")
    trained("blt", blt, *blt_settings)
    return SimpleNamespace(
        root=root, byte_lm=byte_lm, blt=blt, run=run, train=trained, blt_settings=blt_settings
    )
