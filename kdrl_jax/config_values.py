"""Values for the keys of a config, from texts and from Python, and what to say of those that fail.

Texts come from the command line: a bool is true or false, several values stand with commas.
"""

from __future__ import annotations

import ast
import difflib
import numbers
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ml_collections import ConfigDict

from kdrl_jax.foreign_names import answer

OPTION = "--config."
"""Stands before a key on the command line."""


def from_texts(
    overrides: Sequence[str], known: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The values in 'key=text', and a line for each that is none.

    Args:
      known: each key with a value of its type.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for item in overrides:
        key, separator, text = item.partition("=")
        if key not in known:
            problems.append(unknown_key(key, text, known, OPTION))
        elif not separator:
            problems.append(f"{OPTION}{key}: no value; write {OPTION}{key}=VALUE")
        else:
            try:
                values[key] = parse(text, known[key])
            except ValueError as error:
                problems.append(f"{OPTION}{key}={text}: {error}")
    return values, problems


def from_python(
    changes: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """As `from_texts`, from values by key or by groups of keys; see `fit`."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in _leaves(changes, known):
        if key not in known:
            problems.append(unknown_key(key, value, known))
            continue
        try:
            values[key] = fit(value, known[key])
        except ValueError as error:
            problems.append(f"{key}: {value!r} {error}")
    return values, problems


def _leaves(
    changes: Mapping[str, Any], known: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(key, value), groups taken apart."""
    for name, value in changes.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping | ConfigDict) and key not in known:
            yield from _leaves(value, known, f"{key}.")
        else:
            yield key, value


def unknown_key(key: str, value: Any, known: Collection[str], option: str = "") -> str:
    """A line on a key that is none: the name that it has here, its group's keys or the nearest.

    Args:
      value: that it was given.
      known: all keys.
      option: stands before a key, see OPTION.
    """
    if line := answer(key, value, option):
        return line
    if inner := [name for name in known if name.startswith(f"{key}.")]:
        return f"{option}{key}: is a group of keys; set one of {', '.join(inner)}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"{option}{key}: no such key; the nearest is {near[0]}"


def parse(text: str, default: Any) -> Any:
    """`text` as a value of the type of `default`.

    Raises:
      ValueError: it does not read as that type.
    """
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError("must be true or false")
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return fit(value, default)


def fit(value: Any, default: Any) -> Any:
    """`value` in the type of `default`.

    A whole number is a float too, a list or a single value a tuple, a path a text.

    Raises:
      ValueError: it is of another type.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    match default:
        case bool():
            if isinstance(value, bool):
                return value
        case int():
            if is_number and value == value // 1:
                return int(value)
        case float():
            if is_number:
                return float(value)
        case str():
            if isinstance(value, str | PurePath):
                return str(value)
        case tuple():
            if isinstance(value, list | tuple):
                return tuple(tuple(x) if isinstance(x, list) else x for x in value)
            if is_number:
                return (value,)
            if isinstance(value, str) and _takes_texts(value, default):
                return _several(value)
    raise ValueError(must_be(default))


def must_be(default: Any) -> str:
    """'must be int, like 16', of a value of another type than `default`."""
    example = ("a", "b") if default == () else default
    return f"must be {type(default).__name__}, like {example!r}"


def _takes_texts(text: str, default: tuple[Any, ...]) -> bool:
    """Whether a text can be the values of a key: no broken tuple, and no key of numbers."""
    broken = text.startswith(("(", "[", "{", "'", '"'))
    return not text or not (broken or any(isinstance(x, numbers.Real) for x in default))


def _several(text: str) -> tuple[str, ...]:
    """'a,b' as ('a', 'b'), '' as ().

    A comma before `name=` goes on with the arguments of the value before, so that
    'dedupe,pass_rate:model=M,max=0.5' is of two filters.
    """
    values: list[str] = []
    for part in filter(None, (x.strip() for x in text.split(","))):
        if values and ":" in values[-1] and re.match(r"\w+=", part):
            values[-1] += f",{part}"
        else:
            values.append(part)
    return tuple(values)
