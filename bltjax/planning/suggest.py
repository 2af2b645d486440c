"""Suggests config changes that make a plan fit in HBM.

Changes are tried in order of their cost in time: moments of hash tables in fewer bytes; more
micro-batches, each of fewer rows; keeping less for the backward pass; `tensor`; a larger slice.
Each change's memory is estimated from the plan: parameters and moments exactly, gradients as large
as parameters, the rest in proportion to the rows per chip at a time. Estimates only decide the
order; a change reported as compiled was compiled.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bltjax.config.run import RunConfig
from bltjax.distributed.topology import Topology, read_topology
from bltjax.families import family_of

COMPILED = 2  # most changes to compile, as each takes minutes


@dataclass(frozen=True)
class Suggestion:
    """Settings, or a topology, in place of the plan's; and the memory per chip with them."""

    settings: tuple[tuple[str, object], ...]
    topology: str
    total: float  # bytes
    compiled: bool = False

    @property
    def options(self) -> str:
        """The command line's options for it."""
        words = [f"--config.{name}={value}" for name, value in self.settings]
        return " ".join(words + ([f"--topology={self.topology}"] if self.topology else []))


def changed(config: RunConfig, settings) -> RunConfig:
    """The config with each `group.name` set.

    Raises:
      ValueError: where two numbers don't go together.
    """
    for name, value in settings:
        path = name.split(".")
        path[0] = "model" if path[0] == config.model.group else path[0]
        groups = [config]
        for group in path[:-1]:
            groups.append(getattr(groups[-1], group))
        for group, key in zip(reversed(groups), reversed(path), strict=True):
            value = dataclasses.replace(group, **{key: value})
        config = value
    return config


def estimates(found) -> Iterator[Suggestion]:
    """Changes of a plan, the cheapest first, that should make it fit."""
    config, mesh, memory = found.config, found.mesh, found.memory
    states = memory.parameters + memory.optimizer
    count, shards = config.optimizer.grad_accum_steps, mesh["data"] * mesh["fsdp"]
    gradients = memory.parameters * (2 if count > 1 else 1)  # and their sum so far
    rest = max(0.0, memory.total - states - gradients)
    narrow, saved = (), 0.0
    tables = found.parameters.get("hash_tables", 0)
    if tables and config.optimizer.table_moments == "float32":
        narrow = (("optimizer.table_moments", "bfloat16"),)
        # Two moments, of two bytes less each.
        saved = memory.parameters * tables / found.parameters["total"]
        yield Suggestion(narrow, "", memory.total - saved)
    for settings, less in (((), 0.0), (narrow, saved)):
        for more in doublings(count, config.data.batch_size // shards):
            total = states + 2 * memory.parameters + rest * count / more - less
            yield Suggestion((*settings, ("optimizer.grad_accum_steps", more)), "", total)
    if family_of(config).rows == "patches" and hasattr(config.model, "latent"):
        lean = tuple(
            (f"{config.model.group}.{field.name}.remat", "full")
            for field in dataclasses.fields(config.model)
            if getattr(getattr(config.model, field.name), "remat", "full") != "full"
        )
        if lean:
            # A block keeps its input only, instead of a dozen arrays of its width and hidden width.
            yield Suggestion(lean, "", states + gradients + rest / 4)
        if mesh["fsdp"] % 2 == 0 and count % 2 == 0:
            # The same rows per micro-batch on half as many devices: heads and hidden layers are
            # split in two, the activations between blocks are not.
            split = (("mesh.tensor", 2 * mesh["tensor"]), ("mesh.fsdp", mesh["fsdp"] // 2))
            split += (("optimizer.grad_accum_steps", 2 * count),)
            yield Suggestion(split, "", states + gradients + rest * 0.7)
    chip = found.topology.name.partition(":")[0]
    for shape in found.topology.chip.shapes:
        larger = read_topology(f"{chip}:{shape}", found.topology.slices)
        times = larger.devices / found.topology.devices
        if times < 2 or times % 1 or config.data.batch_size % (shards * int(times) * count):
            continue
        total = (states + gradients + rest) / times
        if total <= memory.capacity:
            yield Suggestion((("mesh.fsdp", mesh["fsdp"] * int(times)),), larger.name, total)
            break


def doublings(count: int, rows: int) -> Iterator[int]:
    """Twice, four times ... a number of micro-batches, as long as a device's rows allow it."""
    more = 2 * count
    while rows % more == 0:
        yield more
        more *= 2


def nearest_changes(found, plan: Callable[[RunConfig, Topology], object]) -> list[Suggestion]:
    """Changes that would make a plan fit; compiled in order until one did fit.

    plan: compiles a config for a topology.
    """
    suggested: list[Suggestion] = []
    tries = COMPILED
    for change in estimates(found):
        kinds = [[name for name, _ in x.settings] for x in suggested]
        if change.total > found.memory.capacity or [name for name, _ in change.settings] in kinds:
            continue
        if tries and not any(x.compiled for x in suggested):
            tries -= 1
            name = change.topology or found.topology.name
            topology = read_topology(name, found.topology.slices)
            try:
                memory = plan(changed(found.config, change.settings), topology).memory
            except ValueError:  # it breaks another rule
                continue
            if not memory.fits:
                continue
            change = dataclasses.replace(change, total=memory.total, compiled=True)
        suggested.append(change)
    return suggested
