"""What is said of k responses to each of P problems. Pure NumPy.

Each metric is a value per problem, [P] float64; the figure is their mean, and problems are what
`bootstrap_interval` draws again, so that the samples of a problem stay together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from kdrl_jax.rewards.math_answer import clean, quick_verdict

_DRAWN_AT_ONCE = 2**22


def avg_at_k(rewards: Float[np.ndarray, "P n"]) -> Float[np.ndarray, " P"]:
    """Avg@k: the mean reward of a problem's k = n samples. k = 1 is pass@1 from one sample."""
    return np.asarray(rewards, np.float64).mean(axis=1)


def pass_at_k(rewards: Float[np.ndarray, "P n"], k: int) -> Float[np.ndarray, " P"]:
    """pass@k, unbiased: 1 − C(n−c, k)/C(n, k), where c of the n samples are right.

    As the product 1 − Π_{i=n−c+1..n} (1 − k/i), which needs no large binomials (Chen et al.,
    arXiv 2107.03374, section 2.1).

    Raises:
      ValueError: k is not in 1..n, or a reward is neither 0 nor 1.
    """
    rewards = np.asarray(rewards)
    n = rewards.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k: {k} found; must be from 1 to the {n} samples")
    if not np.isin(rewards, (0, 1)).all():
        raise ValueError("pass@k needs rewards that are 0 or 1")
    # A factor of zero or less means that fewer than k are wrong: some right one is always drawn.
    factors = np.maximum(1 - k / np.arange(n, 0, -1), 0.0)
    by_count = 1 - np.concatenate([[1.0], np.cumprod(factors)])
    return by_count[rewards.sum(axis=1).astype(np.int64)]


def maj_at_k(
    answers: Sequence[Sequence[str | None]], rewards: Float[np.ndarray, "P n"]
) -> Float[np.ndarray, " P"]:
    """maj@k: whether the answer most samples agree on is right (self-consistency, 2203.11171).

    Votes are for groups of equivalent answers: `math_answer.quick_verdict` says that they are the
    same string, word or number in whatever spelling. Only what needs computer algebra stays apart.
    Of groups of one size the one that was voted for first wins. A response without an answer does
    not vote; where none votes the problem counts as wrong.

    Args:
      answers: [P][n], the extracted answers as they were written; None or "": no answer.
      rewards: of the same responses. A group is right if one of its members was found right: the
        others may have been graded in too little time.
    """
    return np.array([_majority(a, r) for a, r in zip(answers, rewards, strict=True)], np.float64)


def _majority(answers: Sequence[str | None], rewards: Float[np.ndarray, " n"]) -> float:
    groups: dict[str, list[float]] = {}  # in the order of first votes
    for answer, reward in zip(answers, rewards, strict=True):
        if text := clean(answer or ""):
            same = (group for group in groups if quick_verdict(group, text))
            groups.setdefault(next(same, text), []).append(float(reward))
    if not groups:
        return 0.0
    most = max(len(votes) for votes in groups.values())
    return max(next(votes for votes in groups.values() if len(votes) == most))


def repetition_rate(cut: Bool[np.ndarray, "..."], repeats: Bool[np.ndarray, "..."]) -> float:
    """The share of the overlong (cut) responses that repeat themselves; NaN if none was cut.

    See `kdrl_jax.rollout.repetition.repeats` for what counts as repeating.
    """
    cut, repeats = np.asarray(cut, bool), np.asarray(repeats, bool)
    return float(repeats[cut].mean()) if cut.any() else float("nan")


def bootstrap_interval(
    values: Float[np.ndarray, " P"], *, seed: int = 0, level: float = 0.95, resamples: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over problems (Efron 1979).

    It says how much the figure depends on which problems were asked, and, as each brings its own
    samples, on the sampling too.

    Args:
      level: the share of resampled means between the ends.

    Returns:
      (low, high). The same seed and values give the same numbers.
    """
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWN_AT_ONCE // values.size)
    means = [
        values[rng.integers(values.size, size=(min(step, resamples - done), values.size))].mean(1)
        for done in range(0, resamples, step)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
