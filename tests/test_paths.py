"""Any name of a file or folder works from one end to the other, or is refused with its reason."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from test_storage import bucket  # noqa: F401

from bltjax.__main__ import main
from bltjax.config.data import SourceConfig
from bltjax.config.fields import to_dict
from bltjax.config.model import Patching
from bltjax.config.run import RunConfig
from bltjax.configured import load_config, parse
from bltjax.data.sources.by_path import open_source
from bltjax.system.paths import (
    NAME_BYTES,
    check_arrays_path,
    check_unused,
    expanded,
    is_remote,
    literal_glob,
    matches,
    path_of,
)
from bltjax.system.storage import cache_place, check_writable, write_text
from bltjax.training.checkpoint import make_manager
from bltjax.weights.export import open_array, place_of
from bltjax.weights.exporting import write_leaves
from bltjax.weights.lazy import Leaf

slow = pytest.mark.slow
TINY = Path(__file__).parent / "tiny.py"
NASTY = [
    "exp[1]", "[", "[!a]", "a*b", "**", "what?", "50%", "%20x", "a:b", "x.py:y", "a=b", " sp ace ",
    "q'u\"o`te", "new\nline", "-dash", "--config.seed=3", "#hash", "zażółć", "日本", "e\u0301",
    "n" * 240, "a~", "$HOME", "{a,b}", "a|b", "a&b;c", "<x>", ".hidden", "...", "123", "None",
    "(1, 2)", "'x'", "@", "\t", "file:", "1.orbax-checkpoint-tmp", "checkpoints", "tfds:",
]  # fmt: skip
COMBINED = "Zoë's [1] 50% a*b? #2 a=b; x:y\n~"  # what tests can afford
SOME = [
    COMBINED, "exp[1]*?", "50% %20 #x", "a:b=c|d", "'q\"u`o\nte", "--config.seed=3",
    "zażółć日本e\u0301", "n" * 240, "~", ".hidden", "(1, 2)",
]  # fmt: skip
# The storage library would write arrays elsewhere, or fail.
NOT_FOR_ARRAYS = ["back\\slash", "gs:", "runs_gs:"]
names = st.text(
    st.sampled_from("[]*?%:=#'\"\\ \n~-.@$|ażé日ab1")
    | st.characters(codec="utf-8", exclude_characters="/\0"),
    min_size=1,
    max_size=40,
).filter(
    lambda name: (
        name not in (".", "..", "manifest.json", "plan.json") and len(os.fsencode(name)) < 200
    )
)


@contextlib.contextmanager
def inside(folder: Path):
    """Makes the folder the working directory, so that relative paths are bare names."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def check_folder(name: str) -> None:
    """A folder of that name in the working directory holds a checkpoint and an array."""
    folder = path_of(f"./{name}")
    check_arrays_path(folder)
    check_writable(folder)
    before = {path.name for path in Path().iterdir()}
    params = {"a": np.arange(4.0)}
    with ocp.CheckpointManager(
        (folder / "checkpoints").absolute(),
        item_names=("params", "progress"),
        options=ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True),
    ) as manager:
        manager.save(
            3,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params), progress=ocp.args.JsonSave({"step": 3})
            ),
        )
        manager.wait_until_finished()
        assert manager.all_steps() == [3]
    there = [path.name for path in (folder / "checkpoints").glob("*")]
    assert there == ["3"] == [path.name for path in (folder / "checkpoints").iterdir()]
    array = open_array(folder / "checkpoints" / "3" / "params", "a", None)
    assert (array.read().result() == params["a"]).all()
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    leaf = Leaf(rows.shape, rows.dtype, lambda place, part: rows[part])
    write_leaves(folder / "params", {"a/w_DE": leaf}, lambda _: None)
    assert (open_array(folder / "params", "a/w_DE", None).read().result() == rows).all()
    assert {path.name for path in Path().iterdir()} == before  # nothing went to another folder


