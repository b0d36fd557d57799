"""The joint objective of KDRL: a policy term and a distillation term, summed over tokens."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdrl_jax.objectives._checks import require_shape
from kdrl_jax.objectives.divergences import ESTIMATORS, estimator
from kdrl_jax.objectives.policy import Epsilon, clipped_surrogate, importance_ratio

Tokens = Float[Array, "..."]
Scalar = Float[Array, ""]
Metrics = dict[str, Scalar]


class TokenBatch(Protocol):
    """What a loss reads of a batch: arrays of one shape, that of the policy's log-probs."""

    @property
    def old_log_probs(self) -> Any: ...
    @property
    def teacher_log_probs(self) -> Any: ...
    @property
    def advantages(self) -> Any: ...
    @property
    def weights(self) -> Any: ...
    @property
    def kd_weights(self) -> Any: ...


def kdrl_loss(
    log_probs: Tokens,
    batch: TokenBatch,
    *,
    beta: float | Scalar,
    kd_estimator: str = "k2",
    clip_eps_low: Epsilon = None,
    clip_eps_high: Epsilon = None,
    entropy: Tokens | None = None,
    entropy_coef: float | Scalar = 0.0,
) -> tuple[Scalar, Metrics]:
    """KDRL, arXiv 2506.02208, to be minimised.

        L = −Σ w·min(ρÂ, clip(ρ, 1 − ε_low, 1 + ε_high)·Â) + β·Σ w_kd·D − c·Σ w·H

    where ρ = π_θ/π_old and D is the term of `kd_estimator` (`divergences`). On-policy with k1 or
    k2, −∇L = Σ w·(Â − β·ℓ)·∇log π_θ for equal weights and c = 0 (eq. 27), ℓ = log π_θ/π_T.
    GRPO is β = 0, KD-RKL is Â = 0. At β = 0 the teacher is not read: loss and gradient are GRPO's
    to the bit, whatever its log-probs are.

    A token whose weight is 0 does not exist: nothing there, inf and nan included, reaches loss,
    gradient or metrics. A token whose weight is not 0 hides nothing: nan there is nan in the
    loss, so that the fault is seen. Where the teacher has no opinion (an end token it does not
    share), set its kd_weight to 0 and its log-prob to nan.

    Everything returned is a sum over tokens with the weights given, so losses, gradients and
    metrics of micro-batches *add up* to those of the batch. With weights that sum to 1 over the
    whole batch, Σ w·x is a mean; otherwise divide by "weights/sum" after adding up.

    Args:
      log_probs: log π_θ of the tokens, in nats, floating, of any shape: `[rows, length]`,
        `[tokens]`, packed or padded.
      batch: old_log_probs (None: on-policy, π_old = π_θ in value), teacher_log_probs (None: no
        teacher, no distillation term), advantages Â, weights w, kd_weights w_kd; each of the
        shape of log_probs. Gradients flow through log_probs and entropy alone.
      beta: β ≥ 0, a scalar; may be traced, so that a schedule compiles once.
      kd_estimator: "k1" (score-function form), "k2" or "k3"; static.
      clip_eps_low, clip_eps_high: ε ≥ 0, scalars, may be traced; None leaves that side open.
      entropy: H of the policy at each token, in nats, of the shape of log_probs, or None.
      entropy_coef: c, a scalar; may be traced.

    Returns:
      The loss, a float32 scalar, and scalars without gradient:
      "loss" = "loss/policy" + "loss/kd" + "loss/entropy", each as it enters the sum;
      "policy/ratio_mean" Σ w·ρ and "policy/clip_frac" Σ w·I[clipped];
      "kl/teacher" Σ w·ℓ, with "kl/teacher_k2" and "kl/teacher_k3" the other two estimates of
      KL(π_θ‖π_T), over *all* weighted tokens with a finite teacher log-prob, whatever kd_weights
      and β are (absent without teacher);
      "entropy/mean" Σ w·H (absent without entropy);
      "weights/sum" Σ w and "kd/active_frac" Σ w_kd, the share that is distilled.

    Raises:
      ValueError: an array's shape differs (named), an unknown estimator or "k1_loss", or an
        entropy coefficient without entropy.
    """
    kd_term = estimator(kd_estimator)
    _check(log_probs, batch, entropy, beta, entropy_coef)
    dtype = jnp.promote_types(jnp.result_type(log_probs), jnp.float32)
    log_probs = jnp.asarray(log_probs, dtype)
    frozen = jax.lax.stop_gradient(log_probs)

    def constant(x: Any) -> Tokens:
        return jax.lax.stop_gradient(jnp.asarray(x, dtype))

    weights, beta = constant(batch.weights), constant(beta)
    no_teacher = batch.teacher_log_probs is None
    kd_weights = jnp.zeros_like(weights) if no_teacher else constant(batch.kd_weights)
    teacher = jnp.zeros_like(weights) if no_teacher else constant(batch.teacher_log_probs)
    old = frozen if batch.old_log_probs is None else constant(batch.old_log_probs)

    # Masked inputs, not masked outputs: the gradient of where(mask, f(x), 0) is nan where f is.
    trained, distilled = weights != 0, (kd_weights != 0) & (beta != 0)
    used = trained | distilled
    ratio = importance_ratio(_keep(used, log_probs), _keep(used, old))
    surrogate, clipped = clipped_surrogate(
        ratio, _keep(trained, constant(batch.advantages)), clip_eps_low, clip_eps_high
    )
    teacher_log_ratio = _keep(distilled, log_probs) - _keep(distilled, teacher)

    policy_loss = -jnp.sum(weights * surrogate)
    kd_loss = beta * jnp.sum(kd_weights * kd_term(teacher_log_ratio, ratio))
    loss = policy_loss + kd_loss
    metrics = {
        "loss/policy": policy_loss,
        "loss/kd": kd_loss,
        "policy/ratio_mean": jnp.sum(weights * ratio),
        "policy/clip_frac": jnp.sum(weights * clipped),
        "weights/sum": jnp.sum(weights),
        "kd/active_frac": jnp.sum(kd_weights),
    }
    if not no_teacher:
        metrics |= _teacher_kl(frozen, teacher, weights)
    if entropy is not None:
        entropy_mean = jnp.sum(weights * _keep(trained, jnp.asarray(entropy, dtype)))
        entropy_loss = -constant(entropy_coef) * entropy_mean
        loss = loss + entropy_loss
        metrics |= {"loss/entropy": entropy_loss, "entropy/mean": entropy_mean}
    metrics["loss"] = loss
    return loss, jax.lax.stop_gradient(metrics)


