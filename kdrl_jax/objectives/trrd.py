"""TRRD, the objective of RLAD: the teacher inside the ratio of the trust region."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdrl_jax.objectives._checks import require_name
from kdrl_jax.objectives._terms import (
    Metrics,
    Scalar,
    TokenBatch,
    Tokens,
    finish_loss,
    keep,
    read_batch,
    scalar,
    truncated_weights,
)
from kdrl_jax.objectives.policy import Epsilon, clipped_surrogate, exp_log_ratio, importance_ratio

CLAMP_GRADIENTS = ("clamp", "straight_through")


def trrd_loss(
    log_probs: Tokens,
    batch: TokenBatch,
    *,
    alpha: float | Scalar,
    clip_eps_low: Epsilon,
    clip_eps_high: Epsilon,
    clamp: float | Scalar = 1.0,
    clamp_gradient: str = "clamp",
    reference_coef: float | Scalar = 0.0,
    tis_cap: float | Scalar | None = None,
    entropy: Tokens | None = None,
    entropy_coef: float | Scalar = 0.0,
) -> tuple[Scalar, Metrics]:
    """Trust-region ratio distillation, arXiv 2602.22495, to be minimised.

        log r = α·log(π_θ/π_old) + (1 − α)·clamp(ℓ, −κ, κ),   ℓ = log π_θ/π_T
        L = −Σ w·min(r·Â, clip(r, 1 − ε_low, 1 + ε_high)·Â)
            + β_ref·Σ w·sg(ρ)·k3(log π_θ/π_ref) − c·Σ w·H

    The clip bounds how far the student goes from a mixture of its old self and the teacher. Where
    it does not bind, ∇ = w·Â·r·(α + (1 − α)·I[|ℓ| < κ])·∇log π_θ: the teacher sets how much a
    token counts and when it has moved enough, never the direction, and where Â = 0 nothing is
    learnt. α = 1 is GRPO (`kdrl_loss` at β = 0) to the bit.

    Weights, masking and sums are those of `kdrl_loss`; so is the treatment of nan, but for the
    teacher's: at a token that it has no opinion on, log r is α·log(π_θ/π_old). kd_weights are
    not read.

    Args:
      log_probs: log π_θ of the tokens, in nats, floating, of any shape.
      batch: as of `kdrl_loss`; teacher_log_probs must be there.
      alpha: α in [0, 1], a scalar; may be traced.
      clip_eps_low, clip_eps_high: ε ≥ 0, scalars, may be traced; None leaves that side open.
      clamp: κ > 0 in nats, a scalar; may be traced.
      clamp_gradient: "clamp", the paper's: beyond ±κ only α·log(π_θ/π_old) has a gradient;
        "straight_through": ℓ keeps its own gradient there; static.
      reference_coef, tis_cap, entropy, entropy_coef: as of `kdrl_loss`.

    Returns:
      The loss and the metrics of `kdrl_loss` but for those that begin with "loss/kd" and "kd/";
      "policy/clip_frac" is of r; and "trrd/ratio_mean" Σ w·r and "trrd/clamped_frac"
      Σ w·I[|ℓ| > κ].

    Raises:
      ValueError: as `kdrl_loss`; no teacher, or an unknown clamp_gradient.
    """
    require_name("clamp_gradient", clamp_gradient, CLAMP_GRADIENTS)
    if batch.teacher_log_probs is None:
        raise ValueError("teacher_log_probs: None found; trrd needs a teacher, use grpo without")
    inputs = read_batch(
        log_probs,
        batch,
        uses_kd=False,
        kd_divergence=None,
        tis_cap=tis_cap,
        reference_coef=reference_coef,
        entropy=entropy,
        entropy_coef=entropy_coef,
        alpha=alpha,
        clamp=clamp,
    )
    assert inputs.teacher is not None
    alpha, clamp = scalar(alpha, inputs), scalar(clamp, inputs)
    weights, trained = inputs.weights, inputs.trained
    scored = trained & ~jnp.isnan(inputs.teacher)
    tis, metrics = truncated_weights(inputs, tis_cap)

    policy, old = keep(trained, inputs.log_probs), keep(trained, inputs.old)
    ell = keep(scored, inputs.log_probs) - keep(scored, inputs.teacher)
    bounded = jnp.clip(ell, -clamp, clamp)
    if clamp_gradient == "straight_through":
        student = keep(scored, inputs.log_probs)
        bounded = jax.lax.stop_gradient(bounded) + (student - jax.lax.stop_gradient(student))
    ratio = exp_log_ratio(alpha * (policy - old) + (1.0 - alpha) * bounded)
    surrogate, clipped = clipped_surrogate(
        ratio, keep(trained, inputs.advantages), clip_eps_low, clip_eps_high
    )
    policy_loss = -jnp.sum(tis * weights * surrogate)
    metrics |= {
        "policy/clip_frac": jnp.sum(weights * clipped),
        "trrd/ratio_mean": jnp.sum(weights * ratio),
        "trrd/clamped_frac": jnp.sum(weights * (jnp.abs(ell) > clamp)),
    }
    return finish_loss(
        policy_loss,
        None,
        metrics,
        inputs,
        ratio=importance_ratio(policy, old),
        tis=tis,
        reference_coef=reference_coef,
        entropy_coef=entropy_coef,
    )
