"""Sources by content: every file by its bytes whatever its name, or refused with the way out."""

import argparse
import bz2
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import pickle
import socket
import sqlite3
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.orc  # noqa: F401 (pa.orc)
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.config.arguments import add_source_arguments, source_from
from bltjax.config.data import DataConfig, SourceConfig
from bltjax.config.fields import from_dict, to_dict
from bltjax.config.rows import patch_rows
from bltjax.data.pipeline import training_batches
from bltjax.data.records import Manifest, encode_record, shard_info, write_manifest, write_shard
from bltjax.data.sources.by_path import open_source
from bltjax.data.sources.kinds import crc32c, recognised
from bltjax.data.sources.text import blank_line_cuts, cuts


def texts_of(path, **source) -> list[bytes]:
    documents = open_source(SourceConfig(str(path), **source))
    return [documents[i].text.tobytes() for i in range(len(documents))]


LINES = b'{"id": 1, "text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf", b"\n \r\n", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.NDJSON", "a.jsonl.txt", "a.gz", "a.parquet", "part-00000"]
)
def test_json_lines_under_any_name(tmp_path, caplog, name, begin):
    (tmp_path / name).write_bytes(begin + LINES.replace(b"\n", b"\r\n"))
    with caplog.at_level(logging.INFO):
        assert texts_of(tmp_path / name) == [b"one", b"two"]
    assert caplog.messages == [f"{tmp_path / name}: JSONL, 1 file, 2 documents"]


def test_a_format_that_is_named_comes_first(tmp_path):
    (tmp_path / "a.txt").write_bytes(LINES)
    (tmp_path / "b.txt").write_bytes(b"not an object\n" + LINES)
    assert texts_of(tmp_path / "a.txt", format="text") == [LINES]
    with pytest.raises(ValueError, match=r"b.txt, line 1: not JSON .* --format=text"):
        texts_of(tmp_path / "b.txt", format="jsonl")
    with pytest.raises(ValueError, match=r"a.txt is not a whole Parquet file"):
        texts_of(tmp_path / "a.txt", format="parquet")
    with pytest.raises(ValueError, match="format is 'csv', not one of auto, text, jsonl, parquet"):
        SourceConfig("a", format="csv")
    with pytest.raises(ValueError, match="tfds:x is no file, so it has no format 'text'"):
        SourceConfig("tfds:x", format="text")


