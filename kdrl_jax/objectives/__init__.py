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

All of them work under jit, grad, vmap and shardings; strings and the vocabulary's size are
static, every other setting may be a traced array. Wrong shapes raise ValueError at trace time.
"""

from kdrl_jax.objectives.advantages import group_advantages
from kdrl_jax.objectives.divergences import ESTIMATORS, estimator
from kdrl_jax.objectives.kdrl import TokenBatch, kdrl_loss
from kdrl_jax.objectives.logprobs import token_log_probs
from kdrl_jax.objectives.policy import clipped_surrogate, importance_ratio, mismatch_kl
from kdrl_jax.objectives.schedules import SCHEDULES, beta_schedule
from kdrl_jax.objectives.weights import AGGREGATIONS, kd_weights, token_weights

__all__ = [
    "AGGREGATIONS",
    "ESTIMATORS",
    "SCHEDULES",
    "TokenBatch",
    "beta_schedule",
    "clipped_surrogate",
    "estimator",
    "group_advantages",
    "importance_ratio",
    "kd_weights",
    "kdrl_loss",
    "mismatch_kl",
    "token_log_probs",
    "token_weights",
]
