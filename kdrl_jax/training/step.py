"""The fused step: forward, log-probs, loss, backward and AdamW in one donated program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from kdrl_jax.models.lora import join
from kdrl_jax.objectives import (
    TokenScores,
    fused_loss,
    kdrl_loss,
    mismatch_kl,
    topk_divergence,
    trrd_loss,
)
from kdrl_jax.objectives.distributions import LOG_FLOOR, Support
from kdrl_jax.sharding import put, replicated, state_shardings
from kdrl_jax.training.scoring import split_micro_batches
from kdrl_jax.types import Params, TrainBatch, TrainState

OF_ROWS = ("tokens", "positions", "segment_ids")
"""Fields of a batch [R, L]; all others are [R, T]."""


class Hyper(NamedTuple):
    """What a schedule may change between steps: array arguments, so nothing recompiles."""

    beta: Float[Array, ""]
    policy_coef: Float[Array, ""]
    temperature: Float[Array, ""]
    clip_eps_low: Float[Array, ""]
    clip_eps_high: Float[Array, ""]
    entropy_coef: Float[Array, ""]
    reference_coef: Float[Array, ""]
    tis_cap: Float[Array, ""]
    alpha: Float[Array, ""]
    clamp: Float[Array, ""]


def make_hyper(
    mesh: Mesh,
    *,
    beta: float,
    temperature: float,
    policy_coef: float = 1.0,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    entropy_coef: float = 0.0,
    reference_coef: float = 0.0,
    tis_cap: float = 0.0,
    alpha: float = 1.0,
    clamp: float = 1.0,
) -> Hyper:
    """`Hyper` from numbers, on every device of `mesh`."""
    numbers = {
        "beta": beta,
        "policy_coef": policy_coef,
        "temperature": temperature,
        "clip_eps_low": clip_eps_low,
        "clip_eps_high": clip_eps_high,
        "entropy_coef": entropy_coef,
        "reference_coef": reference_coef,
        "tis_cap": tis_cap,
        "alpha": alpha,
        "clamp": clamp,
    }
    arrays = {name: np.float32(value) for name, value in numbers.items()}
    return Hyper(**put(arrays, replicated(mesh)))


class Objective(NamedTuple):
    """What is fixed while a program runs: which functions fill the slots of the loss."""

    ratio: str = "old"
    """Of the policy term: to the "old" student alone, or "trrd"."""
    kd_estimator: str = "k2"
    support: Support = "teacher"
    log_floor: float = LOG_FLOOR
    """Of `topk_divergence`, both."""
    k3_clamp: float | None = None
    clamp_gradient: str = "clamp"
    tis: bool = False
    """Whether importance weights, trainer over sampler, apply."""
    own_rollouts: bool = True
    """False: another model sampled, so its log-probs are no measure of the sampler's rounding."""


Metrics = dict[str, Float[Array, ""]]


