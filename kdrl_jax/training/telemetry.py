"""What a step says of itself: rollout statistics, phase times and sample files."""

from __future__ import annotations

import collections
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from kdrl_jax.data import Tokenizer
from kdrl_jax.rollout.repetition import repeats
from kdrl_jax.training.collect import Collected
from kdrl_jax.training.evaluation import completion_texts
from kdrl_jax.training.storage import write_atomic
from kdrl_jax.types import FINISH_LENGTH, OUTCOMES, Rollouts, Verdict


class StepClock:
    """Wall time by phase: `lap(name)` books the time since the last lap to `time/NAME_s`.

    Attributes:
      phase: what the time is being spent on now.
    """

    def __init__(self) -> None:
        self.phase = "rollout"
        self._last = time.perf_counter()
        self._booked: dict[str, float] = {}

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
    rollouts: Rollouts, verdicts: Sequence[Verdict], rewards: np.ndarray
) -> dict[str, float]:
    """Rewards, verdicts and lengths of one step.

    "length/repetition_frac" is the share of all responses that were cut while they repeated
    themselves: those that end by themselves are not looked at.

    Args:
      rollouts: host arrays.
      rewards: [P, G]; verdicts: the same in order, flat.
    """
    lengths, finish = rollouts.lengths, rollouts.finish_reason
    counts = collections.Counter(v.outcome for v in verdicts)
    group = rewards.mean(axis=1)
    cut = np.argwhere(finish == FINISH_LENGTH)
    loops = sum(repeats(rollouts.tokens[p, g, : lengths[p, g]].tolist()) for p, g in cut)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/all_right_frac": float((group == 1).mean()),
        "reward/all_wrong_frac": float((group == 0).mean()),
        **{f"reward/{name}_frac": counts[name] / len(verdicts) for name in OUTCOMES},
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "length/truncated_frac": len(cut) / finish.size,
        "length/repetition_frac": loops / finish.size,
    }


def write_samples(path: Path, found: Collected, count: int, tokenizer: Tokenizer) -> None:
    """The first `count` rollouts of a step, one JSON object a line."""
    group = found.rollouts.lengths.shape[1]
    shown = jax.tree.map(lambda x: x[: -(-count // group)], found.rollouts)
    lengths, finish = shown.lengths.reshape(-1), shown.finish_reason.reshape(-1)
    lines = []
    for i, text in enumerate(completion_texts(shown, tokenizer)[:count]):
        problem, verdict = found.asked[i // group][0], found.verdicts[i]
        row = {
            "id": problem.id,
            "sample": i % group,
            "problem": problem.problem,
            "answer": problem.answer,
            "completion": text,
            "reward": verdict.reward,
            "outcome": verdict.outcome,
            "length": int(lengths[i]),
            "finish_reason": "length" if finish[i] == FINISH_LENGTH else "eos",
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))
