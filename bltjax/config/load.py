"""A config from a file in configs/ and the command line's overrides.

A config file is a program with a `get_config()` that builds a ConfigDict. Missing settings have the
default of their dataclass, and every setting may be overridden. `configs/FILE.py` is looked up in
the working directory and then among the files that came with the package.
"""

import dataclasses
import importlib.util
import inspect
import logging
import re
import traceback
import typing
from ast import literal_eval
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from bltjax.config.fields import (
    choice_of,
    from_dict,
    hints_of,
    nearest,
    renamed,
    renamed_override,
    to_dict,
    without_none,
)
from bltjax.system.paths import check_name, check_utf8, expanded

PACKAGE = Path(__file__).parents[1]
# Of a wheel; of a repository, which an editable installation is.
SHIPPED = (PACKAGE / "configs", PACKAGE.parent / "configs")
PATHS = ("path", "data_dir", "tokenizer", "entropy_model", "init_from")  # settings that name files
LOG = logging.getLogger(__name__)


def read_config_file(
    spec: str, overrides: typing.Iterable[str], kind: type, groups: dict[str, type]
):
    """The config of `configs/FILE.py[:ARG]` after overrides such as `data.batch_size=4`.

    kind: its dataclass. groups: the kinds of its choice.

    Raises:
      ValueError: naming the file or the key, and the nearest key where there is one.
    """
    path, argument = split_spec(spec)
    file = config_path(path)
    made = made_by(file, path, argument)
    tree = ConfigDict(completed(kind, renamed(made.to_dict(), path), groups))
    before = tree.to_dict()
    for override in overrides:
        apply_override(tree, renamed_override(override), kind, groups)

    def checked(values: dict):
        config = from_dict(kind, values, groups=groups)
        check_texts(to_dict(config))
        return config

    try:
        return checked(tree.to_dict())
    except ValueError as error:
        if str(error) != problem_of(checked, before):
            raise
        raise ValueError(f"{path}: {error}") from None


def check_texts(settings: dict, where: str = "config") -> None:
    """Raises ValueError for a bad path, or text that is not UTF-8."""
    for key, value in settings.items():
        if isinstance(value, dict):
            check_texts(value, f"{where}.{key}")
        elif isinstance(value, str) and value and not value.startswith("tfds:"):
            try:
                (check_name if key in PATHS else check_utf8)(value)
            except ValueError as error:
                raise ValueError(f"{where}.{key}: {error}") from None


def problem_of(checked: typing.Callable, values: dict) -> str:
    """The reason why a config is refused; empty if it is not."""
    try:
        checked(values)
    except ValueError as error:
        return str(error)
    return ""


def split_spec(spec: str) -> tuple[str, str]:
    """The path and the argument of FILE.py[:ARG]; a path may have colons, too."""
    path, colon, argument = spec.rpartition(".py:")
    whole = spec.endswith(".py") and Path(expanded(spec)).is_file()
    if colon and not whole:
        return f"{path}.py", argument
    path, _, argument = spec.partition(":")
    return (spec, "") if spec.endswith(".py") else (path, argument)


def config_path(path: str) -> Path:
    """The config file of that path, or the one of that name in the package.

    Raises:
      ValueError: with the nearest existing one.
    """
    file = Path(expanded(path))
    if file.is_file():
        if file.suffix != ".py":
            raise ValueError(f"{path} is no config: its name does not end with .py")
        return file.absolute()
    if file.parts[:1] == ("configs",):
        for folder in SHIPPED:
            found = folder.joinpath(*file.parts[1:])
            if found.is_file():
                LOG.info("%s is not in the working directory; using %s", path, found)
                return found
    there = [str(found) for found in file.parent.glob("*.py")]
    shipped = [f"configs/{found.name}" for folder in SHIPPED for found in folder.glob("*.py")]
    raise ValueError(f"config file {path!r} does not exist{nearest(path, {*there, *shipped})}")


