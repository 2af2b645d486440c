"""A file in configs/ and the command line's overrides, made into a RunConfig once.

A config file is a program with a `get_config()` that builds a ConfigDict. What it leaves out has
the default of `config.py`, and every setting may be overridden.
"""

import dataclasses
import importlib.util
import inspect
import typing
from ast import literal_eval
from pathlib import Path

from ml_collections import ConfigDict

from bltjax.config import RunConfig, from_dict, nearest


def load_config(spec: str, overrides: typing.Iterable[str] = ()) -> RunConfig:
    """The RunConfig of `configs/FILE.py[:ARG]` after overrides such as `data.rows=4`.

    Raises:
      ValueError: naming the file or the key, and the nearest key where there is one.
    """
    path, _, argument = spec.partition(":")
    if not Path(path).is_file():
        there = (
            [str(p) for p in Path(path).parent.glob("*.py")] if Path(path).parent.is_dir() else []
        )
        raise ValueError(f"config file {path!r} does not exist{nearest(path, there)}")
    module_spec = importlib.util.spec_from_file_location("bltjax_run_config", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} is no config: it has no function get_config")
    if argument and not inspect.signature(module.get_config).parameters:
        raise ValueError(f"{path} takes no argument; drop ':{argument}'")
    made = module.get_config(argument) if argument else module.get_config()
    tree = ConfigDict(completed(RunConfig, made.to_dict()))
    for override in overrides:
        apply_override(tree, override)
    return from_dict(RunConfig, tree.to_dict())


def completed(kind, values: dict) -> dict:
    """Values with every setting of a dataclass, defaults where none is given; fresh dicts only.

    So every setting can be overridden, whether or not the config file mentions it. And no group
    stands in two places, as it does in a ConfigDict that was given one dict twice: an override of
    the training source must not change the held-out one. Unknown keys stay, to be refused later.
    """
    result = dict(values)
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        inner = next((arg for arg in typing.get_args(hint) if arg is not type(None)), hint)
        if field.name not in values:
            if field.default_factory is not dataclasses.MISSING:
                result[field.name] = field.default_factory()
            elif dataclasses.is_dataclass(field.default):
                result[field.name] = dataclasses.asdict(field.default)
            elif field.default is not dataclasses.MISSING:
                result[field.name] = field.default
            continue
        value = values[field.name]
        if typing.get_origin(hint) is dict and isinstance(value, dict):
            inner = typing.get_args(hint)[1]
            result[field.name] = {
                key: completed(inner, group) if isinstance(group, dict) else group
                for key, group in value.items()
            }
        elif dataclasses.is_dataclass(inner) and isinstance(value, dict):
            result[field.name] = completed(inner, value)
    return result


def apply_override(tree: ConfigDict, override: str) -> None:
    """Sets one `key.subkey=value` in a ConfigDict; the key must exist."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} has no value; write --config.{key}=VALUE")
    *groups, name = key.split(".")
    node, where = tree, "config"
    for part in [*groups, name]:
        if not isinstance(node, ConfigDict) or part not in node:
            known = node.keys() if isinstance(node, ConfigDict) else ()
            raise ValueError(f"{where}.{part} is no setting{nearest(part, known)}")
        node, where, parent = node[part], f"{where}.{part}", node
    try:
        value = literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(node, str):
        value = text
    if isinstance(value, list):
        value = tuple(value)
    # Types are checked by from_dict, whose messages name the setting; so no type-safety here.
    with parent.ignore_type():
        parent[name] = value
