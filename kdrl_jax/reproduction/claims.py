"""What the papers claim, as data, and the rule by which a grid's results judge it.

A claim is about one or several differences between methods. With d the paired difference on the
claimed side and [low, high] its 95 % interval over seeds, a difference is

    held           low > −margin        did not hold   high < −margin        undecided   otherwise

where the margin is 0, or what "at equal accuracy" may lose. A claim held if all its differences
did, and did not hold if one did not. Sources: KDRL arXiv 2506.02208, RLAD arXiv 2602.22495,
OPD-then-RL arXiv 2609.04108.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from kdrl_jax.reproduction.statistics import Interval
from kdrl_jax.reproduction.study import AT_TIME, Study

Verdict = Literal["held", "did not hold", "undecided"]
VERDICTS: tuple[Verdict, ...] = ("held", "did not hold", "undecided")
EQUAL_ACCURACY = 0.02


@dataclasses.dataclass(frozen=True)
class Difference:
    """`metric` of `left` minus that of `right`: claimed positive, or negative where `less`."""

    metric: str
    left: str
    right: str
    less: bool = False
    margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Claim:
    """text: in our words. source: paper and place. published: its numbers."""

    id: str
    text: str
    source: str
    published: str
    differences: tuple[Difference, ...]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A claim on a task, with the intervals it was judged by."""

    claim: Claim
    task: str
    verdict: Verdict
    intervals: tuple[Interval, ...]


def judge(interval: Interval, difference: Difference) -> Verdict:
    """The rule above; undecided where there is no interval."""
    sides = (interval.low, interval.high)
    low, high = sorted(-side for side in sides) if difference.less else sides
    if any(map(math.isnan, sides)):
        return "undecided"
    if low > -difference.margin:
        return "held"
    return "did not hold" if high < -difference.margin else "undecided"


def combine(verdicts: Sequence[Verdict]) -> Verdict:
    """A claim's verdict from those of its differences."""
    if "did not hold" in verdicts:
        return "did not hold"
    return "held" if all(v == "held" for v in verdicts) else "undecided"


