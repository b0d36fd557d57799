"""Watches over a run: each a rule about one metric, what breaking it means and what to do.

A watch is judged on a moving average over `health.window` steps, trips where it crosses its
threshold in `health.*`, and recovers after as many steps on the right side of it. What a step does
not measure puts its watches to sleep. All memory is plain numbers that go into the checkpoint: a
resumed run sees what an uninterrupted one would have seen, and so do all processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from kdrl_jax.objectives import Method

Row = Mapping[str, float]
"""The metrics of a step."""

EARLY = 3
"""Steps whose mean stands for the beginning: a run may be lost within the first ten."""
SLOW = 5
"""The slow average looks back so many times further than the other."""
REWARD_NOISE = 0.05
"""A reward that lost less than this has not collapsed, whatever the share."""
KL_FLOOR = 0.05
"""Nats per token: a KL below it is no distance, however small it was at first."""


@dataclasses.dataclass
class Memory:
    """What a watch remembers; JSON numbers throughout."""

    asked: int = 0
    """Steps that measured its metric."""
    seen: int = 0
    """Those of them that could say something."""
    last: float = 0.0
    mean: float = 0.0
    """Moving average; of the first `window` values their mean."""
    slow: float = 0.0
    """From the first EARLY values on, a slower one."""
    first: float = 0.0
    """The mean of the first EARLY values."""
    best: float = -math.inf
    """The largest average from then on, and its step."""
    best_step: int = 0
    tripped: bool = False
    calm: int = 0
    """Values since the last bad one."""
    streak: int = 0
    """Bad values without a good one between."""
    trips: int = 0
    bad_steps: int = 0
    first_step: int = 0
    """At which it first tripped."""

    def take(self, value: float, step: int, window: int) -> None:
        """Remember one more value."""
        self.seen += 1
        self.last = value
        self.mean += (value - self.mean) / min(self.seen, window)
        if not self.tripped:  # else what has gone wrong would become the measure
            self.slow += (value - self.slow) / (self.seen if self.seen <= EARLY else SLOW * window)
        if self.seen <= min(EARLY, window):
            self.first = self.mean
        if self.seen >= min(EARLY, window) and self.mean > self.best:
            self.best, self.best_step = self.mean, step

    def to_json(self) -> dict[str, float]:
        """As a checkpoint keeps it: JSON has no infinity."""
        found = dataclasses.asdict(self)
        return {key: x for key, x in found.items() if x != -math.inf}


Memories = Mapping[str, Memory]
Rule = Callable[[Memory, float, Memories], str]
"""(its memory, its threshold, everybody's) → what is wrong, or nothing."""


def _nonfinite(m: Memory, limit: float, _: Memories) -> str:
    return "loss or gradient is not finite: the update was skipped" if m.last > 0 else ""


def _fell(what: str) -> Rule:
    def rule(m: Memory, limit: float, _: Memories) -> str:
        # Of a best that is negative, which functions of one's own can give, there is no share.
        fell = m.best > 0 and m.mean < limit * m.best and m.mean < m.best - REWARD_NOISE
        return f"{what} {m.mean:.3f}, after {m.best:.3f} at step {m.best_step}" if fell else ""

    return rule


def _length_explosion(m: Memory, limit: float, others: Memories) -> str:
    reward = others["reward_collapse"]
    grew = m.mean > limit * m.slow and reward.mean <= reward.slow
    return f"mean length {m.mean:.0f}, lately {m.slow:.0f}, with no more reward" if grew else ""


def _length_collapse(m: Memory, limit: float, others: Memories) -> str:
    reward = others["reward_collapse"]
    shrank = m.mean < limit * m.first and reward.mean <= reward.first
    said = f"mean length {m.mean:.0f}, {m.first:.0f} at first, with no more reward"
    return said if shrank else ""


def _above(what: str) -> Rule:
    def rule(m: Memory, limit: float, _: Memories) -> str:
        return f"{what} {m.mean:.3g}, above {limit:g}" if m.mean > limit else ""

    return rule


def _entropy_collapse(m: Memory, limit: float, _: Memories) -> str:
    low = m.mean < limit * m.first
    return f"entropy {m.mean:.3g} nats per token, {m.first:.3g} at first" if low else ""


def _kl_blowup(m: Memory, limit: float, _: Memories) -> str:
    far = m.mean > limit * max(m.first, KL_FLOOR)
    return f"KL to the teacher {m.mean:.3g} nats per token, {m.first:.3g} at first" if far else ""


def _teacher_ignored(m: Memory, limit: float, _: Memories) -> str:
    deaf = m.last < limit
    return f"shuffling it changes {m.last:.1g} of the gradient" if deaf else ""


def _no_gain(m: Memory, limit: float, _: Memories) -> str:
    said = f"held-out accuracy is {m.last:+.3f} from that of health.baseline, mean of three"
    return said if m.last < limit else ""


@dataclasses.dataclass(frozen=True)
class Watch:
    """A row of the table.

    Attributes:
      of: the number it judges, from a step's metrics; None or NaN: not measured.
      key: of its threshold, in the config's group `health`.
      rule: see `Rule`.
      advice: what it means and what to do, with config keys.
      at_once: judged by each value alone, without `health.window`.
    """

    of: Callable[[Row], float | None]
    key: str
    rule: Rule
    advice: str
    at_once: bool = False


def _metric(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(name)


def _equal(row: Row) -> float | None:
    """The share of groups whose rewards are all equal: where verdicts are all, by these."""
    if "reward/equal_frac" in row or "reward/all_right_frac" not in row:
        return row.get("reward/equal_frac")
    return row["reward/all_right_frac"] + row["reward/all_wrong_frac"]


WATCHES: dict[str, Watch] = {
    "nonfinite": Watch(
        _metric("update/skipped"),
        "max_skipped",
        _nonfinite,
        "lower optimizer.learning_rate or beta.init, or use float32 for student.dtype",
        at_once=True,
    ),
    "reward_collapse": Watch(
        # With dynamic sampling the groups that are kept say less than those that were drawn.
        lambda row: row.get("reward/drawn_mean", row.get("reward/mean")),
        "reward_frac",
        _fell("mean reward"),
        "the policy forgets: lower optimizer.learning_rate; with reward_shaping lower beta.init "
        "or use objective=kdrl",
    ),
    "accuracy_drop": Watch(
        _metric("eval/accuracy"),
        "accuracy_frac",
        _fell("held-out accuracy"),
        "training makes it worse: compare with an earlier checkpoint; lower "
        "optimizer.learning_rate; with reward_shaping use objective=kdrl",
        at_once=True,
    ),
    "no_gain": Watch(
        _metric("eval/gain_over_baseline"),
        "baseline_gain",
        _no_gain,
        "the teacher brings nothing over the baseline: check that it is better than the student on "
        "this data, raise beta.init, or use objective=grpo, which costs less",
        at_once=True,
    ),
    "length_explosion": Watch(
        _metric("length/mean"),
        "length_factor",
        _length_explosion,
        "padding pays: lower beta.init, or set kd_mask=response, mask_truncated or "
        "reward.overlong_buffer",
    ),
    "length_collapse": Watch(
        _metric("length/mean"),
        "length_frac",
        _length_collapse,
        "every token costs more than an answer brings: with reward_shaping lower beta.init or use "
        "objective=kdrl; lower optimizer.learning_rate",
    ),
    "truncation": Watch(
        _metric("length/truncated_frac"),
        "truncated_frac",
        _above("share of responses cut at the limit"),
        "they cannot be right: raise rollout.max_new_tokens, or set reward.overlong_buffer",
    ),
    "entropy_collapse": Watch(
        _metric("entropy/mean"),
        "entropy_frac",
        _entropy_collapse,
        "samples of a group become alike: raise entropy_coef or clip_eps_high, or lower "
        "optimizer.learning_rate",
    ),
    "repetition": Watch(
        _metric("length/repetition_frac"),
        "repetition_frac",
        _above("share of responses that are cut while repeating themselves"),
        "the policy loops: lower optimizer.learning_rate or beta.init, or set mask_truncated=False",
    ),
    "kl_blowup": Watch(
        _metric("kl/teacher"),
        "kl_factor",
        _kl_blowup,
        "the student runs away from its teacher: lower optimizer.learning_rate; with "
        "kd_estimator=topk raise kd_topk.k or use k2; check that the teacher speaks this format",
    ),
    "mismatch": Watch(
        _metric("mismatch/kl"),
        "mismatch_kl",
        _above("KL between sampler and trainer, nats per token,"),
        "what is drawn is not the policy that learns: set tis_cap=2.0, rollout.dtype=float32, a "
        "smaller rollout.carry, or check the server's weights",
    ),
    "no_signal": Watch(
        _equal,
        "no_signal_frac",
        _above("share of groups whose rewards are all equal"),
        "they teach the policy nothing: choose other problems (data.filters pass_rate), a larger "
        "rollout.group_size or rollout.refill; if all are wrong see samples/",
    ),
    "teacher_ignored": Watch(
        _metric("health/teacher_effect"),
        "teacher_effect",
        _teacher_ignored,
        "distillation does nothing: check beta, kd_mask, kd_estimator, and any change to the loss",
        at_once=True,
    ),
}

THRESHOLDS = tuple(f"health.{watch.key}" for watch in WATCHES.values())
"""Their config keys."""


class Health:
    """The watches of a run.

    Args:
      config: the group `health`.
      method: decides which watches have something to judge.
      kd_mask: of the config.
      saved: `to_json()` of an earlier one.

    Attributes:
      stop: why the run is to end, after `observe` found it; else "".
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        method: Method,
        kd_mask: str,
        saved: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self._config, self._method, self._kd_mask = config, method, kd_mask
        self._memory = {name: Memory(**(saved or {}).get(name, {})) for name in WATCHES}
        self._stops = set(WATCHES if "all" in config["stop"] else config["stop"])
        self.stop = ""

    def probe_due(self, step: int, beta: float) -> bool:
        """Whether step number `step` is to measure "health/teacher_effect".

        Every `health.teacher_every` steps, and the first time that there is a teacher to hear.
        """
        every, uses = self._config["teacher_every"], self._method.scores
        heard = uses and (beta > 0 or self._method.ratio == "trrd")
        first = not self._memory["teacher_ignored"].asked
        return bool(every and heard and (first or step % every == 0))

    def observe(self, step: int, row: Row) -> tuple[dict[str, float], list[str]]:
        """Judge a step.

        Args:
          row: its metrics.

        Returns:
          "health/alerts", the number of watches that are tripped, and 1.0 for each of them by
          "health/NAME"; and a line for each that tripped or recovered just now.
        """
        said: list[str] = []
        for name, watch in WATCHES.items():
            limit = self._config[watch.key]
            memory, value = self._memory[name], watch.of(row)
            if value is None:
                continue
            memory.asked += 1
            if not (math.isfinite(value) and self._judges(name, row)):
                continue
            window = 1 if watch.at_once else self._config["window"]
            memory.take(value, step, window)
            on = limit > 0 or name == "nonfinite"
            ready = on and memory.seen >= window
            wrong = watch.rule(memory, limit, self._memory) if ready else ""
            said += self._judged(name, watch, memory, step, wrong)
        tripped = [name for name, memory in self._memory.items() if memory.tripped]
        alerts = {"health/alerts": float(len(tripped))}
        return alerts | {f"health/{name}": 1.0 for name in tripped}, said

    def _judged(self, name: str, watch: Watch, memory: Memory, step: int, wrong: str) -> list[str]:
        """Trip or recover; the lines about it."""
        if not wrong:
            memory.calm, memory.streak = memory.calm + 1, 0
            if memory.tripped and memory.calm >= (1 if watch.at_once else self._config["window"]):
                memory.tripped = False
                return [f"health: {name} is over at step {step}"]
            return []
        memory.calm, memory.streak = 0, memory.streak + 1
        memory.bad_steps += 1
        new, memory.tripped = not memory.tripped, True
        line = f"{name} at step {step}: {wrong}; {watch.advice}"
        if name == "nonfinite":  # a run that is started again has as many tries again
            most = self._config["max_skipped"]
            ends = bool(most) and memory.streak % most == 0
        else:  # one that is started again knew
            ends = new
        if ends and (name in self._stops or name == "nonfinite"):
            self.stop = self.stop or line
        if not new:
            return []
        memory.trips += 1
        memory.first_step = memory.first_step or step
        return [f"health: {line}"]

    def _judges(self, name: str, row: Row) -> bool:
        """Whether the step could say anything."""
        if name == "no_signal":
            return self._method.policy
        if name != "teacher_ignored":
            return True
        if not row.get("weights/sum", 1.0):  # every response was masked
            return False
        all_wrong = row["reward/all_wrong_frac"]
        if self._method.ratio == "trrd":  # the teacher weighs what rewards say
            return (_equal(row) or 0.0) < 1
        if self._method.kd and self._kd_mask != "none":  # is there anything it may speak of?
            some_wrong = row["reward/correct_frac"] < 1
            return all_wrong > 0 if self._kd_mask == "group" else some_wrong
        return True

    def to_json(self) -> dict[str, dict[str, float]]:
        """What a checkpoint keeps; back by `saved`."""
        return {name: memory.to_json() for name, memory in self._memory.items() if memory.asked}

    def summary(self) -> dict[str, dict[str, float]]:
        """Of each watch that tripped: the first step, how often, and the number of bad steps."""
        return {
            name: {"first_step": m.first_step, "trips": m.trips, "bad_steps": m.bad_steps}
            for name, m in self._memory.items()
            if m.trips
        }
