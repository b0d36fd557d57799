"""The joint objective of KDRL: a policy term and a distillation term, summed over tokens."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from kdrl_jax.objectives._terms import (
    Metrics,
    Scalar,
    TokenBatch,
    Tokens,
    finish_loss,
    keep,
    kl_by_mask,
    read_batch,
    scalar,
    truncated_weights,
)
from kdrl_jax.objectives.divergences import DISTRIBUTION_ESTIMATORS, Estimator, estimator, k3
from kdrl_jax.objectives.policy import Epsilon, clipped_surrogate, importance_ratio


def kdrl_loss(
    log_probs: Tokens,
    batch: TokenBatch,
    *,
    beta: float | Scalar,
    kd_estimator: str = "k2",
    kd_divergence: Tokens | None = None,
    k3_clamp: float | None = None,
    clip_eps_low: Epsilon = None,
    clip_eps_high: Epsilon = None,
    policy_coef: float | Scalar = 1.0,
    reference_coef: float | Scalar = 0.0,
    tis_cap: float | Scalar | None = None,
    entropy: Tokens | None = None,
    entropy_coef: float | Scalar = 0.0,
) -> tuple[Scalar, Metrics]:
    """KDRL, arXiv 2506.02208, to be minimised.

        L = −a·Σ w·min(ρÂ, clip(ρ, 1 − ε_low, 1 + ε_high)·Â) + β·Σ w_kd·D
            + β_ref·Σ w·sg(ρ)·k3(log π_θ/π_ref) − c·Σ w·H

    where ρ = π_θ/π_old and D is the term of `kd_estimator` (`divergences`), or the divergence
    given. On-policy with k1 or k2, −∇L = Σ w·(Â − β·ℓ)·∇log π_θ for equal weights, a = 1 and
    c = β_ref = 0 (eq. 27), ℓ = log π_θ/π_T. GRPO is β = 0, KD-RKL is Â = 0. At β = 0 the teacher
    is not read: loss and gradient are GRPO's to the bit, whatever its log-probs are; the same
    goes for the reference at β_ref = 0.

    With a `tis_cap`, all terms but the bonus are weighted by min(π_old/π_sampler, tis_cap) too,
    the truncated importance weight of a sampler that is not quite the trainer's policy.

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
      batch: old_log_probs (None: on-policy, π_old = π_θ in value), teacher_log_probs (None, and
        no kd_divergence: no teacher, no distillation term), advantages Â, weights w, kd_weights
        w_kd; and, None or missing if not used, reference_log_probs and sampler_log_probs. Each of
        the shape of log_probs. Gradients flow through log_probs, kd_divergence and entropy alone.
      beta: β ≥ 0, a scalar; may be traced, so that a schedule compiles once.
      kd_estimator: "k1" (score-function form), "k2" or "k3", from the log-probs of the tokens;
        "topk" or "full", from distributions; static.
      kd_divergence: D of "topk" and "full", in nats, differentiable, of the shape of log_probs;
        see `distributions`. No ratio multiplies it: its expectation over the next token is exact.
      k3_clamp: the bound of "k3" in nats, see `divergences.k3`; None: none. Static.
      clip_eps_low, clip_eps_high: ε ≥ 0, scalars, may be traced; None leaves that side open.
      policy_coef: a, a scalar; may be traced. 0 is distillation alone.
      reference_coef: β_ref, a scalar; may be traced.
      tis_cap: a scalar, may be traced; None: off.
      entropy: H of the policy at each token, in nats, of the shape of log_probs, or None.
      entropy_coef: c, a scalar; may be traced.

    Returns:
      The loss, a float32 scalar, and scalars without gradient:
      "loss" = "loss/policy" + "loss/kd" + "loss/reference" + "loss/entropy", each as it enters
      the sum;
      "policy/ratio_mean" Σ w·ρ and "policy/clip_frac" Σ w·I[clipped];
      "kl/teacher" Σ w·ℓ, with "kl/teacher_k2" and "kl/teacher_k3" the other two estimates of
      KL(π_θ‖π_T), over *all* weighted tokens with a finite teacher log-prob, whatever kd_weights
      and β are (absent without teacher);
      "kl/reference" Σ w·k3, an estimate of KL(π_θ‖π_ref) (absent without reference, as is
      "loss/reference");
      "tis/weight_mean" Σ w·min(…) and "tis/capped_frac" Σ w·I[capped] (absent without cap);
      "entropy/mean" Σ w·H (absent without entropy, as is "loss/entropy");
      "weights/sum" Σ w and "kd/active_frac" Σ w_kd, the share that is distilled.

    Raises:
      ValueError: an array's shape differs (named); an unknown estimator or "k1_loss"; "topk" or
        "full" with a teacher but no kd_divergence, or another estimator with one; a coefficient
        without what it weighs.
    """
    kd_term = _kd_term(kd_estimator, kd_divergence, batch, k3_clamp)
    inputs = read_batch(
        log_probs,
        batch,
        uses_kd=batch.teacher_log_probs is not None or kd_divergence is not None,
        kd_divergence=kd_divergence,
        tis_cap=tis_cap,
        reference_coef=reference_coef,
        entropy=entropy,
        entropy_coef=entropy_coef,
        beta=beta,
        policy_coef=policy_coef,
    )
    beta = scalar(beta, inputs)
    weights, trained = inputs.weights, inputs.trained
    distilled = (inputs.kd_weights != 0) & (beta != 0)
    used = trained | distilled
    tis, metrics = truncated_weights(inputs, tis_cap)

    ratio = importance_ratio(keep(used, inputs.log_probs), keep(used, inputs.old))
    surrogate, clipped = clipped_surrogate(
        ratio, keep(trained, inputs.advantages), clip_eps_low, clip_eps_high
    )
    policy_loss = -scalar(policy_coef, inputs) * jnp.sum(tis * weights * surrogate)

    if inputs.kd_divergence is not None:
        divergence = keep(distilled, inputs.kd_divergence)
    elif inputs.teacher is not None and kd_term is not None:
        ell = keep(distilled, inputs.log_probs) - keep(distilled, inputs.teacher)
        divergence = kd_term(ell, ratio)
    else:
        divergence = jnp.zeros_like(weights)
    kd_loss = beta * jnp.sum(tis * inputs.kd_weights * divergence)

    metrics |= {
        "loss/kd": kd_loss,
        "policy/clip_frac": jnp.sum(weights * clipped),
        "kd/active_frac": jnp.sum(inputs.kd_weights),
    }
    if inputs.teacher is not None:
        metrics |= kl_by_mask(inputs)
    return finish_loss(
        policy_loss,
        kd_loss,
        metrics,
        inputs,
        ratio=ratio,
        tis=tis,
        reference_coef=reference_coef,
        entropy_coef=entropy_coef,
    )


def _kd_term(
    name: str, kd_divergence: Tokens | None, batch: TokenBatch, k3_clamp: float | None
) -> Estimator | None:
    """The estimator from log-probs of a name, None for those from distributions."""
    if name not in DISTRIBUTION_ESTIMATORS:
        if kd_divergence is not None:
            raise ValueError(
                f"kd_divergence: given with kd_estimator {name!r}, which reads the teacher's "
                f"log-probs; use it with {' or '.join(DISTRIBUTION_ESTIMATORS)}"
            )
        found = estimator(name)
        return functools.partial(k3, clamp=k3_clamp) if name == "k3" else found
    if kd_divergence is None and batch.teacher_log_probs is not None:
        raise ValueError(
            f"kd_divergence: None found; kd_estimator {name!r} needs the teacher's distribution, "
            "more than its log-probs of the sampled tokens; give the divergence of each token, "
            "or use k2"
        )
    return None
