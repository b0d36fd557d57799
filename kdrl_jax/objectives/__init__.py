"""Objectives: pure functions of arrays, for this project's loop or any other.

Every method is a per-token policy term, a per-token distillation term, per-token weights and a
schedule. Weights carry aggregation and masking, so a loss knows nothing of padding, packing,
groups or meshes; methods differ in which functions fill the slots.

    advantages = group_advantages(rewards)                                # [P, G]
    weights = token_weights(completion_mask, group_ids)                   # [B, T]
    distil = kd_weights(weights, rewards.reshape(-1), group_ids, "response")
    log_probs, entropy = token_log_probs(hidden, head, targets, ...)      # [B, T]
    beta = beta_schedule("linear", init=5e-3, min=1e-3, delta=5e-5)(step)
    loss, metrics = kdrl_loss(log_probs, batch, beta=beta, entropy=entropy, entropy_coef=1e-3)

Distillation from whole distributions (`support_log_probs` with `topk_divergence`, or
`full_divergence`) goes into `kdrl_loss` as `kd_divergence`; `trrd_loss` takes the teacher into the
ratio instead; `shaped_rewards` into the rewards. `METHODS` names the combinations of the papers.

All of them work under jit, grad, vmap and shardings; strings, counts of ids and the vocabulary's
size are static, every other setting may be a traced array. Wrong shapes raise ValueError at trace
time. Schedules are of Python numbers.
"""

from kdrl_jax.objectives._terms import TokenBatch
from kdrl_jax.objectives.advantages import group_advantages
from kdrl_jax.objectives.distributions import SUPPORTS, full_divergence, topk_divergence
from kdrl_jax.objectives.divergences import DISTRIBUTION_ESTIMATORS, ESTIMATORS, estimator
from kdrl_jax.objectives.fused import TokenScores, fused_loss
from kdrl_jax.objectives.kdrl import kdrl_loss
from kdrl_jax.objectives.logprobs import (
    support_log_probs,
    token_log_probs,
    top_support,
    top_tokens,
)
from kdrl_jax.objectives.methods import METHODS, Method
from kdrl_jax.objectives.policy import clipped_surrogate, importance_ratio, mismatch_kl
from kdrl_jax.objectives.rewards import overlong_penalty, shaped_rewards
from kdrl_jax.objectives.schedules import (
    SCHEDULES,
    AdaptiveEntropy,
    Schedule,
    Trend,
    alpha_schedule,
    beta_schedule,
    phase_schedule,
)
from kdrl_jax.objectives.trrd import CLAMP_GRADIENTS, trrd_loss
from kdrl_jax.objectives.weights import AGGREGATIONS, kd_weights, token_weights

__all__ = [
    "AGGREGATIONS",
    "CLAMP_GRADIENTS",
    "DISTRIBUTION_ESTIMATORS",
    "ESTIMATORS",
    "METHODS",
    "SCHEDULES",
    "SUPPORTS",
    "AdaptiveEntropy",
    "Method",
    "Schedule",
    "TokenBatch",
    "TokenScores",
    "Trend",
    "alpha_schedule",
    "beta_schedule",
    "clipped_surrogate",
    "estimator",
    "full_divergence",
    "fused_loss",
    "group_advantages",
    "importance_ratio",
    "kd_weights",
    "kdrl_loss",
    "mismatch_kl",
    "overlong_penalty",
    "phase_schedule",
    "shaped_rewards",
    "support_log_probs",
    "token_log_probs",
    "token_weights",
    "top_support",
    "top_tokens",
    "topk_divergence",
    "trrd_loss",
]
