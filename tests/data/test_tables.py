"""Parquet and TFDS as sources, their faults, and mixtures of all kinds."""

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.config.model import Patching
from bltjax.config.rows import patch_rows
from bltjax.data.pipeline import training_batches
from bltjax.data.sources.by_path import open_source

TEXTS = ["first text", "第二", "", None, "the fifth", "x"]


def write_parquet(path, texts=TEXTS, **columns):
    table = pa.table({"text": pa.array(texts, pa.string()), "n": list(range(len(texts)))})
    pq.write_table(table, path, row_group_size=2)


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Twelve short texts, two of them empty, and a split of empty ones."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="en"), tfds.core.BuilderConfig(name="de"))

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self.numbered(10), "test": self.numbered(2), "none": self.numbered(0)}

    def numbered(self, count):
        for number in range(count + 2):
            text = f"text number {number}, 好" if number < count else ""
            yield number, {"text": text, "label": number}

    _generate_examples = numbered


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return str(folder)


def test_parquet(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", ["more"])
    documents = open_source(SourceConfig(str(tmp_path / "*.parquet")))
    texts = [documents[i].text.tobytes().decode() for i in range(len(documents))]
    assert texts == ["first text", "第二", "the fifth", "x", "more"]  # null and empty left out
    assert documents.name(2) == f"{tmp_path}/a.parquet, row group 2, row 0"
    again = pickle.loads(pickle.dumps(documents))
    assert again[1].text.tobytes() == "第二".encode()


def test_parquet_with_empty_groups_and_of_every_string_type(tmp_path):
    kinds = {
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
        "view": pa.string_view(),
        "large": pa.large_string(),
    }
    for name, kind in kinds.items():
        groups = [["first", None, "first"], [], ["第二", ""]]
        schema = pa.schema([("text", kind)])
        path = tmp_path / f"{name}.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            for texts in groups:
                writer.write_table(pa.table({"text": pa.array(texts, pa.string()).cast(kind)}))
        assert pq.ParquetFile(path).schema_arrow.field("text").type == kind
        documents = open_source(SourceConfig(str(path)))
        texts = [documents[i].text.tobytes().decode() for i in range(len(documents))]
        assert texts == ["first", "first", "第二"]
        assert documents.name(2) == f"{path}, row group 2, row 0"
    write_parquet(tmp_path / "none.parquet", [])
    with pytest.raises(ValueError, match=r"none.parquet is empty: it has no document"):
        open_source(SourceConfig(str(tmp_path / "none.parquet")))


@pytest.mark.parametrize("name", ["a.pq", "a.PARQUET", "a.parquet", "part-00000", "a.txt"])
def test_parquet_under_any_name(tmp_path, name):
    """Read as text its bytes would train, and teach nothing."""
    write_parquet(tmp_path / name)
    assert open_source(SourceConfig(str(tmp_path / name)))[1].text.tobytes().decode() == "第二"
    (tmp_path / "b.pq").write_text("no Parquet")
    with pytest.raises(ValueError, match=r"b.pq is not a whole Parquet file"):
        open_source(SourceConfig(str(tmp_path / "b.pq")))


def test_parquet_that_is_wrong(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path)
    with pytest.raises(ValueError, match=r"no column 'texts'; did you mean 'text'"):
        open_source(SourceConfig(str(path), field="texts"))
    with pytest.raises(ValueError, match=r"column 'n' is int64, not string"):
        open_source(SourceConfig(str(path), field="n"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a.parquet is not a whole Parquet file"):
        open_source(SourceConfig(str(path)))
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError, match=r"mixes text .* and Parquet|mixes Parquet"):
        open_source(SourceConfig(str(tmp_path / "*")))


def test_tfds(data_dir):
    documents = open_source(SourceConfig("tfds:tiny", data_dir=data_dir))
    texts = {documents[i].text.tobytes().decode() for i in range(len(documents))}
    assert len(documents) == 10 and documents.empty == 2  # of 12: empty ones are left out
    assert texts == {f"text number {number}, 好" for number in range(10)}
    rows = [int(documents.name(i).removeprefix("tfds:tiny[train][")[:-1]) for i in range(10)]
    assert rows == sorted(rows) and rows != list(range(10)) and rows[-1] < 12
    for name, split, count in (
        ("tfds:tiny/en:1.0.0", "test", 2),
        ("tfds:tiny", "train+test", 12),
        ("tfds:tiny", "train[50%:]+test", None),
    ):
        found = len(open_source(SourceConfig(name, split=split, data_dir=data_dir)))
        assert found == count or (count is None and 6 <= found <= 8)


def test_fingerprint_of_tfds(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "moved")
    found = {
        (folder, name, split): open_source(
            SourceConfig(name, split=split, data_dir=str(folder))
        ).fingerprint
        for folder in (data_dir, tmp_path / "moved")
        for name, split in (("tfds:tiny", "train"), ("tfds:tiny", "test"), ("tfds:tiny/en", "test"))
    }
    assert len(set(found.values())) == 2 and all(len(value) == 32 for value in found.values())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tfds:tinny", {}, r"no such dataset; near ones: tiny"),
        ("tfds:tiny", {"split": "trian"}, r"no split 'trian'; did you mean 'train'"),
        ("tfds:tiny", {"field": "txt"}, r"no feature 'txt'; did you mean 'text'"),
        ("tfds:tiny", {"field": "label"}, r"feature 'label' is .*, not text"),
        ("tfds:tiny/enn", {}, r"tiny/enn: there is no config 'enn'; did you mean 'en'"),
        ("tfds:tiny:9.0.0", {}, r"tiny:9.0.0: there is no version '9.0.0'; did you mean '1.0.0'"),
        ("tfds:tiny/en:9.0.0", {}, r"there is no version '9.0.0'"),
        ("tfds:mnist/big", {}, r"tfds:mnist/big: there is no config 'big'$"),
        ("tfds:tiny", {"split": "train[:0]"}, r"tfds:tiny, split 'train\[:0\]': it has no rows"),
        ("tfds:tiny", {"split": "train[:x]"}, r"tfds:tiny, split 'train\[:x\]': Error parsing"),
        ("tfds:tiny", {"split": "train+trian"}, r"no split 'trian'; did you mean 'train'"),
        ("tfds:tiny", {"split": "none"}, r"tfds:tiny is empty: it has no document with any text"),
    ],
)
def test_tfds_that_is_not_there(data_dir, name, settings, message):
    with pytest.raises(ValueError, match=message):
        open_source(SourceConfig(name, data_dir=data_dir, **settings))