def test_the_option_and_a_config_without_the_setting():
    parser = argparse.ArgumentParser()
    add_source_arguments(parser, required=True)
    assert source_from(parser.parse_args(["--source=x"])).format == "auto"
    assert source_from(parser.parse_args(["--source=x", "--format=text"])).format == "text"
    older = to_dict(SourceConfig("x"))
    del older["format"]
    assert from_dict(SourceConfig, older) == SourceConfig("x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"body": "x"}\n', r"line 1: no field 'text' \(there: 'body'\).*--format=text"),
        ('{\n "text": "x"\n}\n', r"line 1: not JSON.*an object over many lines, jq -c \. makes"),
        ('[\n{"text": "x"}\n]\n', r"line 1: not JSON.*an array of objects, jq -c '\.\[\]' makes"),
        ('[{"text": "x"}]', r"line 1: no field .*an array of objects, jq -c '\.\[\]' makes"),
        ("plain text\n", r"line 1: not JSON.*--format=text"),
        ('{"text": "x"}\nplain\n', r"line 2: not JSON.*--skip_bad"),
        ("<!DOCTYPE html><html>", r"begins with HTML: a login or error page"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_a_name_for_json_lines_is_a_promise(tmp_path, content, message, name):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"(?s){name}.* ?{message}"):
        texts_of(tmp_path / name)
    assert texts_of(tmp_path / name, format="text") == [content.encode()]


def test_a_text_that_begins_as_json_is_text_and_the_log_says_why(tmp_path, caplog):
    content = b'{"body": "x"}\n{"body": "y"}\n'
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(content)
    with caplog.at_level(logging.INFO):
        assert texts_of(tmp_path / "?") == [content, content]
    assert r"no field 'text' (there: 'body')" in caplog.messages[0]
    assert caplog.messages[0].endswith("(and 1 file like it)")
    assert caplog.messages[1].endswith("?: text, 2 files, 2 documents")
    assert texts_of(tmp_path / "a", field="body") == [b"x", b"y"]
    for begin in (b"{curly} text", b"{", b"[1]", b"{}\n"):
        (tmp_path / "a").write_bytes(begin)
        assert texts_of(tmp_path / "a") == [begin]
    (tmp_path / "a").write_bytes(LINES + b"and a text\n")
    with pytest.raises(ValueError, match=r"a, line 3: not JSON .*--format=text"):
        texts_of(tmp_path / "a")


def test_an_endless_first_line(tmp_path, monkeypatch):
    monkeypatch.setattr("bltjax.data.sources.kinds.LINE_BYTES", 1000)
    line = b'{"text": "' + b"x" * 2000 + b'"}'
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(line)
    assert texts_of(tmp_path / "a.jsonl") == [b"x" * 2000]
    with pytest.raises(
        ValueError, match=r"a.txt begins as a JSON object does, with a line of over"
    ):
        texts_of(tmp_path / "a.txt")
    assert texts_of(tmp_path / "a.txt", format="jsonl") == [b"x" * 2000]
    (tmp_path / "a.txt").write_bytes(b"x" * 5000)  # isn't read to its end
    assert texts_of(tmp_path / "a.txt") == [b"x" * 5000]
    (tmp_path / "a.txt").write_bytes(b" " * 5000 + b"\n" + LINES)
    assert texts_of(tmp_path / "a.txt") == [b"one", b"two"]


def written(write, *more) -> bytes:
    stream = io.BytesIO()
    write(stream, *more)
    return stream.getvalue()


def zipped(*names: str) -> bytes:
    def write(stream):
        with zipfile.ZipFile(stream, "w") as archive:
            for name in names:
                archive.writestr(name, "content")

    return written(write)


def tarred(stream) -> None:
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())


def made_by_path(make, tmp_path) -> bytes:
    path = tmp_path / "made"
    make(str(path))
    content = path.read_bytes()
    path.unlink()
    return content


