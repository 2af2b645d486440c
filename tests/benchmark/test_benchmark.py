"""The benchmark's batch matches its settings; the benchmark itself runs with the slow tests."""

import json
import os
import random
import subprocess
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest

from bltjax.__main__ import main
from bltjax.benchmark.generate import context_side, context_words, speed_words
from bltjax.benchmark.input import MEAN_PATCH, benchmark_slots, made_records
from bltjax.benchmark.tables import UPDATES, random_case
from bltjax.benchmark.train import MODEL, run_config, sample_batch
from bltjax.benchmark.worker import SIDES, Worker, serve
from bltjax.config.model import Patching
from bltjax.config.run import OptimizerConfig
from bltjax.data.calibrate import mean_patch_bytes
from bltjax.data.records import (
    Manifest,
    RecordDocuments,
    encode_record,
    shard_info,
    write_manifest,
    write_shard,
)
from bltjax.text.alphabet import encode


def test_batch():
    config = run_config(4, 1024)
    batch = sample_batch(config.data)
    assert config.data.max_patches == 228
    assert (batch.starts_BN1[:, :-1].sum(axis=1) == 228).all()
    assert (batch.targets_BN[:, :-1] == batch.bytes_BN[:, 1:]).all()


def test_a_peer_as_it_comes_and_tuned(monkeypatch):
    """With defaults it has neither an allocator that keeps large buffers nor fused AdamW."""
    own, kept = {}, []

    def started(words, env, **_):
        own[json.loads(words[-1])[0]] = "GLIBC_TUNABLES" in env

    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    monkeypatch.setattr("bltjax.benchmark.worker.subprocess.Popen", started)
    monkeypatch.setattr(Worker, "answer", lambda self: {})
    monkeypatch.setattr("bltjax.benchmark.worker.os.sched_setaffinity", lambda *_: None)
    monkeypatch.setattr("bltjax.benchmark.worker.keep_buffers", lambda: kept.append(side))
    sides = ("ours", "transformers", "transformers_tuned")
    for side in sides:
        Worker(side, 1)
        with monkeypatch.context() as patched:
            patched.setitem(SIDES, side, (lambda: dict, 0))
            patched.setattr("sys.stdin", [])
            serve(side, 1)
    assert own == {"ours": True, "transformers": False, "transformers_tuned": True}
    assert kept == ["ours", "transformers_tuned"]
    monkeypatch.setattr("bltjax.benchmark.worker.transformers_step", lambda _, *, fused: fused)
    assert not SIDES["transformers"][0](1, 64) and SIDES["transformers_tuned"][0](1, 64)


