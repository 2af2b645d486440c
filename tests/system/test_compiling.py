"""The cache of compiled programs is private and read only on matching machines; compiling is timed.

Time is counted once, however events nest and whichever thread they end in.
"""

import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from bltjax.system import compiling
from bltjax.system.compiling import (
    CompileTime,
    add_span,
    discard_unused,
    forget_programs,
    keep_programs,
    machine,
    make_private,
    mend,
    skip_cache,
)

ROOT = Path(__file__).parents[2]

COMPILE = "/jax/core/compile/backend_compile_duration"


def test_compiling_is_counted_and_running_is_not():
    clock, started_at = CompileTime(), time.monotonic()
    program = jax.jit(lambda x: jnp.sin(x * 3.25) @ x)  # of no other test
    x = jnp.ones((8, 8))
    program(x).block_until_ready()
    first = clock.seconds
    assert 0 < first <= time.monotonic() - started_at
    program(x).block_until_ready()
    assert clock.seconds == first and CompileTime().seconds == 0


def test_nested_and_simultaneous_events_count_once(monkeypatch):
    monkeypatch.setattr(compiling, "spans", [])
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    early = CompileTime()
    for now, duration in ((103, 1), (104, 3.5), (110, 2), (111, 2), (120, 4)):  # noqa: B007
        add_span(COMPILE, duration)
    add_span("/jax/compilation_cache/cache_retrieval_time_sec", 50)  # part of another
    # 100.5 ... 104 with one inside it, 108 ... 111 of two threads, 116 ... 120.
    assert early.seconds == pytest.approx(3.5 + 3 + 4)
    late = CompileTime()
    late.since = 110
    assert late.seconds == pytest.approx(1 + 4)


