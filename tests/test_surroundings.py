"""Programs in odd environments: jax's variables, locales, streams, platforms, memory.

They give the same numbers and files as elsewhere, or end with a line that names the reason.
"""

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import bltjax
from bltjax.__main__ import main
from bltjax.inference.decoding.decoder import Decoder
from bltjax.inference.decoding.placement import load_onto
from bltjax.system import environment
from bltjax.system.environment import (
    OVERRULED,
    cache_folders,
    check_flags,
    keep_buffers,
    on_cpu,
    prepare_process,
    refused_platform,
)
from bltjax.system.paths import check_name
from bltjax.training.train import train
from bltjax.weights.export import read_model_config

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "bltjax").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
ODD = {
    "JAX_ENABLE_X64": "1",
    "JAX_EXPLICIT_X64_DTYPES": "allow",
    "JAX_DEFAULT_DTYPE_BITS": "32",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_ENABLE_CUSTOM_PRNG": "true",
    "JAX_THREEFRY_PARTITIONABLE": "off",
    "JAX_RANDOM_SEED_OFFSET": "7",
    "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": "yes",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DISABLE_JIT": "1",
    "JAX_DEBUG_INFS": "1",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": "disallow",
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": "disallow",
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": "disallow",
}
# Respected, and without effect on good data.
FOLLOWED = {
    "JAX_DEBUG_NANS": "1",
    "JAX_DEBUG_KEY_REUSE": "1",
    "JAX_ENABLE_CHECKS": "1",
    "JAX_LEGACY_PRNG_KEY": "error",
    "PYTHONOPTIMIZE": "1",
    "HOME": "/nonexistent",
    "PYTHONIOENCODING": "utf-8",  # so that both texts can be compared
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
}


def program(*words, cwd=ROOT, **variables) -> subprocess.CompletedProcess:
    """`python -m bltjax` with these variables added to the test's own."""
    paths = {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}
    return subprocess.run(
        [sys.executable, "-m", "bltjax", *map(str, words)],
        cwd=cwd, capture_output=True, env=os.environ | paths | variables,
    )  # fmt: skip


# Variables that jax reads.


def test_every_variable_has_an_odd_value_here_and_jax_agrees_on_the_others():
    assert ODD.keys() == OVERRULED.keys()
    for name, harmless in OVERRULED.items():
        set_by_tests = name == "JAX_NUMPY_RANK_PROMOTION"
        if hasattr(jax.config, name.lower()) and not set_by_tests:
            default = getattr(jax.config, name.lower())
            values = {str(default), str(getattr(default, "name", None))}
            assert default is None or {value.lower() for value in values} & harmless, name


def test_overruled_with_a_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "jax")  # as at the start of a program
    for name, value in ODD.items():
        monkeypatch.setenv(name, value)
    prepare_process()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(ODD) and not ODD.keys() & os.environ.keys()
    for line, (name, value) in zip(lines, ODD.items(), strict=True):
        assert f"{name}={value}" in line
    for name, harmless in OVERRULED.items():
        for value in harmless:
            monkeypatch.setenv(name, value)
            prepare_process()
            assert os.environ[name] == value
    assert not capsys.readouterr().err


def test_whoever_imported_jax_has_decided(monkeypatch, capsys):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    prepare_process()
    assert os.environ["JAX_ENABLE_X64"] == "1" and not capsys.readouterr().err


PROMPT = "café the patch"
GENERATE = (f"--prompt={PROMPT}", "--max_bytes=12", "--temperature=1", "--seed=3")