def judge_claims(study: Study, tasks: Sequence[str]) -> list[Judgement]:
    """Every claim on every task that has all the methods it is about."""
    found = []
    for claim in CLAIMS:
        for task in tasks:
            needed = {m for d in claim.differences for m in (d.left, d.right)}
            if not all(study.has(task, method) for method in needed):
                continue
            intervals = tuple(
                study.difference(task, d.metric, d.left, d.right) for d in claim.differences
            )
            pairs = zip(intervals, claim.differences, strict=True)
            verdict = combine([judge(interval, d) for interval, d in pairs])
            found.append(Judgement(claim, task, verdict, intervals))
    return found


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "joint-over-grpo",
        "The joint loss ends above reinforcement learning alone.",
        "KDRL, section 4, Table 1",
        "average 56.8 against 54.6",
        (Difference("accuracy", "kdrl", "grpo"),),
    ),
    Claim(
        "joint-over-distillation",
        "The joint loss ends above on-policy distillation alone.",
        "KDRL, section 4, Table 1",
        "average 56.8 against 56.1",
        (Difference("accuracy", "kdrl", "kd_rkl"),),
    ),
    Claim(
        "annealed-over-all",
        "KDRL-Annealing ends above reinforcement learning, distillation and supervised training.",
        "KDRL, section 4, Table 1; its abstract",
        "+2.6, +1.1 and +5.7 (4.7 in section 4.2) on average",
        (
            Difference("accuracy", "kdrl_annealing", "grpo"),
            Difference("accuracy", "kdrl_annealing", "kd_rkl"),
            Difference("accuracy", "kdrl_annealing", "sft"),
        ),
    ),
    Claim(
        "rl-over-sft",
        "Reinforcement learning ends above supervised training on the teacher's right samples.",
        "KDRL, section 4, Table 1",
        "average 54.6 against 51.5",
        (Difference("accuracy", "grpo", "sft"),),
    ),
    Claim(
        "distillation-over-rl",
        "On-policy distillation ends above reinforcement learning; zero-RL has it reversed.",
        "KDRL, section 4, Table 1; section 4.5, Table 2",
        "average 56.1 against 54.6; zero-RL 30.8 against 31.3",
        (Difference("accuracy", "kd_rkl", "grpo"),),
    ),
    Claim(
        "distillation-lengthens",
        "On-policy distillation makes longer responses than reinforcement learning does.",
        "KDRL, section 3.1, figure 2; section 4.3",
        "6K tokens more, 15 % of them cut",
        (Difference("length", "kd_rkl", "grpo"),),
    ),
    Claim(
        "distillation-over-sft",
        "On-policy distillation ends above supervised training on the teacher's right samples.",
        "KDRL, section 4, Table 1",
        "average 56.1 against 51.5",
        (Difference("accuracy", "kd_rkl", "sft"),),
    ),
    Claim(
        "reward-shaping-worse",
        "The teacher belongs in the loss: taking the KL from the reward ends lower.",
        "KDRL, section 3.1, takeaway 3.1",
        "reward shaping collapses",
        (Difference("accuracy", "kdrl", "reward_shaping"),),
    ),
    Claim(
        "reward-shaping-collapses",
        "Reward shaping loses what it had reached, more than the joint loss does.",
        "KDRL, section 3.1, takeaway 3.1",
        "reward shaping collapses",
        (Difference("drop", "reward_shaping", "kdrl"),),
    ),
    Claim(
        "k2-over-k3",
        "k2, whose gradient is the reverse KL's, ends above k3.",
        "KDRL, section 3.2, takeaway 3.2, ablation",
        "k3 loses 1.4 on AIME24",
        (Difference("accuracy", "kdrl", "estimator_k3"),),
    ),
    Claim(
        "k2-lengthens",
        "k2 makes longer responses than k3.",
        "KDRL, section 3.2, figure 3",
        "",
        (Difference("length", "kdrl", "estimator_k3"),),
    ),
    Claim(
        "k3-over-halves",
        "Even with k3 the joint loss ends above all baselines.",
        "KDRL, section 4.4",
        "",
        (
            Difference("accuracy", "estimator_k3", "grpo"),
            Difference("accuracy", "estimator_k3", "kd_rkl"),
            Difference("accuracy", "estimator_k3", "sft"),
        ),
    ),
    Claim(
        "topk-unstable",
        "The top-K estimator is less stable than k2: it loses more of its best accuracy.",
        "KDRL, section 3.2, takeaway 3.2, ablation",
        "Top-K unstable",
        (Difference("drop", "estimator_topk", "kdrl"),),
    ),
    Claim(
        "annealing-over-constant",
        "A β that falls ends above a constant one.",
        "KDRL, section 3.3, takeaway 3.3; Table 1",
        "average 57.2 against 56.8",
        (Difference("accuracy", "kdrl_annealing", "kdrl"),),
    ),
    Claim(
        "annealing-cuts-less",
        "With a β that falls fewer responses are cut at the limit than with a constant one.",
        "KDRL, section 3.3, figure 4",
        "",
        (Difference("truncated", "kdrl_annealing", "kdrl", less=True),),
    ),
    Claim(
        "beta-balances",
        "β balances imitation and reward: both a quarter and four times of it end lower.",
        "KDRL, section 3.3, takeaway 3.3",
        "the paper has half and two and a half times of 2e-3",
        (
            Difference("accuracy", "kdrl", "beta_quarter"),
            Difference("accuracy", "kdrl", "beta_fourfold"),
        ),
    ),
    Claim(
        "mask-shortens",
        "Distilling only wrong responses makes responses shorter at equal accuracy "
        f"(no more than {100 * EQUAL_ACCURACY:.0f} points lower).",
        "KDRL, section 3.4, takeaway 3.4",
        "1.4K tokens, over 10 %, shorter",
        (
            Difference("length", "mask_response", "kdrl", less=True),
            Difference("accuracy", "mask_response", "kdrl", margin=EQUAL_ACCURACY),
        ),
    ),
    Claim(
        "efficient",
        "At equal training time the joint loss is above either of its halves.",
        "KDRL, section 4.3, training efficiency",
        "80 h are 280 KDRL, 200 KD-RKL or 460 GRPO steps",
        (Difference(AT_TIME, "kdrl", "grpo"), Difference(AT_TIME, "kdrl", "kd_rkl")),
    ),
    Claim(
        "weaker-teacher",
        "With a weaker teacher the joint loss still ends above reinforcement learning alone.",
        "KDRL, section 4, ablation",
        "1.1 above GRPO on AIME24",
        (Difference("accuracy", "weak_kdrl", "grpo"),),
    ),
    Claim(
        "rlad-over-grpo",
        "RLAD ends above GRPO.",
        "RLAD, logic, 0.6B student, 8K tokens",
        ".94 against .76",
        (Difference("accuracy", "trrd", "grpo"),),
    ),
    Claim(
        "rlad-over-kdrl",
        "RLAD ends above KDRL.",
        "RLAD, logic, 0.6B student, 8K tokens",
        ".94 against .92",
        (Difference("accuracy", "trrd", "kdrl"),),
    ),
    Claim(
        "distil-then-rl",
        "Distillation first and reinforcement learning after it ends above both joint losses.",
        "OPD-then-RL, logic / mathematics, pass@1",
        "80.6 / 31.8 against 62.8 / 29.0 (KDRL) and 68.9 / 30.0 (annealed); 31.8 is within noise",
        (
            Difference("accuracy", "distil_then_rl", "kdrl"),
            Difference("accuracy", "distil_then_rl", "kdrl_annealing"),
        ),
    ),
)

PUBLISHED: dict[str, dict[str, str]] = {
    "KDRL, Table 1, average": {
        "start": "51.4",
        "sft": "51.5",
        "kd_rkl": "56.1",
        "grpo": "54.6",
        "kdrl": "56.8",
        "kdrl_annealing": "57.2",
    },
    "KDRL, Table 2, average": {
        "start": "21.3",
        "kd_rkl": "30.8",
        "grpo": "31.3",
        "kdrl_annealing": "32.5",
    },
    "RLAD, logic 8K": {"grpo": "76", "kdrl": "92", "trrd": "94"},
    "OPD-then-RL, logic / maths": {
        "kd_rkl": "53.9 / 31.0",
        "grpo": "49.4 / 28.4",
        "kdrl": "62.8 / 29.0",
        "kdrl_annealing": "68.9 / 30.0",
        "trrd": "58.6 / 30.1",
        "distil_then_rl": "80.6 / 31.8",
    },
}
