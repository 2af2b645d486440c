"""Every rival in the one trainer: it learns, resumes bit for bit, is evaluated and exported, and
writes what whole passes predict."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import bltjax
from bltjax.__main__ import main
from bltjax.families import family_of
from bltjax.inference.decoding.decoder import Decoder
from bltjax.inference.decoding.uncached import Predictor
from bltjax.model.params import flattened
from bltjax.training.run import Run
from bltjax.training.train import train

TINY = str(Path(__file__).with_name("tiny_rivals.py"))
CAUSAL = ("llama", "megabyte", "spacebyte", "mambabyte")
TEXT = "the patch begins; 日本"
PROMPTS = ["the patch ", "a", "guess and ends bef"]


@pytest.fixture(scope="module")
def tokenizer(runs, tmp_path_factory) -> str:
    """A tokenizer of 300 tokens, trained by its command."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    words = [f"--source={runs.root}/train.jsonl", "--vocab=300", f"--out={path}"]
    assert main(["tokenizer", *words]) == 0
    return str(path)


@pytest.fixture(scope="module")
def config_of(runs, tokenizer):
    """(family, overrides) -> its RunConfig."""

    def make(name: str, *overrides: str):
        own = [f"llama.tokenizer={tokenizer}"] if name == "llama" else []
        paths = [
            f"data.{split}.text.path={runs.root}/{file}.jsonl"
            for split, file in (("train", "train"), ("eval", "held_out"))
        ]
        return bltjax.load_config(f"{TINY}:{name}", [*paths, *own, *overrides])

    return make


@pytest.fixture(scope="module")
def trained(config_of, tmp_path_factory):
    """(family) -> its run of 50 steps."""
    made: dict[str, Run] = {}

    def run_of(name: str) -> Run:
        if name not in made:
            made[name] = bltjax.train(config_of(name), tmp_path_factory.mktemp(name) / "run")
        return made[name]

    return run_of


@pytest.mark.parametrize("name", CAUSAL)
def test_it_learns(name, trained, runs):
    run = trained(name)
    losses = [loss for _, loss in run.losses]
    assert len(losses) == 50 and np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    (_, first), (_, last) = run.evaluations
    assert last < first
    # As training saw it, up to the places where documents are cut.
    found = bltjax.evaluate(run.model, f"{runs.root}/held_out.jsonl")
    assert found.bits_per_byte == pytest.approx(last, abs=2e-5)
    title = family_of(run.model.config).title
    assert f"{title}" in run.page().read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CAUSAL)
def test_a_resumed_run_is_the_straight_one(name, trained, config_of, tmp_path):
    straight, config = trained(name), config_of(name)
    train(config, tmp_path, stop_at=25)
    again = bltjax.train(config, tmp_path)
    assert again.losses == straight.losses
    for a, b in zip(*map(leaves, (again, straight)), strict=True):
        np.testing.assert_array_equal(a, b)


def leaves(run: Run) -> list[np.ndarray]:
    return [np.asarray(x) for _, x in sorted(flattened(run.model.params).items())]


@pytest.mark.parametrize("name", CAUSAL)
def test_it_writes_what_whole_passes_predict(name, trained):
    model = trained(name).model
    expected, margins = Predictor(model.model).greedy(PROMPTS[0], 24)
    assert min(margins) > 1e-4
    alone = [read(model.model, [prompt])[0] for prompt in PROMPTS]
    # Tokens are longer than bytes: the decoder stops at 24 bytes, the reference at 24 tokens.
    assert alone[0] == expected[:24]
    assert read(model.model, PROMPTS) == alone
    stopped = model.generate(PROMPTS[:1], max_bytes=24, stop=alone[0][5:9].decode(errors="ignore"))
    assert stopped[0] == alone[0].split(alone[0][5:9])[0].decode(errors="replace")