@pytest.fixture(scope="module")
def expected(runs):
    """The text that `generate` writes in the environment of the tests."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["generate", f"--workdir={runs.blt}", *GENERATE]) == 0
    return out.getvalue()


def test_the_same_text_in_odd_surroundings(runs, tmp_path, expected):
    words = ["generate", f"--workdir={runs.blt}", *GENERATE]
    odd = program(*words, cwd=tmp_path, **ODD, **FOLLOWED)
    assert odd.returncode == 0, odd.stderr
    assert odd.stdout.decode() == expected
    assert odd.stderr.count(b"is overridden") == len(ODD)
    assert not list(tmp_path.iterdir())


def trained(runs, workdir, **variables):
    """The outcome of a training run and its model: losses, config, a sampled text."""
    done = program(
        "train", f"--config={ROOT}/tests/tiny.py:blt", f"--workdir={workdir}", *runs.blt_settings,
        f"--config.data.train.text.path={runs.root}/records/train",
        f"--config.data.eval.text.path={runs.root}/records/held_out",
        **variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_bytes().splitlines()]
    kept = ("step", "loss", "gradient_norm", "held_out_bits_per_byte")
    losses = [{key: line[key] for key in kept if key in line} for line in lines]
    written = program("generate", f"--workdir={workdir}", *GENERATE, **variables)
    assert written.returncode == 0, written.stderr
    return losses, (workdir / "config.json").read_bytes(), written.stdout


@pytest.fixture(scope="module")
def plain(runs, tmp_path_factory):
    return trained(runs, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ODD, *FOLLOWED])
def test_the_same_run_with_each_variable(runs, plain, tmp_path, name):
    assert trained(runs, tmp_path / "run", **{name: (ODD | FOLLOWED)[name]}) == plain


def test_a_notebook_with_64_bit_types(runs, expected):
    """It gets the same text as a program."""
    with jax.enable_x64(True):
        pieces = bltjax.load(runs.blt).generate(PROMPT, max_bytes=12, temperature=1.0, seed=3)
        assert PROMPT + "".join(pieces) + "\n" == expected


@pytest.mark.slow
def test_drafts_with_64_bit_types(runs):
    def texts():
        decoder = Decoder(load_onto(None, runs.blt, None), draft=3)
        found = {}
        for piece in decoder.generate([b"the patch", b"a"], max_bytes=9, stop=[b"zz"]):
            found[piece.row] = found.get(piece.row, b"") + piece.text
        return found

    before = texts()
    with jax.enable_x64(True):
        assert texts() == before


def test_what_a_notebook_must_set_first(runs, tmp_path):
    config = read_model_config(runs.byte_lm)
    with jax.numpy_dtype_promotion("strict"):
        with pytest.raises(ValueError, match="load does not work with jax_numpy_dtype_promotion s"):
            bltjax.load(runs.blt)
        with pytest.raises(ValueError, match="JAX_NUMPY_DTYPE_PROMOTION"):
            train(config, tmp_path)
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"jax_enable_x64.*unset JAX_ENA"):
        train(config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--xla_speed=1 --xla_cpu_enable_fast_math=false", "xla_speed"),
        ("--xla_force_host_platform_device_count=many", "many"),
        ("/nonexistent/flags", "/nonexistent/flags"),
        ("--xla_force_host_platform_device_count=2", None),
        (" ", None),
    ],
)
def test_flags_of_xla(monkeypatch, flags, reason):
    monkeypatch.setenv("XLA_FLAGS", flags)
    if reason is None:
        return check_flags()
    with pytest.raises(ValueError, match=f"abort at XLA_FLAGS={flags}: .*{reason}") as raised:
        check_flags()
    assert "\n" not in str(raised.value)


def test_platforms_that_are_not_there(monkeypatch):
    monkeypatch.setattr(environment, "available_platform", lambda: "cpu")
    absent = RuntimeError(
        "Unable to initialize backend 'tpu': NOT_FOUND: no device (set JAX_PLATFORMS='' to"
        " automatically choose an available backend)"
    )
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert refused_platform(absent) is None
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    line = refused_platform(absent)
    assert line.startswith("JAX_PLATFORMS=tpu can't be used here (Unable to initialize")
    assert line.endswith("no device); without JAX_PLATFORMS jax would run on cpu")
    # Raised while reading a file, where it looks like the file's fault.
    wrapped = ValueError("checkpoints/12 can't be read")
    wrapped.__cause__ = absent
    assert refused_platform(wrapped) == line
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(AssertionError) as bare:  # as jax has it
        exec(compile("assert False", "/site-packages/jax/_src/xla_bridge.py", "exec"))
    assert refused_platform(bare.value).startswith("JAX_PLATFORMS=cuda can't be used here; without")
    with pytest.raises(AssertionError) as other:
        exec(compile("assert False", "elsewhere.py", "exec"))
    for error in (other.value, ValueError("Unable to read"), OSError("no such file")):
        assert refused_platform(error) is None


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda", "nonsense"])
@pytest.mark.parametrize("verb", ["train", "generate", "evaluate"])
def test_a_platform_that_is_not_there_ends_in_a_line(runs, tmp_path, verb, platform):
    words = ["--config=tests/tiny.py:byte_lm"] if verb == "train" else []
    words += [f"--config.data.train.text.path={runs.root}/train.jsonl"] * (verb == "train")
    words += [f"--config.data.eval.text.path={runs.root}/held_out.jsonl"] * (verb == "train")
    workdir = tmp_path if verb == "train" else runs.byte_lm
    done = program(verb, f"--workdir={workdir}", *words, JAX_PLATFORMS=platform)
    last = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert last.startswith(f"bltjax {verb}: JAX_PLATFORMS={platform} can't be used here")
    assert last.endswith("without JAX_PLATFORMS jax would run on cpu")


def test_a_value_that_jax_refuses_ends_in_a_line():
    done = program("train", "--config=x", "--workdir=y", JAX_ENABLE_CHECKS="perhaps")
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 1 and len(lines) == 1
    assert lines[0].startswith("bltjax train: ") and "JAX_ENABLE_CHECKS" in lines[0]


# What is imported, and when.


def test_neither_the_package_nor_help_imports_jax():
    code = (
        "import runpy, sys, bltjax; dir(bltjax), bltjax.load, bltjax.train, help(bltjax.patch)\n"
        "sys.argv = ['bltjax', '--help']\n"
        "try: runpy.run_module('bltjax', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'orbax', 'tensorstore', 'numpy', 'pyarrow', 'grain'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"--no_cache" in done.stdout


# Encodings.


def calls(path: Path):
    """Every call in a file: the name called, its words and keywords, and the node."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg for word in node.keywords}, node


