"""Typed configs: a Python file makes one, the command line changes fields, JSON keeps it.

A config is a tree of frozen dataclasses, tuples, numbers and strings. Nothing is looked up by
name: what a field does is found by going to its definition.
"""

import ast
import dataclasses
import difflib
import inspect
import runpy
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal


def load(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The config that `get_config()` of a Python file returns, with overrides applied.

    Args:
      path: a file like configs/pretrain.py.
      overrides: "optimizer.learning_rate=1e-4", see `override`. The arguments of get_config are
        given first, likewise: "folder=photos".

    Raises FileNotFoundError or ValueError in one sentence.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise ValueError(f"{path} must define get_config().")
    parameters, given, others = inspect.signature(get_config).parameters, {}, []
    for assignment in overrides:
        name, separator, text = assignment.partition("=")
        if separator and name in parameters:
            given[name] = _parse(text, parameters[name].default, assignment)
        else:
            others.append(assignment)
    config = get_config(**given)
    for assignment in others:
        config = override(config, assignment, tuple(parameters))
    return config


def override(config: Any, assignment: str, arguments: Sequence[str] = ()) -> Any:
    """A copy of a config with one field changed.

    Args:
      assignment: "a.b.2.c=value": fields by name, entries of tuples by number. The value is read
        as the type of the one it replaces; None, tuples and numbers where None was are written as
        in Python.
      arguments: of get_config, which may be what was meant.

    Raises ValueError in one sentence, with the nearest name for one that does not exist.
    """
    path, separator, text = assignment.partition("=")
    if not separator:
        raise ValueError(f"{assignment!r} is no override: write field=value.")
    return _replace(config, path.split("."), text, assignment, arguments)


def _replace(
    node: Any, names: Sequence[str], text: str, assignment: str, arguments: Sequence[str] = ()
) -> Any:
    if not names:
        return _parse(text, node, assignment)
    name, *rest = names
    if dataclasses.is_dataclass(node):
        fields = [field.name for field in dataclasses.fields(node)]
        if name not in fields:
            near = _nearest(name, [*fields, *arguments])
            raise ValueError(f"{assignment}: there is no field {name!r}{near}.")
        value = _replace(getattr(node, name), rest, text, assignment)
        kind = typing.get_type_hints(type(node))[name]
        if not _fits(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"{assignment}: {name} is of type {wanted}.")
        return dataclasses.replace(node, **{name: value})
    if isinstance(node, tuple):
        if not name.isdigit() or int(name) >= len(node):
            raise ValueError(f"{assignment}: {name!r} is none of the entries 0..{len(node) - 1}.")
        entries = list(node)
        entries[int(name)] = _replace(entries[int(name)], rest, text, assignment)
        return tuple(entries)
    raise ValueError(f"{assignment}: {node!r} has no fields.")


def _fits(value: Any, kind: Any) -> bool:
    """Is this a value of a field annotated so?"""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return True  # The dataclass itself says which there are.
    if typing.get_origin(kind) is tuple:
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value) if isinstance(value, tuple) else ()
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(map(_fits, value, arguments))
        )
    if arguments:  # of a union
        return any(_fits(value, one) for one in arguments)
    return isinstance(value, (int, float) if kind is float else kind)


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f" among {', '.join(names)}"


def _parse(text: str, old: Any, assignment: str) -> Any:
    kind = type(old)
    if isinstance(old, str) and text != "None":
        return text
    try:
        value = ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError) as error:
        if old is None:
            return text
        raise ValueError(f"{assignment}: {text!r} cannot be read as {kind.__name__}.") from error
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is list:
        value = tuple(value)
    if old is not None and value is not None and type(value) is not kind:
        raise ValueError(f"{assignment}: {text!r} is not of type {kind.__name__}.")
    return value


def to_dict(config: Any) -> Any:
    """A config as JSON can hold it: dataclasses become dicts, tuples lists."""
    if dataclasses.is_dataclass(config):
        names = [field.name for field in dataclasses.fields(config)]
        return {name: to_dict(getattr(config, name)) for name in names}
    if isinstance(config, (tuple, list)):
        return [to_dict(entry) for entry in config]
    return config