@pytest.mark.slow
def test_benchmark_train(capsys):
    """Times are for the reader: which of two is shorter depends on who else uses the machine."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    words = ["benchmark", "train", "--json", "--repeats=1", "--threads=1", "--peer=transformers"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {
        "ours_ms", "peer_ms", "ratio", "peer", "all_ms", "step_gflop", "ours_gflop_per_second",
        "products_gflop_per_second", "share_of_products", "threads",
    }  # fmt: skip
    assert result["ours_ms"] > 0 and result["peer_ms"] > 0
    assert result["ratio"] == result["peer_ms"] / result["ours_ms"]
    rate, limit = result["ours_gflop_per_second"], result["products_gflop_per_second"]
    assert rate == pytest.approx(result["step_gflop"] / result["ours_ms"] * 1000)
    assert result["share_of_products"] == rate / limit and limit > 1
    assert {side: len(times) for side, times in result["all_ms"].items()} == {
        "ours": 1,
        "transformers": 1,
    }


@pytest.mark.slow
def test_benchmark_rows(capsys, monkeypatch):
    monkeypatch.setattr("bltjax.benchmark.compare.ROW_LENGTHS", (64, 128, 256))
    assert main(["benchmark", "rows", "--json", "--repeats=1", "--threads=1", "--longest=128"]) == 0
    printed = capsys.readouterr()
    lines = json.loads(printed.out)["rows"]
    assert [line["row_bytes"] for line in lines] == [64, 128]
    for line in lines:
        assert line["ours"]["ms"] > 0 and line["ours"]["peak_mib"] > 500
    assert printed.err.count("per KiB") == 2


def test_charts_are_drawn_from_the_figures():
    result = {"prompt_bytes": 512, "ours_ms_per_byte": 11.1, "uncached_ms_per_byte": 396.0}
    said = speed_words(result)
    assert said.startswith("after 512 bytes: ours 11.10 ms per byte, 396.0 uncached")
    assert "bar [11.1, 396]" in said and "0 --> 436" in said and "transformers" not in said
    result |= {"peer": "transformers", "peer_ms_per_byte": 500.0, "ratio": 45.0, "same_text": True}
    said = speed_words(result)
    assert "transformers 500.0 ms, 45.0 times as long, the same text" in said
    assert said.count('"transformers"]') == 1 and "bar [11.1, 396, 500]" in said
    contexts = [
        {
            "context_bytes": length,
            "ms_per_byte": ms,
            "mean_patch_bytes": 4.0,
            "latent_cache_bytes_read_per_byte": 3e6,
            "ring_bytes_read_per_byte": 2e6,
        }
        for length, ms in ((1024, 8.0), (32768, 10.0))
    ]
    said = context_words({"contexts": contexts})
    assert (
        "  1024 bytes before:   8.00 ms per byte, 4.00 bytes per patch; read for each byte 3MB"
        in said
    )
    assert '["1k", "32k"]' in said and "line [125, 100]" in said
    assert said.count("```") == 2 and said.endswith("```")


@pytest.mark.slow
def test_contexts(capsys):
    words = ["benchmark", "generate", "--contexts", "--longest=1024", "--repeats=1", "--json"]
    assert main(words) == 0
    ((found,), _) = json.loads(capsys.readouterr().out).values()
    assert found["context_bytes"] == 1024 and found["ms_per_byte"] > 0
    held = found["latent_cache_bytes_read_per_byte"] * found["mean_patch_bytes"]
    slot = MODEL.latent.layers * 2 * MODEL.latent.width * 4
    # The text starts with patches of two bytes; there is room for one patch per 4 further bytes.
    assert round(held / slot, 3) in (512, 1024)


@pytest.mark.slow
def test_contexts_of_a_config(tmp_path):
    """Any BLT can be timed; one that needs no byte LM gets patches of four bytes by counting."""
    config = tmp_path / "space.py"
    config.write_text(f"""
exec(open({str(Path(__file__).parents[1] / "tiny.py")!r}).read())
tiny = get_config
def get_config(_=""):
    config = tiny("blt")
    config.data.train.text.path = config.data.eval.text.path = "unread"
    config.patching = dict(mode="space")
    config.compute_dtype = "bfloat16"
    return config
