"""How the functions of hidden states and an output head go through [R, T] piece by piece.

Tokens are taken some columns of the batch at a time. Chunks run along the length, so a batch
split over devices stays split; where the length is split too, each device's columns make a row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdrl_jax.objectives._checks import require_rank, require_shape
from kdrl_jax.sharding import batch_parts, constrain, shares


class Plan(NamedTuple):
    """How [R, T] is cut: each row in `context` parts, and these in `chunks` of `width` tokens.

    The R·context parts are in `shards` groups, one for each device that has a share of them.
    """

    shards: int
    context: int
    chunks: int
    width: int
    valid_vocab: int


def make_plan(
    hidden: Array, head: Array, *, temperature: float | Array, valid_vocab: int, chunk: int
) -> tuple[Plan, Float[Array, ""]]:
    """The plan for `hidden` `[R, T, D]`, and what logits are multiplied by: 1/τ, of τ = 0 1.

    Raises:
      ValueError: shapes do not fit, or valid_vocab or chunk is out of range.
    """
    require_head(valid_vocab, hidden=hidden, head=head)
    require_shape((), "a scalar", temperature=temperature)
    if chunk < 1:
        raise ValueError(f"chunk: {chunk} found; must be 1 or more")
    rows, length = hidden.shape[:2]
    shards, context = _parts(rows)
    part = math.ceil(length / context)
    chunks = max(1, math.ceil(part / max(1, chunk * shards // max(1, rows))))
    # Chunks of equal width: the last one is filled up with fewer than `chunks` columns.
    width = math.ceil(part / chunks)
    temperature = jnp.asarray(temperature, jnp.float32)
    scale = jax.lax.stop_gradient(1.0 / jnp.where(temperature > 0, temperature, 1.0))
    return Plan(shards * context, context, chunks, width, valid_vocab), scale


def require_head(valid_vocab: int, **arrays: Array) -> None:
    """Raises ValueError unless the two named arrays are hidden [R, T, D] and a head that fits."""
    (hidden_name, hidden), (head_name, head) = arrays.items()
    require_rank(3, "[R, T, D]", **{hidden_name: hidden})
    fits = (jnp.shape(head)[0], hidden.shape[2])
    require_shape(fits, f"[V, D of {hidden_name}]", **{head_name: head})
    if not 0 < valid_vocab <= head.shape[0]:
        raise ValueError(
            f"valid_vocab: {valid_vocab} found; must be from 1 to the {head.shape[0]} rows of "
            f"{head_name}"
        )


def _parts(rows: int) -> tuple[int, int]:
    """Parts that the mesh in use splits the rows and the length into; 1 where it cannot."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else batch_parts(mesh)
    return (parts, shares("length", 0)) if rows % parts == 0 else (1, 1)


def cut(plan: Plan, x: Array) -> Array:
    """`[R, T, ...]` to `[chunks, R·context, width, ...]`, the length filled up with zeros."""
    rows, length, *rest = x.shape
    columns = plan.context * plan.chunks * plan.width
    x = jnp.pad(x, [(0, 0), (0, columns - length), *[(0, 0)] * len(rest)])
    if plan.context > 1:  # groups in the order of the devices that have them
        x = x.reshape(plan.shards // plan.context, -1, plan.context, columns // plan.context, *rest)
        x = x.swapaxes(1, 2)
    x = x.reshape(rows * plan.context, plan.chunks, plan.width, *rest)
    return constrain(jnp.moveaxis(x, 1, 0), None, "tokens", *[None] * (x.ndim - 2))


def join(x: Array, length: int, plan: Plan) -> Array:
    """The inverse of `cut`."""
    chunks, parts, width, *rest = x.shape
    x = jnp.moveaxis(x, 0, 1)
    if plan.context > 1:
        x = x.reshape(plan.shards // plan.context, plan.context, -1, chunks * width, *rest)
        x = x.swapaxes(1, 2)
    return x.reshape(parts // plan.context, plan.context * chunks * width, *rest)[:, :length]


def by_shard(plan: Plan, x: Array) -> Array:
    """`[R, ...]` to `[shards, R / shards, ...]`, each shard on the devices that have its rows."""
    x = x.reshape(plan.shards, x.shape[0] // plan.shards, *x.shape[1:])
    return constrain(x, "tokens", *[None] * (x.ndim - 1))
