"""Scoring as a pod's job: any number of processes, killed or not, writes the same records."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from bltjax.config.data import SourceConfig
from bltjax.data.records import RecordDocuments
from bltjax.inference.corpus import bars, write_report
from bltjax.inference.entropies import write_entropies

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """Every record file and the manifest, without the timing files."""
    names = [*folder.glob("*.array_record"), folder / "manifest.json"]
    return {path.name: path.read_bytes() for path in names}


def part(runs, out: Path, process: int, count: int):
    source = SourceConfig(str(runs.root / "train.jsonl"))
    return write_entropies(
        source, runs.byte_lm, epath.Path(out), shard_bytes=3000, process=process, count=count
    )


def test_processes_that_never_meet_leave_the_records_of_one(runs, tmp_path, capsys):
    expected = contents(runs.root / "records" / "train")
    assert part(runs, tmp_path / "o", 2, 3) is None
    assert part(runs, tmp_path / "o", 0, 3) is None
    assert "1 shards of others are still missing" in capsys.readouterr().out
    assert part(runs, tmp_path / "o", 1, 3) is not None
    assert contents(tmp_path / "o") == expected


def test_a_restart_with_other_processes_completes_what_was_lost(runs, tmp_path, capsys):
    expected = contents(runs.root / "records" / "train")
    assert part(runs, tmp_path / "o", 0, 2) is None
    shards = sorted((tmp_path / "o").glob("*.array_record"))
    assert len(shards) > 1
    damaged, kept = shards[0], shards[1].stat().st_mtime_ns
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    for process in (0, 1, 2):
        last = part(runs, tmp_path / "o", process, 3)
    assert last is not None and contents(tmp_path / "o") == expected
    assert shards[1].stat().st_mtime_ns == kept
    assert capsys.readouterr().out.count(": kept,") == len(shards) - 1


def test_another_corpus_is_refused_with_the_difference(runs, tmp_path):
    shutil.copytree(runs.root / "records" / "train", tmp_path / "o")
    source = SourceConfig(str(runs.root / "held_out.jsonl"))
    with pytest.raises(ValueError, match=r"(?s)there -> here.*source.path: '.*train.jsonl' -> '.*"):
        write_entropies(source, runs.byte_lm, epath.Path(tmp_path / "o"), shard_bytes=3000)


def test_a_plan_from_before_formats_goes_on(runs, tmp_path):
    shutil.copytree(runs.root / "records" / "train", tmp_path / "o")
    plan = json.loads((tmp_path / "o" / "plan.json").read_text())
    assert plan["source"].pop("format") == "auto"
    (tmp_path / "o" / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "o" / "manifest.json").unlink()
    assert part(runs, tmp_path / "o", 0, 1) is not None
    source = SourceConfig(str(runs.root / "train.jsonl"), format="jsonl")
    with pytest.raises(ValueError, match=r"source.format: 'auto' -> 'jsonl'"):
        write_entropies(source, runs.byte_lm, epath.Path(tmp_path / "o"), shard_bytes=3000)


def test_a_folder_that_cannot_be_written_is_found_at_once(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/o can't be written"):
        part(runs, tmp_path / "file" / "o", 0, 1)


def test_report(runs, tmp_path, capsys):
    folders = [epath.Path(runs.root / "records" / name) for name in ("train", "held_out")]
    found = write_report(folders, epath.Path(tmp_path), threshold=6.0, pod="v5e:2x4")
    printed = capsys.readouterr().out
    assert "1 TB on v5e:2x4 (8 chips)" in printed and " on 256\n" in printed
    records = RecordDocuments(folders[0])
    assert found[str(folders[0])]["documents"] == len(records) == 80
    means = list(found[str(folders[0])]["mean_patch_bytes"].values())
    assert means == sorted(means) and means[0] < means[-1]
    assert json.loads((tmp_path / "report.json").read_text()) == found
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert found[str(folders[0])]["scoring"]["bytes_per_second_per_device"] > 0


def test_bars_are_shares_of_bytes():
    lines = bars(np.array([1, 1, 2, 4, 100]))
    assert lines[0].split()[:2] == ["1", "1.9%"] and lines[-1].split()[:2] == ["24+", "92.6%"]
    assert lines[2].split() == ["3", "0.0%"] and lines[-1].count("█") == 40


def start(runs, out: Path, process: int, count: int, devices: int = 1) -> subprocess.Popen:
    words = [
        f"--byte_lm={runs.byte_lm}", f"--source={runs.root / 'train.jsonl'}", f"--out={out}",
        "--shard_bytes=300", f"--process={process}", f"--processes={count}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "bltjax", "entropies", *words]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_real_processes_killed_and_started_again(runs, tmp_path, seed):
    """One process; four of two devices; four that are all killed in the middle, and two that
    resume."""
    choose = random.Random(seed)
    assert start(runs, tmp_path / "one", 0, 1).wait() == 0
    expected = contents(tmp_path / "one")
    four = [start(runs, tmp_path / "four", process, 4, devices=2) for process in range(4)]
    assert [process.wait() for process in four] == [0] * 4
    assert contents(tmp_path / "four") == expected
    killed = [start(runs, tmp_path / "killed", process, 4) for process in range(4)]
    enough = choose.randint(1, len(expected) - 2)
    while len(list((tmp_path / "killed").glob("*.array_record"))) < enough:
        assert not all(process.poll() is not None for process in killed)
        time.sleep(0.01)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    two = [start(runs, tmp_path / "killed", process, 2) for process in range(2)]
    assert [process.wait() for process in two] == [0] * 2
    assert contents(tmp_path / "killed") == expected