def database(path: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("create table texts (text)")
    connection.close()


def array_record(path: str) -> None:
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    writer.write(b"text")
    writer.close()


def ipc(new):
    def write(stream):
        with new(stream, TABLE.schema) as writer:
            writer.write_table(TABLE)

    return written(write)


TABLE = pa.table({"text": ["one", "two"]})
TEXT = b"some text to pack, some text to pack"
# An empty record of TFRecord's: length, its checksum, that of nothing.
TFRECORD = bytes.fromhex("0000000000000000 29039807 d8ea82a2")
BINARY = {
    "gzip": gzip.compress(TEXT),
    "zstd": pa.compress(TEXT, codec="zstd", asbytes=True),
    "xz": lzma.compress(TEXT),
    "bzip2": bz2.compress(TEXT),
    "bzip2 ": bz2.compress(b""),
    "lz4": pa.compress(TEXT, codec="lz4", asbytes=True),
    "snappy": b"\xff\x06\x00\x00sNaPpY\x01\x00",
    "7z": b"7z\xbc\xaf\x27\x1c\x00\x04",
    "RAR": b"Rar!\x1a\x07\x01\x00",
    "tar": written(tarred),
    "ZIP": zipped("a.txt"),
    "ZIP ": zipped(),
    "PyTorch": zipped("model/data.pkl", "model/version"),
    "office": zipped("[Content_Types].xml", "word/document.xml"),
    ".npz": written(np.savez, np.arange(3)),
    ".npy": written(np.save, np.arange(3)),
    "Arrow": ipc(pa.ipc.new_file),
    "Arrow ": ipc(pa.ipc.new_stream),
    "Avro": b"Obj\x01\x04\x14avro.codec",
    "ORC": written(lambda stream: pa.orc.write_table(TABLE, stream)),
    "ArrayRecord": array_record,
    "TFRecord": TFRECORD,
    "HDF5": b"\x89HDF\r\n\x1a\n\x00",
    "pickle": pickle.dumps([TEXT]),
    "pickle ": pickle.dumps([TEXT], protocol=2),
    "safetensors": (40).to_bytes(8, "little") + b'{"__metadata__":{"format":"pt"}}        ',
    "GGUF": b"GGUF\x03\x00\x00\x00\x10",
    "SQLite": database,
    "PDF": b"%PDF-1.7\n%\xe2\xe3",
    "PNG": b"\x89PNG\r\n\x1a\n\x00",
    "JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "ELF": b"\x7fELF\x02\x01\x01",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
}


@pytest.mark.parametrize("what", BINARY)
def test_packed_and_binary_files_are_refused_under_any_name(tmp_path, what):
    content = BINARY[what]
    if callable(content):
        content = made_by_path(content, tmp_path)
    for name in ("a.txt", "a.jsonl", "a.parquet", "part-00000"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no text: .*{what.strip()}.*; .+--format"):
            texts_of(tmp_path / name)
    assert texts_of(tmp_path / "a.txt", format="text") == [content]
    with pytest.raises(ValueError, match="is no text"):
        texts_of(tmp_path / "a.txt", format="jsonl")


@pytest.mark.parametrize(
    "content",
    [
        b"PK is not zipped", b"ORC\nORCs, one ORC\n", b"BZh9 is how bzip2 begins", b"GGUF",
        b"GGUF is a format", b"Obj", b"%PDF", b"7z", b"Rar!", b"ARROW1 hits", b"FEA1", b"ORC",
        b"SQLite format 3", b"\x1f", b"\xff\xfe\xfd", b"\0" * 40, b"a\0b", b"\xff" * 40,
        "ą".encode("iso8859-2"), bytes(range(256)), b"version https://example.org", b"<html>\n",
        b"{", b"\xef\xbb\xbf",
    ],
)  # fmt: skip
def test_what_only_looks_binary_trains_as_it_is(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert texts_of(tmp_path / "a.txt") == [content]


def test_names_of_packed_files_count_where_the_bytes_are_no_text(tmp_path):
    """brotli's files, for example, have no magic bytes."""
    (tmp_path / "a.br").write_bytes(b"\x1b\x63\x00\x00\x24\x06\x6a\x10\xc0\xaa\xf0\x9c")
    with pytest.raises(
        ValueError, match=r"a.br is no text: it is not UTF-8 and called .br; unpack"
    ):
        texts_of(tmp_path / "a.br")
    (tmp_path / "a.gz").write_bytes("żółw".encode() * 3000)  # the head ends within a character
    assert texts_of(tmp_path / "a.gz") == ["żółw".encode() * 3000]


def test_checksum_of_records():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32", "UTF-32BE"])
def test_json_lines_of_wide_characters_are_named(tmp_path, encoding):
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes('\r\n{"text": "好"}\r\n'.encode(encoding))
        with pytest.raises(
            ValueError, match=rf"{name} is JSON lines in {encoding}, .*: iconv -f {encoding} -t"
        ):
            texts_of(tmp_path / name)


def test_text_of_wide_characters_trains_and_the_log_says_so(tmp_path, caplog):
    content = "żółw".encode("utf-16")
    (tmp_path / "a.txt").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert texts_of(tmp_path / "a.txt") == [content]
    assert "is UTF-16, not UTF-8" in caplog.text
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="is JSON lines in UTF-16, not UTF-8"):
        texts_of(tmp_path / "a.jsonl")


def test_a_page_in_place_of_a_table(tmp_path):
    (tmp_path / "a.parquet").write_text("\n<HTML><body>Log in</body>")
    with pytest.raises(ValueError, match=r"a.parquet begins with HTML.*Fetch it again"):
        texts_of(tmp_path / "a.parquet")


def test_files_without_text_are_of_the_others_kind(tmp_path, caplog):
    (tmp_path / "0").write_bytes(b"")
    (tmp_path / "1").write_bytes(LINES)
    (tmp_path / "2").write_bytes(b" \n\n")
    assert texts_of(tmp_path / "*") == [b"one", b"two"]
    (tmp_path / "1").write_bytes(b"x")
    with caplog.at_level(logging.INFO):
        assert texts_of(tmp_path / "*") == [b"x", b" \n\n"]
    assert caplog.messages == [
        f"{tmp_path}/*: text, 3 files, 2 documents; 1 empty document left out",
    ]
    (tmp_path / "3").write_bytes(LINES)
    with pytest.raises(ValueError, match=r"mixes text \(.*/1\) and JSONL \(.*/3\): make them two"):
        texts_of(tmp_path / "*")


def test_null_and_empty_texts_are_left_out_of_every_kind(tmp_path, caplog):
    texts = ["one", None, "", "two", None]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert texts_of(tmp_path / name) == [b"one", b"two"]
        assert caplog.messages[0].endswith("1 file, 2 documents; 3 empty documents left out")
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"other": null}\n')
    with pytest.raises(ValueError, match=r"line 2: no field 'text'"):
        texts_of(tmp_path / "a.jsonl")
    documents = '{"text": null}\n{"text": ["x"]}\n{"text": 3}\n{"text": true}\n' + '{"text": "x"}\n'
    (tmp_path / "a.jsonl").write_text(documents)
    found = open_source(SourceConfig(str(tmp_path / "a.jsonl")), skip_bad=True)
    assert (len(found), found.bad, found.empty) == (1, 3, 1)


def test_a_shard_of_nulls_is_read_as_no_documents(tmp_path):
    for name, texts in (("0", [None, None]), ("1", ["one", None]), ("2", [None])):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet")
    assert pq.read_schema(tmp_path / "0.parquet").field("text").type == pa.null()
    assert texts_of(tmp_path / "*.parquet") == [b"one"]
    with pytest.raises(ValueError, match=r"0.parquet is empty: it has no document with any text"):
        texts_of(tmp_path / "0.parquet")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"n": ' + "9" * 5000 + ', "text": "x"}', b"x"),
        ('{"n": [-' + "9" * 5000 + '], "text": "x"}', b"x"),
        ('{"n": 1e999999, "m": -0, "text": "x"}', b"x"),
        ('{"n": NaN, "m": [Infinity, -Infinity], "text": "x"}', b"x"),
        (r'{"text": "a\ud800b\udfff"}', b"ab"),  # surrogates alone have no bytes
        (r'{"text": "\ud83d\ude00"}', "😀".encode()),
        ('{"text": "first", "text": "last"}', b"last"),
        ('{"text": "x"}\r', b"x"),
        (r'{"text": "a\u0000\u2028b"}', "a\0\u2028b".encode()),
        ('{"n": ' + "[" * 500 + "]" * 500 + ', "text": "x"}', b"x"),
        ('{"text": "' + "[" * 100_000 + '"}', b"[" * 100_000),
    ],
)
def test_json_as_python_reads_it(tmp_path, line, text):
    (tmp_path / "a").write_text(line + "\n")
    assert texts_of(tmp_path / "a") == [text]


