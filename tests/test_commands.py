"""The commands as a person types them: their files, their output and their refusals."""

import argparse
import json
import shutil

import numpy as np
import pytest
from readmes import READMES, ROOT, shown_commands

from bltjax.__main__ import VERBS, main, program_of
from bltjax.config.data import SourceConfig
from bltjax.config.model import Patching
from bltjax.configured import load_config
from bltjax.data.calibrate import calibrate, mean_patch_bytes
from bltjax.data.records import Document, RecordDocuments
from bltjax.evaluation.evaluate import compressor_bits, evaluate


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert VERBS[verb] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)}"[:80])
        for path in READMES
        for words in shown_commands(path)
        if "..." not in words
    ],
)
def test_commands_in_the_readmes_are_valid(words):
    """Every verb and option exists, and so does every setting that is overridden."""
    verb, *words = words
    parser = argparse.ArgumentParser(allow_abbrev=False)
    program_of(verb).add_arguments(parser)
    args, rest = parser.parse_known_args(words)
    overrides = [word.removeprefix("--config.").replace("NATS", "1.5") for word in rest]
    assert all(word.startswith("--config.") for word in rest)
    assert not overrides or verb in ("train", "plan")
    if verb in ("train", "plan"):
        load_config(args.config, overrides)


def test_unknown_options_and_verbs(capsys):
    for words in (["fly"], ["train", "--config=x", "--workdir=y", "--fast"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2


def error_of(capsys, *words):
    assert main(list(map(str, words))) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(error.splitlines()) < 12
    return error


def test_evaluate_and_compressors(runs, tmp_path, capsys):
    out = tmp_path / "result.json"
    runs.run("evaluate", f"--workdir={runs.blt}", "--compressors", f"--out={out}")
    result = json.loads(out.read_text())
    assert 2 < result["bits_per_byte"] < 9 and result["model"] == "blt"
    assert set(result["compressors"]) == {"gzip", "xz", "xz_after_training_text"}
    assert "bits per byte" in capsys.readouterr().out
    # Raw text is scored on the fly: the same number, and every byte counts once.
    raw = evaluate(runs.blt, SourceConfig(str(runs.root / "held_out.jsonl")))
    assert raw["bits_per_byte"] == pytest.approx(result["bits_per_byte"], abs=1e-4)
    texts = [json.loads(t)["text"] for t in (runs.root / "held_out.jsonl").open()]
    assert raw["text_bytes"] == sum(len(text.encode()) for text in texts) == result["text_bytes"]


def test_evaluation_does_not_depend_on_order(runs, tmp_path):
    lines = (runs.root / "held_out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "turned.jsonl").write_text("".join(lines[::-1]))
    bits = [
        evaluate(runs.byte_lm, SourceConfig(str(path)))["bits_per_byte"]
        for path in (runs.root / "held_out.jsonl", tmp_path / "turned.jsonl")
    ]
    assert bits[0] == pytest.approx(bits[1], abs=2e-5)


def test_evaluation_errors_come_first(runs, tmp_path, monkeypatch, capsys):
    """Before the model is loaded, with the option and the path that were typed."""
    monkeypatch.setattr("bltjax.evaluation.evaluate.load_params", None)
    monkeypatch.setattr("bltjax.evaluation.evaluate.load_scorer", None)
    source = tmp_path / "text.txt"
    source.write_text("some text")
    (tmp_path / "empty.txt").write_text("")
    words = ["evaluate", f"--workdir={runs.byte_lm}", f"--source={source}"]
    missing = tmp_path / "none" / "x.json"
    error = error_of(capsys, *words, f"--out={missing}")
    assert f"--out={missing}: its folder {missing.parent} does not exist" in error
    assert "partial" not in error
    assert f"--out={tmp_path} is a folder" in error_of(capsys, *words, f"--out={tmp_path}")
    assert "would replace what the evaluation reads" in error_of(capsys, *words, f"--out={source}")
    part = runs.byte_lm / "metrics.jsonl"
    assert "would replace a part of" in error_of(capsys, *words, f"--out={part}")
    assert "no such file" in error_of(capsys, *words[:2], f"--source={tmp_path / 'none'}")
    assert "is empty" in error_of(capsys, *words[:2], f"--source={tmp_path / 'empty.txt'}")
    assert source.read_text() == "some text"


def test_one_byte_is_evaluated(runs, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff")
    result = evaluate(runs.blt, SourceConfig(str(tmp_path / "x.txt")))
    assert result["text_bytes"] == 1 and result["bits_per_byte"] > 0


def test_compressors_by_hand():
    text = b"tokens are out, bytes are in. " * 40
    bits = compressor_bits(text, text)
    assert bits["xz_after_training_text"] < bits["xz"] and bits["gzip"] < 1


def test_entropies_keep_finished_shards(runs, tmp_path, capsys):
    folder = tmp_path / "records"
    shutil.copytree(runs.root / "records" / "train", folder)
    shards = sorted(folder.glob("*.array_record"))
    assert len(shards) > 2
    before = [shard.read_bytes() for shard in shards]
    kept = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    shards[2].write_bytes(bytes(len(before[2])))  # as long as it should be, but damaged
    (folder / "manifest.json").unlink()
    (folder / f".{shards[1].name}.partial").write_bytes(b"half a shard")
    words = [
        "entropies",
        f"--byte_lm={runs.byte_lm}",
        f"--source={runs.root / 'train.jsonl'}",
        f"--out={folder}",
        "--shard_bytes=3000",
    ]
    runs.run(*words)
    assert [shard.read_bytes() for shard in shards] == before
    assert shards[0].stat().st_mtime_ns == kept and "kept" in capsys.readouterr().out
    manifest = RecordDocuments(folder).manifest
    positions, padding = manifest.total("positions"), manifest.total("padding")
    assert padding <= 0.03 * (positions + padding)
    assert "started with another" in error_of(capsys, *words[:-1], "--shard_bytes=4000")


def test_calibrate(runs, tmp_path, capsys):
    out = tmp_path / "threshold"
    runs.run(
        "calibrate", f"--records={runs.root / 'records' / 'train'}", "--mean=4", f"--out={out}"
    )
    printed = capsys.readouterr().out
    assert "mean patch (bytes)" in printed and "--config.patching.threshold=" in printed
    assert 0 < float(out.read_text()) < 6
    for mean in ("nan", "inf", "0", "-1"):
        assert main(["calibrate", f"--records={runs.root / 'records' / 'train'}", f"--mean={mean}"])
        assert "not a finite number of bytes >= 1" in capsys.readouterr().err


def test_calibration_reaches_its_target():
    random = np.random.default_rng(0)
    documents = [
        Document(np.zeros(200, np.uint8), random.uniform(0, 5, 201).astype(np.float32))
        for _ in range(20)
    ]
    threshold, tried = calibrate(documents, Patching(), 4.5)
    found = mean_patch_bytes(documents, Patching(threshold=threshold))
    assert found == pytest.approx(4.5, rel=0.01) and len(tried) > 3
    with pytest.raises(ValueError, match=r"no threshold gives a mean of 1000 bytes"):
        calibrate(documents, Patching(), 1000)
    for target in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"not > 0"):
            calibrate(documents, Patching(), target)


def test_calibration_that_comes_nowhere_near():
    """Documents of one byte have patches of one byte, or of one and a half."""
    documents = [Document(np.zeros(1, np.uint8), np.full(2, 2.0, np.float32))] * 4
    with pytest.raises(
        ValueError, match=r"are 1\.000 bytes at (1\.9+|2\.0+) nats and 1\.500 bytes at 2"
    ):
        calibrate(documents, Patching(), 1.25)
    threshold, tried = calibrate(documents, Patching(), 1.45)  # within 5 %, with a warning
    assert dict(tried)[threshold] == 1.5


def test_calibrate_warns_or_refuses(runs, tmp_path, monkeypatch, capsys):
    words = ["calibrate", f"--records={runs.root / 'records' / 'train'}", f"--out={tmp_path / 'x'}"]
    for mean in ("nan", "0", "-4"):
        assert "not a finite number of bytes >= 1" in error_of(capsys, *words, f"--mean={mean}")
    assert "its folder" in error_of(capsys, *words[:2], f"--out={tmp_path}/none/x")
    assert not list(tmp_path.iterdir())
    document = Document(np.zeros(1, np.uint8), np.full(2, 2.0, np.float32))
    monkeypatch.setattr("bltjax.data.calibrate.sample_documents", lambda *_: [document])
    runs.run(*words, "--mean=1.45")
    assert "mean at that threshold is 1.500 bytes, not 1.45" in capsys.readouterr().err
    (tmp_path / "x").unlink()
    assert "no threshold gives a mean near" in error_of(capsys, *words, "--mean=1.25")
    assert not list(tmp_path.iterdir())


def test_generate_prints_text(runs, capsys):
    runs.run("generate", f"--workdir={runs.blt}", "--prompt=the patch", "--max_bytes=5")
    printed = capsys.readouterr()
    assert printed.out.startswith("the patch") and "bytes" in printed.err


def test_generate_from_nothing_and_from_invalid_bytes(runs, tmp_path):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe\x80")
    runs.run("generate", f"--workdir={runs.byte_lm}", "--max_bytes=2")
    runs.run(
        "generate", f"--workdir={runs.byte_lm}", f"--prompt_file={tmp_path / 'prompt'}",
        "--max_bytes=2",
    )  # fmt: skip


def test_bad_input(runs, tmp_path, capsys):
    train = ["train", "--config=tests/tiny.py:byte_lm", f"--workdir={tmp_path / 'run'}"]
    path = "--config.data.train.text.path"
    assert "an empty path" in error_of(capsys, *train)
    held_out = f"--config.data.eval.text.path={runs.root / 'held_out.jsonl'}"
    train.append(held_out)
    missing = error_of(capsys, *train, f"{path}={tmp_path}/none.txt")
    assert "none.txt: no such file" in missing
    (tmp_path / "empty.txt").write_bytes(b"")
    assert "is empty" in error_of(capsys, *train, f"{path}={tmp_path}/empty.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "a b c"}\noops\n')
    assert "bad.jsonl, line 2: not JSON" in error_of(capsys, *train, f"{path}={tmp_path}/bad.jsonl")
    unknown = error_of(capsys, *train, "--config.optimizer.lrate=3")
    assert "config.optimizer.lrate is no setting; did you mean" in unknown
    assert "neither a training run nor an export" in error_of(
        capsys, "evaluate", f"--workdir={tmp_path}"
    )
    assert "is not a finished folder" in error_of(capsys, "calibrate", f"--records={tmp_path}")
    records = runs.root / "records" / "train"
    assert "not a byte LM" in error_of(
        capsys,
        "entropies",
        f"--byte_lm={runs.blt}",
        f"--source={records}",
        f"--out={tmp_path / 'o'}",
    )
    assert "no threshold gives" in error_of(
        capsys, "calibrate", f"--records={records}", "--mean=999"
    )


def test_truncated_records_stop_training(runs, tmp_path, capsys):
    folder = tmp_path / "records"
    shutil.copytree(runs.root / "records" / "train", folder)
    shard = sorted(folder.glob("*.array_record"))[0]
    shard.write_bytes(shard.read_bytes()[:-7])
    words = ["train", "--config=tests/tiny.py:blt", f"--workdir={tmp_path / 'run'}"]
    words += [*runs.blt_settings, f"--config.data.train.text.path={folder}"]
    words += [f"--config.data.eval.text.path={runs.root / 'records' / 'held_out'}"]
    assert f"{shard} has" in error_of(capsys, *words)


def test_odd_texts_train(runs, tmp_path):
    """Invalid UTF-8 and documents of one byte are texts like any other."""
    (tmp_path / "a.txt").write_bytes(bytes(range(256)))
    (tmp_path / "b.txt").write_bytes(b"x")
    runs.run(
        "train",
        "--config=tests/tiny.py:byte_lm",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.train.text.path={tmp_path}",
        f"--config.data.eval.text.path={tmp_path}/b.txt",
        "--config.data.batch_size=2",
        "--stop_at=2",
    )
