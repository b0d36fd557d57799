"""How answers are drawn where nothing else is given, and within which limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from kdrl_jax.config import CONFIGS, load_config, saved_config
from kdrl_jax.data import Tokenizer
from kdrl_jax.rollout import DRAWING
from kdrl_jax.types import UserError

USUAL_TOKENS = 1024
LIMITS: dict[str, tuple[float, float | None, str]] = {
    "max_new_tokens": (1, None, "must be at least 1"),
    "temperature": (0, None, "must not be negative"),
    "top_p": (1e-9, 1, "must be above 0 and at most 1"),
    "top_k": (0, None, "must not be negative"),
    "min_p": (0, 1, "must be from 0 to 1"),
    "samples": (1, None, "must be at least 1"),
    "seed": (0, 2**32 - 1, "must be from 0 to 2**32 - 1"),
}
"""Least and greatest value of each setting."""


def limit_problems(values: Mapping[str, Any], option: str = "") -> list[str]:
    """Returns a line for each setting that is out of its limits.

    Args:
      option: stands before a name on the command line.
    """
    found = []
    for name, (least, most, rule) in LIMITS.items():
        value = values[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not value >= least or not (most is None or value <= most):
            found.append(f"{option}{name}: {value} {rule}")
    return found


def run_settings(folder: Path, step: int | None) -> dict[str, Any]:
    """Returns what a run's config has of drawing and columns, with the usual for what it has not.

    Args:
      folder: of a run or a model.
      step: None: it is no run.
    """
    file = folder / "config.json"
    own = step is not None and file.is_file()
    config = saved_config(file) if own else load_config(CONFIGS / "base.py")
    found = {key: config.rollout[key] for key in DRAWING} | {"cache_dir": config.cache_dir}
    found["fields"] = config.data.fields
    return found | (
        {"prompt_style": config.data.prompt_style} if own else {"max_new_tokens": USUAL_TOKENS}
    )


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has a chat template."""
    try:
        return bool(tokenizer.chat([{"role": "user", "content": "a"}]))
    except UserError:
        return False


def usual_dtype() -> str:
    """The dtype that a model answers in where none is given."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