def test_numbers_are_no_text_however_they_are_parsed(tmp_path):
    for number in ("3", "3.5", "9" * 5000, "NaN"):
        (tmp_path / "a").write_text(f'{{"text": {number}}}\n')
        with pytest.raises(ValueError, match=r"line 1: field 'text' is not a string"):
            texts_of(tmp_path / "a")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"n": ' + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"line 2: not JSON"):
        texts_of(tmp_path / "a.jsonl")


def test_a_file_counts_once_whatever_links_to_it(tmp_path, caplog):
    corpus = tmp_path / "corpus"
    (corpus / "deep").mkdir(parents=True)
    for name in ("b", "deep/a", "deep/c"):
        (corpus / f"{name}.txt").write_text(name)
    plain = texts_of(corpus / "**/*.txt")
    assert plain == [b"b", b"deep/a", b"deep/c"]
    # Two circular links: each path of up to 40 links would be another name.
    (corpus / "again").symlink_to(".")
    (corpus / "deep" / "up").symlink_to("..")
    (corpus / "a.txt").symlink_to("deep/a.txt")
    (corpus / "zz.txt").symlink_to(corpus / "b.txt")
    (corpus / "gone.txt").symlink_to("nowhere")
    (corpus / "round.txt").symlink_to("round.txt")
    (corpus / "round").symlink_to("round")
    with caplog.at_level(logging.INFO):
        assert texts_of(corpus / "**/*.txt") == [b"deep/a", b"b", b"deep/c"]
    assert any("leads to a folder that was searched already" in line for line in caplog.messages)
    assert "2 files found again through links, and counted once" in caplog.text
    (corpus / "a.txt").unlink()
    assert texts_of(corpus / "**/*.txt") == texts_of(corpus / "**/**/*.txt") == plain
    assert texts_of(corpus / "*/*.txt") == [b"b", b"deep/a", b"deep/c"]
    assert texts_of(corpus) == [b"b"]
    with pytest.raises(ValueError, match=r"gone.txt is a link to nowhere, which is not there"):
        texts_of(corpus / "gone.txt")
    os.link(corpus / "b.txt", corpus / "bb.txt")
    assert texts_of(corpus) == [b"b", b"b"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.txt").write_text("d")
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    assert texts_of(corpus / "**/d.txt") == texts_of(corpus / "l*/**") == [b"d"]


def test_a_folder_is_no_pattern(tmp_path):
    (tmp_path / "[x]").mkdir()
    (tmp_path / "[x]" / "a.txt").write_text("x")
    assert texts_of(tmp_path / "[x]") == [b"x"]


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reading, writing = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        for path in (tmp_path / "fifo", tmp_path / "f*", tmp_path / "s", "/dev/zero",
                     f"/dev/fd/{reading}"):  # fmt: skip
            with pytest.raises(ValueError, match="is a pipe or a device, not a file that can be"):
                texts_of(path)
    os.write(writing, b"x")
    assert os.read(reading, 2) == b"x"  # nothing was read from it
    os.close(reading)
    os.close(writing)
    (tmp_path / "a.txt").write_text("x")
    with open(tmp_path / "a.txt", encoding="utf-8") as file:
        assert texts_of(f"/dev/fd/{file.fileno()}") == [b"x"]


parts = st.sampled_from(
    [b"a", b"bb", b" ", b"\n", b"\n\n", b"\r\n", "好".encode(), b"x" * 30, b"\xbf"]
)


@given(st.lists(parts, max_size=80), st.integers(1, 20))
def test_long_pieces_are_cut_and_others_as_ever(pieces, split_bytes):
    text = b"".join(pieces)
    old, new = blank_line_cuts(text, split_bytes), cuts(text, split_bytes)
    assert new == sorted(set(new)) or not text
    assert set(old) <= set(new)
    for begin, end in itertools.pairwise(new):
        assert end - begin <= 16 * split_bytes and (end - begin >= split_bytes or end in old)
    for begin, end in itertools.pairwise(old):
        inside = set(range(begin + 1, end)) & set(new)
        assert bool(inside) == (end - begin > 16 * split_bytes)
        if inside:
            pieces = itertools.pairwise([begin, *sorted(inside), end])
            # No character is cut, and four bytes may be one.
            assert max(b - a for a, b in pieces) <= max(3 * split_bytes, split_bytes + 3)


@given(st.text(alphabet="aż好😀", max_size=400), st.integers(1, 20))
def test_no_character_is_cut(text, split_bytes):
    text = text.encode()
    found = cuts(text, split_bytes)
    assert not text or found == sorted(set(found))
    for begin, end in itertools.pairwise(found):
        text[begin:end].decode()


def test_where_a_piece_without_blank_lines_is_cut():
    assert cuts(b"A" * 1601, 100) == [*range(0, 1500, 100), 1601]
    assert cuts(b"A" * 1600, 100) == [0, 1600]
    for end in (b"\n", b" ", b"\t"):
        assert cuts((b"A" * 69 + end) * 30, 100) == [*range(0, 1900, 140), 2100]
    assert cuts(b"A" * 150 + b" " + b"A" * 30 + b"\n" + b"A" * 2000, 100)[1] == 182
    assert cuts("😀".encode() * 5, 1) == [0, 4, 8, 12, 16, 20]
    # The cut that follows is where it was.
    assert 2010 in cuts(b"A" * 2008 + b"\n\n" + b"B" * 2000, 100)


def test_one_endless_line_trains_and_too_little_says_how(tmp_path):
    (tmp_path / "dna.txt").write_bytes(b"ACGT" * 500)
    source = SourceConfig(str(tmp_path / "dna.txt"), split_bytes=100)
    data = DataConfig(train={"a": source}, batch_size=4, seq_len=64, max_patches=64)
    documents = open_source(source)
    assert len(documents) == 18 and max(len(documents[i].text) for i in range(18)) == 300
    training_batches(data, patch_rows(None), seed=0, streams=range(4))
    data = DataConfig(train={"a": source}, batch_size=19, seq_len=64, max_patches=64)
    with pytest.raises(ValueError, match=r"has 18 documents in all.*: lower split_bytes"):
        training_batches(data, patch_rows(None), seed=0, streams=range(19))


def test_files_that_change_after_they_were_opened(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    pq.write_table(TABLE, tmp_path / "a.parquet")
    text, lines, table = (
        open_source(SourceConfig(str(tmp_path / f"a.{kind}")))
        for kind in ("txt", "jsonl", "parquet")
    )
    with (tmp_path / "a.txt").open("ab") as file:
        file.write(b"more")
    assert len(text[0].text) == 100
    (tmp_path / "a.txt").write_bytes(b"x" * 99)
    (tmp_path / "a.jsonl").write_bytes(LINES[:30])
    with pytest.raises(ValueError, match=r"a.txt has become shorter since it was opened"):
        text[0]
    with pytest.raises(ValueError, match=r"a.jsonl:2 has changed since it was opened"):
        lines[1]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""          }\n')
    with pytest.raises(ValueError, match=r"a.jsonl:1 has changed since it was opened"):
        lines[0]
    for texts in (["one"], [None, None], []):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / "a.parquet")
        table._files.clear()
        table._kept.clear()
        with pytest.raises(ValueError, match=r"a.parquet"):
            table[1]
    for name, documents in (("a.txt", text), ("a.jsonl", lines)):
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            documents[0]


