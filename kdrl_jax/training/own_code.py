"""Checks of what a config names of the user's own: reward functions and prompt styles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdrl_jax.data.prompts import find_style
from kdrl_jax.objectives import METHODS
from kdrl_jax.rewards import parse_functions
from kdrl_jax.types import UserError


def own_code_problems(flat: dict[str, Any]) -> Iterator[str]:
    """What is wrong with them, one line each; their modules are imported.

    Args:
      flat: every key of a config with its value.
    """
    functions, objective = flat["reward.functions"], flat["objective"]
    for check, value in ((parse_functions, functions), (find_style, flat["data.prompt_style"])):
        try:
            check(value)
        except UserError as error:
            yield from error.problems
    if functions and objective in METHODS and not METHODS[objective].policy:
        yield (
            f"reward.functions: {functions!r}, but objective={objective!r} learns from no reward; "
            "leave them out, or use 'kdrl' or 'grpo'"
        )
    if not functions and not flat["reward.verdict_weight"]:
        yield (
            "reward.verdict_weight: 0 without reward.functions leaves no reward at all; raise it, "
            "or name functions"
        )
