"""JSON of ours, damaged by a power failure, a full disk or a person: rewritten, or named."""

import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath
from test_checkpoint import CONFIG, small_state
from test_entropies import contents, part
from test_train import command, losses

from bltjax.__main__ import main
from bltjax.convert.inspect import last_report
from bltjax.data.records import (
    Manifest,
    RecordDocuments,
    encode_record,
    shard_info,
    write_manifest,
    write_shard,
)
from bltjax.inference.corpus import scoring_rate
from bltjax.inference.shard_plan import agree_on, info_of, plan_checksum, side_path
from bltjax.system.storage import parse_json, read_json
from bltjax.training.checkpoint import StreamsHandler, StreamsRestore, make_manager, save
from bltjax.training.goodput import Goodput, read_sums
from bltjax.training.reports import Reporter
from bltjax.viz.page import curves, read_samples, samples_part
from bltjax.weights.damage import Damaged, Misfit, read_progress
from bltjax.weights.export import read_export_manifest
from bltjax.weights.workdir import read_reports, read_run_config

OTHERS = (None, True, -1, 0, 3.5, float("nan"), 10**400, "", "x", [], [1], {}, {"a": 1})


def damaged(choose: random.Random, text: bytes) -> bytes:
    """Empty, cut, blank, garbage, with other bytes, or JSON with one value changed."""
    how = choose.randrange(8)
    if how < 5:
        values = json.loads(text)
        change(choose, values)
        return json.dumps(values).encode() if how else json.dumps(choose.choice(OTHERS)).encode()
    if how == 5:
        return text[: choose.randrange(len(text))]
    if how == 6:
        return choose.choice((b"", bytes(len(text)), b"\xff\xfe{}", choose.randbytes(20), b"{}"))
    changed = bytearray(text)
    for _ in range(choose.randint(1, 3)):
        changed[choose.randrange(len(text))] = choose.randrange(256)
    return bytes(changed)


