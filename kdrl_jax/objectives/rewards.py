"""What may be added to rewards before they become advantages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdrl_jax.objectives._checks import require_rank, require_shape


def shaped_rewards(
    rewards_P_G: Float[Array, "P G"],
    student_log_probs: Float[Array, "B T"],
    teacher_log_probs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    beta: float | Float[Array, ""],
) -> Float[Array, "P G"]:
    """Distillation inside the reward, arXiv 2506.02208 section 3.1: no distillation term at all.

        r'ᵢ = rᵢ − β·Σ_t ℓᵢₜ        ℓ = log π_θ/π_T of the tokens of response i

    The paper finds that it collapses: one number per response carries the distance of thousands
    of tokens, and long responses pay most.

    Args:
      rewards_P_G: r `[P, G]`; the responses of problem p are rows p·G … p·G + G − 1 below.
      student_log_probs: log π_θ `[B, T]`, in nats, B = P·G: those of the student that sampled.
      teacher_log_probs: log π_T `[B, T]`; nan, no opinion, counts as ℓ = 0.
      mask: `[B, T]`, true (or non-zero) on tokens of the response; nothing else is read.
      beta: β ≥ 0, a scalar; may be traced.

    Returns:
      r' float32 `[P, G]`, without gradient.

    Raises:
      ValueError: a shape is wrong.
    """
    require_rank(2, "[P, G]", rewards_P_G=rewards_P_G)
    require_rank(2, "[B, T]", mask=mask)
    p, g = jnp.shape(rewards_P_G)
    shape = (p * g, jnp.shape(mask)[1])
    arrays = {"student_log_probs": student_log_probs, "teacher_log_probs": teacher_log_probs}
    require_shape(shape, "[P·G, T]", **arrays, mask=mask)
    require_shape((), "a scalar", beta=beta)
    scored = (jnp.asarray(mask) != 0) & ~jnp.isnan(teacher_log_probs)
    student, teacher = (
        jnp.where(scored, jnp.asarray(x, jnp.float32), 0.0) for x in arrays.values()
    )
    distance = (student - teacher).sum(axis=1).reshape(p, g)
    shaped = jnp.asarray(rewards_P_G, jnp.float32) - jnp.asarray(beta, jnp.float32) * distance
    return jax.lax.stop_gradient(shaped)


def overlong_penalty(
    lengths: Int[Array, "..."],
    max_length: int | Int[Array, ""],
    buffer: int | Int[Array, ""],
    penalty: float | Float[Array, ""] = 1.0,
) -> Float[Array, "..."]:
    """Soft punishment of long responses, to be added to the reward; DAPO, arXiv 2503.14476 eq. 13.

        0                                          length ≤ max_length − buffer
        penalty·(max_length − buffer − length)/buffer    up to max_length
        −penalty                                   beyond

    Args:
      lengths: `[...]`, tokens.
      max_length: L_max, tokens; a scalar.
      buffer: L_cache, tokens before max_length over which the penalty grows; 0 turns it off.
      penalty: in units of reward, ≥ 0; a scalar.

    Returns:
      What to add, float32 `[...]`, in [−penalty, 0].

    Raises:
      ValueError: a setting is not a scalar.
    """
    require_shape((), "a scalar", max_length=max_length, buffer=buffer, penalty=penalty)
    lengths, max_length, buffer, penalty = (
        jnp.asarray(x, jnp.float32) for x in (lengths, max_length, buffer, penalty)
    )
    over = (lengths - (max_length - buffer)) / jnp.where(buffer > 0, buffer, 1.0)
    return jnp.where(buffer > 0, -penalty * jnp.clip(over, 0.0, 1.0), 0.0)
