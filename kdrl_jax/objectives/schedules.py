"""Schedules of β, the weight of the distillation term."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdrl_jax.types import UserError

Step = int | Int[Array, ""]
Schedule = Callable[[Step], float | Float[Array, ""]]


def constant(init: float, min: float, delta: float) -> Schedule:
    """β = init at every step; the other arguments are not used."""
    return lambda step: init


def linear(init: float, min: float, delta: float) -> Schedule:
    """β = max(init − delta·step, min): KDRL-Annealing, arXiv 2506.02208 section 3.3."""

    def beta(step: Step) -> float | Float[Array, ""]:
        value = init - delta * step
        # On a Python int no array is made: the loop may forbid transfers to the device.
        return jnp.maximum(value, min) if isinstance(value, jax.Array) else max(value, min)

    return beta


SCHEDULES: dict[str, Callable[[float, float, float], Schedule]] = {
    "constant": constant,
    "linear": linear,
}
"""Name → (init, min, delta) → schedule."""


def beta_schedule(
    schedule: str = "constant", init: float = 0.0, min: float = 0.0, delta: float = 0.0
) -> Schedule:
    """β as a function of the number of updates made so far, from 0.

    Args:
      schedule: a name in SCHEDULES.
      init: β at step 0.
      min: the floor of "linear".
      delta: what "linear" takes off at each step.

    Returns:
      A function of the step: an int gives a float, an array (traced or not) gives an array.

    Raises:
      UserError: an unknown schedule, a negative or NaN value, or a floor above the start; one line
        for each problem.
    """
    problems = []
    if schedule not in SCHEDULES:
        names = ", ".join(SCHEDULES)
        problems.append(f"beta.schedule: {schedule!r} is unknown; use one of {names}")
    for name, value in {"init": init, "min": min, "delta": delta}.items():
        if not value >= 0:
            problems.append(f"beta.{name}: {value!r} is not 0 or more; use a number ≥ 0")
    if schedule == "linear" and min > init:
        problems.append(
            f"beta.min: {min!r} is above beta.init={init!r}; β only falls, so use at most that"
        )
    if problems:
        raise UserError(*problems)
    return SCHEDULES[schedule](init, min, delta)
