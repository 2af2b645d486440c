"""A family of models is one file and one line: a toy joins, and every program takes it."""

import numpy as np
import pytest
from conftest import TINY
from toy_family import FAMILY

import bltjax
from bltjax import configured, families
from bltjax.__main__ import main
from bltjax.config.fields import to_dict
from bltjax.inference.decoding.uncached import Predictor
from bltjax.model.byte_decoding import Scorer
from bltjax.training.run import Run

CONFIG = f"""
import importlib.util

from ml_collections import ConfigDict

spec = importlib.util.spec_from_file_location("tiny", {TINY!r})
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def get_config():
    config = tiny.get_config("byte_lm")
    del config.byte_lm
    config.toy = ConfigDict(dict(scale=0.2))
    return config
"""
TEXT = "the patch begins; 日本"


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "toy", FAMILY)  # the one line


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory) -> Run:
    """A trained toy."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text(CONFIG, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, "toy", FAMILY)
        config = bltjax.load_config(
            f"{folder}/toy.py",
            [
                f"data.train.text.path={runs.root}/train.jsonl",
                f"data.eval.text.path={runs.root}/held_out.jsonl",
                "optimizer.lr=0.1",
                "toy.scale=0.3",
            ],
        )
        return bltjax.train(config, folder / "run")


def test_its_settings_are_a_group_of_a_config(trained):
    config = trained.model.config
    assert config.model == FAMILY.Config(scale=0.3) and config.patching is None
    assert to_dict(config)["toy"] == {"scale": 0.3}
    assert configured.parse(type(config), to_dict(config)) == config


def test_it_learns(trained):
    losses = [loss for _, loss in trained.losses]
    assert len(losses) == 12 and losses[-1] < losses[0] - 1
    assert all(later < earlier for earlier, later in zip(losses, losses[2:], strict=False))
    (_, first), (_, last) = trained.evaluations
    assert last < first < 8.1
    assert "Toy in" in trained.page().read_text(encoding="utf-8")


def test_it_is_evaluated(trained, runs, tmp_path):
    source = f"{runs.root}/held_out.jsonl"
    found = bltjax.evaluate(trained.model, source)
    # As training saw it: a bigram needs nothing of what was before a cut.
    assert found.bits_per_byte == pytest.approx(trained.evaluations[-1][1], abs=2e-5)
    assert main(["evaluate", f"--workdir={trained.workdir}", f"--source={source}"]) == 0
    texts = [TEXT, "the"]
    table_VV = np.asarray(trained.model.params["bigrams_VV"], np.float64)
    log_probs_VV = table_VV - np.logaddexp.reduce(table_VV, axis=1, keepdims=True)
    for text in texts:
        ids = np.array([1, *(byte + 4 for byte in text.encode())])
        bits = -log_probs_VV[ids[:-1], ids[1:]].mean() / np.log(2)
        assert trained.model.bits_per_byte(text) == pytest.approx(bits, abs=2e-5)
        entropies = -(np.exp(log_probs_VV) * log_probs_VV).sum(axis=1)[ids]
        np.testing.assert_allclose(trained.model.entropies(text), entropies, atol=2e-5)


def test_it_writes_what_whole_passes_predict(trained, capsys):
    model = trained.model
    expected, margins = Predictor(model.model).greedy("the ", 20)
    assert min(margins) > 1e-4
    written = "".join(model.generate("the ", max_bytes=20))
    assert written == expected.decode(errors="replace") and written
    assert model.generate(["the ", "a"], max_bytes=20)[0] == written
    words = ["generate", f"--workdir={trained.workdir}", "--prompt=the ", "--max_bytes=20"]
    assert main(words) == 0
    assert written in capsys.readouterr().out


def test_it_is_inspected_and_exported(trained, tmp_path, capsys):
    model, export = trained.model, tmp_path / "export"
    model.export(export)
    again = bltjax.load(export)
    assert again.config == model.config
    np.testing.assert_array_equal(again.logits(TEXT), model.logits(TEXT))
    for folder in (trained.workdir, export):
        assert main(["inspect", str(folder)]) == 0
        message = capsys.readouterr().out
        assert "toy: a table of 260 x 260" in message and "67,600 parameters" in message
        assert message.splitlines()[-1] == "  whole"


def test_it_scores_a_corpus(trained, runs, tmp_path):
    trained.model.write_records(f"{runs.root}/train.jsonl", tmp_path / "records")
    assert bltjax.threshold(tmp_path / "records", 3.0) > 0


def test_a_family_that_does_not_decode_refuses_with_its_reason(trained, monkeypatch, capsys):
    reason = "a toy has nothing to write"
    for verbs, why in (({"decoding": reason}, reason), ({}, "a toy has no decoding")):
        mute = FAMILY._replace(decoding=None, verbs=verbs)
        monkeypatch.setitem(families.FAMILIES, "toy", mute)
        with pytest.raises(ValueError, match=why):
            bltjax.load(trained.workdir).generate("the ")
        assert main(["generate", f"--workdir={trained.workdir}", "--prompt=the"]) == 1
        assert why in capsys.readouterr().err


def test_it_does_not_place_patches_while_a_text_is_written():
    with pytest.raises(ValueError, match="placed by a toy, which can't score a text while"):
        Scorer(FAMILY.Config(), newline_reset=False)


def test_without_its_line_its_runs_are_refused(trained, monkeypatch):
    monkeypatch.delitem(families.FAMILIES, "toy")
    with pytest.raises(ValueError, match="toy"):
        bltjax.load(trained.workdir)
