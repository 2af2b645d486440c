"""The benchmark's batch is what it says; the benchmark itself runs with the slow tests."""

import json
from pathlib import Path

import pytest

from bltjax.__main__ import main
from bltjax.benchmark import MALLOC, run_config, sample_batch


def test_batch():
    config = run_config(4, 1024)
    batch = sample_batch(config.data)
    assert config.data.row_patches == 228
    assert (batch["starts_BN1"][:, :-1].sum(axis=1) == 228).all()
    assert (batch["targets_BN"][:, :-1] == batch["bytes_BN"][:, 1:]).all()


@pytest.mark.slow
def test_benchmark_train(capsys):
    words = ["benchmark", "train", "--json", "--repeats=1"]
    try:
        import transformers  # noqa: F401

        words.append("--peer=transformers")
    except ImportError:
        pass
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ours_ms"] > 0 and result.get("ratio", 9) > 1


def test_memory_is_kept_as_in_the_launch_scripts():
    assert MALLOC in Path("launch/environment.sh").read_text()


def test_slots(runs, capsys):
    records = runs.root / "records" / "train"
    runs.run("benchmark", "slots", f"--records={records}", "--row_bytes=1024", "--json")
    result = json.loads(capsys.readouterr().out)
    ahead, none = (min(result[f"look_ahead_{n}"].values()) for n in (32, 1))
    assert ahead > none > 0.5


def test_refused(capsys):
    assert main(["benchmark", "slots"]) == 1
    assert "takes --records" in capsys.readouterr().err
    assert main(["benchmark", "train", "--repeats=0"]) == 1
    assert "must be >= 1" in capsys.readouterr().err