def corpus_of(kind: str, folder, change: int | None = None) -> SourceConfig:
    """Two small files, or a folder of records, with one letter in the middle changed."""
    folder.mkdir(parents=True)
    for number in range(2):
        text = [f"text {number} {i} " for i in range(20)]
        if change == number:
            text[10] = "Text" + text[10][4:]
        path = folder / f"{folder.name}{number}"
        if kind == "text":
            path.write_text("\n\n".join(text))
        elif kind == "JSONL":
            path.write_text("".join(json.dumps({"text": t}) + "\n" for t in text))
        elif kind == "Parquet":
            pq.write_table(pa.table({"text": text}), path, compression="none")
        else:
            path = folder / f"shard-{number}.array_record"
            write_shard(path, (encode_record(t.encode(), np.zeros(len(t) + 1)) for t in text))
    if kind == "records":
        infos = [shard_info(path, 400, 20, 0) for path in sorted(folder.glob("shard*"))]
        write_manifest(folder, Manifest("id", str(folder), 7, "float32", "texts", tuple(infos)))
        return SourceConfig(str(folder))
    return SourceConfig(f"{folder}/*", split_bytes=50)


@pytest.mark.parametrize("kind", ["text", "JSONL", "Parquet", "records"])
def test_fingerprints_know_a_corpus_wherever_it_lies(tmp_path, kind):
    here = open_source(corpus_of(kind, tmp_path / "here")).fingerprint
    assert len(here) == 32 and int(here, 16)
    there = corpus_of(kind, tmp_path / "moved" / "there")
    for path in (tmp_path / "moved" / "there").iterdir():
        os.utime(path, (1, 1))
    assert open_source(there).fingerprint == here
    for change in (0, 1):
        other = corpus_of(kind, tmp_path / f"changed{change}", change)
        assert open_source(other).fingerprint != here
    if kind == "records":
        return
    (tmp_path / "here" / "zzz").write_bytes(b"")
    if kind != "Parquet":
        assert open_source(SourceConfig(f"{tmp_path}/here/*", split_bytes=50)).fingerprint == here
    (tmp_path / "moved" / "there" / "there1").rename(tmp_path / "moved" / "there" / "0")
    assert open_source(there).fingerprint != here  # another order
    if kind == "text":
        other = open_source(SourceConfig(f"{tmp_path}/here/*", split_bytes=60))
        assert other.fingerprint != here


