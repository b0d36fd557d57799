"""What a step says of itself: rollout statistics and phase times."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from kdrl_jax.rewards import OwnReward
from kdrl_jax.rollout.repetition import repeats
from kdrl_jax.types import FINISH_LENGTH, OUTCOMES, Rollouts, Verdict


class StepClock:
    """Wall time by phase: `lap(name)` books the time since the last lap to `time/NAME_s`.

    Args:
      watch: called with each new phase.
    """

    def __init__(self, watch: Callable[[str], Any] = lambda phase: None) -> None:
        self._phase, self._watch = "", watch
        self.phase = "rollout"
        self._last = time.perf_counter()
        self._booked: dict[str, float] = {}

    @property
    def phase(self) -> str:
        """What the time is being spent on now."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self._watch(phase)

    def lap(self, name: str, then: str = "rollout") -> None:
        """The time since the last lap was spent on `name`, in seconds; `then` comes next."""
        now = time.perf_counter()
        key = f"time/{name}_s"
        self._booked[key] = self._booked.get(key, 0.0) + now - self._last
        self._last, self.phase = now, then

    def take(self) -> dict[str, float]:
        """What has been booked since the last call."""
        booked, self._booked = self._booked, {}
        return booked


def rollout_metrics(
    rollouts: Rollouts,
    verdicts: Sequence[Verdict],
    rewards: np.ndarray,
    own: Mapping[str, OwnReward] = MappingProxyType({}),
) -> dict[str, float]:
    """Rewards, verdicts and lengths of one step.

    "length/truncated_frac" is the share of responses that the limit cut, the clip ratio of arXiv
    2506.02208. "length/repetition_frac" is the share of all responses that were cut while they
    repeated themselves; "length/overlong_repetition_frac" the share of those that were cut, which
    is the paper's, absent where none was. Responses that end by themselves are not looked at.

    Args:
      rollouts: host arrays.
      verdicts: of the P·G rollouts in order; which groups are all right is theirs to say.
      rewards: [P, G].
      own: of reward functions: for each the mean of what it gave ("reward/NAME", NaN where it gave
        nothing) and the share of calls that failed; with the share of groups whose rewards are all
        equal, which verdicts no longer tell.
    """
    lengths, finish = rollouts.lengths, rollouts.finish_reason
    counts = collections.Counter(v.outcome for v in verdicts)
    right = np.array([v.reward for v in verdicts], np.float32).reshape(rewards.shape)
    group = right.mean(axis=1)
    cut = np.argwhere(finish == FINISH_LENGTH)
    loops = sum(repeats(rollouts.tokens[p, g, : lengths[p, g]].tolist()) for p, g in cut)
    said: dict[str, float] = {}
    for name, (values, failed) in own.items():
        heard = values[~np.isnan(values)]
        said[f"reward/{name}"] = float(heard.mean()) if heard.size else math.nan
        said[f"reward/{name}_failed_frac"] = float(failed.mean())
    if own:
        equal = rewards.max(axis=1) == rewards.min(axis=1)
        said["reward/equal_frac"] = float(equal.mean())
    return {
        "reward/mean": float(rewards.mean()),
        "reward/all_right_frac": float((group == 1).mean()),
        "reward/all_wrong_frac": float((group == 0).mean()),
        **{f"reward/{name}_frac": counts[name] / len(verdicts) for name in OUTCOMES},
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "length/truncated_frac": len(cut) / finish.size,
        "length/repetition_frac": loops / finish.size,
        **({"length/overlong_repetition_frac": loops / len(cut)} if len(cut) else {}),
        **said,
    }


def split_kl(numbers: Mapping[str, float]) -> dict[str, float]:
    """`numbers` with the sums of `kl_by_mask` as means over the tokens of each part.

    Nats per token; absent where a part has no tokens.
    """
    parts = {
        "kl/distilled": ("kl/distilled_sum", "kd/active_frac"),
        "kl/distilled_k2": ("kl/distilled_k2_sum", "kd/active_frac"),
        "kl/masked": ("kl/masked_sum", "kd/masked_frac"),
    }
    sums = {total for total, _ in parts.values()}
    means = {
        name: numbers[total] / numbers[share]
        for name, (total, share) in parts.items()
        if total in numbers and numbers[share] > 0
    }
    return {name: value for name, value in numbers.items() if name not in sums} | means
