"""The methods and ablations of a grid: what each changes in its task's config.

A task's config is KDRL at a constant β; everything here follows from its keys, so one table serves
every task. Published settings keep their proportions: KDRL-Annealing falls from 2.5 β to β/2 within
two sevenths of the run, as 5e-3 → 1e-3 around the constant 2e-3 does in arXiv 2506.02208.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

Changes = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the papers' tables.

    label: its name in figures and tables.
    note: what it is, in a sentence.
    changes: from the task's config to the keys that differ.
    variant: name in the config file's `VARIANTS` that is applied first.
    """

    label: str
    note: str
    changes: Callable[[ConfigDict], Changes]
    variant: str = ""

    def config_path(self, path: str) -> str:
        """The task's config file, with this method's variant."""
        return f"{path}:{self.variant}" if self.variant else path


def _constant(**changes: Any) -> Callable[[ConfigDict], Changes]:
    return lambda base: dict(changes)


def _scaled_beta(factor: float) -> Callable[[ConfigDict], Changes]:
    return lambda base: {"objective": "kdrl", "beta.init": factor * base.beta.init}


def _annealing(base: ConfigDict) -> Changes:
    beta = base.beta.init
    return {
        "objective": "kdrl",
        "beta.schedule": "linear",
        "beta.init": 2.5 * beta,
        "beta.min": 0.5 * beta,
        "beta.delta": 7 * beta / base.steps,
    }


def _adaptive(base: ConfigDict) -> Changes:
    share = 0.02  # of β, taken off in each step without progress
    return {**_annealing(base), "beta.schedule": "adaptive", "beta.delta": share}


def _sft(base: ConfigDict) -> Changes:
    """Rejection sampling in the proportions of appendix B.2.

    A fifth of the others' learning rate; 8 candidates where a group has 8; as many problems as the
    others see, so that the right answers are used about once.
    """
    return {
        "objective": "sft",
        "aggregation": "seq-mean-token-mean",
        "entropy_coef": 0.0,
        "reward.require_format": False,
        "optimizer.learning_rate": base.optimizer.learning_rate / 5,
        "sft_problems": base.steps * base.rollout.prompts_per_step,
    }


def _distil_then_rl(base: ConfigDict) -> Changes:
    half = base.steps // 2
    return {
        "objective": "kdrl",
        "beta.schedule": "phases",
        "beta.phases": ((0, base.beta.init), (half, 0.0)),
        "policy_phases": ((0, 0.0), (half, 1.0)),
    }


METHODS: dict[str, Method] = {
    "sft": Method(
        "SFT",
        "cross-entropy on a fixed set of the teacher's right answers (rejection sampling)",
        _sft,
    ),
    "kd_rkl": Method(
        "KD-RKL", "on-policy distillation alone, reverse KL", _constant(objective="kd_rkl")
    ),
    "grpo": Method("GRPO", "reinforcement learning alone, no teacher", _constant(objective="grpo")),
    "kdrl": Method("KDRL", "the joint loss: k2, constant β", _constant(objective="kdrl")),
    "kdrl_annealing": Method("KDRL-Annealing", "β falls linearly from 2.5 β to β/2", _annealing),
    "kdrl_adaptive": Method(
        "KDRL-Adaptive", "β falls as the measured KL and the rewards say", _adaptive
    ),
    "reward_shaping": Method(
        "Reward shaping",
        "the KL is taken from the reward, not added to the loss",
        _constant(objective="reward_shaping"),
    ),
    "trrd": Method(
        "RLAD (TRRD)",
        "the teacher within the importance ratio, α = 0.5, clip 0.2/0.28",
        _constant(
            objective="trrd",
            clip_eps_low=0.2,
            clip_eps_high=0.28,
            aggregation="seq-mean-token-mean",
        ),
    ),
    "distil_then_rl": Method(
        "Distil, then RL", "KD-RKL for half of the steps, GRPO for the rest", _distil_then_rl
    ),
    # --- ablations of KDRL, and of RLAD ---
    "estimator_k1": Method(
        "k1", "KDRL with the score-function form of k1", _constant(kd_estimator="k1")
    ),
    "estimator_k3": Method(
        "k3",
        "KDRL with k3 as the loss, at most 10 nats as in verl",
        _constant(kd_estimator="k3", k3_clamp=10.0),
    ),
    "estimator_topk": Method(
        "Top-K",
        "KDRL to a teacher that has next to nothing outside its K likeliest tokens",
        _constant(kd_estimator="topk", **{"kd_topk.support": "floor"}),
    ),
    "estimator_full": Method(
        "full", "KDRL with the exact KL over the vocabulary", _constant(kd_estimator="full")
    ),
    "mask_response": Method(
        "response mask", "KDRL, distilling only wrong responses", _constant(kd_mask="response")
    ),
    "mask_group": Method(
        "group mask", "KDRL, distilling only groups without a right one", _constant(kd_mask="group")
    ),
    "beta_quarter": Method("β/4", "KDRL with a quarter of β", _scaled_beta(0.25)),
    "beta_half": Method("β/2", "KDRL with half of β", _scaled_beta(0.5)),
    "beta_more": Method("2.5 β", "KDRL with two and a half times β", _scaled_beta(2.5)),
    "beta_fourfold": Method("4 β", "KDRL with four times β", _scaled_beta(4.0)),
    "weak_kdrl": Method(
        "KDRL, weaker teacher", "KDRL with a weaker teacher", _constant(), variant="weak_teacher"
    ),
    "weak_kd_rkl": Method(
        "KD-RKL, weaker teacher",
        "KD-RKL with a weaker teacher",
        _constant(objective="kd_rkl"),
        variant="weak_teacher",
    ),
    "trrd_straight_through": Method(
        "RLAD, straight-through",
        "TRRD whose clamp passes the gradient",
        lambda base: {
            **METHODS["trrd"].changes(base),
            "trrd.clamp_gradient": "straight_through",
        },
    ),
}