def made_by(file: Path, path: str, argument: str) -> ConfigDict | FrozenConfigDict:
    """The ConfigDict that the `get_config` of a file returns.

    Raises:
      ValueError: naming the line of the file, for any error in it.
    """
    try:
        module_spec = importlib.util.spec_from_file_location("bltjax_run_config", file)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(place_in(file, path, error)) from error
    if isinstance(alias := getattr(module, "ALIAS", None), str):  # FILE.py:ARGUMENT beside it
        name, first = split_spec(alias)
        LOG.info("%s is now %s", path, f"{file.parent.name}/{alias}")
        beside = str(Path(path).with_name(name))
        return made_by(file.with_name(name), beside, "_".join(filter(None, (first, argument))))
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(f"{path} is no config: it has no function get_config")
    check_argument(inspect.signature(module.get_config), path, argument)
    try:
        made = module.get_config(argument) if argument else module.get_config()
    except Exception as error:
        raise ValueError(place_in(file, path, error)) from error
    if not isinstance(made, ConfigDict | FrozenConfigDict):
        raise ValueError(
            f"{path}: get_config() returns {type(made).__name__}, not an ml_collections.ConfigDict"
        )
    return made


def check_argument(signature: inspect.Signature, path: str, argument: str) -> None:
    """Raises ValueError unless a `get_config` can be called with the argument, or without one."""
    try:
        signature.bind(*[argument] if argument else [])
    except TypeError:
        names = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.default is parameter.empty
        ]
        if argument and not signature.parameters:
            raise ValueError(f"{path} takes no argument; drop ':{argument}'") from None
        if len(names) == 1 and not argument:
            raise ValueError(f"{path} needs an argument: {path}:{names[0].upper()}") from None
        raise ValueError(
            f"{path}: get_config{signature} can't be called with"
            f" {'one argument' if argument else 'none'}"
        ) from None


def place_in(file: Path, path: str, error: Exception) -> str:
    """The message for an error in a config file: the file, the line, and the fault."""
    if isinstance(error, SyntaxError):  # of the file, or of one that it imports
        place = path if error.filename in (None, str(file)) else error.filename
        return f"{place}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    trace = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in trace if frame.filename == str(file)]
    # A config's own ValueError is a complete message.
    what = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    what = re.sub(r"\s*\n\s*", " ", what)[:500]
    return f"{path}, line {lines[-1]}: {what}" if lines else f"{path}: {what}"


def completed(kind: typing.Any, values, groups: dict[str, type]):
    """Values for every setting of a dataclass, defaults where none is given; fresh dicts only.

    So every setting can be overridden, whether or not the config file mentions it. And no group
    is shared by two keys, as it would be in a ConfigDict that was given one dict twice: an override
    of the training source must not change the held-out one. Unknown keys, and values of a wrong
    type, are kept, to be refused later.
    """
    if not isinstance(values, dict):
        return values
    if dataclasses.is_dataclass(kind):
        absent = dict.fromkeys(groups if choice_of(kind) else ())
        values = absent | defaults_of(kind) | values
    return {
        name: completed(kind_of_setting(kind, name, groups), value, groups)
        for name, value in values.items()
    }


def defaults_of(kind: type) -> dict:
    """The settings of a dataclass that have a default, with their defaults."""
    found = {}
    for field in dataclasses.fields(kind):
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default
        if default is not dataclasses.MISSING:
            found[field.name] = (
                dataclasses.asdict(default) if dataclasses.is_dataclass(default) else default
            )
    return found


def apply_override(
    tree: ConfigDict, override: str, kind: typing.Any, groups: dict[str, type] | None = None
) -> None:
    """Sets one `key.subkey=value` in a ConfigDict; the key must exist."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} has no value; write --config.{key}=VALUE")
    *above, name = key.split(".")
    node, where = tree, "config"
    for part in [*above, name]:
        kind = kind_of_setting(kind, part, groups or {})
        known = node.keys() if isinstance(node, ConfigDict) else ()
        if part not in known:
            raise ValueError(f"{where}.{part} is no setting{nearest(part, known)}")
        node, where, parent = node[part], f"{where}.{part}", node
    try:
        value = literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    # A folder may be called 123, None or (1, 2).
    if isinstance(node, str) or kind is str:
        value = text
    if isinstance(value, list):
        value = tuple(value)
    # Types are checked by from_dict, whose messages name the setting; so no type-safety here.
    try:
        with parent.ignore_type():
            parent[name] = value
    except OverflowError:  # what it makes a float
        raise ValueError(f"{where} has {len(text)} digits: too large") from None


def kind_of_setting(kind: typing.Any, name: str, groups: dict[str, type]) -> typing.Any:
    """The declared type of a setting of a config class, without its None."""
    if typing.get_origin(kind) is dict:
        kind = typing.get_args(kind)[1]
    elif dataclasses.is_dataclass(kind):
        kind = hints_of(kind, groups).get(name)
    else:
        return None
    return without_none(kind)