""")
    found = context_side(str(config), 64)()
    assert found["mean_patch_bytes"] == 4 and found["ms_per_byte"] > 0
    slot = 2 * 2 * 32 * 2  # layers, keys and values, width, bytes of a bfloat16
    assert found["latent_cache_bytes_read_per_byte"] * 4 == 128 * slot
    with pytest.raises(ValueError, match="trains a byte model"):
        context_side("configs/byte_lm_100m.py", 64)


def test_config_is_for_two_of_them(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "train", "--config=configs/blt.py:1b"])
    assert stopped.value.code == 2
    assert "no option '--config=configs/blt.py:1b'" in capsys.readouterr().err
    assert main(["benchmark", "generate", "--config=configs/blt.py:1b"]) == 1
    assert "--config is for benchmark generate with --contexts" in capsys.readouterr().err


def test_tables(capsys, monkeypatch):
    """Without first moments, both updates of the tables are one."""
    state, ids_RBN, grad_BNE = random_case(3, 40, 8, 50)
    state = (*state[:2], abs(state[0]))  # used before, long enough ago
    given = (OptimizerConfig(), 1, state, ids_RBN, grad_BNE)
    dense, used = (jax.jit(UPDATES[kind], static_argnums=0)(*given) for kind in UPDATES)
    for x, y in zip(dense[:2], used[:2], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    touched = np.zeros((3, 40, 1), bool)
    for table, ids_BN in enumerate(ids_RBN):
        touched[table, ids_BN] = True
    assert 0 < touched.sum() < touched.size
    np.testing.assert_allclose(used[2], np.where(touched, dense[2], state[2]), rtol=1e-5)

    monkeypatch.setattr("bltjax.benchmark.tables.SIZES", {"small": (3, 40, 8, 50)})
    assert main(["benchmark", "tables", "--repeats=1"]) == 0
    assert "small: 3 tables of 40 x 8, 50 bytes use" in capsys.readouterr().out


def test_attention(capsys, monkeypatch):
    """Every attention of a BLT, and the library's where it has one; all agree."""
    for name in ("LOCAL_HEADS", "LATENT_HEADS", "LATENT_KEY_VALUE_HEADS"):
        monkeypatch.setattr(f"bltjax.benchmark.attention.{name}", 1)
    monkeypatch.setattr("bltjax.benchmark.attention.IMPLEMENTATIONS", ("ours", "library"))
    monkeypatch.setattr("bltjax.benchmark.attention.WINDOW", 20)
    words = ["benchmark", "attention", "--repeats=1", "--row_bytes=64", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["attentions"]
    assert {name: set(sides) for name, sides in found.items()} == {
        "local self": {"ours", "library"},
        "encoder cross": {"ours"},
        "decoder cross": {"ours"},
        "latent self": {"ours", "library"},
    }
    for sides in found.values():
        for side in sides.values():
            assert max(side["errors"]) < 1e-5 and side["both_ms"] > 0


def test_a_worker_that_dies_is_an_error():
    process = subprocess.Popen(["true"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.wait()
    worker = Worker.__new__(Worker)
    worker.side, worker.process = "ours", process
    with pytest.raises(ValueError, match="ours died; see above"):
        worker.step()
    worker.close()


@pytest.mark.slow
def test_slots(runs, capsys):
    records = runs.root / "records" / "train"
    runs.run("benchmark", "slots", f"--records={records}", "--row_bytes=1024", "--json")
    result = json.loads(capsys.readouterr().out)
    ahead, none = (min(result[f"look_ahead_{n}"].values()) for n in (32, 1))
    assert ahead > none > 0.5


def write_records(folder: Path, texts: list[bytes], nats_after: np.ndarray) -> None:
    """Scored as by a model that knows little more than how often each byte follows each: with only
    260 entropies, some mean lengths of patches have no threshold."""
    folder.mkdir()
    path = folder / "shard.array_record"
    noise = np.random.default_rng(0)
    scored = []
    for text in texts:
        nats_N = nats_after[encode(text, eos=False)]
        scored.append(encode_record(text, nats_N + noise.normal(0, 0.02, len(nats_N))))
    write_shard(path, iter(scored))
    info = shard_info(path, sum(map(len, texts)), len(texts), 0)
    write_manifest(folder, Manifest("counts", "", 0, "float32", str(folder), (info,)))


def entropy_after(ids: list[np.ndarray]) -> np.ndarray:
    """float32 nats [V]: entropy of the byte after each byte, from the frequencies of pairs."""
    counts_VV = np.full((260, 260), 0.01)
    for ids_N in ids:
        np.add.at(counts_VV, (ids_N[:-1], ids_N[1:]), 1)
    shares_VV = counts_VV / counts_VV.sum(axis=1, keepdims=True)
    return -(shares_VV * np.log(shares_VV)).sum(axis=1).astype(np.float32)


def test_slots_of_a_mixed_corpus(tmp_path):
    """Code, English and Chinese, whose patches differ in length, in equal shares of bytes."""
    choose = random.Random(5)
    library = Path(json.__file__).parents[1]
    code = [path.read_bytes()[:9000] for path in sorted(library.glob("*.py"))[:60]]
    english = [text.encode() for text in topics.values() if len(text) > 300]
    # Frequent characters come often, as in any language.
    signs = [chr(number) for number in range(0x4E00, 0x4E00 + 400)]
    often = [1 / rank for rank in range(1, 401)]
    chinese = []
    for _ in range(80):
        lines = ("".join(choose.choices(signs, often, k=choose.randint(4, 20))) for _ in range(90))
        chinese.append("，".join(lines).encode()[: 3 * choose.randint(200, 2500)])
    kinds = {"code": code, "english": english, "chinese": chinese}
    nats_after = entropy_after([encode(text) for text in [*english, *code, *chinese]])
    for name, kind in kinds.items():
        write_records(tmp_path / name, kind, nats_after)
    found = benchmark_slots([str(tmp_path / name) for name in kinds], 16384)
    means = {}
    for name in kinds:
        documents = RecordDocuments(tmp_path / name)
        every = (documents[i] for i in range(len(documents)))
        means[name] = mean_patch_bytes(every, Patching(threshold=found["threshold"]))
    assert max(means.values()) > 1.5 * min(means.values()), means
    ahead, none = found["look_ahead_32"], found["look_ahead_1"]
    print(f"mean patches {means}; with look-ahead {ahead}, without {none}")
    assert max(ahead.values()) > 0.95 and min(ahead.values()) > min(none.values())


def test_input(capsys, monkeypatch):
    """All sizes and both kinds are measured, and the patches have the requested length."""
    monkeypatch.setattr("bltjax.benchmark.input.CORPUS_BYTES", 1 << 17)
    monkeypatch.setattr("bltjax.benchmark.input.BATCHES", 2)
    assert main(["benchmark", "input", "--json", "--repeats=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_per_second_per_core"] > 1e5
    long, short = (found[f"documents_of_{size}"] for size in (4096, 512))
    assert found["bytes_per_second_per_core"] == long["blt"]["bytes_per_second_per_core"]
    assert short["byte_lm"]["bytes_per_second"] > 0


def test_made_records_have_the_patches_that_their_threshold_gives(tmp_path, monkeypatch):
    monkeypatch.setattr("bltjax.benchmark.input.CORPUS_BYTES", 1 << 16)
    made_records(tmp_path, 4096)
    documents = RecordDocuments(tmp_path)
    assert len(documents) == 16
    patching = Patching(threshold=float(np.log(MEAN_PATCH)))
    assert 4.3 < mean_patch_bytes((documents[i] for i in range(16)), patching) < 4.7


def test_refused(capsys):
    for words, why in (
        (["slots"], "arguments are required: --records"),
        (["tables", "--records=x"], "no option '--records=x'"),
        (["generate", "--peer=transformers_tuned"], "invalid choice: 'transformers_tuned'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["benchmark", *words])
        assert stopped.value.code == 2 and why in capsys.readouterr().err
    assert main(["benchmark", "generate", "--contexts", "--peer=transformers"]) == 1
    assert "drop --peer" in capsys.readouterr().err
    assert main(["benchmark", "train", "--repeats=0"]) == 1
    assert "--repeats (0) must be >= 1" in capsys.readouterr().err
    there = len(os.sched_getaffinity(0))
    assert main(["benchmark", "train", f"--threads={there + 1}"]) == 1
    assert f"--threads ({there + 1}) must be at most {there}" in capsys.readouterr().err
    assert main(["benchmark", "rows", "--longest=1000"]) == 1
    assert "--longest (1000) must be at least 1024" in capsys.readouterr().err


def test_convert(tmp_path, capsys):
    """The quickstart's shapes; the default is those of the released 1B."""
    configs = ["--config=configs/quickstart.py:blt", "--byte_lm=configs/quickstart.py:byte_lm"]
    assert main(["benchmark", "convert", *configs, f"--folder={tmp_path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] > found["largest_tensor_bytes"] > 0 < found["peak_bytes"]
    assert not list(tmp_path.iterdir())