def opens_text(name: str, keywords: set, node: ast.Call) -> bool:
    """Whether a call reads or writes text in the locale's encoding."""
    if "encoding" in keywords or name.startswith(("os.", "tensorstore.", "metadata.distribution")):
        return False
    last = name.rpartition(".")[2]
    if last in ("read_text", "write_text"):
        return "." in name  # storage's own write_text is UTF-8
    if last in ("run", "Popen", "check_output"):
        return bool(keywords & {"text", "universal_newlines"})
    words = [
        x.value
        for x in (*node.args, *(k.value for k in node.keywords))
        if isinstance(x, ast.Constant)
    ]
    modes = [word for word in words if isinstance(word, str) and re.fullmatch("[rwaxbt+]+", word)]
    return last == "open" and not any("b" in mode for mode in modes)


def test_every_file_of_ours_is_utf8():
    for path in SOURCES:
        for call in calls(path):
            assert not opens_text(*call), f"{path}, line {call[2].lineno}: no encoding"


def test_what_is_taken_for_text_in_the_locales_encoding(tmp_path):
    (tmp_path / "some.py").write_text(
        "open(p)\np.open()\np.open('a')\np.read_text()\np.write_text(x)\nrun(x, text=True)\n"
        "open(p, 'rb')\np.open(mode='wb')\nwrite_text(p, x)\nos.open(p, 1)\nrun(x)\n"
        "p.read_text(encoding='utf-8')\nopen(p, encoding='utf-8')\n"
    )
    lines = [node.lineno for *call, node in calls(tmp_path / "some.py") if opens_text(*call, node)]
    assert lines == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_streams_show_what_they_lack_as_signs(monkeypatch, encoding):
    kept, lost = io.BytesIO(), io.BytesIO()
    for name, bytes_ in (("stdout", kept), ("stderr", lost)):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(bytes_, encoding=encoding))
    prepare_process()
    text = "a ██ 日␛↵|é\udcff"
    print(text, end="", flush=True)
    print(text, end="", file=sys.stderr, flush=True)
    assert kept.getvalue() == lost.getvalue()
    shown = kept.getvalue().decode(encoding)
    if encoding == "utf-8":
        assert shown == "a ██ 日␛↵|é\\udcff"
    else:
        letter = "\\xe9" if encoding == "ascii" else "é"
        assert shown == "a ## \\u65e5\\x1b\\n|" + letter + "\\udcff"