def check_sources(name: str) -> None:
    """Text in a folder and in files of that name is found by the folder, a pattern and itself."""
    folder = Path(name)
    folder.mkdir(exist_ok=True)
    (folder / "1.txt").write_text("one")
    write_text(folder / name, "two")
    assert matches(f"./{name}/*.txt") == [folder / "1.txt"] or name.endswith(".txt")
    assert matches(f"./{name}/{name}") == [folder / name]
    documents = open_source(SourceConfig(f"./{name}"))
    assert b"one" in [documents[i].text.tobytes() for i in range(len(documents))]
    documents = open_source(SourceConfig(f"./{name}/[0-9].txt"))
    assert [documents[i].text.tobytes() for i in range(len(documents))] == [b"one"]
    pq.write_table(pa.table({"text": ["one"]}), "plain")
    Path("plain").replace(f"{name}/x.parquet")
    assert len(open_source(SourceConfig(f"./{name}/x.parquet"))) == 1
    paths = [f"data.{part}.text.path=./{name}" for part in ("train", "eval")]
    config = load_config(f"{TINY}:byte_lm", [*paths, f"data.train.text.field={name}"])
    source = config.data.train["text"]
    assert (source.path, source.field) == (f"./{name}", name)  # no Python literal, no number
    assert parse(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", NASTY)
def test_text_under_any_name(name, tmp_path):
    with inside(tmp_path):
        check_sources(name)


@pytest.mark.parametrize("name", [COMBINED, *(pytest.param(n, marks=slow) for n in NASTY)])
def test_arrays_under_any_name(name, tmp_path):
    with inside(tmp_path):
        check_folder(name)


@pytest.mark.parametrize("name", NOT_FOR_ARRAYS)
def test_names_that_what_stores_arrays_takes_for_others(name, tmp_path, capsys):
    with inside(tmp_path):
        check_sources(name)
        with pytest.raises(ValueError, match="another place"):
            check_arrays_path(path_of(f"./{name}"))
    words = ["train", f"--config={TINY}:byte_lm", f"--workdir={tmp_path / 'new' / name / 'run'}"]
    text = tmp_path / name / "1.txt"
    assert main([*words, *(f"--config.data.{p}.text.path={text}" for p in ("train", "eval"))])
    assert "give another name" in capsys.readouterr().err and not (tmp_path / "new").exists()


@slow
@given(names)
@settings(max_examples=100, deadline=None)
def test_a_folder_of_any_random_name(tmp_path_factory, name):
    with inside(tmp_path_factory.mktemp("any")):
        if "\\" in name or name.endswith("gs:"):
            with pytest.raises(ValueError, match="another place"):
                check_arrays_path(path_of(f"./{name}"))
        else:
            check_folder(name)
    with inside(tmp_path_factory.mktemp("text")):
        check_sources(name)


def test_names_that_are_refused(tmp_path):
    for text, reason in {
        "": "empty path",
        "a\0b": "zero byte",
        "a\udcff": "not UTF-8",
        "gs:/bucket/x": "write gs://BUCKET",
        "gs://": "write gs://BUCKET",
        "http://host/x": "no paths of http://",
        "file:///x": "no paths of file://",
        "~nobody-of-that-name/x": "is no user's folder",
    }.items():
        with pytest.raises(ValueError, match=reason):
            path_of(text)
    for fine in ("C:/x", "abc:/x", "./~x", "./a://b", "./gs:/x", "#"):
        assert str(path_of(fine)) == str(Path(fine))
    assert str(path_of("gs://bucket/x")) == "gs://bucket/x"
    with pytest.raises(ValueError, match="has 3856 bytes, and 3840 is the most"):
        check_arrays_path(epath.Path("/" + "/".join(["n" * 240] * 16)))
    with pytest.raises(ValueError, match="at gs:// alone"):
        check_arrays_path(path_of("s3://bucket/run"))


def test_a_user_s_home_is_expanded(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "there").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    with inside(tmp_path):
        assert expanded("~/new/*.txt") == f"{home}/new/*.txt" and expanded("~") == str(home)
        assert str(path_of("~/new")) == str(home / "new")
        assert SourceConfig("~/x", data_dir="~/tfds").data_dir == str(home / "tfds")
        bpe = Patching(mode="bpe", tokenizer="~/tokenizer.json")
        assert bpe.tokenizer == str(home / "tokenizer.json")
        settings = [f"{name}=~/run" for name in ("entropy_model", "init_from")]
        settings += [f"data.{part}.text.path=~/*.txt" for part in ("train", "eval")]
        config = load_config(f"{TINY}:byte_lm", settings)
        assert config.entropy_model == config.init_from == str(home / "run")
        # An older run, whose settings have the unexpanded path, has the same config.
        old = to_dict(config) | {"entropy_model": "~/run"}
        assert parse(RunConfig, old) == config
        # Folders made by such a path before expansion existed are still found.
        Path("~").mkdir()
        Path("~/run").mkdir()
        assert expanded("~/run") == "~/run" and expanded("~/there") == str(home / "there")
        monkeypatch.setenv("BLTJAX_CACHE", "~/cache")
        assert cache_place("gs://b/x.txt") == home / "cache" / "gs" / "b" / "x.txt"


def test_names_that_are_not_utf8_are_found_by_patterns(tmp_path):
    odd = tmp_path / os.fsdecode(b"latin\xff.txt")
    odd.write_text("one")
    for path in (tmp_path, f"{tmp_path}/latin?.txt", f"{tmp_path}/*.txt"):
        assert open_source(SourceConfig(str(path)))[0].text.tobytes() == b"one"
    with pytest.raises(ValueError, match=r"latin.xff.txt' is not UTF-8: rename it"):
        open_source(SourceConfig(str(odd)))
    with pytest.raises(ValueError, match=r"train.text.path: .*latin.xff.txt' is not UTF-8"):
        load_config(f"{TINY}:byte_lm", [f"data.train.text.path={odd}", "data.eval.text.path=x"])
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "plain")
    (tmp_path / "plain").replace(odd)
    with pytest.raises(ValueError, match="is not UTF-8"):
        open_source(SourceConfig(str(tmp_path)))