def read(model, prompts) -> list[bytes]:
    texts = [b""] * len(prompts)
    for piece in Decoder(model).generate(prompts, max_bytes=24):
        texts[piece.row] += piece.text
    return texts


@pytest.mark.parametrize("name", CAUSAL)
def test_a_text_has_the_bits_of_its_ids(name, trained):
    model = trained(name).model
    ids = model.vocabulary.prompt(TEXT)
    logits = model.logits(TEXT).astype(np.float64)
    assert len(logits) == len(ids)
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    nats = -log_probs[np.arange(len(ids) - 1), ids[1:]].sum()
    bits = nats / np.log(2) / len(TEXT.encode())
    assert model.bits_per_byte(TEXT) == pytest.approx(bits, rel=1e-5)
    entropies = -(np.exp(log_probs) * log_probs).sum(axis=1)
    np.testing.assert_allclose(model.entropies(TEXT), entropies, atol=1e-4)
    (likeliest, chance), *_ = model.next_bytes(TEXT, 3)
    assert chance <= np.exp(log_probs[-1]).max() * 1.001 and isinstance(likeliest, bytes)


@pytest.mark.parametrize("name", CAUSAL)
def test_its_export_is_the_model(name, trained, tmp_path, capsys):
    run = trained(name)
    run.model.export(tmp_path / "export")
    again = bltjax.load(tmp_path / "export")
    np.testing.assert_array_equal(again.logits(TEXT), run.model.logits(TEXT))
    assert dataclasses.replace(again.config, model=None) == dataclasses.replace(
        run.model.config, model=None
    )
    for folder in (run.workdir, tmp_path / "export"):
        assert main(["inspect", str(folder)]) == 0
        said = capsys.readouterr().out
        assert family_of(run.model.config).title in said and said.splitlines()[-1] == "  whole"


def test_the_positions_of_a_row_of_tokens_are_measured(config_of, tmp_path, runs):
    config = config_of(
        "llama", "data.max_patches=0", "optimizer.steps=1", "optimizer.warmup_steps=0"
    )
    run = bltjax.train(config, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["max_patches"]
    assert stored == run.model.config.max_patches == 64
    batch = next(bltjax.training_batches(config))
    assert batch.tokens_BN.shape == (4, 64)
    # A run of the same command is resumed.
    again = bltjax.train(config_of("llama", "data.max_patches=0", "optimizer.steps=2",
                                   "optimizer.warmup_steps=0"), tmp_path / "run")  # fmt: skip
    assert [step for step, _ in again.losses] == [1, 2]


def test_refusals(config_of, tmp_path, trained):
    for name, overrides, why in (
        ("llama", ["llama.tokenizer="], "llama.tokenizer is empty"),
        ("llama", ["llama.vocabulary=299"], "has ids up to 299, but llama.vocabulary is 299"),
        (
            "megabyte",
            ["data.seq_len=256"],
            "256 bytes .data.seq_len. is longer than megabyte.context",
        ),
        ("spacebyte", ["patching.mode=byte"], "SpaceByte has patches of its own"),
    ):
        with pytest.raises(ValueError, match=why):
            bltjax.train(config_of(name, *overrides), tmp_path / "run")
    with pytest.raises(ValueError, match="takes tokens, token_counts"):
        trained("llama").model.forward(bytes_BN=np.ones((1, 4), np.int32))
    with pytest.raises(ValueError, match="needs 'tokens'"):
        trained("llama").model.forward(text0=np.ones(4, np.int32))
    with pytest.raises(ValueError, match="only a BLT drafts"):
        Decoder(trained("megabyte").model.model, draft=2)


def test_samples_of_a_page_end_where_a_table_of_positions_ends(trained):
    run = trained("megabyte")
    assert main(["page", str(run.workdir), "--samples=1", "--max_bytes=300"]) == 0
    texts = json.loads((run.workdir / "samples.json").read_text(encoding="utf-8"))["texts"]
    assert 0 < len(texts[0]["written"].encode()) <= 127