def test_fingerprints_of_files_of_every_size(tmp_path):
    block = 1 << 16
    seen = set()
    for size in (1, block - 1, block + 1, 2 * block, 3 * block - 1, 3 * block, 5 * block):
        content = bytearray(size)
        places = range(0, size, block // 2) if size <= 3 * block else (0, size // 2, size - 1)
        for place in (None, *places):
            if place is not None:
                content[place] = 1
            (tmp_path / "a").write_bytes(content)
            found = open_source(SourceConfig(str(tmp_path / "a"))).fingerprint
            assert found not in seen, (size, place)
            seen.add(found)


SUFFIXES = ("", ".txt", ".jsonl", ".json", ".ndjson", ".parquet", ".pq", ".gz", ".txt.zst", ".bin")
any_text = st.text(max_size=30) | st.text(alphabet='{"text: x\n\\}[]\r\0\ufeff', max_size=30)
any_bytes = st.binary(max_size=60) | st.builds(
    lambda begin, rest: begin + rest,
    st.sampled_from(
        [c[:20] for c in BINARY.values() if isinstance(c, bytes)] + [LINES, b"PAR1", b"{"]
    ),
    st.binary(max_size=30),
)


def check_any_file(folder, texts, content, suffix, width, ascii):
    """The same texts as JSON lines and Parquet, and any bytes as text, all under one name."""
    path = folder / f"a{suffix}"
    expected = [t.encode(errors="ignore") for t in texts if t and t.encode(errors="ignore")]
    lines = [json.dumps({"n": 1, "text": t}, ensure_ascii=ascii) for t in texts]
    path.write_text("".join(line + "\n" for line in lines), errors="surrogatepass")
    if expected:
        assert texts_of(path) == expected
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=width)
    if expected:
        assert texts_of(path) == expected
    path.write_bytes(content)
    assert texts_of(path, format="text") == [content] if content else True
    try:
        found = texts_of(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        if recognised(path, "text").name in ("text", None):
            assert found == [content]


any_file = given(
    st.lists(any_text | st.none(), max_size=5), any_bytes, st.sampled_from(SUFFIXES),
    st.integers(1, 3), st.booleans(),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@settings(max_examples=60, derandomize=True)
@any_file
def test_any_file_comes_out_as_it_went_in_or_is_refused(
    folder, texts, content, suffix, width, ascii
):
    check_any_file(folder, texts, content, suffix, width, ascii)


@pytest.mark.slow
@settings(max_examples=3000)
@any_file
def test_many_files_come_out_or_are_refused(folder, texts, content, suffix, width, ascii):
    check_any_file(folder, texts, content, suffix, width, ascii)