def test_where_a_folder_can_t_be(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "to_nothing").symlink_to(tmp_path / "gone")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name, reason in {
        "file": "file is a file, not a folder",
        "file/below": "file is a file, not a folder",
        "to_nothing": "to_nothing is a symbolic link to .*gone, which is not there",
        "x" * 256: "too long",
    }.items():
        with pytest.raises(OSError, match=reason):
            check_writable(tmp_path / name)
    with pytest.raises(OSError, match="/proc/bltjax can't be written"):
        check_writable("/proc/bltjax")
    check_writable(tmp_path / "link" / "new")
    assert (tmp_path / "folder" / "new").is_dir()
    # The system follows a link before it goes up; as text, the two names would cancel out.
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link2").symlink_to(tmp_path / "elsewhere" / "deep")
    with inside(tmp_path):
        assert str(path_of("link2/../run")) == str(tmp_path / "elsewhere" / "run")
        assert str(path_of("folder/../run")) == "folder/../run"


def test_folders_that_hold_something_else(tmp_path):
    for name, kind in {"export.json": "an export", "model.safetensors": "weights"}.items():
        (tmp_path / name).write_text("{}")
        for by in ("a run", "records"):
            with pytest.raises(ValueError, match=f"holds {kind}, with {name}"):
                check_unused(epath.Path(tmp_path), by=by)
        (tmp_path / name).unlink()
    (tmp_path / "config.json").write_text("{}")
    check_unused(epath.Path(tmp_path), by="a run")


def test_patterns_below_folders_with_brackets(tmp_path):
    for folder in ("run[1]", "run1", "a*b"):
        (tmp_path / folder / "text").mkdir(parents=True)
        (tmp_path / folder / "text" / "1.txt").write_text(folder)
    with inside(tmp_path):
        found = {p: [path.read_text() for path in matches(p)] for p in (
            "run[1]/text/*.txt", "run[2]/*/1.txt", "run[1-9]/*/1.txt", "*/text/1.txt", "**/*.txt",
            "a*b/text/1.tx?", "run[1]/text/2.txt",
        )}  # fmt: skip
    assert found == {
        "run[1]/text/*.txt": ["run[1]"], "run[2]/*/1.txt": [], "run[1-9]/*/1.txt": ["run1"],
        "*/text/1.txt": ["a*b", "run1", "run[1]"], "**/*.txt": ["a*b", "run1", "run[1]"],
        "a*b/text/1.tx?": ["a*b"], "run[1]/text/2.txt": [],
    }  # fmt: skip


def test_buckets_with_brackets(bucket, tmp_path):  # noqa: F811
    for name in ("exp[1]/1.txt", "exp[1]/.2.txt", "exp1/3.txt", "exp[1]/a/4.txt"):
        write_text(bucket / name, name)
    assert [path.name for path in matches("gs://bucket/exp[1]/*.txt")] == ["1.txt"]
    assert [path.name for path in matches("gs://bucket/exp[1]/*/*.txt")] == ["4.txt"]
    assert [path.name for path in matches("gs://bucket/exp[12]/*.txt")] == ["3.txt"]
    assert [path.name for path in (bucket / "exp[1]").glob("*.txt")] == ["1.txt"]
    assert place_of(bucket / "a%b") == {"driver": "gcs", "bucket": "bucket", "path": "a%b/"}
    with pytest.raises(ValueError, match=r"\*\* is not for buckets"):
        matches("gs://bucket/**/1.txt")
    # An object's name may be impossible on a disk; its copy is still below the cache.
    for name in ("../../x.txt", f"{'n' * 400}.jsonl"):
        place = cache_place(f"gs://bucket/{name}")
        assert place.is_relative_to(tmp_path / "cache" / "gs" / "bucket")
        assert ".." not in place.parts and place.suffix == Path(name).suffix
        assert len(place.name) < NAME_BYTES and is_remote(f"gs://bucket/{name}")


