"""The library: what `import bltjax` gives, by the tiny runs that all tests share.

That importing it starts no jax is tested in test_surroundings.py; what a loaded model computes, in
inference/test_loaded.py.
"""

import contextlib
import inspect
import io
import itertools
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY
from readmes import ROOT

import bltjax
from bltjax.__main__ import main
from bltjax.config.data import SourceConfig
from bltjax.config.rows import patch_rows
from bltjax.config.run import RunConfig
from bltjax.data import pipeline
from bltjax.distributed import rows
from bltjax.evaluation.scores import Evaluation
from bltjax.inference.loaded import LoadedModel
from bltjax.training import train as trainer
from bltjax.training.run import Run
from bltjax.weights.workdir import saved_steps

TEXT = "the patch begins where the next byte is hard to guess; 日本 żółć"
SIGNATURES = {
    "load": "(path, *, mesh=None, dtype=None)",
    "load_config": "(path, overrides=())",
    "train": "(config, workdir, *, resume=True)",
    "evaluate": "(model, source)",
    "patch": "(text, patching, entropies=None)",
    "training_batches": "(config)",
    "threshold": "(records, mean)",
}


@pytest.fixture(scope="module")
def byte_lm(runs) -> LoadedModel:
    return bltjax.load(runs.byte_lm)


@pytest.fixture(scope="module")
def blt(runs) -> LoadedModel:
    return bltjax.load(runs.blt)


def config_of(runs, model: str, *settings: str) -> RunConfig:
    """The config by which the fixture `runs` trained a model."""
    part = runs.root / "records" if model == "blt" else runs.root
    suffix = "" if model == "blt" else ".jsonl"
    own = [setting.removeprefix("--config.") for setting in runs.blt_settings]
    return bltjax.load_config(
        f"{TINY}:{model}",
        [
            f"data.train.text.path={part}/train{suffix}",
            f"data.eval.text.path={part}/held_out{suffix}",
            *(own if model == "blt" else ()),
            *settings,
        ],
    )


