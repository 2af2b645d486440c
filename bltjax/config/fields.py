"""Frozen dataclasses as settings: their checks, their JSON, and the differences of two.

Each field's metadata says whether a resumed run may change it. Checks that need two numbers
stand in a dataclass' `__post_init__`, before any device is touched.

One field of a config may be a choice: a dataclass of one of several kinds, each with a class
attribute `group`, its name in a config file or JSON. The functions below take the kinds as
`groups`, {group: dataclass}.
"""

import dataclasses
import difflib
import functools
import json
import logging
import math
import re
import typing

from bltjax.system.paths import expanded

# Whether a setting may differ when a run is resumed. A field's rule holds for all that is in it;
# unless all of it may change, a field in it may have a rule of its own.
FIXED = "fixed"  # no: it would be another run. The default rule
MAY_CHANGE = "may change"  # yes: it only affects how a run is executed, or its start
SAME_CONTENT = "same content"  # a path of an input: another path, but the same contents
RENAMED = "renamed"  # another path, whatever its contents; but not none, and not the first
LENGTH = "length"  # up, or down to the steps already done
# Settings that were renamed: their old names are read wherever there are settings.
OLD_NAMES = {
    "data.rows": "data.batch_size",
    "data.row_bytes": "data.seq_len",
    "data.row_patches": "data.max_patches",
    "data.held_out": "data.eval",
    "optimizer.accumulate": "optimizer.grad_accum_steps",
}
LOG = logging.getLogger(__name__)


def renamed(values, where: str):
    """Nested settings with new names for old ones, and a line in the log that names them.

    Raises:
      ValueError: for a setting that has both names.
    """
    found = []
    for old, new in OLD_NAMES.items():
        group, _, name = old.partition(".")
        inner = values.get(group) if isinstance(values, dict) else None
        if not isinstance(inner, dict) or name not in inner:
            continue
        now = new.partition(".")[2]
        if now in inner:
            raise ValueError(f"{where}.{old} is the old name of {where}.{new}: drop one of them")
        values = values | {group: {now if key == name else key: x for key, x in inner.items()}}
        found.append(f"{old} is now {new}")
    if found:
        notify(f"{where} has settings by their old names: {', '.join(found)}")
    return values


@functools.cache
def notify(line: str) -> None:
    """Logs a line, the first time that it is given."""
    LOG.warning("%s", line)


def renamed_override(override: str) -> str:
    """An override `key=value` by its setting's new name."""
    for old, new in OLD_NAMES.items():
        if override.startswith((f"{old}=", f"{old}.")):
            notify(f"config.{old} is now config.{new}")
            return new + override.removeprefix(old)
    return override


def setting(
    default=dataclasses.MISSING, *, resume: str = "", infinite: bool = False, choice: bool = False
):
    """A config field with its resume rule; `infinite`: a float that may be infinite."""
    metadata = {"resume": resume} if resume else {}
    metadata |= {"infinite": infinite, "choice": choice}
    return dataclasses.field(default=default, metadata=metadata)


def choice_of(kind) -> str:
    """The field of a config class that is a choice; empty if none is."""
    return next((f.name for f in dataclasses.fields(kind) if f.metadata.get("choice")), "")


def hints_of(kind, groups: dict[str, type]) -> dict[str, typing.Any]:
    """The type of each setting of a config class; for a choice, those of each of its groups."""
    hints = typing.get_type_hints(kind)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    if name := choice_of(kind):
        del hints[name]
        hints = {group: one | None for group, one in groups.items()} | hints
    return hints


def without_none(hint):
    """The type of a setting, or of one that may also be None."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if type(None) in typing.get_args(hint) else hint


def divides(small_name: str, small: int, large_name: str, large: int) -> None:
    """Raises ValueError unless small divides large: the rule, both numbers, and values that
    would."""
    if small < 1 or large % small:
        below = next((n for n in range(min(small, large), 0, -1) if large % n == 0), None)
        above = next((n for n in range(max(small, 1), large + 1) if large % n == 0), None)
        near = " or ".join(str(n) for n in (below, above) if n is not None)
        raise ValueError(
            f"{small_name} ({small}) must divide {large_name} ({large}), as {near} would"
        )


def setting_name(config, name: str) -> str:
    """`optimizer.lr` for the field `lr` of an OptimizerConfig."""
    name_of_class = type(config).__name__.removesuffix("Config")
    words = re.sub("(?<=[a-z])(?=[A-Z])", "_", name_of_class).lower()
    group = getattr(config, "group", words)  # a family's, which a config names it by
    return name if group == "run" else f"{group}.{name}"


def within(config, interval: str, *names: str) -> None:
    """Raises ValueError unless each setting lies in an interval as `[0, 1)`; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    for name in names:
        value = getattr(config, name)
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            rule = f"in {interval}"
            if high == math.inf:
                rule = f"{'>=' if interval[0] == '[' else '>'} {low:g}"
                if not math.isfinite(value):
                    rule = f"a finite number {rule}".removesuffix(" > -inf")
            raise ValueError(f"{setting_name(config, name)} is {value}, not {rule}")


