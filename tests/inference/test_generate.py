"""The generate command and its output; trained models generate the same text as the whole model."""

import dataclasses
import io
import json
import logging
import os

import numpy as np
import pytest
from test_decoding import followed

from bltjax.__main__ import main
from bltjax.inference.decoding.decoder import Decoder
from bltjax.inference.decoding.pieces import Piece, Rest
from bltjax.inference.decoding.uncached import Predictor
from bltjax.inference.entropy import score_documents
from bltjax.inference.prompts import (
    Prompt,
    begin_results,
    finish_results,
    read_prompts,
    result_line,
)
from bltjax.inference.terminal import Painter
from bltjax.text.alphabet import EOS, OFFSET, encode
from bltjax.text.vocabulary import vocabulary_of
from bltjax.weights.export import load_model, load_params


@pytest.fixture(scope="module", params=["byte_lm", "blt"])
def trained(request, runs):
    model = load_model(getattr(runs, request.param))
    return Decoder(model), Predictor(model)


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The log; an earlier command may have disabled propagation."""
    monkeypatch.setattr(logging.getLogger("bltjax"), "propagate", True)
    return caplog


def text_of(pieces) -> bytes:
    return b"".join(piece.text for piece in pieces)


def test_trained_models_write_as_the_whole_model(trained):
    """Greedily, the same bytes up to the first near-tie, with its log-probabilities."""
    decoder, predictor = trained
    pieces = list(decoder.generate(["the patch"], max_bytes=40))
    expected, margins = predictor.greedy("the patch", 40)
    ties = np.flatnonzero(np.array(margins) < 1e-4)
    sure = int(ties[0]) if ties.size else len(expected)
    assert sure > 10 and text_of(pieces)[:sure] == expected[:sure]
    logits_V = predictor(encode(b"the patch" + expected[:2], eos=False))
    log_probs = logits_V - np.log(np.exp(logits_V.astype(np.float64)).sum())
    found = np.concatenate([piece.log_probs for piece in pieces])
    np.testing.assert_allclose(found[2], log_probs[OFFSET + expected[2]], atol=1e-4)


def test_trained_logits_at_every_position(runs):
    """On the bytes of held-out documents, rather than on generated ones."""
    lines = (runs.root / "held_out.jsonl").read_text().splitlines()
    texts = [text for line in lines if len(text := json.loads(line)["text"].encode()) > 60][:3]
    model = load_model(runs.blt)
    byte_lm = model.entropy_model
    # At the run's own threshold so small a byte LM finds a boundary at every byte.
    text = np.frombuffer(texts[0], "B")
    entropies_N, _ = score_documents(byte_lm.config.model, byte_lm.params, [text])
    patching = dataclasses.replace(
        model.config.patching, threshold=float(np.quantile(entropies_N[0], 0.7)) + 1e-4
    )
    model = model._replace(config=dataclasses.replace(model.config, patching=patching))
    decoder, predictor = Decoder(model), Predictor(model)
    prompts, count = [0, 3, 24], 36
    logits, opens, _ = followed(decoder, texts, prompts, count)
    assert len(texts) == 3 and 0 < opens.mean() < 1
    for row, (text, n) in enumerate(zip(texts, prompts, strict=True)):
        for place in range(count):
            expected_V = predictor(encode(text[: n + place], eos=False))
            np.testing.assert_allclose(logits[place, row], expected_V, atol=1e-4, rtol=0)


def test_stops(trained):
    """A stop string ends the text and is not part of it, wherever the host looks in between."""
    decoder, _ = trained
    whole = text_of(decoder.generate(["the"], max_bytes=40))
    stop = whole[9:12]
    at = whole.index(stop)
    for chunk in (2, 32):
        *_, last = pieces = list(
            decoder.generate(["the"], max_bytes=40, stop=[b"\xff\xfe", stop], chunk=chunk)
        )
        assert text_of(pieces) == whole[:at] and last.finish_reason == "stop"
        assert sum(len(piece.log_probs) for piece in pieces) == at
    *_, last = pieces = list(decoder.generate(["the"], max_bytes=5))
    assert text_of(pieces) == whole[:5] and last.finish_reason == "max_bytes"
    (nothing,) = decoder.generate(["the"], max_bytes=0)
    assert nothing.text == b"" and nothing.finish_reason == "max_bytes"


BYTES = vocabulary_of("blt")


def test_bytes_that_may_begin_a_stop_string_are_held_back():
    held = Rest([b"\n\n", b"end"], BYTES)

    def write(text: bytes, why="", eos=False):
        ids = np.append(encode(text, bos=False, eos=False), [EOS] * eos).astype(np.int32)
        numbers = np.arange(len(ids), dtype=np.float32)
        return held.piece(0, ids, [numbers, numbers, numbers > 0], why).text

    assert write(b"x.\n") == b"x." and write(b"y e") == b"\ny " and write(b"nd", "stop") == b""
    held = Rest([b"\n\n"], BYTES)
    assert write(b"a\n") == b"a" and write(b"", "max_bytes") == b"\n"
    held = Rest([], BYTES)
    assert write(b"a", "eos", eos=True) == b"a"


def test_painter():
    def painted(patches, colour, *texts):
        out = io.StringIO()
        painter = Painter(out, patches, colour)
        painter.prompt("é".encode()[:1])
        for text in texts:
            size = len(text)
            opens = np.arange(size) % 2 == 0
            painter.piece(Piece(0, text, np.zeros(size), np.full(size, 2.5), opens, ""))
        painter.close()
        return out.getvalue()

    rest = "é".encode()[1:]
    assert painted(False, False, rest + b"ab", b"c") == "éabc\n"
    assert painted(False, False, rest + b"\x1b]0;x\x07\r") == "é\x1b]0;x\x07\r\n"  # no terminal
    assert painted(True, False, rest + b"abc") == "|éa|bc\n"
    coloured = painted(True, True, rest + "a日\nb".encode())
    assert "\x1b[38;5;52;48;5;157m日" in coloured and "\x1b[0m\n\x1b[38" in coloured
    assert coloured.endswith("\x1b[0m\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_sent_no_controls():
    """Neither from a prompt nor from the output, wherever pieces are cut; newlines and tabs are
    kept."""

    def painted(patches, prompt, *texts):
        out = Terminal()
        painter = Painter(out, patches, False)
        painter.prompt(prompt)
        for text in texts:
            nothing = np.zeros(len(text))
            painter.piece(Piece(0, text, nothing, nothing, nothing > 0, ""))
        painter.close()
        return out.getvalue()

    shown = painted(False, b"\x1b]0;title\x07\b\x7f\n\tx\xc2", b"\x9b31m", b"\r", b"\na\r", b"b\r")
    assert shown == "␛]0;title␇␈␡\n\tx\\u009b31m\r\na␍b␍\n".replace("␡", "␡")
    assert painted(True, b"\x1b[31m\r", b"\x1b") == "␛[31m␍␛\n"
    persian = "می\u200cخواهم"  # a format, which no terminal obeys
    assert painted(False, persian.encode()) == f"{persian}\n"


def test_prompts_from_jsonl(runs, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    odd = "日\u2028本"  # the end of a line elsewhere, but not in JSON
    prompts.write_text(f'"the patch"\n\n{{"prompt": "{odd}"}}\n{{"prompt": ""}}\n')
    out = tmp_path / "results.jsonl"
    words = ["generate", f"--workdir={runs.blt}", f"--prompts={prompts}", "--max_bytes=6"]
    runs.run(*words, f"--out={out}", "--temperature=1", "--valid_utf8")
    results = [json.loads(line) for line in out.open()]
    assert [result["prompt"] for result in results] == ["the patch", odd, ""]
    for result in results:
        size = len(result["text"].encode())
        assert "hex" not in result and (size == 6 or result["finish_reason"] == "eos")
        assert len(result["log_probs"]) == size and max(result["log_probs"]) <= 0
    assert "latent steps" in capsys.readouterr().err


def test_drafts_are_accounted_for(runs, capsys):
    words = ["generate", f"--workdir={runs.blt}", "--prompt=the ", "--draft=2"]
    runs.run(*words, "--max_bytes=0")
    assert "passes" not in capsys.readouterr().err
    runs.run(*words, "--max_bytes=12")
    assert "passes of the whole model per byte" in capsys.readouterr().err


def test_results_that_are_not_utf8():
    none = np.zeros(0)
    line = result_line(Prompt(b"\xff"), [Piece(0, b"a\xe6", np.zeros(2), none, none, "eos")])
    assert json.loads(line) == {
        "prompt": "\ufffd", "text": "a\ufffd", "finish_reason": "eos", "log_probs": [0, 0],
        "hex": "61e6", "prompt_hex": "ff",
    }  # fmt: skip


def test_prompts_in_hex(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "?", "prompt_hex": "ff61"}\n')
    assert [prompt.text for prompt in read_prompts(str(path))] == [b"\xffa"]
    path.write_text('"x"\n{"prompt_hex": "6"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2: prompt_hex: "):
        read_prompts(str(path))


def test_results_keep_what_a_prompt_has(tmp_path, warnings):
    """An id and other keys, in order; a key that results also have is replaced, and logged."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"id": 7, "prompt": "é", "finish_reason": "?", "tags": ["\\ud800"], "hex": "00"}\n"x"\n'
    )
    keyed, plain = read_prompts(str(path))
    assert "prompts.jsonl, line 1: results have a hex, finish_reason of their own" in warnings.text
    none = np.zeros(0)
    line = result_line(keyed, [Piece(0, b"a", np.zeros(1), none, none, "eos")])
    assert line.encode()  # half a surrogate pair has no UTF-8
    assert list(json.loads(line).items()) == [
        ("id", 7), ("prompt", "é"), ("finish_reason", "eos"), ("tags", ["\ud800"]), ("text", "a"),
        ("log_probs", [0]),
    ]  # fmt: skip
    line = result_line(plain, [Piece(0, b"", none, none, none, "eos")])
    assert list(json.loads(line)) == ["prompt", "text", "finish_reason", "log_probs"]


