"""Metrics of a run in a bucket, which can't be appended to, and of one that was killed."""

import json

from etils import epath

from bltjax.metrics import Reporter


def test_a_run_in_a_bucket_copies_its_lines(tmp_path, monkeypatch):
    """A folder stands for the bucket: its files must only ever be written whole."""
    monkeypatch.setattr("bltjax.metrics.is_remote", lambda path: True)
    monkeypatch.setenv("BLTJAX_CACHE", str(tmp_path / "cache"))
    bucket = epath.Path(tmp_path / "bucket")
    bucket.mkdir()
    (bucket / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    reporter = Reporter(bucket, first_step=2)
    reporter.write(3, {"loss": 1.5})
    assert len((bucket / "metrics.jsonl").read_text().splitlines()) == 4, "not copied yet"
    reporter.uploaded -= 61
    reporter.write(4, {"loss": 1.25})
    reporter.write(5, {"loss": 1.0})
    assert '"step": 4' in (bucket / "metrics.jsonl").read_text()
    reporter.close()
    lines = [json.loads(line) for line in (bucket / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
