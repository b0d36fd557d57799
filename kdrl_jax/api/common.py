"""What the functions have in common: configs, functions and rows as arguments, what is printed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from kdrl_jax import processes
from kdrl_jax.config import load_config, split_variant
from kdrl_jax.foreign_names import answer
from kdrl_jax.own_functions import name_of
from kdrl_jax.training.display import speaking
from kdrl_jax.types import UserError

Rows = str | Path | Iterable[Mapping[str, Any]]
"""A path as `data.path` takes it, or rows: a list of dicts, a `datasets.Dataset`, …"""
Function = str | Callable[..., Any]
"""A function, or 'module:function'."""
Log = Literal["text", "quiet"]


def config_of(config: str | Path | ConfigDict) -> tuple[ConfigDict, str]:
    """A config, and a name for its run."""
    if isinstance(config, ConfigDict):
        return config, "python"
    file, variant = split_variant(config)
    name = "-".join([file.stem, *variant.split(",")]) if variant else file.stem
    return load_config(config), name


def refuse_others(others: Mapping[str, Any], function: str) -> None:
    """Refuse arguments that a function does not take, such as those of other trainers.

    Raises:
      UserError: a line for each.
    """
    if others:
        raise UserError(
            *(
                answer(name, value)
                or f"{name}: no argument of {function}; a key goes into changes={{'KEY': VALUE}}"
                for name, value in others.items()
            )
        )


def text_of(function: Any, key: str) -> str:
    """How a config writes a function or (function, weight)."""
    if isinstance(function, str):
        return function
    if isinstance(function, tuple) and len(function) == 2:
        return f"{text_of(function[0], key)}*{function[1]}"
    return name_of(function, key)


@contextlib.contextmanager
def speaking_as(log: str) -> Iterator[None]:
    if log not in ("text", "quiet"):
        raise UserError(f"log: {log!r} is none of 'text', 'quiet'")
    processes.start(None)
    with speaking(log):
        yield
