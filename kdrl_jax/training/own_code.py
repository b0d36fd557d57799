"""Checks of what a config names of the user's own: rewards, forms of answers, prompt styles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdrl_jax.data.prompts import find_style
from kdrl_jax.objectives import METHODS
from kdrl_jax.rewards import parse_functions
from kdrl_jax.tasks.registry import task_form
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
    if flat["reward.answer"] == "task":
        try:
            task_form(flat["data.task"])
        except UserError as error:  # what is wrong with the task's name is said elsewhere
            yield from (line for line in error.problems if line.startswith("reward.answer"))
    if not functions and not flat["reward.verdict_weight"]:
        yield (
            "reward.verdict_weight: 0 without reward.functions leaves no reward at all; raise it, "
            "or name functions"
        )


def unweighted_verdicts(flat: dict[str, Any]) -> list[str]:
    """Returns a warning where a verdict decides what is learnt from but is no part of the reward.

    Args:
      flat: every key of a config with its value; a config that `validate` lets pass.
    """
    method = METHODS[flat["objective"]]
    if flat["reward.verdict_weight"] or not method.policy:
        return []
    used = {
        "kd_mask": method.kd and flat["kd_mask"] != "none",
        "rollout.refill": bool(flat["rollout.refill"]),
    }
    return [
        f"warning: {key}={flat[key]!r} goes by the verifier's right and wrong, which "
        "reward.verdict_weight=0 leaves out of the reward: where it cannot read the answers "
        f"(reward.answer={flat['reward.answer']!r}) all of them are wrong; see reward/correct_frac"
        for key, does in used.items()
        if does
    ]
