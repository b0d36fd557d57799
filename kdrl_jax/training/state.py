"""The optimizer and the train state, created in their shards."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kdrl_jax.sharding import param_shardings, state_shardings
from kdrl_jax.types import Params, TrainState


def make_schedule(learning_rate: float, warmup_steps: int, schedule: str, steps: int, floor=0.0):
    """Learning rate by update: linear warm-up, then `constant` or `cosine` down to `floor`."""
    if schedule == "constant":
        after = optax.constant_schedule(learning_rate)
    else:
        after = optax.cosine_decay_schedule(
            learning_rate, max(steps - warmup_steps, 1), alpha=floor / learning_rate
        )
    if not warmup_steps:
        return after
    ramp = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    return optax.join_schedules([ramp, after], [warmup_steps])


def make_optimizer(
    schedule: Any, *, b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW on gradients clipped to a global norm; moments are float32 like the weights."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    )


def optimizer_of(config: ConfigDict, updates: int) -> optax.GradientTransformation:
    """What a run's `optimizer` asks for, over so many updates."""
    schedule = make_schedule(config.learning_rate, config.warmup_steps, config.schedule, updates)
    keys = ("b1", "b2", "eps", "weight_decay", "clip_norm")
    return make_optimizer(schedule, **{key: config[key] for key in keys})


def init_params(model: Any, key: jax.Array, mesh: Mesh) -> Params:
    """Random float32 weights; no device ever holds more than its own shards."""
    return jax.jit(model.init, out_shardings=param_shardings(mesh, model.shapes()))(key)


def init_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh TrainState around `params`, each moment sharded as its weight."""

    def build(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shardings = state_shardings(mesh, jax.eval_shape(build, params))
    return jax.jit(build, out_shardings=shardings)(params)


def abstract_state(model: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState, for restoring into; allocates nothing."""

    def build(key: jax.Array) -> TrainState:
        params = model.init_trained(key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shapes = jax.eval_shape(build, jax.random.key(0))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        state_shardings(mesh, shapes),
    )