def test_etils_takes_folders_literally(tmp_path):
    """Orbax globs below a checkpoint; without this it would leave `exp[1]` unfinished."""
    folder = epath.Path(tmp_path) / "exp[1]"
    folder.mkdir()
    (folder / "a.txt").write_text("")
    assert [path.name for path in folder.glob("*.txt")] == ["a.txt"]
    found = list(literal_glob(folder, "?.txt", None))
    assert found == [folder / "a.txt"] and type(found[0]) is type(folder)


@pytest.mark.parametrize("name", [COMBINED, *(pytest.param(n, marks=slow) for n in SOME[1:])])
def test_models_under_any_name(name, runs, tmp_path):
    place = tmp_path / name
    place.mkdir()
    shutil.copytree(runs.byte_lm, place / "run")
    runs.run("inspect", "--quick", place / "run")
    runs.run("convert", place / "run", place / name)
    runs.run("inspect", place / name)
    source = runs.root / "records" / "held_out"
    for model in ("run", name):
        words = (f"--workdir={place / model}", f"--source={source}", f"--out={place / name}.json")
        runs.run("evaluate", *words)
        assert 1 < json.loads((place / f"{name}.json").read_text())["bits_per_byte"] < 9
    assert {path.name for path in place.iterdir()} == {"run", name, f"{name}.json"}


@slow
@pytest.mark.parametrize("name", SOME)
def test_commands_under_any_name(name, runs, tmp_path):
    place = tmp_path / name
    shutil.copytree(runs.root / "records", place / "records")
    shutil.copytree(runs.blt, place / "run")
    shutil.copytree(runs.byte_lm, place / "byte_lm")
    shutil.copy(runs.root / "held_out.jsonl", place)
    runs.run("generate", f"--workdir={place / 'run'}", "--prompt=the", "--max_bytes=2")
    runs.run("page", place / "run", "--samples=0")
    assert (place / "run" / "page.html").stat().st_size
    words = (f"--byte_lm={place / 'byte_lm'}", f"--source={place / 'held_out.jsonl'}")
    runs.run("entropies", *words, f"--out={place / 'again'}")
    runs.run("inspect", place / "again")
    runs.run("calibrate", f"--records={place / 'again'}", "--mean=2", f"--out={place / name}")
    assert float((place / name).read_text()) > 0
    with inside(place):
        pictures = (f"--html=./{name}.html", f"--png=./{name}.png")
        runs.run("patches", "--workdir=run", "--text=the patch", *pictures)
        assert Path(f"{name}.html").stat().st_size and Path(f"{name}.png").stat().st_size


@slow
@pytest.mark.parametrize("name", SOME)
def test_a_run_in_a_folder_of_any_name(name, runs, tmp_path, capsys):
    place = tmp_path / name
    shutil.copytree(runs.root / "records", place / "records")
    shutil.copy(TINY, place / "tiny [1].py")
    words = [
        "train", f"--config={place}/tiny [1].py:blt", f"--workdir={place / 'run'}",
        f"--config.data.train.text.path={place}/records/train",
        f"--config.data.eval.text.path={place}/records/held_out", *runs.blt_settings,
    ]  # fmt: skip
    with inside(tmp_path):
        runs.run(*words, "--stop_at=5")
        runs.run(*words)
    assert "after step 5" in capsys.readouterr().out
    runs.run("inspect", place / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_trainer_s_checkpoints_below_brackets(tmp_path):
    paths = [f"data.{part}.text.path={TINY}" for part in ("train", "eval")]
    config = load_config(f"{TINY}:byte_lm", paths)
    workdir = epath.Path(tmp_path) / "exp[1]*?"
    with make_manager(workdir, config) as manager:
        arrays = {"w": jax.numpy.ones(3)}
        for step in (1, 2, 3):
            manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(arrays)))
            manager.wait_until_finished()
        assert manager.all_steps() == [2, 3]
    assert (workdir / "checkpoints" / "3" / "params" / "manifest.ocdbt").exists()