def positive(config, *names: str) -> None:
    within(config, "(0, inf)", *names)


def check_finite_settings(config, *names: str) -> None:
    within(config, "(-inf, inf)", *names)


def expand(config, *names: str) -> None:
    """Expands `~` in settings that are paths, so that those of an old run compare equal."""
    for name in names:
        if isinstance(text := getattr(config, name), str):
            object.__setattr__(config, name, expanded(text))


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(choices)}")


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """'; did you mean X?', or the list of known names when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"


def from_dict(kind, values, where: str = "config", groups: dict[str, type] | None = None):
    """A dataclass from nested dicts, refusing unknown keys with the nearest name.

    groups: the kinds of its choice, if it has one.

    Raises:
      ValueError: for an unknown key, a wrong type, a number that is not finite where it must be,
        or two numbers that break a rule.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in args:
        return None if values is None else from_dict(without_none(kind), values, where)
    if dataclasses.is_dataclass(kind) and isinstance(values, kind):
        return values
    if (origin is dict or dataclasses.is_dataclass(kind)) and not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}, not a group of settings")
    if origin is dict:
        return {key: from_dict(args[1], value, f"{where}.{key}") for key, value in values.items()}
    if origin is tuple:
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"{where} is {values!r}, not a list")
        return tuple(from_dict(args[0], value, where) for value in values)
    if dataclasses.is_dataclass(kind):
        hints = hints_of(kind, groups or {})
        for key in values:
            if key not in hints:
                raise ValueError(f"{where}.{key} is no setting{nearest(key, hints)}")
        made = {k: from_dict(hints[k], v, f"{where}.{k}") for k, v in values.items()}
        if name := choice_of(kind):
            given = [one for one in (made.pop(group, None) for group in groups) if one is not None]
            if len(given) != 1:
                *others, last = groups
                raise ValueError(
                    f"a config has one model: give one of {', '.join(others)} and {last}"
                )
            made[name] = given[0]
        for field in dataclasses.fields(kind):
            value = made.get(field.name)
            if not isinstance(value, float) or math.isfinite(value):
                continue
            if math.isnan(value) or not field.metadata.get("infinite"):
                raise ValueError(f"{where}.{field.name} is {value}, not a finite number")
        try:
            return kind(**made)
        except TypeError as error:  # a required field was left out
            raise ValueError(f"{where}: {error}") from None
    if kind is float and isinstance(values, int) and not isinstance(values, bool):
        try:
            return float(values)
        except OverflowError:
            raise ValueError(f"{where} has {len(str(values))} digits: too large") from None
    if not isinstance(values, kind) or (kind is int and isinstance(values, bool)):
        raise ValueError(f"{where} is {values!r}, not {kind.__name__}")
    return values


def to_dict(config) -> dict:
    """The JSON form of a config; `from_dict` inverts it."""
    values = dataclasses.asdict(config)
    if name := choice_of(config):
        values = {getattr(config, name).group: values.pop(name)} | values
    return json.loads(json.dumps(values))


def differences(old: dict, new: dict, where: str = "") -> list[str]:
    """Lines 'key: old -> new' where two JSON configs differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{where}{key}.")
        elif a != b:
            lines.append(f"{where}{key}: {a!r} -> {b!r}")
    return lines


class Change(typing.NamedTuple):
    """A setting that differs between two configs, and its resume rule."""

    path: str
    old: typing.Any
    new: typing.Any
    rule: str

    def __str__(self) -> str:
        old, new = (
            dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
            for value in (self.old, self.new)
        )
        return f"{self.path}: {old!r} -> {new!r}"


def changes(old, new, path: str = "", rule: str = FIXED) -> list[Change]:
    """The settings that differ between two configs, groups of them, or dicts of groups.

    rule: for settings that have no rule of their own.
    """

    def inner(name: str) -> str:
        return f"{path}.{name}" if path else name

    if dataclasses.is_dataclass(old) and type(old) is type(new):
        found = []
        for field in dataclasses.fields(old):
            values = getattr(old, field.name), getattr(new, field.name)
            own = rule if rule == MAY_CHANGE else field.metadata.get("resume", rule)
            if not field.metadata.get("choice"):
                found += changes(*values, inner(field.name), own)
            elif type(values[0]) is type(values[1]):
                found += changes(*values, inner(values[0].group), own)
            else:
                found.append(Change(inner(values[0].group), values[0], None, own))
                found.append(Change(inner(values[1].group), None, values[1], own))
        return found
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [Change(path, old, new, rule)] if old != new else []
    # A source that is new, or gone, has nothing to compare with.
    whole = FIXED if rule == SAME_CONTENT else rule
    found = []
    for key in sorted(old.keys() | new.keys()):
        if key in old and key in new:
            found += changes(old[key], new[key], inner(key), rule)
        else:
            found.append(Change(inner(key), old.get(key), new.get(key), whole))
    if old.keys() == new.keys() and list(old) != list(new):  # a stream's seeds follow the order
        found.append(Change(f"{path} (order)", list(old), list(new), whole))
    return found