def test_the_exports_are_all_and_each_resolves():
    scope: dict = {}
    exec("from bltjax import *", scope)
    assert scope.keys() - {"__builtins__"} == set(bltjax.__all__)
    assert bltjax.__all__ == sorted(bltjax.__all__) and set(bltjax.__all__) <= set(dir(bltjax))
    for name in bltjax.__all__:
        assert callable(getattr(bltjax, name)) and getattr(bltjax, name).__doc__, name
    public = {name for name, found in vars(bltjax).items() if inspect.isfunction(found)}
    assert {name for name in public if not name.startswith("_")} == SIGNATURES.keys()
    with pytest.raises(AttributeError, match="'bltjax' has no attribute 'patchs'"):
        _ = bltjax.patchs


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_these(name):
    found = inspect.signature(getattr(bltjax, name))
    bare = [each.replace(annotation=each.empty) for each in found.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_a_prompt_gives_pieces_and_a_list_gives_the_same_texts(byte_lm):
    prompts = ["the ", "日本".encode()]
    alone = [list(byte_lm.generate(prompt, max_bytes=12)) for prompt in prompts]
    assert all(isinstance(piece, str) for pieces in alone for piece in pieces)
    together = byte_lm.generate(prompts, max_bytes=12)
    assert isinstance(together, list) and together == ["".join(pieces) for pieces in alone]
    assert byte_lm.generate([], max_bytes=12) == []


@pytest.fixture(scope="module")
def resumed(runs, tmp_path_factory) -> SimpleNamespace:
    """The byte LM of `runs`, stopped in the middle and resumed by the library; and its bar."""
    config, workdir = config_of(runs, "byte_lm"), tmp_path_factory.mktemp("library") / "byte_lm"
    trainer.train(config, workdir, stop_at=6)
    assert saved_steps(workdir)[-1] == 6
    with contextlib.redirect_stderr(io.StringIO()) as bar:
        run = bltjax.train(config, str(workdir))
    return SimpleNamespace(run=run, bar=bar.getvalue())


def test_train_resumes_what_is_there(resumed, runs, byte_lm):
    straight, run = Run(runs.byte_lm), resumed.run
    assert run.losses == straight.losses and len(run.losses) == 12
    assert run.evaluations == straight.evaluations
    assert [step for step, _ in run.evaluations] == [6, 12]
    np.testing.assert_array_equal(run.model.logits(TEXT), byte_lm.logits(TEXT))


def test_train_shows_a_bar_with_its_steps(resumed):
    first, *_, last = re.findall(r"(\d+)/12 ", resumed.bar)
    assert (first, last) == ("6", "12") and "bits/byte" in resumed.bar


@pytest.mark.parametrize("processes", [1, 2])
def test_train_is_as_fast_as_the_command(processes, runs, tmp_path, monkeypatch, caplog):
    """Freed memory and compiled programs are kept; not the programs of many processes."""
    done = []

    def kept(what: str) -> str:
        done.append(what)
        return "the disk is full"

    monkeypatch.setattr("bltjax.training.run.process_count", lambda: processes)
    monkeypatch.setattr("bltjax.training.run.keep_buffers", lambda: kept("buffers"))
    monkeypatch.setattr("bltjax.training.run.keep_programs", lambda: kept("programs"))
    monkeypatch.setattr("bltjax.training.run.train", lambda *_, **__: done.append("trained"))
    bltjax.train(config_of(runs, "byte_lm"), tmp_path)
    programs = ["programs"] * (processes == 1)
    assert done == ["buffers", *programs, "trained"]
    warnings = ["compiled programs are not cached: the disk is full"] * (processes == 1)
    assert [line for line in caplog.messages if "programs" in line] == warnings


def test_train_without_resume_refuses_a_folder_that_has_a_run(runs, resumed):
    workdir = resumed.run.workdir
    with pytest.raises(ValueError, match=rf"{workdir} has a run, saved at step 12"):
        bltjax.train(config_of(runs, "byte_lm"), workdir, resume=False)


def test_a_run_has_curves_a_model_and_a_page(resumed):
    run = resumed.run
    steps, losses = zip(*run.losses, strict=True)
    assert steps == tuple(range(1, 13)) and losses[-1] < losses[0]
    assert all(0 < bits < 9 for _, bits in run.evaluations)
    assert [step for step, _ in run.values("gradient_norm")] == list(steps)
    assert run.values("no_such_figure") == []
    assert isinstance(run.model, LoadedModel) and run.model is run.model
    page = run.page()
    assert page.parent == run.workdir and "<svg" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("model", ["byte_lm", "blt"])
def test_evaluate_gives_the_figures_of_the_command(runs, model, tmp_path):
    folder, source = getattr(runs, model), f"{runs.root}/held_out.jsonl"
    out = tmp_path / "evaluation.json"
    assert main(["evaluate", f"--workdir={folder}", f"--source={source}", f"--out={out}"]) == 0
    expected = json.loads(out.read_text(encoding="utf-8"))
    for given in (source, SourceConfig(source)):
        found = bltjax.evaluate(bltjax.load(folder), given)
        assert found.bits_per_byte == pytest.approx(expected["bits_per_byte"], abs=2e-5)
        counts = (found.text_bytes, found.documents, found.cuts)
        assert counts == tuple(expected[key] for key in ("text_bytes", "documents", "cuts"))


@pytest.mark.parametrize("mode", ["entropy", "space", "static", "byte", "bpe"])
@pytest.mark.parametrize("text", [TEXT, b"\xff\x80 a", "", "x"])
def test_patches_join_to_the_text(mode, text, byte_lm, byte_level_tokenizer):
    tokenizer = str(byte_level_tokenizer) if mode == "bpe" else ""
    entropies = byte_lm.entropies(text) if mode == "entropy" else None
    patching = bltjax.Patching(mode, threshold=5.5, tokenizer=tokenizer)
    patches = bltjax.patch(text, patching, entropies)
    assert all(isinstance(patch, bytes) and patch for patch in patches)
    assert b"".join(patches) == (text if isinstance(text, bytes) else text.encode())


def test_patch_gives_the_patches_of_the_model(blt):
    found = bltjax.patch(TEXT, blt.config.patching, blt.entropies(TEXT))
    assert found == blt.patches(TEXT) and len(found) > 1


def test_patching_by_entropy_needs_an_entropy_for_each_place():
    with pytest.raises(ValueError, match=r"needs 4 entropies for a text of 3 bytes.*not 0"):
        bltjax.patch("abc", bltjax.Patching("entropy"))
    with pytest.raises(ValueError, match=r"needs 4 entropies for a text of 3 bytes.*not 3"):
        bltjax.patch("abc", bltjax.Patching("entropy"), np.zeros(3, np.float32))


def same(batch, other) -> bool:
    pairs = zip(batch, other, strict=True)
    return type(batch) is type(other) and all(np.array_equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("model", ["byte_lm", "blt"])
def test_training_batches_are_those_of_a_run(runs, model, tmp_path, monkeypatch):
    config, trained_on = config_of(runs, model), []
    kept = rows.make_global_batch
    monkeypatch.setattr(
        trainer,
        "make_global_batch",
        lambda batch, *more: trained_on.append(batch) or kept(batch, *more),
    )
    trainer.train(config, tmp_path / "run", stop_at=3)
    batches = bltjax.training_batches(config)
    assert len(trained_on) == 3
    assert all(same(next(batches), batch) for batch in trained_on)
    patching = config.patching if model == "blt" else None
    plain = pipeline.training_batches(
        config.data, patch_rows(patching), seed=config.seed, streams=range(config.data.batch_size)
    )
    skipped = itertools.islice(plain, 3, 5)
    state = batches.get_state()
    assert all(same(next(batches), batch) for batch in skipped)
    again = bltjax.training_batches(config)
    again.set_state(state)
    plain = itertools.islice(plain, 3, 4)
    assert all(same(next(again), batch) for batch in plain)


def test_an_export_loads_to_the_same_logits(blt, byte_lm, tmp_path):
    for name, model in (("blt", blt), ("byte_lm", byte_lm)):
        model.export(str(tmp_path / name))
        again = bltjax.load(tmp_path / name)
        np.testing.assert_array_equal(again.logits(TEXT), model.logits(TEXT))
        assert again.config == model.config
        assert sorted(path.name for path in tmp_path.iterdir())[-1] == name  # no partial folder
        with pytest.raises(ValueError, match=rf"{tmp_path / name} exists"):
            model.export(tmp_path / name)


def test_records_and_their_threshold(runs, byte_lm, blt, tmp_path):
    records = tmp_path / "records"
    byte_lm.write_records(f"{runs.root}/train.jsonl", records)
    (shard,) = (path.read_bytes() for path in records.glob("*.array_record"))
    byte_lm.write_records(f"{runs.root}/train.jsonl", str(records))  # nothing is left to do
    assert [path.read_bytes() for path in records.glob("*.array_record")] == [shard]
    nats = bltjax.threshold(records, 3.0)
    assert isinstance(nats, float)
    lines = (runs.root / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    patching = bltjax.Patching("entropy", threshold=nats)
    patches = [len(bltjax.patch(text, patching, byte_lm.entropies(text))) for text in texts]
    # BOS and EOS are positions of a document; BOS is a patch.
    positions = sum(len(text.encode()) + 2 for text in texts)
    assert positions / sum(count + 1 for count in patches) == pytest.approx(3.0, rel=0.1)
    with pytest.raises(ValueError, match="no threshold gives a mean of 1000"):
        bltjax.threshold(records, 1000)
    with pytest.raises(ValueError, match="records are written by a byte LM"):
        blt.write_records(f"{runs.root}/train.jsonl", tmp_path / "others")


def test_load_config_names_the_nearest_setting():
    config = bltjax.load_config("configs/quickstart.py:blt", ["optimizer.steps=90"])
    assert config.optimizer.steps == 90 and config.model.group == "blt"
    with pytest.raises(ValueError, match=r"optimizer\.step is no setting; did you mean 'steps'"):
        bltjax.load_config("configs/quickstart.py:blt", ["optimizer.step=90"])


def test_load_names_the_folder_that_holds_no_model(runs, tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        bltjax.load(tmp_path)
    shutil.copytree(runs.byte_lm, tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="damaged"):
        bltjax.load(tmp_path / "damaged")


@pytest.fixture(scope="module")
def user_folder(runs, tmp_path_factory):
    """A folder as a user has it: text, the quickstart's runs, and its configs, which are tiny."""
    folder = tmp_path_factory.mktemp("user")
    for part in ("train", "held_out"):
        (folder / "text" / part).mkdir(parents=True)
        lines = (runs.root / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            path = folder / "text" / part / f"{number}.txt"
            path.write_text(json.loads(line)["text"], encoding="utf-8")
    (folder / "configs").mkdir()
    shutil.copy(TINY, folder / "configs" / "quickstart.py")
    for model in ("byte_lm", "blt"):
        shutil.copytree(getattr(runs, model), folder / "runs" / "quickstart" / model)
    return folder


@pytest.mark.parametrize("readme", ["README.md", "bltjax/README.md"])
def test_the_examples_of_the_readme_run(readme, user_folder, monkeypatch):
    """Its blocks of Python, one after the other, with fewer steps and shorter texts."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / readme).read_text("utf-8"), re.M | re.S)
    assert blocks
    monkeypatch.chdir(user_folder)
    scope: dict = {}
    for block in blocks:
        block = re.sub(r"optimizer\.steps=\d+", "optimizer.steps=12", block)
        block = re.sub(r"max_bytes=\d+", "max_bytes=8", block)
        exec(compile(block, readme, "exec"), scope)
    if readme == "README.md":
        return
    assert scope["blt"].logits(scope["text"]).shape == (35, 260)
    assert len(scope["texts"]) == 2
    assert [step for step, _ in scope["run"].evaluations] == [6, 12]
    assert scope["batch"].bytes_BN.shape == (4, 64) and scope["batch"].starts_BN1.shape == (4, 65)


def test_the_readme_documents_every_name():
    text = (ROOT / "bltjax" / "README.md").read_text(encoding="utf-8")
    section = text.split("## Python")[1].split("\n## ")[0]
    for name in bltjax.__all__:
        assert re.search(rf"`{name}[(`]", section), name
    for kind in (LoadedModel, Run, Evaluation):
        documented = {*re.findall(r"`\.(\w+)", section)}
        assert kind.__name__ in section
        public = {name for name in vars(kind) if not name.startswith("_")}
        # Of a model, what other rooms use besides is in its docstrings.
        assert public - documented <= {"logits_with", "starts"}, kind
