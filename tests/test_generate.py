"""The generate command and what it shows; trained models write what the whole model would write."""

import dataclasses
import io
import json
import os

import numpy as np
import pytest
from test_decoding import followed

from bltjax.__main__ import main
from bltjax.alphabet import EOS, OFFSET, encode
from bltjax.decoding import Decoder, Piece, Rest
from bltjax.decoding.whole import Predictor
from bltjax.evaluate import run_patching
from bltjax.export import load_params
from bltjax.generate import Painter, read_prompts, result_line
from bltjax.scoring import score_documents


@pytest.fixture(scope="module", params=["byte_lm", "blt"])
def trained(request, runs):
    workdir = getattr(runs, request.param)
    config, params, _ = load_params(workdir)
    model = (config, params, *run_patching(config, workdir))
    return Decoder(*model), Predictor(*model)


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
    """With the bytes of held-out documents, rather than what the model writes."""
    lines = (runs.root / "held_out.jsonl").read_text().splitlines()
    texts = [text for line in lines if len(text := json.loads(line)["text"].encode()) > 60][:3]
    config, params, _ = load_params(runs.blt)
    patching, byte_lm = run_patching(config, runs.blt)
    # At the run's own threshold so small a byte LM finds a boundary at every byte.
    entropies_N, _ = score_documents(byte_lm.config, byte_lm.params, [np.frombuffer(texts[0], "B")])
    patching = dataclasses.replace(
        patching, threshold=float(np.quantile(entropies_N[0], 0.7)) + 1e-4
    )
    model = (config, params, patching, byte_lm)
    decoder, predictor = Decoder(*model), Predictor(*model)
    prompts, count = [0, 3, 24], 36
    logits, opens, _ = followed(decoder, texts, prompts, count)
    assert len(texts) == 3 and 0 < opens.mean() < 1
    for row, (text, n) in enumerate(zip(texts, prompts, strict=True)):
        for place in range(count):
            expected_V = predictor(encode(text[: n + place], eos=False))
            np.testing.assert_allclose(logits[place, row], expected_V, atol=1e-4, rtol=0)


def test_stops(trained):
    """A stop string ends the text and is no part of it, wherever the host looks in between."""
    decoder, _ = trained
    whole = text_of(decoder.generate(["the"], max_bytes=40))
    stop = whole[9:12]
    at = whole.index(stop)
    for chunk in (2, 32):
        *_, last = pieces = list(
            decoder.generate(["the"], max_bytes=40, stop=[b"\xff\xfe", stop], chunk=chunk)
        )
        assert text_of(pieces) == whole[:at] and last.why == "stop"
        assert sum(len(piece.log_probs) for piece in pieces) == at
    *_, last = pieces = list(decoder.generate(["the"], max_bytes=5))
    assert text_of(pieces) == whole[:5] and last.why == "max_bytes"
    (nothing,) = decoder.generate(["the"], max_bytes=0)
    assert nothing.text == b"" and nothing.why == "max_bytes"


def test_bytes_that_may_begin_a_stop_string_are_held_back():
    held = Rest([b"\n\n", b"end"])

    def write(text: bytes, why="", eos=False):
        ids = np.append(encode(text, bos=False, eos=False), [EOS] * eos).astype(np.int32)
        numbers = np.arange(len(ids), dtype=np.float32)
        return held.piece(0, ids, [numbers, numbers, numbers > 0], why).text

    assert write(b"x.\n") == b"x." and write(b"y e") == b"\ny " and write(b"nd", "stop") == b""
    held = Rest([b"\n\n"])
    assert write(b"a\n") == b"a" and write(b"", "max_bytes") == b"\n"
    held = Rest([])
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
    assert painted(True, False, rest + b"abc") == "|éa|bc\n"
    coloured = painted(True, True, rest + "a日\nb".encode())
    assert "\x1b[38;5;52;48;5;157m日" in coloured and "\x1b[0m\n\x1b[38" in coloured
    assert coloured.endswith("\x1b[0m\n")


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
        assert "hex" not in result and (size == 6 or result["why"] == "eos")
        assert len(result["log_probs"]) == size and max(result["log_probs"]) <= 0
    assert "latent steps" in capsys.readouterr().err


def test_drafts_are_accounted_for(runs, capsys):
    words = ["generate", f"--workdir={runs.blt}", "--prompt=the ", "--draft=2"]
    runs.run(*words, "--max_bytes=0")
    assert "passes" not in capsys.readouterr().err
    runs.run(*words, "--max_bytes=12")
    assert "passes of the whole model a byte" in capsys.readouterr().err


def test_results_that_are_not_utf8():
    none = np.zeros(0)
    line = result_line(b"\xff", [Piece(0, b"a\xe6", np.zeros(2), none, none, "eos")])
    assert json.loads(line) == {
        "prompt": "\ufffd", "text": "a\ufffd", "why": "eos", "log_probs": [0, 0], "hex": "61e6",
        "prompt_hex": "ff",
    }  # fmt: skip


def test_prompts_in_hex(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "?", "prompt_hex": "ff61"}\n')
    assert read_prompts(path) == [b"\xffa"]
    path.write_text('"x"\n{"prompt_hex": "6"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2: prompt_hex: "):
        read_prompts(path)


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


def test_bytes_of_any_kind_are_a_prompt(runs, tmp_path, monkeypatch, capsys):
    """Nothing at all, and what is not UTF-8: from a file, and as a shell hands it over."""
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
    config, params, _ = load_params(runs.blt)
    with pytest.raises(ValueError, match="needs a byte LM"):
        Decoder(config, params, config.patching, None)
    ports = dataclasses.replace(config.patching, looks_past_end=False)
    with pytest.raises(ValueError, match=r"looks_past_end is False.*without --as_port"):
        Decoder(config, params, ports, None)
