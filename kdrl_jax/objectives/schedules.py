"""Schedules of β and of other weights: functions of the step and of what was measured."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdrl_jax.types import UserError

FAST, SLOW = 0.2, 0.05
"""What the moving averages take of each new value: they look back some 5 and 20 steps."""


class Trend(NamedTuple):
    """What the adaptive schedule remembers of the steps so far; Python floats throughout.

    `Trend()` is that of a new run. `list(trend)` is JSON, and `Trend(*values)` the way back, to
    the bit: a resumed run goes on as if it had not stopped.
    """

    steps: float = 0.0
    """Number of observations."""
    kl_first: float = 0.0
    kl: float = 0.0
    """Moving average of KL(student‖teacher), nats per token, from kl_first on; rate FAST."""
    reward_fast: float = 0.0
    reward_slow: float = 0.0
    """Moving averages of the mean reward, both from its first value on."""
    stalled: float = 0.0
    """Number of observations, from the second on, after which reward_fast ≤ reward_slow."""
    entropy: float = 0.0
    """Of the last observation, nats per token."""
    entropy_raise: float = 0.0
    """What `AdaptiveEntropy` has added to the coefficient of the entropy bonus."""

    def observe(self, kl: float, reward: float) -> Trend:
        """The trend after one more step; entropy and entropy_raise stay.

        Args:
          kl: KL(student‖teacher) measured in this step, nats per token ("kl/teacher").
          reward: its mean reward.
        """
        kl, reward = float(kl), float(reward)
        if not self.steps:
            return self._replace(
                steps=1.0, kl_first=kl, kl=kl, reward_fast=reward, reward_slow=reward
            )
        fast = self.reward_fast + FAST * (reward - self.reward_fast)
        slow = self.reward_slow + SLOW * (reward - self.reward_slow)
        return self._replace(
            steps=self.steps + 1,
            kl=self.kl + FAST * (kl - self.kl),
            reward_fast=fast,
            reward_slow=slow,
            stalled=self.stalled + (fast <= slow),
        )


Step = int | Int[Array, ""]
Value = float | Float[Array, ""]
Schedule = Callable[..., Any]
"""(step, trend=None) → value. A Python step gives a Python float: no array is made, for the loop
may forbid transfers to the device. `linear` and `constant` also take a traced step."""
Phases = Sequence[tuple[int, float]]


def constant(init: float, min: float, delta: float, phases: Phases) -> Schedule:
    """β = init at every step."""
    return lambda step, trend=None: float(init)


def linear(init: float, min: float, delta: float, phases: Phases) -> Schedule:
    """β = max(init − delta·step, min): KDRL-Annealing, arXiv 2506.02208 section 3.3."""

    def beta(step: Step, trend: Trend | None = None) -> Value:
        value = init - delta * step
        return jnp.maximum(value, min) if isinstance(value, jax.Array) else float(max(value, min))

    return beta


def adaptive(init: float, min: float, delta: float, phases: Phases) -> Schedule:
    """As much distillation as there is distance left, and less where it stopped to pay.

        β = max(min, init · m · (1 − delta)^s)

        m = clip(kl_t/kl_1, 0, 1)     kl_t ← kl_{t−1} + FAST·(KL_t − kl_{t−1}), the moving average
                                      of the measured KL(student‖teacher); 1 if kl_1 ≤ 0
        s = #{u ≤ t: fast_u ≤ slow_u}     moving averages of the mean reward, at rates FAST and
                                      SLOW; the first step, where both are equal, does not count

    So β never rises above init·kl_t/kl_1 (nor above init) unless min is higher, and falls by the
    factor 1 − delta in each step in which the recent reward is no better than the older one:
    imitation no longer pays. A choice of this project: arXiv 2506.02208 leaves it open.

    The `Trend` holds kl and reward history; without one (before the first measurement) β is init.
    """

    def beta(step: Step, trend: Trend | None = None) -> float:
        if trend is None or not trend.steps:
            return float(init)
        left = trend.kl / trend.kl_first if trend.kl_first > 0 else 1.0
        left = max(0.0, left if left < 1.0 else 1.0)
        return float(max(min, init * left * (1.0 - delta) ** trend.stalled))

    return beta


def phased(init: float, min: float, delta: float, phases: Phases) -> Schedule:
    """β = value of the last phase that has begun; see `phase_schedule`."""
    return _piecewise(phases)


SCHEDULES: dict[str, Callable[[float, float, float, Phases], Schedule]] = {
    "constant": constant,
    "linear": linear,
    "adaptive": adaptive,
    "phases": phased,
}
"""Name → (init, min, delta, phases) → schedule; each leaves alone what it does not need."""


def beta_schedule(
    schedule: str = "constant",
    init: float = 0.0,
    min: float = 0.0,
    delta: float = 0.0,
    phases: Phases = (),
) -> Schedule:
    """β as a function of the number of updates made so far, from 0, and of the `Trend`.

    Args:
      schedule: a name in SCHEDULES.
      init: β at step 0.
      min: the floor of "linear" and "adaptive".
      delta: what "linear" takes off at each step; the share that "adaptive" takes off at each
        step without progress.
      phases: of "phases": ((step, value), …), each value from its step on; the first step is 0.

    Returns:
      A function `(step, trend=None)`: a Python step gives a Python float.

    Raises:
      UserError: an unknown schedule, a negative or NaN value, a floor above the start, or phases
        out of order; one line for each problem.
    """
    problems = []
    if schedule not in SCHEDULES:
        names = ", ".join(SCHEDULES)
        problems.append(f"beta.schedule: {schedule!r} is unknown; use one of {names}")
    for name, value in {"init": init, "min": min, "delta": delta}.items():
        if not _is_weight(value):
            problems.append(f"beta.{name}: {value!r} is not 0 or more; use a number ≥ 0")
    if schedule in ("linear", "adaptive") and not problems and min > init:
        problems.append(
            f"beta.min: {min!r} is above beta.init={init!r}; β only falls, so use at most that"
        )
    if schedule == "adaptive" and _is_weight(delta) and delta > 1:
        problems.append(f"beta.delta: {delta!r} is a share of β for adaptive; use at most 1")
    if schedule == "phases":
        problems += _phase_problems("beta.phases", phases)
        if not phases:
            problems.append("beta.phases: () found; give ((0, value), (step, value), …)")
    if problems:
        raise UserError(*problems)
    return SCHEDULES[schedule](init, min, delta, phases)


def phase_schedule(phases: Phases, default: float = 1.0, *, key: str = "policy_phases") -> Schedule:
    """A weight that is constant between given steps: distil first, then reinforce, in two of them.

    Args:
      phases: ((step, value), …), each value ≥ 0 from its step on, steps rising, the first 0.
      default: the value throughout where phases is empty.
      key: the config key that errors name.

    Returns:
      A function `(step, trend=None)` of a Python step that gives a Python float.

    Raises:
      UserError: one line for each problem.
    """
    if problems := _phase_problems(key, phases):
        raise UserError(*problems)
    return _piecewise(phases or ((0, default),))


def alpha_schedule(alpha: float, alpha_end: float, alpha_steps: int) -> Schedule:
    """Returns the α of TRRD by step: alpha → alpha_end in a straight line, then alpha_end.

    Args:
      alpha_steps: of the line; 0: α is `alpha` throughout.
    """

    def at(step: int, trend: Trend | None = None) -> float:
        done = min(step / alpha_steps, 1.0) if alpha_steps else 0.0
        return float(alpha + done * (alpha_end - alpha))

    return at


class AdaptiveEntropy(NamedTuple):
    """The coefficient of the entropy bonus by the entropy (Skywork-OR1, arXiv 2505.22312).

    c_{k+1} = clip(c_k ± delta, 0, max)     + where the entropy of step k was below target
    coefficient of step k+1 = c_{k+1} where it was at most target, else 0
    """

    start: float
    """c_0."""
    target: float
    """Nats per token; 0: the coefficient is `start` throughout."""
    delta: float
    max: float

    def coefficient(self, trend: Trend | None = None) -> float:
        """Returns the coefficient of the next step; `start` where there was none."""
        if trend is None:
            return self.start
        if self.target and trend.steps and trend.entropy > self.target:
            return 0.0
        return self.start + trend.entropy_raise

    def observe(self, trend: Trend, entropy: float) -> Trend:
        """Returns the trend after a step of that entropy, nats per token."""
        if not self.target:
            return trend
        sign = (entropy < self.target) - (entropy > self.target)
        c = min(max(self.start + trend.entropy_raise + sign * self.delta, 0.0), self.max)
        return trend._replace(entropy=float(entropy), entropy_raise=c - self.start)


def _piecewise(phases: Phases) -> Schedule:
    steps, values = [int(s) for s, _ in phases], [float(v) for _, v in phases]
    return lambda step, trend=None: values[bisect.bisect_right(steps, step) - 1]


def _phase_problems(key: str, phases: Any) -> list[str]:
    problems, last = [], -1
    if not isinstance(phases, Sequence) or isinstance(phases, str):
        return [f"{key}: {phases!r} is not a sequence; use ((0, value), (step, value), …)"]
    for i, phase in enumerate(phases):
        if not (isinstance(phase, Sequence) and not isinstance(phase, str) and len(phase) == 2):
            problems.append(f"{key}: {phase!r} is not a pair; use (step, value)")
            continue
        step, value = phase
        if not isinstance(step, int) or isinstance(step, bool):
            problems.append(f"{key}: step {step!r} is not a whole number; use one ≥ 0")
        elif i == 0 and step != 0:
            problems.append(f"{key}: the first phase is from step {step}; it must be from 0")
        elif step <= last:
            problems.append(f"{key}: step {step} comes after {last}; steps must rise")
        else:
            last = step
        if not _is_weight(value):
            problems.append(f"{key}: value {value!r} is not 0 or more; use a number ≥ 0")
    return problems


def _is_weight(x: Any) -> bool:
    return isinstance(x, int | float) and math.isfinite(x) and x >= 0