def test_events_of_many_threads(monkeypatch):
    monkeypatch.setattr(compiling, "spans", [])
    clock = CompileTime()
    clock.since -= 2

    def report():
        for _ in range(200):
            add_span(COMPILE, 1e-4)
            assert clock.seconds >= 0

    threads = [threading.Thread(target=report) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiling.spans == sorted(compiling.spans)
    assert all(a[1] < b[0] for a, b in zip(compiling.spans, compiling.spans[1:], strict=False))
    assert 0 < clock.seconds < time.monotonic() - clock.since


# Programs on disk.


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A process that has no cache yet, and may have one in tmp_path; afterwards the tests' own."""
    names = (*compiling.SETTINGS, "jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    for name in names:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("BLTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield tmp_path / "cache" / "programs" / machine()
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled_anew(factor: float) -> bool:
    """Whether a small program of that factor was compiled and cached, as in another process."""
    jax.clear_caches()
    found = []
    listener = lambda event, **_: found.append(event)  # noqa: E731
    jax.monitoring.register_event_listener(listener)
    try:
        assert jax.jit(lambda x: x * factor + 1)(2.0) == 2 * factor + 1
    finally:
        jax.monitoring.unregister_event_listener(listener)
    return "/jax/compilation_cache/cache_misses" in found


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


def test_programs_are_kept_for_the_next_process(cache):
    assert not keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(cache)
    assert jax.config.jax_compilation_cache_max_size == 1 << 30
    assert cache.parent.stat().st_mode & 0o777 == 0o700
    assert compiled_anew(2.5) and entries(cache)
    assert not compiled_anew(2.5)


def test_whoever_names_a_cache_to_jax_keeps_it(cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert not keep_programs()
    forget_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert not keep_programs() and jax.config.jax_compilation_cache_dir is None
    assert not cache.exists()


def test_many_processes_have_no_cache_that_they_did_not_ask_for(cache):
    keep_programs()
    forget_programs()
    compiled_anew(3.5)
    assert not entries(cache)


def test_no_cache(cache):
    keep_programs()
    skip_cache()
    compiled_anew(4.5)
    assert not entries(cache)


def test_damaged_entries_are_compiled_again(cache, recwarn):
    keep_programs()
    compiled_anew(5.5)
    whole = {path: path.read_bytes() for path in cache.iterdir()}
    program = next(path for path in entries(cache) if "lambda" in path.name)
    for damaged in (b"", whole[program][:-20], b"\0" * 300, zlib.compress(b"no program")):
        program.write_bytes(damaged)
        compilation_cache.reset_cache()
        jax.clear_caches()
        assert jax.jit(lambda x: x * 5.5 + 1)(2.0) == 12
    # A process that died while it wrote leaves an entry without the time of its use; a machine that
    # went down, an empty one or zeros. These are compiled and kept again.
    for torn in (None, b"", b"\0" * len(whole[program])):
        for path, data in whole.items():
            path.write_bytes(data)
        if torn is None:
            program.with_name(time_of(program)).unlink()
        else:
            program.write_bytes(torn)
        mend(cache)
        assert not program.exists()
        compilation_cache.reset_cache()
        assert compiled_anew(5.5) and not compiled_anew(5.5)


def time_of(entry: Path) -> str:
    return f"{entry.name.removesuffix('-cache')}-atime"


def test_the_cache_is_bounded(cache, monkeypatch):
    monkeypatch.setitem(compiling.SETTINGS, "jax_compilation_cache_max_size", 20_000)
    keep_programs()
    for factor in range(20):
        compiled_anew(factor + 0.25)
    assert 0 < sum(path.stat().st_size for path in entries(cache)) <= 20_000
    assert not compiled_anew(19.25) and compiled_anew(0.25)


def test_a_variable_of_jax_bounds_it_otherwise(cache, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
    keep_programs()
    assert jax.config.jax_compilation_cache_max_size != 1 << 30


def test_another_machine_has_another_folder(monkeypatch):
    here, count = machine(), len(os.sched_getaffinity(0))
    assert re.fullmatch(r"[\w.]+-[\w.]+-[0-9a-f]{12}", here) and here == machine()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(count + 1))
    more = machine()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(count))
    names = {here, more}

    def with_cpuinfo(text: str) -> str:
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
        return machine()

    text = "vendor_id: Any\nmodel name: Any 3\ncpu MHz: 2000\nflags: avx2 fma\n\nprocessor: 1"
    assert with_cpuinfo(text) == with_cpuinfo(text.replace("2000", "2500"))
    names |= {with_cpuinfo(text), with_cpuinfo(text.replace("fma", "fma avx512f"))}

    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)  # as on other systems than Linux
    names.add(machine())
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert len(names | {machine()}) == 6


def test_a_home_that_cannot_be_written(cache, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert not keep_programs()
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder.is_relative_to(tmp_path / "temporary")
    jax.config.update("jax_compilation_cache_dir", None)
    folder.parent.parent.chmod(0o777)  # another user could write programs there
    reason = keep_programs()
    assert reason.startswith(f"{tmp_path}/cache") and jax.config.jax_compilation_cache_dir is None
    compiled_anew(6.5)
    assert not list(tmp_path.rglob("*-cache"))


def test_folders_of_others_are_not_read(tmp_path, monkeypatch):
    make_private(tmp_path / "cache" / "programs")
    make_private(tmp_path / "cache" / "programs")
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="other users"):
        make_private(tmp_path / "cache" / "programs")


def test_a_disk_without_locks(cache, monkeypatch, tmp_path):
    def acquire(self, *_, **__):
        if Path(self.lock_file).is_relative_to(tmp_path / "cache"):
            raise NotImplementedError("no flock here")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    monkeypatch.setattr(filelock.FileLock, "release", lambda *_, **__: None)
    assert not keep_programs()
    assert Path(jax.config.jax_compilation_cache_dir).is_relative_to(tmp_path / "temporary")


def test_others_at_work_hold_up_nobody(cache, monkeypatch):
    monkeypatch.setattr(compiling, "LOCK_SECONDS", 0.05)
    keep_programs()
    torn = cache / "jit_f-0123-cache"
    torn.write_bytes(b"half")
    with filelock.FileLock(cache / ".lockfile"):
        mend(cache)
        assert torn.exists()  # perhaps it is being written
    mend(cache)
    assert not torn.exists()


def test_folders_that_nobody_uses_any_more(tmp_path):
    for name in ("mine", "fresh", "old", "foreign"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "jit_f-0-cache").write_bytes(b"x")
    for name in ("fresh", "old"):
        (tmp_path / name / ".used").write_bytes(b"")
    long_ago = time.time() - 31 * 86400
    os.utime(tmp_path / "old" / ".used", (long_ago, long_ago))
    discard_unused(tmp_path / "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "fresh", "foreign"}


AT_ONCE = """
import sys
import jax
from bltjax.system.compiling import keep_programs
assert not keep_programs()
for factor in range(12):
    assert jax.jit(lambda x: x * (factor + 0.75) + 1)(2.0) == 2 * factor + 2.5
"""


@pytest.mark.slow
def test_processes_that_compile_the_same_at_once(cache):
    """All of them end well, without a warning, and the next finds every program."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") or "PLAT" in k}
    command = [sys.executable, "-W", "error", "-c", AT_ONCE]
    for count in (4, 1):
        started = [
            subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE)
            for _ in range(count)
        ]
        for process in started:
            _, error = process.communicate()
            assert process.returncode == 0 and not error, error
        kept = {path: path.stat().st_mtime_ns for path in entries(cache)}
        if count == 4:
            before = kept
    assert kept == before and len(kept) >= 12
