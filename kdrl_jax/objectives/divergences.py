"""Per-token distillation terms from the log-probs of sampled tokens.

With ℓ = log π_θ(o) − log π_T(o) at the sampled token o and ρ = π_θ(o)/π_old(o):

| name | term | value on-policy | expected gradient, o ~ π_old |
|---|---|---|---|
| `k1` | ρ·sg(ℓ) | ℓ | ∇KL(π_θ‖π_T), reverse |
| `k2` | sg(ρ)·½ℓ² | ½ℓ² | ∇KL(π_θ‖π_T), reverse |
| `k3` | sg(ρ)·(e^{−ℓ} + ℓ − 1) | e^{−ℓ} + ℓ − 1 | ∇KL(π_T‖π_θ), *forward* |

`topk` and `full` are of whole distributions and not of the sampled token: see `distributions`.

sg is stop_gradient. The expectations are over the next token, for the prefixes that were
sampled: what a token does to the KL of later ones is not credited to it, in none of the three
(nor in the paper). Sources: Schulman, "Approximating KL divergence" (2020); arXiv 2510.01555;
arXiv 2506.02208 section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdrl_jax.objectives.policy import MAX_LOG_RATIO

Tokens = Float[Array, "..."]


def k1(teacher_log_ratio: Tokens, ratio: Tokens) -> Tokens:
    """Score-function form of the reverse KL: ρ·sg(ℓ), ∇ = ρ·ℓ·∇log π_θ. arXiv 2510.01555.

    Args:
      teacher_log_ratio: ℓ `[...]` in nats, differentiable.
      ratio: ρ `[...]`, differentiable; 1 in value on-policy.

    Returns:
      The term `[...]`; on-policy its value is the k1 estimate ℓ, unbiased and of either sign.
    """
    return ratio * jax.lax.stop_gradient(teacher_log_ratio)


def k2(teacher_log_ratio: Tokens, ratio: Tokens) -> Tokens:
    """Half the squared log-ratio: sg(ρ)·½ℓ², ∇ = ρ·ℓ·∇log π_θ. The estimator of KDRL.

    Off-policy the weight must be there (½ℓ² alone follows π_old) and must not be differentiated
    (ρ·½ℓ² adds ½ρℓ²·∇log π_θ, a push away from every disagreement).

    Args:
      teacher_log_ratio: ℓ `[...]` in nats, differentiable.
      ratio: ρ `[...]`.

    Returns:
      The term `[...]`, never negative.
    """
    return jax.lax.stop_gradient(ratio) * 0.5 * jnp.square(teacher_log_ratio)


def k3(teacher_log_ratio: Tokens, ratio: Tokens, clamp: float | None = None) -> Tokens:
    """sg(ρ)·(e^{−ℓ} + ℓ − 1). As a loss its gradient is that of the *forward* KL(π_T‖π_θ).

    By expm1: e^{−ℓ} − 1 taken apart loses every digit near ℓ = 0. The exponent stops at
    MAX_LOG_RATIO, where the term is 5e8 nats already, so that float32 stays finite.

    verl's `low_var_kl`, which is the name that arXiv 2506.02208 gives to k3, bounds the term by 10.
    The gradient is then exactly 0 where ℓ < −2.61 or ℓ > 11, so the tokens that the teacher likes
    most and the student least are not learnt.

    Args:
      teacher_log_ratio: ℓ `[...]` in nats, differentiable.
      ratio: ρ `[...]`.
      clamp: the most that e^{−ℓ} + ℓ − 1 may be, in nats, without a gradient there; None: no bound.

    Returns:
      The term `[...]`, never negative up to rounding.
    """
    term = jnp.expm1(jnp.minimum(-teacher_log_ratio, MAX_LOG_RATIO)) + teacher_log_ratio
    if clamp is not None:
        term = jnp.where(term > clamp, clamp, term)  # nan stays nan
    return jax.lax.stop_gradient(ratio) * term


Estimator = Callable[[Tokens, Tokens], Tokens]
ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3}
"""Name → (ℓ, ρ) → term whose gradient is the estimator's."""
DISTRIBUTION_ESTIMATORS = ("topk", "full")
"""Those that need distributions and not only the sampled tokens: see `distributions`."""


def estimator(name: str) -> Estimator:
    """The function of a name in ESTIMATORS.

    Raises:
      ValueError: the name is unknown, is "k1_loss", which must not exist, or is one of
        DISTRIBUTION_ESTIMATORS, which are no functions of a log-ratio.
    """
    if name == "k1_loss":
        raise ValueError(
            "kd_estimator: 'k1_loss' found; ℓ differentiated as a loss has the gradient "
            "E[∇log π_θ] = 0 in expectation, so the teacher would have no effect at all; "
            "use 'k2', or 'k1', its score-function form"
        )
    if name in DISTRIBUTION_ESTIMATORS:
        raise ValueError(
            f"kd_estimator: {name!r} needs the teacher's distribution, more than its log-probs of "
            "the sampled tokens; see kdrl_jax.objectives.distributions"
        )
    if name not in ESTIMATORS:
        names = ", ".join([*ESTIMATORS, *DISTRIBUTION_ESTIMATORS])
        raise ValueError(f"kd_estimator: {name!r} is unknown; use one of {names}")
    return ESTIMATORS[name]
