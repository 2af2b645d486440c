"""Every patching scheme trains a small BLT with falling loss, evaluates and, if able, generates."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from bltjax.__main__ import main
from bltjax.text.bpe import load_tokenizer

ENTROPY = {
    "cnn": (),
    "newline_reset": ("--config.patching.newline_reset=True",),
    "monotonic": ("--config.patching.monotonic=True", "--config.patching.threshold=0.0"),
    "relative": ("--config.patching.threshold_add=0.0",),
    "whole_characters": ("--config.patching.whole_characters=True",),
}
OTHERS = {
    "space": ("--config.patching.mode=space",),
    "static": ("--config.patching.mode=static",),
    "byte": ("--config.patching.mode=byte", "--config.data.max_patches=64"),
    "bpe": ("--config.patching.mode=bpe",),
}


@pytest.fixture(scope="module")
def scorers(runs, tmp_path_factory):
    """(byte LM or CNN, its records) by scheme."""
    root = tmp_path_factory.mktemp("scorers")
    runs.train("byte_cnn", root / "cnn")

    def scored(name, byte_lm, *more):
        for part in ("train", "held_out"):
            source, out = runs.root / f"{part}.jsonl", root / name / part
            runs.run(
                "entropies", f"--byte_lm={byte_lm}", f"--source={source}", f"--out={out}", *more
            )
        return byte_lm, root / name

    plain = (runs.byte_lm, runs.root / "records")
    return {
        "cnn": scored("cnn_records", root / "cnn"),
        "newline_reset": scored("newline_records", runs.byte_lm, "--newline_reset"),
    } | dict.fromkeys(("monotonic", "relative", "whole_characters"), plain)


QUICK = ("newline_reset", "bpe")


@pytest.mark.parametrize(
    "scheme",
    [pytest.param(s, marks=[pytest.mark.slow] * (s not in QUICK)) for s in (*ENTROPY, *OTHERS)],
)
def test_scheme(runs, scorers, byte_level_tokenizer, scheme, tmp_path, capsys):
    workdir = tmp_path / "blt"
    words = ["train", "--config=tests/tiny.py:blt", f"--workdir={workdir}"]
    words += ["--config.optimizer.steps=50", "--config.checkpoint.every=50"]
    words += ["--config.evaluate_every=50", "--config.optimizer.lr=1e-2"]
    folder, suffix = runs.root, ".jsonl"
    if scheme in ENTROPY:
        (byte_lm, folder), suffix = scorers[scheme], ""
        words += [f"--config.entropy_model={byte_lm}", "--config.patching.threshold=4.0"]
    for name, part in (("train", "train"), ("eval", "held_out")):
        words.append(f"--config.data.{name}.text.path={folder / part}{suffix}")
    words += (ENTROPY | OTHERS)[scheme]
    if scheme == "bpe":
        original = shutil.copy(byte_level_tokenizer, tmp_path)
        words.append(f"--config.patching.tokenizer={original}")
    runs.run(*words)
    if scheme == "bpe":
        Path(original).unlink()  # the run has its own copy
        load_tokenizer.cache_clear()
    losses = [json.loads(line).get("loss") for line in (workdir / "metrics.jsonl").open()]
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) == 50 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    runs.run("evaluate", f"--workdir={workdir}", f"--out={tmp_path / 'result.json'}")
    assert json.loads((tmp_path / "result.json").read_text())["bits_per_byte"] < 6
    capsys.readouterr()
    generate = ["generate", f"--workdir={workdir}", "--prompt=the next\n日", "--max_bytes=2"]
    if scheme == "bpe":
        assert main(generate) == 1
        assert "bpe patching can't generate" in capsys.readouterr().err
    else:
        runs.run(*generate)


@pytest.mark.parametrize("becomes", ["nothing", pytest.param("another", marks=pytest.mark.slow)])
def test_resumed_bpe_takes_its_own_tokenizer(runs, byte_level_tokenizer, becomes, tmp_path):
    def losses(name, stop_at):
        """Losses of a run up to a step, with the current file at `original`."""
        words = [
            f"--config.data.train.text.path={runs.root / 'train'}.jsonl",
            f"--config.data.eval.text.path={runs.root / 'held_out'}.jsonl",
        ]
        words += ["--config.patching.mode=bpe", f"--config.patching.tokenizer={original}"]
        load_tokenizer.cache_clear()  # as in a process of its own
        runs.run(
            "train", "--config=tests/tiny.py:blt", f"--workdir={tmp_path / name}",
            f"--stop_at={stop_at}", *words,
        )  # fmt: skip
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").open())
        return [line["loss"] for line in lines if "loss" in line]

    original = Path(shutil.copy(byte_level_tokenizer, tmp_path))
    straight = losses("straight", 6)
    losses("resumed", 4)
    original.unlink()
    if becomes == "another":
        Tokenizer(models.BPE(vocab={chr(n): n for n in range(33, 127)}, merges=[])).save(
            str(original)
        )
    assert losses("resumed", 6) == straight
    if becomes == "another":  # which would have made a difference
        assert losses("other", 6) != straight


def test_records_of_another_context_are_refused(runs, scorers, tmp_path, capsys):
    _, records = scorers["newline_reset"]
    words = ["train", "--config=tests/tiny.py:blt", f"--workdir={tmp_path / 'run'}"]
    words += [*runs.blt_settings, f"--config.data.train.text.path={records / 'train'}"]
    words += [f"--config.data.eval.text.path={records / 'held_out'}"]
    assert main(words) == 1
    assert "+newline_reset" in capsys.readouterr().err


def test_calibration_says_which_context_the_records_have(runs, scorers, capsys):
    reset = ["--scheme=entropy:newline_reset=True", "--mean=4"]
    plain = runs.root / "records" / "train"
    assert main(["calibrate", f"--records={plain}", *reset]) == 1
    assert f"but {plain} was scored without it" in capsys.readouterr().err
    runs.run("calibrate", f"--records={scorers['newline_reset'][1] / 'train'}", *reset)
    assert "--config.patching.newline_reset=True" in capsys.readouterr().out
    runs.run("calibrate", f"--records={plain}", "--mean=4")
    assert "newline_reset" not in capsys.readouterr().out


def test_raw_text_scored_while_evaluating_is_the_same(runs, scorers, tmp_path):
    """newline_reset holds for records and for text that is scored in memory."""
    from bltjax.config.data import SourceConfig
    from bltjax.config.model import Patching
    from bltjax.inference.entropy import load_entropy_model, scored_source

    byte_lm, records = scorers["newline_reset"]
    model = load_entropy_model(byte_lm, newline_reset=True)
    patching = Patching(newline_reset=True)
    raw = scored_source(SourceConfig(str(runs.root / "held_out.jsonl")), patching, model)
    kept = scored_source(SourceConfig(str(records / "held_out")), patching, model)
    for a, b in zip(raw, (kept[i] for i in range(len(kept))), strict=True):
        assert abs(a.entropies - b.entropies).max() < 1e-5