def change(choose: random.Random, values) -> None:
    """Removes a part of nested values, or replaces it."""
    keys = list(values) if isinstance(values, dict) else list(range(len(values)))
    if not keys:
        return
    key = choose.choice(keys)
    if isinstance(values[key], dict | list) and values[key] and choose.random() < 0.8:
        change(choose, values[key])
    elif choose.random() < 0.3:
        del values[key]
    elif type(values[key]) is int and choose.random() < 0.5:
        values[key] += choose.choice((-1, 1, 10))
    else:
        values[key] = choose.choice(OTHERS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One of each kind of JSON of a run, its data and its checkpoints."""
    root = tmp_path_factory.mktemp("files")
    goodput = Goodput(root, 0.0)
    goodput.save(5)
    goodput.write()
    reporter = Reporter(root, 0)
    for step in range(1, 9):
        reporter.write(step, {"loss": 3.0 / step, "seconds": 1.0 * step, "learning_rate": 1e-3})
    reporter.close()
    text = {"prompt": "a", "written": "b"}
    piece = {"text": "the ", "bytes": 4, "nats": 2.5}
    samples = {"step": 5, "temperature": 0.7, "texts": [text], "patches": [piece, piece]}
    (root / "samples.json").write_text(json.dumps(samples))
    manager = make_manager(root, CONFIG)
    save(manager, small_state(3), {"0": {"taken": 3}}, {"step": 3, "config": {"seed": 1}})
    manager.close()
    records = root / "records"
    records.mkdir()
    source = {"path": "texts", "field": "text", "split_bytes": 0}
    plan = {"byte_lm": "id-1", "source": source, "documents": 6, "text_bytes": 66}
    plan |= {"text_crc32": 7, "shard_bytes": 30}
    (records / "plan.json").write_text(json.dumps(plan))
    infos = []
    for number in range(2):
        path = records / f"shard-{number:05d}-of-00002.array_record"
        texts = [f"document {number}{i}".encode() for i in range(3)]
        write_shard(path, (encode_record(t, np.zeros(len(t) + 1)) for t in texts))
        infos.append(shard_info(path, sum(map(len, texts)), 3, 0))
        made = {"seconds": 1.5, "process": 0, "device": "cpu", "plan": plan_checksum(plan)}
        side_path(path).write_text(json.dumps(vars(infos[-1]) | {"made": made}))
    write_manifest(records, Manifest("id-1", "runs/lm", 7, "float32", "texts", tuple(infos)))
    return SimpleNamespace(root=root, records=records, plan=plan, infos=infos)


def read_goodput(files, path) -> None:
    found = Goodput(path.parent, 0.0)
    found.resume(5)
    found.charge("steps")
    assert "goodput" in found.summary()


def read_metrics(files, path) -> None:
    """All complete lines are kept, and no other."""
    whole = []
    for line in path.read_bytes().split(b"\n"):
        try:
            values = parse_json(line, "")
            if type(values.get("step")) is int and -(2**63) < values["step"] <= 6:
                whole.append(values)
        except ValueError:
            pass
    assert all(type(report["step"]) is int for report in read_reports(path))
    last_report(epath.Path(path))
    curves(read_reports(path))
    Reporter(epath.Path(path.parent), 6).close()
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert json.dumps(kept) == json.dumps(whole)


def read_page(files, path) -> None:
    try:
        samples_part(read_samples(path))
    except ValueError as error:
        assert str(path) in str(error)


def read_side(files, path) -> None:
    """Only correct values are used; except that a changed padding count can't be detected."""
    number = 0 if "00000" in path.name else 1
    whole = files.infos[number]
    info = info_of(
        path.with_suffix(".array_record"), 3, whole.text_bytes, plan_checksum(files.plan)
    )
    if info is not None and info.is_whole(files.records / info.name):
        assert vars(info) | {"padding": 0} == vars(whole)
    records = RecordDocuments(files.records)
    records.folder = path.parent
    rate = scoring_rate(records)
    assert rate is None or rate["bytes_per_second_per_device"] > 0


def read_plan(files, path) -> None:
    """Another plan is refused; an unreadable one is written again, as its shards have its
    checksum."""
    try:
        agree_on(files.plan, epath.Path(path.parent))
    except ValueError as error:
        assert str(path.parent) in str(error) and "Give another --out" in str(error)
    else:
        assert read_json(path) | {"source": 0} == files.plan | {"source": 0}
        assert files.plan["source"].items() <= ({"split_bytes": 0, "field": "text"} | (
            read_json(path)["source"]
        )).items()  # fmt: skip


def read_manifest(files, path) -> None:
    """The result is what was written, whatever the manifest says; or the error names it."""
    try:
        found = RecordDocuments(epath.Path(path.parent), "id-1")
        texts = [found[i].text.tobytes().decode() for i in range(len(found))]
    except ValueError as error:
        assert str(path.parent) in str(error)
    else:
        assert texts == [f"document {number}{i}" for number in range(2) for i in range(3)]


def read_state(files, path) -> None:
    folder = path.parent.parent
    try:
        if path.name == "metadata":
            found, whole = read_progress(folder), files.root / "checkpoints/3/progress/metadata"
        else:
            found = StreamsHandler().restore(folder / "streams", StreamsRestore([0]))["0"]
            whole = files.root / "checkpoints/3/streams/0.json"
    except (Damaged, Misfit):
        return
    assert found | {"crc32": 0} == json.loads(whole.read_text()) | {"crc32": 0}


READERS = {
    "goodput.json": read_goodput,
    "metrics.jsonl": read_metrics,
    "samples.json": read_page,
    "records/shard-00000-of-00002.json": read_side,
    "records/plan.json": read_plan,
    "records/manifest.json": read_manifest,
    "checkpoints/3/progress/metadata": read_state,
    "checkpoints/3/streams/0.json": read_state,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("times", "seed"), [(60, 0), pytest.param(1250, None, marks=pytest.mark.slow)]
)
def test_whatever_is_in_a_file(files, tmp_path, name, times, seed):
    """Every error names the file, and no detectably wrong value is used."""
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    print(f"seed {seed}")
    choose, whole = random.Random(f"{name} {seed}"), (files.root / name).read_bytes()
    shutil.copytree(files.records, tmp_path / "records")
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(times):
        data = damaged_lines(choose, whole) if name == "metrics.jsonl" else damaged(choose, whole)
        path.write_bytes(data)
        READERS[name](files, path)


def damaged_lines(choose: random.Random, text: bytes) -> bytes:
    lines = text.splitlines()
    for at in choose.sample(range(len(lines)), 3):
        lines[at] = damaged(choose, lines[at])
    return b"\n".join(lines)


def test_how_a_file_is_named():
    whole = json.dumps({"a": [1.5e-3, True, None, 'x"\\zż'], "b": {"c": float("inf")}}).encode()
    assert parse_json(b"\xef\xbb\xbf" + whole, "F")["b"] == {"c": float("inf")}
    for end in range(len(whole)):
        message = rf"^F is truncated at byte {end}$" if end else "^F is empty$"
        with pytest.raises(ValueError, match=message):
            parse_json(whole[:end], "F")
    for data, message in (
        (bytes(9), "is empty: 9 blank bytes"),
        (b"{\xff}", "is not UTF-8: byte 1 is 0xff"),
        (b'{"a": "\xc5', "is truncated at byte 8"),
        (b"{'a': 1}", r"is not JSON: .* \(char 1\)"),
        (whole + b"}", "is not JSON: Extra data"),
        (b"[" * 100_000, "is not JSON: maximum recursion"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b"[1]", "holds list, not an object"),
    ):
        with pytest.raises(ValueError, match=f"^F {message}"):
            parse_json(data, "F")


def test_a_run_resumes_without_its_statistics(runs, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(runs.byte_lm, copy)
    (copy / "page.html").unlink(missing_ok=True)
    shutil.rmtree(copy / "checkpoints" / "12")
    (copy / "goodput.json").write_text("")
    (copy / "samples.json").write_text('{"texts": [{"prompt"')
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    lines.insert(3, lines[3][: len(lines[3]) // 2])
    (copy / "metrics.jsonl").write_text("\n".join([*lines, "3", '{"step": "4"}']))
    assert main(command(runs, "byte_lm", copy)) == 0
    printed = capsys.readouterr()
    assert f"{copy / 'goodput.json'} is empty: goodput is counted from here on" in printed.out
    assert f"{copy / 'metrics.jsonl'}: 3 damaged lines are left out" in printed.err
    assert f"{copy / 'samples.json'} is truncated at byte 20" in printed.out
    assert losses(copy) == losses(runs.byte_lm) and read_sums(copy / "goodput.json")["ended"]
    assert "Bits per byte" in (copy / "page.html").read_text(encoding="utf-8")


def test_scoring_goes_on(runs, tmp_path, capsys):
    """With a lost plan, sidecar and manifest; the complete shards are kept."""
    out = tmp_path / "o"
    shutil.copytree(runs.root / "records" / "train", out)
    first, *others = sorted(out.glob("*.array_record"))
    before = [path.stat().st_mtime_ns for path in (first, *others)]
    side, manifest = side_path(first), (out / "manifest.json")
    for path, text in ((out / "plan.json", ""), (side, side.read_text()[:50]), (manifest, "{}")):
        path.write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json is not a manifest .*Run the entropies"):
        RecordDocuments(epath.Path(out))
    assert part(runs, out, 0, 1) is not None
    printed = capsys.readouterr().out
    assert f"{out / 'plan.json'} is empty; it is lost" in printed
    assert f"{side} is truncated at byte 50: its shard is scored again" in printed
    assert printed.count(": kept,") == len(others)
    assert contents(out) == contents(runs.root / "records" / "train")
    after = [path.stat().st_mtime_ns for path in (first, *others)]
    assert after[1:] == before[1:] and after[0] > before[0]


def test_a_lost_plan_of_other_shards_is_refused(files, tmp_path):
    """Of another plan, or of a version that didn't store its checksum."""
    out = epath.Path(tmp_path / "o")
    shutil.copytree(files.records, out)
    (out / "plan.json").unlink()
    with pytest.raises(ValueError, match=r"plan.json is lost, .*shard-00000-of-00002.json"):
        agree_on(files.plan | {"byte_lm": "id-2"}, out)
    agree_on(files.plan, out)
    assert read_json(out / "plan.json") == files.plan
    for side in out.glob("shard-*.json"):
        values = read_json(side)
        del values["made"]["plan"]
        side.write_text(json.dumps(values))
    agree_on(files.plan, out)  # it is there
    (out / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="Give another --out, or remove that folder"):
        agree_on(files.plan, out)
    for side in out.glob("shard-*.json"):
        side.unlink()
    agree_on(files.plan, out)  # all of them will be scored
    assert read_json(out / "plan.json") == files.plan


def test_settings_that_a_source_has_by_default_are_no_other_plan(files, tmp_path):
    """A version with a new setting resumes the work of an older one."""
    out = epath.Path(tmp_path)
    (out / "plan.json").write_text(json.dumps(files.plan))
    newer = files.plan | {"source": files.plan["source"] | {"split": "train", "data_dir": ""}}
    agree_on(newer, out)
    assert plan_checksum(newer) == plan_checksum(files.plan)
    with pytest.raises(ValueError, match=r"source.split: 'train' -> 'test'"):
        agree_on(newer | {"source": newer["source"] | {"split": "test"}}, out)


@pytest.mark.parametrize("text", ["", "{", "garbage", "[1]", '{"byte_lm": {"layers": ', "\0\0"])
def test_configs_are_named(runs, tmp_path, text):
    shutil.copytree(runs.byte_lm, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"run/config\.json "):
        read_run_config(tmp_path / "run")
    export = tmp_path / "export"
    export.mkdir()
    (export / "export.json").write_text(text)
    with pytest.raises(ValueError, match=r"export/export\.json "):
        read_export_manifest(epath.Path(export))
