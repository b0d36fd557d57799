"""From rollouts, rewards and teacher log-probs to a batch of rows, all on the devices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdrl_jax.objectives import group_advantages, kd_weights, token_weights
from kdrl_jax.objectives.advantages import Baseline, Scale
from kdrl_jax.rollout.decode import prompt_layout
from kdrl_jax.sharding import constrain
from kdrl_jax.types import FINISH_EOS, Rollouts, TrainBatch


class Rows(NamedTuple):
    """Token rows: a left-padded prompt, then its completion."""

    tokens: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]


def to_rows(
    prompt_tokens: Int[Array, "B S"],
    prompt_lengths: Int[Array, "B"],
    completions: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> Rows:
    """Join prompts and completions; positions count real tokens, segment id 0 is padding."""
    s, t = prompt_tokens.shape[1], completions.shape[1]
    before, in_prompt = prompt_layout(prompt_lengths, s)
    after = jnp.arange(t)[None, :]
    positions = jnp.concatenate([before, prompt_lengths[:, None] + after], axis=1)
    real = jnp.concatenate([in_prompt, after < lengths[:, None]], axis=1)
    tokens = jnp.concatenate([prompt_tokens, completions], axis=1)
    return Rows(tokens, positions, real.astype(jnp.int32))


@jax.jit
def rollout_rows(rollouts: Rollouts) -> Rows:
    """The P·G rows of a step, problem by problem."""
    p, g, t = rollouts.tokens.shape
    rows = to_rows(
        jnp.repeat(rollouts.prompt_tokens, g, axis=0),
        jnp.repeat(rollouts.prompt_lengths, g),
        rollouts.tokens.reshape(p * g, t),
        rollouts.lengths.reshape(p * g),
    )
    return Rows(*(constrain(x, "batch", None) for x in rows))


def build_batch(
    rows: Rows,
    rollouts: Rollouts,
    rewards: Float[Array, "P G"],
    teacher_log_probs: Float[Array, "B T"] | None,
    *,
    aggregation: str,
    kd_mask: str,
    scale: Scale,
    baseline: Baseline,
    use_reward: bool,
    mask_final_eos: bool,
    max_new_tokens: int,
) -> TrainBatch:
    """Fill the slots of the objective. Jit it with everything but the arrays bound.

    Args:
      rewards: 0 or 1 for each rollout.
      teacher_log_probs: None where no teacher is loaded; the distillation weights are then 0.
      aggregation, kd_mask, scale, baseline: see `kdrl_jax.objectives`.
      use_reward: False sets all advantages to 0 (KD-RKL).
      mask_final_eos: drop the distillation term on the end token, for a teacher that ends with
        another token than the student.
      max_new_tokens: the budget, by which `seq-mean-token-sum-norm` divides.
    """
    p, g, t = rollouts.tokens.shape
    lengths = rollouts.lengths.reshape(p * g)
    mask = jnp.arange(t)[None, :] < lengths[:, None]
    groups = jnp.repeat(jnp.arange(p), g)
    weights = token_weights(mask, groups, aggregation, max_length=max_new_tokens)
    advantages = group_advantages(rewards, scale=scale, baseline=baseline) * float(use_reward)
    distilled, teacher = jnp.zeros_like(weights), teacher_log_probs
    if teacher is not None:
        distilled = kd_weights(weights, rewards.reshape(p * g), groups, kd_mask)
        if mask_final_eos:
            ended = rollouts.finish_reason.reshape(p * g) == FINISH_EOS
            last = (jnp.arange(t)[None, :] == (lengths - 1)[:, None]) & ended[:, None]
            distilled, teacher = jnp.where(last, 0.0, distilled), jnp.where(last, jnp.nan, teacher)
    return TrainBatch(
        tokens=rows.tokens,
        positions=rows.positions,
        segment_ids=rows.segment_ids,
        sampler_log_probs=rollouts.log_probs.reshape(p * g, t),
        old_log_probs=None,
        teacher_log_probs=teacher,
        advantages=jnp.broadcast_to(advantages.reshape(p * g, 1), weights.shape),
        weights=weights,
        kd_weights=distilled,
    )
