"""The installed commands: `kdrl-train …` is `python -m kdrl_jax.train …`, and so are the others.

Each loads its own module alone, when it is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from kdrl_jax.cli import run_entry


def _command(name: str) -> Callable[[], None]:
    def command() -> None:
        run_entry(importlib.import_module(f"kdrl_jax.{name}").main)

    return command


convert = _command("convert")
difficulty = _command("difficulty")
evaluate = _command("evaluate")
generate = _command("generate")
plan = _command("plan")
report = _command("report")
reproduce = _command("reproduce")
train = _command("train")
