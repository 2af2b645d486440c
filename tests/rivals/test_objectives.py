"""ByT5 and CANINE in the one trainer: they learn from masked spans and masked characters, resume
bit for bit, and are measured by what they predict, never as causal models."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import bltjax
from bltjax.__main__ import main
from bltjax.config.data import DataConfig
from bltjax.configured import batch_logits, make_model, measure_of, rows_of
from bltjax.data.batches import PairBatch
from bltjax.data.pipeline import held_out_batches
from bltjax.data.records import Document
from bltjax.inference.decoding.decoder import Decoder
from bltjax.model.loss import target_sums
from bltjax.model.params import flattened
from bltjax.text.alphabet import BLT_ALPHABET, encode
from bltjax.text.characters import CLS, SEP
from bltjax.text.sentinels import START, sentinel
from bltjax.training.run import Run
from bltjax.training.train import train

TINY = str(Path(__file__).with_name("tiny_rivals.py"))
NAMES = ("byt5", "canine")
STEPS = 30
TEXT = "the patch begins; 日本"
SCORES = {
    "byt5": ("masked_span_bits_per_byte", "masked-span bits per byte"),
    "canine": ("bits_per_masked_character", "bits per masked character"),
}


@pytest.fixture(scope="module")
def config_of(runs):
    """(family, overrides) -> its RunConfig."""
    paths = [
        f"data.{split}.text.path={runs.root}/{file}.jsonl"
        for split, file in (("train", "train"), ("eval", "held_out"))
    ]
    settings = [*paths, f"optimizer.steps={STEPS}", "evaluate_every=15", "checkpoint.every=15"]

    def make(name: str, *overrides: str):
        return bltjax.load_config(f"{TINY}:{name}", [*settings, *overrides])

    return make


@pytest.fixture(scope="module")
def trained(config_of, tmp_path_factory):
    """(family) -> its run."""
    made: dict[str, Run] = {}

    def run_of(name: str) -> Run:
        if name not in made:
            made[name] = bltjax.train(config_of(name), tmp_path_factory.mktemp(name) / "run")
        return made[name]

    return run_of


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_says_what_it_measures(name, trained, runs, tmp_path, capsys):
    run, (key, measure) = trained(name), SCORES[name]
    losses = [loss for _, loss in run.losses]
    assert len(losses) == STEPS and np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert not run.values("bits_per_byte") and not run.values("held_out_bits_per_byte")
    assert not run.values("mean_patch_bytes")
    assert len(run.values(key)) == STEPS and run.evaluations == run.values(f"held_out_{key}")
    for fill in ("byte_fill", "patch_fill"):
        assert np.mean([share for _, share in run.values(fill)]) > 0.8
    (_, first), (_, last) = run.evaluations
    assert last < first
    source, out = f"{runs.root}/held_out.jsonl", tmp_path / "found.json"
    found = bltjax.evaluate(run.model, source)
    assert found.measure == measure and found.bits_per_byte is None
    assert found.bits == pytest.approx(last, abs=2e-5) and found.cuts > 0
    assert main(["evaluate", f"--workdir={run.workdir}", f"--out={out}"]) == 0
    result, said = json.loads(out.read_text()), capsys.readouterr().out
    assert result["measure"] == measure and result[key] == pytest.approx(last, abs=2e-5)
    assert "bits_per_byte" not in result and measure in said
    assert ("masked_accuracy" in result) == (name == "canine")
    if name == "canine":
        accuracy = run.values("held_out_masked_accuracy")[-1][1]
        assert result["masked_accuracy"] == pytest.approx(accuracy) and 0 < accuracy < 1
        assert "it has no bits per byte" in said
    assert main(["page", str(run.workdir), "--max_bytes=4"]) == 0
    assert measure[1:] in (run.workdir / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_straight_one(name, trained, config_of, tmp_path):
    straight = trained(name)
    train(config_of(name), tmp_path, stop_at=15)
    again = bltjax.train(config_of(name), tmp_path)
    assert again.losses == straight.losses and again.evaluations == straight.evaluations
    for a, b in zip(*map(leaves, (again, straight)), strict=True):
        np.testing.assert_array_equal(a, b)


def leaves(run: Run) -> list[np.ndarray]:
    return [np.asarray(x) for _, x in sorted(flattened(run.model.params).items())]


@pytest.mark.parametrize("name", NAMES)
def test_its_export_is_the_model(name, trained, runs, tmp_path, capsys):
    run, source = trained(name), f"{runs.root}/held_out.jsonl"
    run.model.export(tmp_path / "export")
    again = bltjax.load(tmp_path / "export")
    assert bltjax.evaluate(again, source) == bltjax.evaluate(run.model, source)
    for folder in (run.workdir, tmp_path / "export"):
        assert main(["inspect", str(folder)]) == 0
        said = capsys.readouterr().out
        assert said.splitlines()[-1] == "  whole"
        assert (SCORES[name][0].replace("_", " ") in said) == (folder == run.workdir)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_scores_the_same_alone_and_packed(name, trained, runs):
    """So sums of a corpus don't depend on what shares a row."""
    model = trained(name).model
    lines = (runs.root / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"][:60].encode() for line in lines]
    texts = [Document(np.frombuffer(text, np.uint8)) for text in (*texts, b"a", b"be", b"a b c d")]
    config = model.config
    data = DataConfig(batch_size=1, seq_len=config.max_bytes, max_patches=config.max_patches)
    module = make_model(config.model, config.max_patches, np.float32, "xla")

    @jax.jit
    def sums(params, batch):
        return target_sums(batch_logits(module, params, batch), batch)[:4]

    def total(texts) -> np.ndarray:
        batches, _ = held_out_batches(texts, data, rows_of(config))
        return sum(np.array(sums(model.params, batch), np.float64) for batch in batches)

    packed, alone = total(texts), sum(total([text]) for text in texts)
    np.testing.assert_allclose(packed, alone, rtol=2e-6)
    assert packed[1] > 50


def test_a_byt5_writes_what_whole_passes_predict(trained):
    model, prompts = trained("byt5").model, ["the patch ", "a", "guess and ends bef"]
    alone = [written(model.model, [prompt])[0] for prompt in prompts]
    assert written(model.model, prompts) == alone
    every = np.arange(BLT_ALPHABET.size)
    allowed = BLT_ALPHABET.is_text(every) | (every == BLT_ALPHABET.eos)
    mark = sentinel(0, BLT_ALPHABET)
    module = make_model(model.config.model, 2, np.float32, "xla")
    step = jax.jit(lambda params, batch: batch_logits(module, params, batch)[0])
    for prompt, found in zip(prompts, alone, strict=True):
        ids = encode(prompt, bos=False, eos=False)
        read = [*ids, mark, BLT_ALPHABET.eos]
        decoder, text = [START, mark], []
        for _ in range(12):
            batch = PairBatch(*padded(read, 32), *padded(decoder, 16))
            logits_V = np.array(step(model.params, batch)[len(decoder) - 1])
            logits_V[~allowed] = -np.inf
            chosen = int(logits_V.argmax())
            if chosen == BLT_ALPHABET.eos:
                break
            decoder.append(chosen)
            text.append(chosen - BLT_ALPHABET.offset)
        assert found == bytes(text)


def padded(ids, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of one row, and its documents."""
    row = np.pad(np.array(ids, np.int32), (0, length - len(ids)))
    return row[None], (np.arange(length) < len(ids))[None].astype(np.int32)


def written(model, prompts) -> list[bytes]:
    texts = [b""] * len(prompts)
    for piece in Decoder(model).generate(prompts, max_bytes=12):
        texts[piece.row] += piece.text
    return texts


def test_a_prefix_is_measured_by_another_name(trained, config_of, runs):
    run = trained("byt5")
    objective = dataclasses.replace(run.model.config.model.objective, kind="prefix")
    config = dataclasses.replace(run.model.config.model, objective=objective)
    assert measure_of(config).name == "conditional bits per byte"
    changed = dataclasses.replace(run.model.config, model=config)
    model = bltjax.load(run.workdir)
    model.model = model.model._replace(config=changed)
    found = bltjax.evaluate(model, f"{runs.root}/held_out.jsonl")
    assert found.measure == "conditional bits per byte" and found.text_bytes > 400


def test_a_canine_embeds_texts(trained):
    model = trained("canine").model
    found = model.embed(TEXT)
    width = model.config.model.width
    assert found.characters.shape == (len(TEXT) + 2, width) and found.pooled.shape == (width,)
    assert np.abs(found.pooled).max() <= 1
    many = model.embed([TEXT, "a", b"\xff", ""])
    np.testing.assert_array_equal(many[0].characters, found.characters)
    assert [len(one.characters) for one in many] == [len(TEXT) + 2, 3, 3, 2]
    # As the public implementation, on the text alone and without padding.
    ids_BN = np.array([[CLS, *map(ord, TEXT[:18]), SEP]])
    more = {"attention_mask": np.ones_like(ids_BN), "token_type_ids": np.zeros_like(ids_BN)}
    states, cut = model.forward(input_ids=ids_BN, **more), model.embed(TEXT[:18])
    np.testing.assert_allclose(cut.characters, states["last_hidden_state"][0], atol=2e-5)
    np.testing.assert_allclose(cut.pooled, states["pooler_output"][0], atol=2e-5)
    with pytest.raises(ValueError, match=r"has 102 characters, .* but the model has 96 positions"):
        model.embed("a" * 100)


def test_what_makes_no_sense_is_refused_with_the_reason(trained, config_of, tmp_path):
    for name, why in (("canine", "no next byte. `embed` gives"), ("byt5", "`evaluate` gives its")):
        model = trained(name).model
        for ask in (model.logits, model.bits_per_byte, model.next_bytes, model.entropies):
            with pytest.raises(ValueError, match=why):
                ask(TEXT)
        with pytest.raises(ValueError, match="has no patches"):
            model.patches(TEXT)
    with pytest.raises(ValueError, match="an encoder: it writes no text"):
        trained("canine").model.generate("the ")
    with pytest.raises(ValueError, match="only a CANINE embeds texts"):
        trained("byt5").model.embed(TEXT)
    mute = config_of("canine", "canine.predicts=False")
    for ask in (
        lambda: bltjax.train(mute, tmp_path / "run"),
        lambda: bltjax.training_batches(mute),
    ):
        with pytest.raises(ValueError, match="no head for masked characters"):
            ask()
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(ValueError, match=r"a row of 97 .* longer than canine\.context, 96"):
        bltjax.train(config_of("canine", "data.seq_len=97"), tmp_path / "run")
    headless = bltjax.load(trained("canine").workdir)
    config = dataclasses.replace(headless.config.model, predicts=False)
    headless.model = headless.model._replace(
        config=dataclasses.replace(headless.config, model=config)
    )
    with pytest.raises(ValueError, match="no head for masked characters"):
        bltjax.evaluate(headless, "nowhere.txt")


def test_accumulated_gradients_are_those_of_the_batch(trained, config_of, tmp_path):
    for name in NAMES:
        train(config_of(name, "optimizer.grad_accum_steps=2"), tmp_path / name, stop_at=2)
        halves, whole = Run(tmp_path / name).losses, trained(name).losses[:2]
        np.testing.assert_allclose(halves, whole, rtol=1e-5)
