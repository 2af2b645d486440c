"""Private names of jax and Orbax that tests need, to inject faults or to save time: all in this
file.

Each function says what it replaces by what; if a library no longer has the name, it raises an error
instead of testing nothing. Programs that a test starts import it too.
"""

import asyncio
import sys
import time
from pathlib import Path


def share_compiled_programs() -> None:
    """Removes the process from jax's key of a CPU's program, with the kind of each device in its
    place.

    Four processes on two cores need not compile the same program four times.
    """
    from jax._src import cache_key

    if not {"_hash_accelerator_config", "_hash_devices"} <= vars(cache_key).keys():
        raise SystemExit("this version of jax makes the keys of its cache in another way")
    cache_key._hash_accelerator_config = cache_key._hash_devices


def compile_late(process: int, programs: tuple[str, ...], seconds: float, marks: str) -> None:
    """This process compiles these programs much later than the others, and marks each."""
    from jax._src import compiler

    compiled = compiler.compile_or_get_cached

    def late(backend, module, *more, **options):
        name = module.operation.attributes["sym_name"].value
        if f"--process={process}" in sys.orig_argv and name in programs:
            time.sleep(seconds)
            Path(marks, name).touch()
        return compiled(backend, module, *more, **options)

    compiler.compile_or_get_cached = late


def make_folders_late() -> None:
    """Orbax makes a checkpoint's folders after a second, and no process waits for them."""
    from orbax.checkpoint._src.futures import future
    from orbax.checkpoint._src.path import atomicity

    create = atomicity.AtomicRenameTemporaryPath.create

    async def late(self):
        await asyncio.sleep(1)
        return await create(self)

    atomicity.AtomicRenameTemporaryPath.create = late
    future.AwaitableSignalsContract.get_awaitable_signals_from_contract = classmethod(
        lambda cls, operation_id=None: []
    )


def forget_devices(monkeypatch) -> None:
    """jax treats this process as one that has started no device, so that it may look for others."""
    from jax._src import xla_bridge

    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