class Update:
    """`update(state, batch, hyper, teacher_head=None, used=None, base=None) -> (state, metrics)`.

    Jitted; `state` is donated. See `make_update`.
    """

    def __init__(self, update: Callable[..., tuple[TrainState, Metrics]], mesh: Mesh, donate: bool):
        self._update, self._mesh, self._donated = update, mesh, (0,) if donate else ()
        self._jitted: Any = None

    def __call__(
        self,
        state: TrainState,
        batch: TrainBatch,
        hyper: Hyper,
        teacher_head: Array | None = None,
        used: Array | None = None,
        base: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        """One update."""
        with jax.set_mesh(self._mesh):
            return self._program(state)(state, batch, hyper, teacher_head, used, base)

    def lower(
        self,
        state: Any,
        batch: Any,
        hyper: Any,
        teacher_head: Any = None,
        used: Any = None,
        base: Any = None,
    ) -> jax.stages.Lowered:
        """The program for arrays or shapes like these, on devices that need not be there."""
        with jax.set_mesh(self._mesh):
            return self._program(state).lower(state, batch, hyper, teacher_head, used, base)

    def _program(self, state: TrainState) -> Any:
        if self._jitted is None:  # the state's own shardings are those that come out
            out = (state_shardings(self._mesh, state), replicated(self._mesh))
            self._jitted = jax.jit(self._update, donate_argnums=self._donated, out_shardings=out)
        return self._jitted


Loss = Callable[..., tuple[Array, Metrics]]


def make_loss(model: Any, *, objective: Objective, valid_vocab: int, chunk: int) -> Loss:
    """The loss of some rows: `loss(params, rows, hyper, teacher_head, base) -> (scalar, metrics)`.

    `params` are all weights, or adapters that the frozen weights `base` are joined with.

    Args:
      objective: see `Objective`.
      valid_vocab, chunk: see `token_log_probs`.
    """
    loss_of = {"old": _joint_loss, "trrd": _trrd_loss}[objective.ratio]

    def of_tokens(scores: TokenScores, batch: TrainBatch, hyper: Hyper) -> tuple[Array, Metrics]:
        divergence = scores.divergence
        if scores.support_log_probs is not None and batch.support_log_probs is not None:
            divergence = topk_divergence(
                scores.support_log_probs,
                batch.support_log_probs,
                objective.support,
                entropy=scores.entropy,
                log_floor=objective.log_floor,
            )
        log_probs, weights = scores.log_probs, batch.weights
        loss, metrics = loss_of(objective, hyper, log_probs, scores.entropy, batch, divergence)
        if objective.own_rollouts:
            # Meaningful where both are taken at one temperature; see logprob_temperature.
            metrics["mismatch/kl"] = mismatch_kl(log_probs, batch.sampler_log_probs, weights)
        metrics["log_probs/mean"] = jnp.sum(weights * log_probs)
        return loss, metrics

    def loss_fn(
        params: Params,
        batch: TrainBatch,
        hyper: Hyper,
        teacher_head: Array | None,
        base: Params | None = None,
    ) -> tuple[Array, Metrics]:
        t = batch.weights.shape[1]
        params = params if base is None else join(base, params)
        states = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
        return fused_loss(
            of_tokens,
            states[:, -t - 1 : -1],
            model.head(params),
            batch.tokens[:, -t:],
            dataclasses.replace(
                batch,
                **{key: getattr(batch, key)[:, -t:] for key in OF_ROWS},
                support=None,
                teacher_hidden=None,
            ),
            hyper,
            temperature=hyper.temperature,
            support=batch.support,
            teacher_hidden=batch.teacher_hidden,
            teacher_head=teacher_head,
            valid_vocab=valid_vocab,
            chunk=chunk,
        )

    return loss_fn


def make_update(
    model: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    objective: Objective = Objective(),  # noqa: B008 (immutable)
    micro_batches: int,
    valid_vocab: int,
    chunk: int,
    donate: bool = True,
) -> Update:
    """The fused step: gradients of the loss of all micro-batches, then the optimizer.

    The batch's weights carry all normalisation, so the loss is a sum over tokens: gradients and
    metrics of the micro-batches add up, and how many there are changes nothing but memory. Only the
    first `used` ones are run, where that is given.

    Where loss, gradient or the step that AdamW makes of it is not finite the state comes out as it
    went in, its counters included, and "update/skipped" is 1, else 0: on all devices alike, for
    these are sums over all of them.

    Args:
      objective: see `Objective`.
      micro_batches: divides the rows of a batch.
      valid_vocab, chunk: see `token_log_probs`.
      donate: whether the state that comes in is given up; NaNs can be traced only where it is not.
    """
    loss_fn = make_loss(model, objective=objective, valid_vocab=valid_vocab, chunk=chunk)

    def update(
        state: TrainState,
        batch: TrainBatch,
        hyper: Hyper,
        teacher_head: Array | None,
        used: Array | None,
        base: Params | None,
    ) -> tuple[TrainState, Metrics]:
        grad_fn = jax.grad(loss_fn, has_aux=True)
        micro = split_micro_batches(batch, micro_batches)

        def gradients(index: Array | int) -> tuple[Params, Metrics]:
            part = jax.tree.map(lambda x: x[index], micro)
            return grad_fn(state.params, part, hyper, teacher_head, base)

        def accumulate(index: Array, sums: Any) -> Any:
            return jax.tree.map(jnp.add, sums, gradients(index))

        if micro_batches == 1:
            grads, metrics = gradients(0)
        else:
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradients, 0))
            passes = micro_batches if used is None else used
            grads, metrics = jax.lax.fori_loop(0, passes, accumulate, zeros)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm, change = optax.global_norm(grads), optax.global_norm(updates)
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & jnp.isfinite(change)
        # A choice element by element, which fuses with AdamW's: no copy of the state is made.
        new = TrainState(state.step + 1, params, opt_state)
        new = jax.tree.map(lambda new, old: jnp.where(sound, new, old), new, state)
        metrics["gradient/norm"] = norm
        metrics["params/update_norm"] = jnp.where(sound, change, 0.0)
        metrics["update/skipped"] = jnp.where(sound, 0.0, 1.0)
        return new, metrics

    return Update(update, mesh, donate)


def _joint_loss(
    objective: Objective,
    hyper: Hyper,
    log_probs: Array,
    entropy: Array,
    batch: TrainBatch,
    divergence: Array | None,
) -> tuple[Array, Metrics]:
    """The policy term and the distillation term side by side: KDRL and its halves."""
    return kdrl_loss(
        log_probs,
        batch,
        beta=hyper.beta,
        kd_estimator=objective.kd_estimator,
        kd_divergence=divergence,
        k3_clamp=objective.k3_clamp,
        policy_coef=hyper.policy_coef,
        **_common(objective, hyper, entropy),
    )


def _trrd_loss(
    objective: Objective,
    hyper: Hyper,
    log_probs: Array,
    entropy: Array,
    batch: TrainBatch,
    divergence: Array | None,
) -> tuple[Array, Metrics]:
    """The teacher within the ratio of the policy term: RLAD."""
    return trrd_loss(
        log_probs,
        batch,
        alpha=hyper.alpha,
        clamp=hyper.clamp,
        clamp_gradient=objective.clamp_gradient,
        **_common(objective, hyper, entropy),
    )


def _common(objective: Objective, hyper: Hyper, entropy: Array) -> dict[str, Any]:
    return {
        "clip_eps_low": hyper.clip_eps_low,
        "clip_eps_high": hyper.clip_eps_high,
        "reference_coef": hyper.reference_coef,
        "tis_cap": hyper.tis_cap if objective.tis else None,
        "entropy": entropy,
        "entropy_coef": hyper.entropy_coef,
    }
