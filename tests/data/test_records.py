"""Records and sources: complete files or a clear error."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bltjax.config.data import SourceConfig
from bltjax.data.records import (
    Manifest,
    RecordDocuments,
    decode_record,
    encode_record,
    shard_info,
    write_manifest,
    write_shard,
)
from bltjax.data.sources.by_path import open_source
from bltjax.data.sources.text import blank_line_cuts


@given(st.binary(max_size=50))
def test_record_round_trip(text):
    entropies = np.arange(len(text) + 1, dtype=np.float32)
    record = encode_record(text, entropies)
    document = decode_record(record)
    assert document.text.tobytes() == text and (document.entropies == entropies).all()
    with pytest.raises(ValueError):
        decode_record(record[:-1])
    with pytest.raises(ValueError, match="checksum"):
        decode_record(record[:-1] + bytes([record[-1] ^ 1]))


def test_record_needs_one_entropy_more_than_bytes():
    with pytest.raises(ValueError, match="a text of 3 bytes needs 4 entropies, not 3"):
        encode_record(b"abc", np.zeros(3))


@pytest.fixture
def folder(tmp_path):
    """Two shards of three documents."""
    infos = []
    for number in range(2):
        path = tmp_path / f"shard-{number}.array_record"
        texts = [f"document {number} {i}".encode() for i in range(3)]
        write_shard(path, (encode_record(t, np.zeros(len(t) + 1)) for t in texts))
        infos.append(shard_info(path, sum(map(len, texts)), 3, 0))
    write_manifest(tmp_path, Manifest("id-1", "runs/lm", 7, "float32", "texts", tuple(infos)))
    return tmp_path


def test_reading_by_number(folder):
    documents = RecordDocuments(folder, expected_identity="id-1")
    assert len(documents) == 6
    assert documents[4].text.tobytes() == b"document 1 1"
    assert not list(folder.glob(".*partial"))


def test_another_byte_lm_is_refused(folder):
    with pytest.raises(ValueError, match=r"scored by byte LM id-1.*requested byte LM is id-2"):
        RecordDocuments(folder, expected_identity="id-2")


def test_truncated_missing_and_corrupt_shards(folder):
    path = folder / "shard-1.array_record"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=f"{path} has {len(whole) - 10} bytes, not {len(whole)}"):
        RecordDocuments(folder)
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match=r"shard-1.array_record, record 4: .*damaged"):
        RecordDocuments(folder)[4]
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        RecordDocuments(folder)


def test_unfinished_folder_is_refused(folder):
    (folder / "manifest.json").unlink()
    (folder / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="Run the entropies command to its end"):
        open_source(SourceConfig(str(folder)))
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a manifest"):
        open_source(SourceConfig(str(folder)))


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe not UTF-8")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"x")
    for path in (tmp_path, f"{tmp_path}/*.txt", f"{tmp_path}/**/*.txt"):
        documents = open_source(SourceConfig(str(path)))
        texts = [documents[i].text.tobytes() for i in range(len(documents))]
        assert texts == [b"\xff\xfe not UTF-8", b"x"]


@given(st.lists(st.sampled_from([b"a", b"bb", b"\n", b"\n\n"]), max_size=60), st.integers(1, 20))
def test_cuts_join_to_the_file(parts, split_bytes):
    text = b"".join(parts)
    cuts = blank_line_cuts(text, split_bytes)
    assert cuts[0] == 0 and cuts[-1] == len(text) and cuts == sorted(cuts)
    for end in cuts[1:-1]:
        assert text[:end].endswith(b"\n\n") and text[end : end + 1] != b"\n"


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "zażółć", "id": 3}\n')
    documents = open_source(SourceConfig(str(path)))
    assert [documents[i].text.tobytes().decode() for i in range(2)] == ["one", "zażółć"]
    assert documents.name(1).endswith("a.jsonl:4")
    for line, message in (
        ("not json", "line 2: not JSON"),
        ('{"body": "x"}', r"line 2: no field 'text' \(there: 'body'\)"),
        ('{"text": 3}', "line 2: field 'text' is not a string"),
        ("[1]", r"line 2: no field 'text' \(there: no fields\)"),
    ):
        path.write_text(f'{{"text": "one"}}\n{line}\n')
        with pytest.raises(ValueError, match=f"{path}, {message}"):
            open_source(SourceConfig(str(path)))
        documents = open_source(SourceConfig(str(path)), skip_bad=True)
        assert len(documents) == 1 and documents.bad == 1


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(ValueError, match="no such file, and no file matches it"):
        open_source(SourceConfig(str(tmp_path / "nowhere*.txt")))
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty: it has no document with any text"):
        open_source(SourceConfig(str(tmp_path / "empty.txt")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(PermissionError):
        open_source(SourceConfig(str(tmp_path / "a.txt")))


def test_manifest_survives_json(folder):
    manifest = RecordDocuments(folder).manifest
    assert manifest.total("documents") == 6
    assert json.loads((folder / "manifest.json").read_text())["byte_lm"] == "id-1"
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    assert dataclasses.asdict(RecordDocuments(copy).manifest) == dataclasses.asdict(manifest)


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(ValueError, match=r"a.jsonl.gz is no text: it is packed by gzip; gzip -d"):
        open_source(SourceConfig(str(tmp_path / "a*")))
    with pytest.raises(ValueError, match=r"neither records nor \*.txt files; other files need"):
        open_source(SourceConfig(str(tmp_path)))
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(ValueError, match=r"mixes JSONL .* and text .*: make them two sources"):
        open_source(SourceConfig(str(tmp_path / "b*")))


def test_jsonl_nested_too_deeply_is_a_bad_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + '\n{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: not JSON"):
        open_source(SourceConfig(str(tmp_path / "a.jsonl")))
    assert len(open_source(SourceConfig(str(tmp_path / "a.jsonl")), skip_bad=True)) == 1


def test_blank_lines_of_windows_cut_too(tmp_path):
    text = b"one line\r\n\r\n" * 50
    (tmp_path / "a.txt").write_bytes(text)
    documents = open_source(SourceConfig(str(tmp_path / "a.txt"), split_bytes=20))
    pieces = [documents[i].text.tobytes() for i in range(len(documents))]
    assert len(pieces) > 10 and b"".join(pieces) == text


def test_another_format_version_and_numbers_out_of_range(folder):
    documents = RecordDocuments(folder)
    for number in (-1, 6):
        with pytest.raises(IndexError, match=f"has no record {number}; it has 6"):
            documents[number]
    write_manifest(folder, dataclasses.replace(documents.manifest, version=2))
    with pytest.raises(ValueError, match="has format version 2, but this code reads version 1"):
        RecordDocuments(folder)


def test_a_failed_shard_never_has_its_final_name(tmp_path):
    def records():
        yield encode_record(b"one", np.zeros(4))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.array_record", records())
    assert not list(tmp_path.glob("*.array_record"))
    write_shard(tmp_path / "a.array_record", [encode_record(b"one", np.zeros(4))])
    assert [path.name for path in tmp_path.iterdir()] == ["a.array_record"]


def test_a_shard_that_cannot_be_written_is_an_os_error(tmp_path):
    path = tmp_path / "nowhere" / "a.array_record"
    with pytest.raises(OSError, match=r"a.array_record.partial could not be written"):
        write_shard(path, [encode_record(b"one", np.zeros(4))])
