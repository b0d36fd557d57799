"""The fused step: forward, log-probs, `kdrl_loss`, backward and AdamW in one donated program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from kdrl_jax.objectives import kdrl_loss, mismatch_kl, token_log_probs
from kdrl_jax.sharding import replicated, state_shardings
from kdrl_jax.training.teacher import split_micro_batches
from kdrl_jax.types import Params, TrainBatch, TrainState


class Hyper(NamedTuple):
    """What a schedule may change between steps: array arguments, so nothing recompiles."""

    beta: Float[Array, ""]
    temperature: Float[Array, ""]
    clip_eps_low: Float[Array, ""]
    clip_eps_high: Float[Array, ""]
    entropy_coef: Float[Array, ""]


def make_hyper(
    mesh: Mesh,
    *,
    beta: float,
    temperature: float,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    entropy_coef: float = 0.0,
) -> Hyper:
    """`Hyper` from numbers, on every device of `mesh`."""
    numbers = (beta, temperature, clip_eps_low, clip_eps_high, entropy_coef)
    return Hyper(*jax.device_put([np.float32(x) for x in numbers], replicated(mesh)))


Metrics = dict[str, Float[Array, ""]]
Update = Callable[[TrainState, TrainBatch, Hyper], tuple[TrainState, Metrics]]


def make_update(
    model: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    kd_estimator: str,
    micro_batches: int,
    valid_vocab: int,
    chunk: int,
) -> Update:
    """`update(state, batch, hyper) -> (state, metrics)`, jitted; `state` is donated.

    The batch's weights carry all normalisation, so the loss is a sum over tokens: gradients and
    metrics of the micro-batches add up, and how many there are changes nothing but memory.

    Args:
      kd_estimator: see `kdrl_jax.objectives.kdrl_loss`.
      micro_batches: divides the rows of a batch.
      valid_vocab, chunk: see `token_log_probs`.
    """

    def loss_fn(params: Params, batch: TrainBatch, hyper: Hyper) -> tuple[Array, Metrics]:
        t = batch.weights.shape[1]
        hidden = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
        log_probs, entropy = token_log_probs(
            hidden[:, -t - 1 : -1],
            model.head(params),
            batch.tokens[:, -t:],
            temperature=hyper.temperature,
            valid_vocab=valid_vocab,
            chunk=chunk,
        )
        loss, metrics = kdrl_loss(
            log_probs,
            batch,
            beta=hyper.beta,
            kd_estimator=kd_estimator,
            clip_eps_low=hyper.clip_eps_low,
            clip_eps_high=hyper.clip_eps_high,
            entropy=entropy,
            entropy_coef=hyper.entropy_coef,
        )
        # Meaningful where both are taken at one temperature; see logprob_temperature.
        metrics["mismatch/kl"] = mismatch_kl(log_probs, batch.sampler_log_probs, batch.weights)
        metrics["log_probs/mean"] = jnp.sum(batch.weights * log_probs)
        return loss, metrics

    def update(state: TrainState, batch: TrainBatch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        grad_fn = jax.grad(loss_fn, has_aux=True)

        def accumulate(carry: Any, micro: TrainBatch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, grad_fn(state.params, micro, hyper)), None

        micro = split_micro_batches(batch, micro_batches)
        first = jax.tree.map(lambda x: x[0], micro)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(grad_fn, state.params, first, hyper),
        )
        (grads, metrics), _ = jax.lax.scan(accumulate, zeros, micro)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["gradient/norm"] = optax.global_norm(grads)
        metrics["params/update_norm"] = optax.global_norm(updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    jitted: dict[str, Any] = {}

    def run(state: TrainState, batch: TrainBatch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        if "update" not in jitted:  # the state's own shardings are those that come out
            shardings = state_shardings(mesh, state)
            jitted["update"] = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
        with jax.set_mesh(mesh):
            return jitted["update"](state, batch, hyper)

    return run