def test_tfds_prepared_elsewhere(data_dir):
    """Without a dataset's code, the contents are read from its folder."""
    code = (
        "import sys; from bltjax.config.data import SourceConfig as S;"
        " from bltjax.data.sources.by_path import open_source as o\n"
        "for name in sys.argv[2:]:\n"
        "    try: print(len(o(S(name, data_dir=sys.argv[1]))))\n"
        "    except ValueError as error: print(error)\n"
    )
    names = ("tfds:tiny", "tfds:tiny/enn", "tfds:tiny:9.0.0")
    found = subprocess.run(
        [sys.executable, "-c", code, data_dir, *names], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines() == [
        "10",
        "tfds:tiny/enn: there is no config 'enn'; did you mean 'en'?",
        "tfds:tiny:9.0.0: there is no version '9.0.0'; did you mean '1.0.0'?",
    ]


def test_mixture_of_all_kinds(tmp_path, data_dir):
    """Shares are of bytes, whatever the sources are."""
    write_parquet(tmp_path / "a.parquet", ["parquet " * 5] * 20)
    (tmp_path / "b.jsonl").write_text('{"text": "jsonl jsonl jsonl"}\n' * 20)
    (tmp_path / "c.txt").write_text("plain " * 9)
    sources = {
        "parquet": SourceConfig(str(tmp_path / "a.parquet"), weight=4.0),
        "jsonl": SourceConfig(str(tmp_path / "b.jsonl"), weight=2.0),
        "text": SourceConfig(str(tmp_path / "c.txt"), weight=1.0),
        "tfds": SourceConfig("tfds:tiny", data_dir=data_dir, weight=1.0),
    }
    data = DataConfig(train=sources, batch_size=2, seq_len=256, max_patches=128, look_ahead=2)
    batches = iter(
        training_batches(
            data, patch_rows(Patching(mode="space")), seed=5, streams=range(data.batch_size)
        )
    )
    text = b""
    for _ in range(40):
        ids = next(batches).bytes_BN
        text += (ids[ids >= 4] - 4).astype(np.uint8).tobytes()
    batches.close()
    sizes = {b"parquet ": 8, b"jsonl": 17 / 3, b"plain ": 6, b"text number": 18}
    counts = np.array([text.count(word) * size for word, size in sizes.items()])
    np.testing.assert_allclose(counts / counts.sum(), [0.5, 0.25, 0.125, 0.125], atol=0.04)