def test_names_in_a_locale_that_is_not_utf8(monkeypatch):
    check_name("café")
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    check_name("cafe")
    with pytest.raises(ValueError, match=r"names are iso8859-1 in this locale.*PYTHONUTF8=1"):
        check_name("café")


@pytest.mark.slow
def test_every_verb_in_ascii(runs, tmp_path):
    """Programs that print and write letters exit cleanly where a stream and the locale have
    none."""
    odd = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    odd |= {"PYTHONCOERCECLOCALE": "0"}
    page = tmp_path / "patches.html"
    (tmp_path / "text.txt").write_text("żółć, 日本\n\na tower", encoding="utf-8")
    commands = [
        ["generate", f"--workdir={runs.blt}", "--prompt=żółć", "--max_bytes=2"],
        ["patches", f"--workdir={runs.blt}", f"--file={tmp_path}/text.txt", "--scheme=space",
         f"--html={page}"],
        ["page", runs.byte_lm],
        ["corpus", f"--records={runs.root}/records/train", f"--out={tmp_path}/report"],
        ["entropies", f"--byte_lm={runs.byte_lm}", f"--source={tmp_path}/text.txt",
         f"--out={tmp_path}/records"],
    ]  # fmt: skip
    for words in commands:
        done = program(*words, **odd)
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii() and done.stderr.isascii()
    assert "日" in page.read_text(encoding="utf-8")
    assert b"#####" in program(*commands[3], **odd).stdout


# Rules that hold in every file.


def test_no_meaning_is_lost_with_asserts():
    """`python -O` drops them."""
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [x.lineno for x in ast.walk(tree) if isinstance(x, ast.Assert)], path


def test_every_key_is_of_one_kind():
    for path in SOURCES:
        for name, _, node in calls(path):
            makes = name.endswith(("random.key", "random.PRNGKey"))
            assert not makes or path.name == "environment.py", f"{path}, line {node.lineno}"


# Memory.

FAULTS = """
import resource, sys
from bltjax.system.environment import keep_buffers
assert keep_buffers() == (sys.argv[1] == "kept")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        del [bytearray(b"x") * (1 << 26) for _ in range(2)][:]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_large_buffers_are_kept(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)

    def faults(how):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    kept = faults("kept")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")  # the user's setting wins
    assert kept < 100 < 10_000 < faults("not")


def test_the_allocator_is_set_on_a_cpu_only(monkeypatch):
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda _: 1 / 0)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for platform in ("tpu", "cuda,cpu"):
        monkeypatch.setenv("JAX_PLATFORMS", platform)
        assert not on_cpu() and not keep_buffers()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu,cuda")
    assert on_cpu()
    monkeypatch.delenv("JAX_PLATFORMS")
    for pattern, there in (("/dev/accel*", False), ("/dev/nothing", True)):
        monkeypatch.setattr(
            environment.glob, "glob", lambda x, pattern=pattern: ["a"] * (x == pattern)
        )
        assert on_cpu() == there


def test_where_caches_lie(monkeypatch, tmp_path):
    for name in ("BLTJAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folders()[0] == tmp_path / ".cache" / "bltjax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be left out, by its rules
    assert cache_folders()[0] == tmp_path / ".cache" / "bltjax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folders()[0] == tmp_path / "xdg" / "bltjax"
    monkeypatch.setenv("BLTJAX_CACHE", "~/mine")
    assert cache_folders()[0] == tmp_path / "mine"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("BLTJAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", homeless)
    assert len(cache_folders()) == 1
