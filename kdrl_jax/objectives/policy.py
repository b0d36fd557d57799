"""The policy-gradient term: importance ratios and the clipped surrogate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdrl_jax.objectives._checks import require_shape

MAX_LOG_RATIO = 20.0
"""Nats. Beyond it a ratio is the sign of a fault, and e^x would overflow float32 at 88."""

Tokens = Float[Array, "..."]
Epsilon = float | Float[Array, ""] | None


def importance_ratio(log_probs: Tokens, old_log_probs: Tokens) -> Tokens:
    """ρ = π_θ(o)/π_old(o) = exp(log π_θ − log π_old), the exponent kept within ±MAX_LOG_RATIO.

    Args:
      log_probs: of the policy `[...]`, in nats; the gradient flows through them.
      old_log_probs: of the policy that sampled `[...]`; no gradient flows.

    Returns:
      ρ `[...]`; exactly 1, and carrying the gradient ∇log π_θ, where both are equal.
    """
    return exp_log_ratio(log_probs - jax.lax.stop_gradient(old_log_probs))


def exp_log_ratio(log_ratio: Tokens) -> Tokens:
    """e^x of a log-ratio `[...]`, the exponent kept within ±MAX_LOG_RATIO (gradient 0 beyond)."""
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def clipped_surrogate(
    ratio: Tokens, advantages: Tokens, clip_eps_low: Epsilon, clip_eps_high: Epsilon
) -> tuple[Tokens, Tokens]:
    """PPO's pessimistic surrogate, arXiv 1707.06347; two-sided bounds as in arXiv 2503.14476.

        min(ρ·Â, clip(ρ, 1 − ε_low, 1 + ε_high)·Â)        to be maximised

    Args:
      ratio: `[...]`, differentiable: ρ, or any other ratio a method puts in its place.
      advantages: Â `[...]`.
      clip_eps_low, clip_eps_high: scalars (arrays or not); None leaves that side open.

    Returns:
      The term `[...]`, and 1.0 where the clip took the gradient away, else 0.0.
    """
    lower = None if clip_eps_low is None else 1.0 - clip_eps_low
    upper = None if clip_eps_high is None else 1.0 + clip_eps_high
    free = ratio * advantages
    bounded = jnp.clip(ratio, lower, upper) * advantages
    return jnp.minimum(free, bounded), (bounded < free).astype(free.dtype)


def mismatch_kl(log_probs: Tokens, sampler_log_probs: Tokens, weights: Tokens) -> Float[Array, ""]:
    """How far the trainer's log-probs are from the sampler's, for the same weights.

        Σ w·(e^d − 1 − d),  d = log π_trainer − log π_sampler

    which estimates KL(π_sampler‖π_trainer) (k3, Schulman 2020). Rounding alone should cause it;
    a growing value says that sampler and trainer are not one policy.

    Args:
      log_probs, sampler_log_probs, weights: `[...]`, one shape; weight 0 is ignored.

    Returns:
      A scalar in nats (per token, if the weights sum to 1); additive over micro-batches.

    Raises:
      ValueError: shapes differ.
    """
    shape = jnp.shape(log_probs)
    require_shape(shape, "log_probs", sampler_log_probs=sampler_log_probs, weights=weights)
    difference = jnp.where(weights != 0, log_probs - sampler_log_probs, 0.0)
    difference = jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    terms = weights * (jnp.expm1(difference) - difference)
    return jax.lax.stop_gradient(terms.sum())