def _teacher_kl(log_probs: Tokens, teacher: Tokens, weights: Tokens) -> Metrics:
    """Three estimates of KL(π_θ‖π_T) over the weighted tokens that the teacher has scored."""
    scored = (weights != 0) & jnp.isfinite(teacher)
    log_ratio = _keep(scored, log_probs) - _keep(scored, teacher)
    names = {"k1": "kl/teacher", "k2": "kl/teacher_k2", "k3": "kl/teacher_k3"}
    one = jnp.ones_like(log_ratio)
    return {key: jnp.sum(weights * ESTIMATORS[k](log_ratio, one)) for k, key in names.items()}


def _keep(mask: Bool[Array, "..."], x: Tokens) -> Tokens:
    """x where the mask is true, else 0 with a gradient of exactly 0."""
    return jnp.where(mask, x, 0.0)


def _check(
    log_probs: Tokens, batch: TokenBatch, entropy: Any, beta: Any, entropy_coef: Any
) -> None:
    arrays = {
        "old_log_probs": batch.old_log_probs,
        "teacher_log_probs": batch.teacher_log_probs,
        "advantages": batch.advantages,
        "weights": batch.weights,
        "kd_weights": None if batch.teacher_log_probs is None else batch.kd_weights,
        "entropy": entropy,
    }
    optional = ["old_log_probs", "teacher_log_probs", "entropy"]
    if batch.teacher_log_probs is None:
        optional.append("kd_weights")
    given = {k: x for k, x in arrays.items() if x is not None or k not in optional}
    require_shape(jnp.shape(log_probs), "log_probs", **given)
    require_shape((), "a scalar", beta=beta, entropy_coef=entropy_coef)
    if not jnp.issubdtype(jnp.result_type(log_probs), jnp.floating):
        raise ValueError(f"log_probs: dtype {jnp.result_type(log_probs)} found; must be floating")
    no_bonus = isinstance(entropy_coef, int | float) and entropy_coef == 0
    if entropy is None and not no_bonus:
        raise ValueError("entropy: None found; must be given for the entropy_coef to have effect")
