"""What the losses share: how they read a batch, and the terms and metrics that all of them have."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdrl_jax.objectives._checks import require_shape
from kdrl_jax.objectives.divergences import ESTIMATORS
from kdrl_jax.objectives.policy import importance_ratio

Tokens = Float[Array, "..."]
Scalar = Float[Array, ""]
Metrics = dict[str, Scalar]


@runtime_checkable
class TokenBatch(Protocol):
    """What a loss reads of a batch: arrays of one shape, that of the policy's log-probs.

    `sampler_log_probs` and `reference_log_probs` may be missing; that is None.
    """

    @property
    def old_log_probs(self) -> Any: ...
    @property
    def teacher_log_probs(self) -> Any: ...
    @property
    def reference_log_probs(self) -> Any: ...
    @property
    def sampler_log_probs(self) -> Any: ...
    @property
    def advantages(self) -> Any: ...
    @property
    def weights(self) -> Any: ...
    @property
    def kd_weights(self) -> Any: ...


class LossInputs(NamedTuple):
    """A batch in the dtype of the loss; only `log_probs` and `entropy` carry a gradient."""

    log_probs: Tokens
    old: Tokens
    """log π_old; on-policy the value of log_probs."""
    teacher: Tokens | None
    reference: Tokens | None
    sampler: Tokens | None
    advantages: Tokens
    weights: Tokens
    kd_weights: Tokens
    """0 throughout where there is no teacher."""
    kd_divergence: Tokens | None
    """With a gradient, like log_probs."""
    entropy: Tokens | None

    @property
    def trained(self) -> Bool[Array, "..."]:
        return self.weights != 0


def read_batch(
    log_probs: Tokens,
    batch: TokenBatch,
    *,
    uses_kd: bool,
    kd_divergence: Tokens | None,
    tis_cap: Any,
    reference_coef: Any,
    entropy: Tokens | None,
    entropy_coef: Any,
    **scalars: Any,
) -> LossInputs:
    """Check everything, cast it, and stop the gradients that must not flow.

    Args:
      uses_kd: whether kd_weights are read.
      scalars: what else must be a scalar, by name.

    Raises:
      ValueError: names the array or scalar at fault.
    """
    reference = getattr(batch, "reference_log_probs", None)
    sampler = None if tis_cap is None else getattr(batch, "sampler_log_probs", None)
    required = {"advantages": batch.advantages, "weights": batch.weights}
    if uses_kd:
        required["kd_weights"] = batch.kd_weights
    optional = {
        "old_log_probs": batch.old_log_probs,
        "teacher_log_probs": batch.teacher_log_probs,
        "reference_log_probs": reference,
        "sampler_log_probs": sampler,
        "kd_divergence": kd_divergence,
        "entropy": entropy,
    }
    given = required | {name: x for name, x in optional.items() if x is not None}
    require_shape(jnp.shape(log_probs), "log_probs", **given)
    scalars |= {"reference_coef": reference_coef, "entropy_coef": entropy_coef}
    if tis_cap is not None:
        scalars["tis_cap"] = tis_cap
    require_shape((), "a scalar", **scalars)
    if not jnp.issubdtype(jnp.result_type(log_probs), jnp.floating):
        raise ValueError(f"log_probs: dtype {jnp.result_type(log_probs)} found; must be floating")
    _require(entropy, "entropy", "entropy_coef", not _is_zero(entropy_coef))
    # A traced coefficient may be 0, and the reference is no array of the model's own.
    known = isinstance(reference_coef, int | float) and reference_coef != 0
    _require(reference, "reference_log_probs", "reference_coef", known)
    _require(sampler, "sampler_log_probs", "tis_cap", tis_cap is not None)

    dtype = jnp.promote_types(jnp.result_type(log_probs), jnp.float32)
    log_probs = jnp.asarray(log_probs, dtype)

    def fixed(x: Any) -> Tokens:
        return jax.lax.stop_gradient(jnp.asarray(x, dtype))

    def maybe(x: Any) -> Tokens | None:
        return None if x is None else fixed(x)

    weights = fixed(batch.weights)
    return LossInputs(
        log_probs=log_probs,
        old=fixed(log_probs if batch.old_log_probs is None else batch.old_log_probs),
        teacher=maybe(batch.teacher_log_probs),
        reference=maybe(reference),
        sampler=maybe(sampler),
        advantages=fixed(batch.advantages),
        weights=weights,
        kd_weights=fixed(batch.kd_weights) if uses_kd else jnp.zeros_like(weights),
        kd_divergence=None if kd_divergence is None else jnp.asarray(kd_divergence, dtype),
        entropy=None if entropy is None else jnp.asarray(entropy, dtype),
    )


def keep(mask: Bool[Array, "..."], x: Tokens) -> Tokens:
    """x where the mask is true, else 0 with a gradient of exactly 0.

    For inputs, not outputs: the gradient of where(mask, f(x), 0) is nan where f is.
    """
    return jnp.where(mask, x, 0.0)


def scalar(x: Any, like: LossInputs) -> Scalar:
    """A coefficient in the dtype of the loss, without gradient."""
    return jax.lax.stop_gradient(jnp.asarray(x, like.log_probs.dtype))


def truncated_weights(inputs: LossInputs, tis_cap: Any) -> tuple[Tokens | float, Metrics]:
    """min(π_old/π_sampler, cap) at each token, and its metrics; 1 and none where the cap is None.

    One set of weights may be two policies in two programs. The truncated importance weights of
    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (Yao et al., 2025)
    make up for it: what the sampler did not choose as often as the trainer would counts more.
    """
    if tis_cap is None or inputs.sampler is None:
        return 1.0, {}
    used = inputs.trained | (inputs.kd_weights != 0)
    raw = jax.lax.stop_gradient(
        importance_ratio(keep(used, inputs.old), keep(used, inputs.sampler))
    )
    cap = scalar(tis_cap, inputs)
    capped = jnp.minimum(raw, cap)
    return capped, {
        "tis/weight_mean": jnp.sum(inputs.weights * capped),
        "tis/capped_frac": jnp.sum(inputs.weights * (raw > cap)),
    }


def finish_loss(
    policy_loss: Scalar,
    distillation: Scalar | None,
    metrics: Metrics,
    inputs: LossInputs,
    *,
    ratio: Tokens,
    tis: Tokens | float,
    reference_coef: Any,
    entropy_coef: Any,
) -> tuple[Scalar, Metrics]:
    """Add the reference term and the entropy bonus, which no method changes, and all metrics.

    Args:
      ratio: ρ; tis: as of `truncated_weights`.

    Returns:
      The loss, and `metrics` with those of the terms, without gradient.
    """
    weights, trained = inputs.weights, inputs.trained
    loss = policy_loss if distillation is None else policy_loss + distillation
    metrics = metrics | {
        "loss/policy": policy_loss,
        "policy/ratio_mean": jnp.sum(weights * ratio),
        "weights/sum": jnp.sum(weights),
    }
    if inputs.teacher is not None:
        metrics |= _teacher_kl(inputs.log_probs, inputs.teacher, weights)
    if inputs.reference is not None:
        coefficient = scalar(reference_coef, inputs)
        term = _reference_k3(inputs, trained & (coefficient != 0), ratio)
        reference_loss = coefficient * jnp.sum(tis * weights * term)
        loss = loss + reference_loss
        estimate = _reference_k3(inputs, trained, jnp.ones_like(ratio))
        metrics |= {
            "loss/reference": reference_loss,
            "kl/reference": jnp.sum(weights * estimate),
        }
    if inputs.entropy is not None:
        entropy_mean = jnp.sum(weights * keep(trained, inputs.entropy))
        entropy_loss = -scalar(entropy_coef, inputs) * entropy_mean
        loss = loss + entropy_loss
        metrics |= {"loss/entropy": entropy_loss, "entropy/mean": entropy_mean}
    metrics["loss"] = loss
    return loss, jax.lax.stop_gradient(metrics)


def _teacher_kl(log_probs: Tokens, teacher: Tokens, weights: Tokens) -> Metrics:
    """Three estimates of KL(π_θ‖π_T) over the weighted tokens that the teacher has scored."""
    scored = (weights != 0) & jnp.isfinite(teacher)
    log_ratio = keep(scored, log_probs) - keep(scored, teacher)
    names = {"k1": "kl/teacher", "k2": "kl/teacher_k2", "k3": "kl/teacher_k3"}
    one = jnp.ones_like(log_ratio)
    return {key: jnp.sum(weights * ESTIMATORS[k](log_ratio, one)) for k, key in names.items()}


def kl_by_mask(inputs: LossInputs) -> Metrics:
    """`kl/teacher` in two parts: of the tokens that are distilled, and of those masked from it.

    Sums, as all metrics: a mean over the tokens of a part is its sum by its share.

    Returns:
      "kl/distilled_sum" Σ w·ℓ and "kl/distilled_k2_sum" Σ w·½ℓ², the paper's KL loss, where
      w_kd ≠ 0; "kl/masked_sum" Σ w·ℓ where it is 0, and "kd/masked_frac" Σ w there. Tokens without
      a finite teacher log-prob are in none.
    """
    teacher = inputs.teacher
    assert teacher is not None
    scored = inputs.trained & jnp.isfinite(teacher)
    distilled = scored & (inputs.kd_weights != 0)
    masked = scored & (inputs.kd_weights == 0)

    def total(part: Bool[Array, "..."], estimator: str = "k1") -> Scalar:
        log_ratio = keep(part, inputs.log_probs) - keep(part, teacher)
        term = ESTIMATORS[estimator](log_ratio, jnp.ones_like(log_ratio))
        return jnp.sum(inputs.weights * term)

    return {
        "kl/distilled_sum": total(distilled),
        "kl/distilled_k2_sum": total(distilled, "k2"),
        "kl/masked_sum": total(masked),
        "kd/masked_frac": jnp.sum(keep(masked, inputs.weights)),
    }


def _reference_k3(inputs: LossInputs, used: Bool[Array, "..."], ratio: Tokens) -> Tokens:
    assert inputs.reference is not None
    log_ratio = keep(used, inputs.log_probs) - keep(used, inputs.reference)
    return ESTIMATORS["k3"](log_ratio, ratio)


def _require(array: Any, name: str, coefficient: str, needed: bool) -> None:
    if needed and array is None:
        raise ValueError(f"{name}: None found; must be given for the {coefficient} to have effect")


def _is_zero(x: Any) -> bool:
    return isinstance(x, int | float) and x == 0
