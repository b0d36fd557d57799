"""From rollouts, rewards and teacher log-probs to a batch of rows, all on the devices."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdrl_jax.objectives import (
    Method,
    group_advantages,
    kd_weights,
    overlong_penalty,
    shaped_rewards,
    token_weights,
)
from kdrl_jax.objectives.advantages import Baseline, Scale
from kdrl_jax.sharding import constrain
from kdrl_jax.types import FINISH_EOS, Rollouts, Scores, TrainBatch

Overlong = tuple[int, float]
"""Tokens of the budget that are punished, and the punishment at its end."""


class Packing(NamedTuple):
    """Where B rollouts are in rows that several may share.

    Column l of a row has what is said of token l + 1, as in all per-token arrays `[B, L − 1]`.
    """

    sources: Int[Any, "B L-1"]
    """Which token of the flat completions `[B·T]` a column is about; −1: of none."""
    places: Int[Any, "B T"]
    """Which of the flat columns `[B·(L − 1)]` is about a token; 0 beyond the completions."""
    used: Int[Any, ""]
    """Micro-batches of each mini-batch that have anything in them: the first ones."""

    def lay(self, x: Array) -> Array:
        """`[B, T]` of completions → `[B, L − 1]` of rows, 0 in between."""
        return jnp.where(self.sources >= 0, x.reshape(-1)[jnp.maximum(self.sources, 0)], 0)

    def collect(self, x: Array) -> Array:
        """The inverse of `lay`, for the tokens of completions."""
        return x.reshape(-1)[self.places]


class Rows(NamedTuple):
    """Token rows: each a left-padded prompt and its completion, or several of these packed."""

    tokens: Int[Any, "B L"]
    positions: Int[Any, "B L"]
    segment_ids: Int[Any, "B L"]
    packing: Packing | None = None


def prompt_layout(
    lengths: Int[Array, " P"], slots: int
) -> tuple[Int[Array, "P S"], Bool[Array, "P S"]]:
    """Positions and real tokens of prompts left-padded to `slots`; padding is at position 0."""
    offsets = jnp.arange(slots)[None, :] - (slots - lengths)[:, None]
    return jnp.maximum(offsets, 0), offsets >= 0


def to_rows(
    prompt_tokens: Int[Array, "B S"],
    prompt_lengths: Int[Array, " B"],
    completions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
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
    tokens, positions, segment_ids = (constrain(x, "batch", None) for x in rows[:3])
    return Rows(tokens, positions, segment_ids)


def by_mini_batch(x: Array, groups: int, count: int) -> Array:
    """`[B, …]` of `groups` groups → `[count, B / count, …]`, each part of whole groups.

    Strided over the groups, so that each device keeps the rows it has. Packed rows are groups of
    one.
    """
    size, rest = x.shape[0] // groups, x.shape[1:]
    x = x.reshape(groups // count, count, size, *rest).swapaxes(0, 1)
    x = x.reshape(count, groups // count * size, *rest)
    return constrain(x, None, "batch", *(None,) * len(rest))


def join_mini_batches(x: Array, groups: int) -> Array:
    """The inverse of `by_mini_batch`."""
    count, size, rest = x.shape[0], x.shape[0] * x.shape[1] // groups, x.shape[2:]
    x = x.reshape(count, groups // count, size, *rest).swapaxes(0, 1)
    return constrain(x.reshape(groups * size, *rest), "batch", *(None,) * len(rest))


def build_batch(
    rows: Rows,
    rollouts: Rollouts,
    rewards: Float[Array, "P G"],
    scores: Scores,
    beta: Float[Array, ""],
    correct: Float[Array, "P G"] | None = None,
    *,
    method: Method,
    aggregation: str,
    kd_mask: str,
    scale: Scale,
    baseline: Baseline,
    overlong: Overlong,
    mask_truncated: bool,
    mask_final_eos: bool,
    max_new_tokens: int,
    mini_batches: int,
    carried: bool = False,
) -> TrainBatch:
    """Fill the slots of the objective. Jit it with everything but the arrays bound.

    Args:
      rows: what `scores` are of.
      rewards: of each rollout; what advantages are made of.
      scores: see `Scores`; without teacher log-probs nothing is distilled.
      beta: β, used here by reward shaping alone.
      correct: the verifier's 1 and 0, which masks go by; None: they are the rewards.
      method: what the objective takes from rewards and teacher.
      aggregation, kd_mask, scale, baseline: see `kdrl_jax.objectives`.
      overlong: (buffer, penalty) of `overlong_penalty`.
      mask_truncated: give responses cut at the limit no weight.
      mask_final_eos: drop the teacher's opinion of the end token, for a teacher that ends with
        another token than the student.
      max_new_tokens: the budget, by which `seq-mean-token-sum-norm` divides.
      mini_batches: M, which divides P.
      carried: rollouts may have been begun by earlier students: ratios are to their own log-probs.

    Returns:
      A batch with a leading axis: `[M, B / M, …]`. The weights are normalised within each of the
      M parts, so each makes an update of its own.
    """
    p, g, t = rollouts.tokens.shape
    packing = rows.packing
    lengths, finish = rollouts.lengths.reshape(p * g), rollouts.finish_reason.reshape(p * g)
    outcomes = (rewards if correct is None else correct).reshape(p * g)
    mask = jnp.arange(t)[None, :] < lengths[:, None]
    judged = jnp.ones_like(mask)
    if mask_final_eos:
        last = jnp.arange(t)[None, :] == (lengths - 1)[:, None]
        judged = ~(last & (finish == FINISH_EOS)[:, None])

    sampler, teacher = rollouts.log_probs.reshape(p * g, t), scores.teacher_log_probs
    rewards = rewards + overlong_penalty(rollouts.lengths, max_new_tokens, *overlong)
    if method.shaped and teacher is not None:
        heard = teacher if packing is None else packing.collect(teacher)
        heard = jnp.where(judged, heard, jnp.nan)
        rewards = shaped_rewards(rewards, sampler, heard, mask, beta)
    advantages = group_advantages(rewards, scale=scale, baseline=baseline) * float(method.policy)
    if method.supervised:
        advantages = jnp.ones_like(rewards)
        mask &= (outcomes > 0)[:, None]
    if mask_truncated:
        mask &= (finish == FINISH_EOS)[:, None]

    def weigh(mask: Array, outcomes: Array) -> tuple[Array, Array]:
        groups = jnp.repeat(jnp.arange(p // mini_batches), g)
        weights = token_weights(mask, groups, aggregation, max_length=max_new_tokens)
        return weights, kd_weights(weights, outcomes, groups, kd_mask)

    parts = (by_mini_batch(x, p, mini_batches) for x in (mask.astype(jnp.float32), outcomes))
    weights, distilled = (join_mini_batches(x, p) for x in jax.vmap(weigh)(*parts))
    distilled *= judged * float(method.kd and teacher is not None)

    def lay(x: Array) -> Array:
        return x if packing is None else packing.lay(x)

    if teacher is not None and mask_final_eos:
        teacher = jnp.where(lay(~judged), jnp.nan, teacher)
    batch = TrainBatch(
        tokens=rows.tokens,
        positions=rows.positions,
        segment_ids=rows.segment_ids,
        sampler_log_probs=lay(sampler),
        old_log_probs=lay(sampler) if carried else scores.old_log_probs,
        teacher_log_probs=teacher,
        advantages=lay(jnp.broadcast_to(advantages.reshape(p * g, 1), (p * g, t))),
        weights=lay(weights),
        kd_weights=lay(distilled),
        reference_log_probs=scores.reference_log_probs,
        support=scores.support,
        support_log_probs=scores.support_log_probs,
        teacher_hidden=scores.teacher_hidden,
    )
    groups = p if packing is None else p * g
    return jax.tree.map(lambda x: by_mini_batch(x, groups, mini_batches), batch)