@pytest.mark.parametrize(
    "data, why",
    [
        (b'"a"\n{"prompt": "b", "x": NaN}\n', "line 2: not JSON .NaN is no number"),
        (b"[" * 100_000, "line 1: not JSON"),
        ('"a"\n'.encode("utf-16"), "is UTF-16"),
        (b"\xff\n", "line 1: not JSON"),
        (b"\n \n", "has no prompts"),
        (b"", "has no prompts"),
    ],
)
def test_prompts_that_are_no_json_lines(data, why, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=why):
        read_prompts(str(path))


def test_prompts_of_standard_input(runs, monkeypatch, capsys):
    words = ["generate", f"--workdir={runs.byte_lm}", "--max_bytes=2"]
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO(b'\xef\xbb\xbf"the"\n'), encoding="utf-8")
    )
    runs.run(*words, "--prompts=-")
    assert json.loads(capsys.readouterr().out)["prompt"] == "the"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the \xff"), encoding="utf-8"))
    runs.run(*words, "--prompt_file=-")
    assert capsys.readouterr().out.startswith("the \ufffd")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'"a"\n7\n'), encoding="utf-8"))
    assert main([*words, "--prompts=-"]) == 1
    assert "standard input, line 2: no string" in capsys.readouterr().err


def test_results_are_continued(runs, tmp_path, monkeypatch, capsys):
    """A command that was killed leaves complete lines; the same one writes the rest, and no
    other."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text("".join(f'{{"id": {n}, "prompt": "the {n}"}}\n' for n in range(4)))
    words = ["generate", f"--workdir={runs.byte_lm}", f"--prompts={prompts}", "--max_bytes=3"]
    words += ["--rows=1", "--temperature=1"]
    runs.run(*words, f"--out={tmp_path / 'straight'}")
    straight = (tmp_path / "straight").read_text()
    generate = Decoder.generate

    def killed(decoder, texts, **settings):
        if texts == [b"the 2"]:
            raise KeyboardInterrupt
        return generate(decoder, texts, **settings)

    monkeypatch.setattr(Decoder, "generate", killed)
    assert main([*words, f"--out={out}"]) == 130
    monkeypatch.undo()
    assert out.read_text() == "".join(straight.splitlines(keepends=True)[:2])
    with out.open("a") as file:
        file.write('{"prompt": "the 2", "te')  # what a full disk leaves
    capsys.readouterr()

    def error_of(*more):
        assert main([*words, f"--out={out}", *more]) == 1
        return capsys.readouterr().err

    assert "temperature: 1.0 -> 0.5" in error_of("--temperature=0.5")
    runs.run(*words, f"--out={out}")
    assert f"{out}: 2 of 4 results exist" in capsys.readouterr().err
    assert out.read_text() == straight and sorted(tmp_path.glob(".*")) == []
    assert "has the results of all 4 prompts already" in error_of()
    out.write_text(straight.replace("the 1", "the 9"))
    assert "line 2 is no result of" in error_of()
    out.write_text(straight + straight)
    assert "line 5 is no result of these prompts" in error_of()
    out.write_text("notes")
    assert "holds no results" in error_of()
    assert out.read_text() == "notes"


@pytest.mark.parametrize("key", ["finish_reason", "why"])  # the second in older files
def test_results_whose_settings_are_not_known_are_continued_with_a_warning(key, tmp_path, warnings):
    prompts = [Prompt(b"a"), Prompt(b"\xff")]
    none = np.zeros(0)
    out = tmp_path / "results.jsonl"
    lines = [result_line(p, [Piece(0, b"", none, none, none, "eos")]) + "\n" for p in prompts]
    out.write_text(lines[0].replace("finish_reason", key))
    assert begin_results(out, prompts, {"seed": 0}) == 1
    assert "are unknown" in warnings.text
    assert begin_results(out, prompts, {"seed": 0}) == 1  # now they are
    finish_results(out)
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_show_patches(runs, capsys):
    words = ["generate", f"--workdir={runs.blt}", "--prompt=the ", "--max_bytes=20"]
    runs.run(*words, "--show=patches", "--color=always")
    assert "\x1b[38;5;" in capsys.readouterr().out
    runs.run(*words, "--show=patches")
    assert "|" in capsys.readouterr().out


def test_bad_input(runs, tmp_path, capsys):
    def error_of(*words):
        assert main(["generate", f"--workdir={runs.byte_lm}", *words]) == 1
        return capsys.readouterr().err

    assert "temperature is -1.0, not >= 0" in error_of("--temperature=-1")
    assert "top_k is -2" in error_of("--top_k=-2")
    assert "top_p is 0.0, not in (0, 1]" in error_of("--top_p=0")
    assert "min_p is 2.0" in error_of("--min_p=2")
    assert "repetition_penalty is 0.0" in error_of("--repetition_penalty=0")
    assert "max_bytes is -1" in error_of("--max_bytes=-1")
    assert "a stop string is empty" in error_of("--stop=")
    assert "begins inside a character" in error_of("--valid_utf8", "--stop=" + os.fsdecode(b"\xa9"))
    assert "seed is -1, not between 0 and 2147483648" in error_of("--seed=-1")
    assert "seed is 2147483648" in error_of(f"--seed={2**31}")
    assert "--out is for" in error_of("--out=x")
    assert "--show=patches is for one" in error_of("--prompts=x", "--show=patches")
    assert "no such file" in error_of(f"--prompt_file={tmp_path / 'nothing'}")
    long = ["--prompt=0123456789", "--max_bytes=20", "--context=24"]
    assert "10 bytes and 20 to write exceed the context of 24 bytes" in error_of(*long)
    runs.run("generate", f"--workdir={runs.byte_lm}", *long, "--truncate=left")
    assert "[20 bytes" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('"x"\n{"text": 1}\n')
    assert "bad.jsonl, line 2" in error_of(f"--prompts={tmp_path / 'bad.jsonl'}")
    (tmp_path / "none.jsonl").write_text("\n")
    assert "has no prompts" in error_of(f"--prompts={tmp_path / 'none.jsonl'}")


def test_errors_come_before_the_model_is_loaded(runs, tmp_path, monkeypatch, capsys):
    """Every check that needs no model comes first, and nothing is written."""
    monkeypatch.setattr("bltjax.inference.generate.load_onto", None)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text("".join(json.dumps("a" * n) + "\n" for n in (1, 5, 9, 99, 2)))

    def error_of(*words, workdir=runs.byte_lm):
        given = [f"--workdir={workdir}", f"--prompts={prompts}", f"--out={out}", "--max_bytes=10"]
        assert main(["generate", *given, *words]) == 1
        error = capsys.readouterr().err
        assert "partial" not in error and len(error.splitlines()) == 1
        return error

    error = error_of("--context=100")
    assert f"{prompts}, line 4: 99 bytes and 10 to write exceed the context of 100" in error
    assert "10 to write exceed the context of 5" in error_of("--context=5", "--truncate=left")
    assert "context is 0" in error_of("--context=0")
    assert "--rows is 0" in error_of("--rows=0")
    assert "seed is 2147483644" in error_of(f"--seed={2**31 - 4}")
    assert "a stop string is empty" in error_of("--stop=")
    assert "verified greedily" in error_of("--draft=2", "--temperature=1", workdir=runs.blt)
    assert "only a BLT drafts" in error_of("--draft=2")
    assert "neither a training run nor an export" in error_of(workdir=tmp_path)
    missing = tmp_path / "none" / "x"
    assert f"--out={missing}: its folder {missing.parent} does not" in error_of(f"--out={missing}")
    assert f"--out={tmp_path} is a folder" in error_of(f"--out={tmp_path}")
    assert "would replace what --prompts reads" in error_of(f"--out={prompts}")
    assert "would replace a part of" in error_of(f"--out={runs.byte_lm / 'config.json'}")
    assert sorted(tmp_path.iterdir()) == [prompts]


def test_bytes_of_any_kind_are_a_prompt(runs, tmp_path, monkeypatch, capsys):
    """The empty prompt, and invalid UTF-8: from a file, and from a shell's argument."""
    asked = []
    generate = Decoder.generate

    def seen(decoder, prompts, **settings):
        asked.append((prompts, settings["stop"]))
        return generate(decoder, prompts, **settings)

    monkeypatch.setattr(Decoder, "generate", seen)
    odd = b"\xff\xfe a\xe6\n\x00"
    (tmp_path / "odd").write_bytes(odd)
    words = ["generate", f"--workdir={runs.byte_lm}", "--max_bytes=3"]
    runs.run(*words)
    runs.run(*words, f"--prompt_file={tmp_path / 'odd'}")
    runs.run(*words, f"--prompt={os.fsdecode(odd[:-1])}", f"--stop={os.fsdecode(odd[:1])}")
    assert asked == [([b""], []), ([odd], []), ([odd[:-1]], [odd[:1]])]
    assert capsys.readouterr().err.count(" bytes in ") == 3


def test_patches_that_cannot_be_placed_while_writing_are_refused(runs):
    model = load_params(runs.blt)
    with pytest.raises(ValueError, match="needs a byte LM"):
        Decoder(model)
    ports = dataclasses.replace(model.config.patching, looks_past_end=False)
    config = dataclasses.replace(model.config, patching=ports)
    with pytest.raises(ValueError, match=r"looks_past_end is False.*without --as_port"):
        Decoder(model._replace(config=config))
