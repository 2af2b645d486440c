"""Buckets, mocked by a file system in memory: sources, records, their scoring and their report."""

import glob
import json
import os

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from bltjax.config.data import SourceConfig
from bltjax.data.records import RecordDocuments, read_records_manifest
from bltjax.data.sources.by_path import open_source
from bltjax.system.paths import is_remote, matches, size_of
from bltjax.system.storage import check_writable, local_copy, write_text
from bltjax.training.reports import Reporter


class Bucket(MemoryFileSystem):
    """Objects by name, without folders, as in gs://."""

    protocol = ("gcs", "gs")
    read_only = False

    def __init__(self, finalize_on_close=True, **rest):
        super().__init__(**rest)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs:/"))

    def _open(self, path, mode="rb", **rest):
        if self.read_only and "w" in mode:
            raise PermissionError(f"403: no storage.objects.create access to {path}")
        return super()._open(path, mode, **rest)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    Bucket.store.clear()
    monkeypatch.setenv("BLTJAX_CACHE", str(tmp_path / "cache"))
    yield epath.Path("gs://bucket")
    Bucket.store.clear()


def test_text_and_patterns(bucket):
    for name in ("a/1.txt", "a/2.txt", "a/b/3.txt", "a/4.jsonl"):
        write_text(bucket / name, f"text of {name}")
    assert is_remote(bucket) and size_of(bucket / "a" / "1.txt") == 15
    assert size_of(bucket / "a" / "none") is None and size_of(bucket / "a") is None
    assert [path.name for path in matches("gs://bucket/a/*.txt")] == ["1.txt", "2.txt"]
    assert [path.name for path in matches("gs://bucket/a/1.txt")] == ["1.txt"]
    assert matches("gs://bucket/none/*.txt") == matches("gs://bucket/none.txt") == []
    documents = open_source(SourceConfig("gs://bucket/a"))
    texts = [documents[i].text.tobytes() for i in range(len(documents))]
    assert texts == [b"text of a/1.txt", b"text of a/2.txt"]


def test_patterns_with_stars_name_what_they_did(tmp_path, monkeypatch):
    """Against the library's own glob, where no link is circular."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b/a.txt", "b/c/d.txt", "b/c/e/f.txt", ".h/g.txt", "b/.i", "[x]/j.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(name)
    for pattern in (
        "**/*.txt", "**", "b/**", "b/**/", "**/c/**/*.txt", "**/**", "*/**/f.txt", "**/.i",
        "**.txt", "[[]x]/**/*.txt", ".h/**", f"{tmp_path}/**/*.txt", "none/**", "**/c/*", "*.txt",
    ):  # fmt: skip
        expected = {os.path.normpath(p) for p in glob.glob(pattern, recursive=True)}
        expected = sorted(p for p in expected if os.path.isfile(p))
        assert sorted(map(str, matches(pattern))) == expected, pattern
    assert not matches("a.txt/**")  # the library finds the file itself, but not on Python 3.13


def test_links_in_circles_end(tmp_path):
    """The library's glob would find each file by every path of up to 40 links."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.txt").write_text("x")
    for name in ("a/up", "a/b/up", "a/b/top"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "round").symlink_to("round")
    assert matches(f"{tmp_path}/**/*.txt") == [tmp_path / "a" / "b" / "x.txt"]


def test_a_copy_is_kept_and_is_made_again_when_the_object_changed(bucket, tmp_path):
    write_text(bucket / "x.txt", "one")
    copy = local_copy(bucket / "x.txt")
    assert copy == tmp_path / "cache" / "gs" / "bucket" / "x.txt" and copy.read_text() == "one"
    before = copy.stat().st_ino
    assert local_copy(bucket / "x.txt").stat().st_ino == before
    write_text(bucket / "x.txt", "three")
    assert local_copy(bucket / "x.txt").read_text() == "three"
    assert [path.name for path in copy.parent.iterdir()] == ["x.txt"]


def test_a_bucket_that_cannot_be_written_is_named(bucket, monkeypatch):
    check_writable(bucket / "out")
    assert not any("writable" in name for name in Bucket.store)
    monkeypatch.setattr(Bucket, "read_only", True)
    with pytest.raises(OSError, match=r"gs://bucket/out can't be written: .*403"):
        check_writable(bucket / "out")


def test_reports_in_a_bucket_go_on_after_a_restart(bucket, monkeypatch):
    workdir = bucket / "run"
    reporter = Reporter(workdir, 0)
    for step in (1, 2, 3):
        reporter.write(step, {"loss": 3.0 - step})
    assert not (workdir / "metrics.jsonl").exists()  # not a copy for every line
    monkeypatch.setattr("bltjax.training.reports.UPLOAD_SECONDS", 0.0)
    reporter.write(4, {"loss": 0.0})
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 4
    reporter.close()
    cut_off = (workdir / "metrics.jsonl").read_text() + '{"st'
    (workdir / "metrics.jsonl").write_text(cut_off)
    again = Reporter(workdir, 2)  # the checkpoint was that of step 2
    again.write(3, {"loss": 9.0})
    again.close()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.0), (2, 1.0), (3, 9.0)]
    assert len(list((workdir / "tensorboard").iterdir())) == 2


def test_records_in_a_bucket_are_those_on_a_disk(runs, bucket):
    lines = (runs.root / "train.jsonl").read_text()
    write_text(bucket / "in" / "train.jsonl", lines)
    runs.run(
        "entropies", f"--byte_lm={runs.byte_lm}", "--source=gs://bucket/in/*.jsonl",
        "--out=gs://bucket/records", "--shard_bytes=3000",
    )  # fmt: skip
    there, here = RecordDocuments(bucket / "records"), RecordDocuments(runs.root / "records/train")
    assert len(there) == len(here) > 1
    for i in range(len(here)):
        assert (there[i].text == here[i].text).all()
        assert (there[i].entropies == here[i].entropies).all()
    assert read_records_manifest(bucket / "records").shards == here.manifest.shards
    assert json.loads((bucket / "records" / "report.json").read_text())
    assert np.frombuffer((bucket / "records" / "report.png").read_bytes()[:4], "S4") == b"\x89PNG"
    runs.run("calibrate", "--records=gs://bucket/records", "--mean=2")
