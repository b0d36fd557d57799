"""Log-probs and entropies from hidden states, without ever holding [rows, length, vocabulary].

Tokens go through the output head some columns of the batch at a time. The backward pass computes
each chunk's logits again, from the normaliser kept by the forward pass, and applies

    ∂log p(y)/∂z_v = 1[v = y] − p_v        ∂H/∂z_v = −p_v·(log p_v + H),   z = logits/τ

in closed form. Chunks run along the length, so a batch split over devices stays split.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdrl_jax.objectives._checks import require_rank, require_shape
from kdrl_jax.sharding import BATCH_AXES, constrain


class _Plan(NamedTuple):
    """How [R, T] is cut: `shards` parts of the rows, `chunks` of `width` tokens of the length."""

    shards: int
    chunks: int
    width: int
    valid_vocab: int


def token_log_probs(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "R T"],
    *,
    temperature: float | Float[Array, ""],
    valid_vocab: int,
    chunk: int = 512,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Log-prob of each target and entropy of its distribution, p = softmax(head·h/τ).

        log p(y) = z_y − log Σ_v e^{z_v}        H = −Σ_v p_v·log p_v        v < valid_vocab

    Student, old student and teacher all come through here. Differentiable in hidden and head, in
    reverse mode. The products run in hidden's dtype and accumulate in float32; the gradient of
    the head adds up in float32 over all tokens.

    Args:
      hidden: `[R, T, D]` after the final norm, at the positions that predict `targets`.
      head: `[V, D]`, of any float dtype; converted to hidden's once.
      targets: `[R, T]` integer token ids.
      temperature: τ, a scalar, may be traced; 0, the greedy sampler's, means 1. No gradient.
      valid_vocab: ids from here on have probability 0 (rows that only pad the vocabulary).
      chunk: tokens whose logits one device holds at a time (one column of its rows at least).

    Returns:
      (log_probs, entropy), float32 `[R, T]`, in nats. A target outside [0, valid_vocab) has
      log-prob −inf and no gradient.

    Raises:
      ValueError: shapes do not fit, or valid_vocab or chunk is out of range.
    """
    require_rank(3, "[R, T, D]", hidden=hidden)
    require_shape(hidden.shape[:2], "hidden's [R, T]", targets=targets)
    require_shape((jnp.shape(head)[0], hidden.shape[2]), "[V, D of hidden]", head=head)
    require_shape((), "a scalar", temperature=temperature)
    if not 0 < valid_vocab <= head.shape[0]:
        raise ValueError(
            f"valid_vocab: {valid_vocab} found; must be from 1 to the {head.shape[0]} rows of head"
        )
    if chunk < 1:
        raise ValueError(f"chunk: {chunk} found; must be 1 or more")
    rows, length = targets.shape
    shards = _batch_shards(rows)
    chunks = max(1, math.ceil(length / max(1, chunk * shards // max(1, rows))))
    # Chunks of equal width: the last one is filled up with fewer than `chunks` columns.
    width = math.ceil(length / chunks)
    temperature = jnp.asarray(temperature, jnp.float32)
    scale = jax.lax.stop_gradient(1.0 / jnp.where(temperature > 0, temperature, 1.0))
    return _scan_log_probs(_Plan(shards, chunks, width, valid_vocab), hidden, head, targets, scale)


def _batch_shards(rows: int) -> int:
    """Parts that the mesh in use splits the rows into; 1 without a mesh or if it cannot."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return parts if rows % parts == 0 else 1


def _cut(plan: _Plan, x: Array) -> Array:
    """`[R, T, ...]` to `[chunks, R, width, ...]`, the length filled up with zeros."""
    rows, length, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, plan.chunks * plan.width - length), *[(0, 0)] * len(rest)])
    x = jnp.moveaxis(x.reshape(rows, plan.chunks, plan.width, *rest), 1, 0)
    return constrain(x, None, "batch", *[None] * (x.ndim - 2))


def _join(x: Array, length: int) -> Array:
    """The inverse of `_cut`."""
    chunks, rows, width, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(rows, chunks * width, *rest)[:, :length]


def _logits(
    plan: _Plan, hidden: Array, head: Array, scale: Array
) -> tuple[Float[Array, "R W V"], Bool[Array, "1 1 V"]]:
    """Logits over temperature, float32, −inf from valid_vocab on; and which ids are valid."""
    z = jnp.einsum("RWD,VD->RWV", hidden, head, preferred_element_type=jnp.float32) * scale
    z = constrain(z, "batch", None, "vocab")
    valid = _ids(z) < plan.valid_vocab
    return jnp.where(valid, z, -jnp.inf), valid


def _ids(z: Float[Array, "R W V"]) -> Int[Array, "1 1 V"]:
    return jax.lax.broadcasted_iota(jnp.int32, (1, 1, z.shape[-1]), 2)


def _in_compute_dtype(head: Array, hidden: Array) -> Array:
    """The head as the products read it, gathered once over the axes that split its width."""
    return constrain(head.astype(hidden.dtype), "vocab", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_log_probs(
    plan: _Plan, hidden: Array, head: Array, targets: Array, scale: Array
) -> tuple[Array, Array]:
    return _forward(plan, hidden, head, targets, scale)[0]


def _forward(
    plan: _Plan, hidden: Array, head: Array, targets: Array, scale: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    compute_head = _in_compute_dtype(head, hidden)

    def body(_: None, xs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array, Array]]:
        hidden, targets = xs
        z, valid = _logits(plan, hidden, compute_head, scale)
        # Everything relative to the largest logit, so that large logits cost no digits.
        top = z.max(-1)
        z -= top[..., None]
        e = jnp.exp(z)
        total = e.sum(-1)
        log_total = jnp.log(total)
        # A sum over one hit, not a gather: it needs no communication of a split vocabulary.
        hit = (_ids(z) == targets[..., None]) & valid
        target = jnp.where(hit, z, 0.0).sum(-1)
        known = (targets >= 0) & (targets < plan.valid_vocab)
        log_probs = jnp.where(known, target - log_total, -jnp.inf)
        entropy = log_total - (e * jnp.where(valid, z, 0.0)).sum(-1) / total
        return None, (log_probs, entropy, top + log_total)

    with jax.named_scope("token_log_probs"):
        _, outputs = jax.lax.scan(body, None, (_cut(plan, hidden), _cut(plan, targets)))
        log_probs, entropy, log_sum = (_join(x, targets.shape[1]) for x in outputs)
    return (log_probs, entropy), (hidden, head, targets, scale, log_sum, entropy)


def _backward(
    plan: _Plan, saved: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    hidden, head, targets, scale, log_sum, entropy = saved
    compute_head = _in_compute_dtype(head, hidden)

    def body(d_head: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden, targets, log_sum, entropy, d_log_probs, d_entropy = xs
        z, valid = _logits(plan, hidden, compute_head, scale)
        log_p = jnp.where(valid, z - log_sum[..., None], 0.0)
        p = jnp.where(valid, jnp.exp(log_p), 0.0)
        known = (targets >= 0) & (targets < plan.valid_vocab)
        d_log_probs = jnp.where(known, d_log_probs, 0.0)[..., None]
        d_z = jnp.where(_ids(z) == targets[..., None], d_log_probs, 0.0) - d_log_probs * p
        d_z -= d_entropy[..., None] * p * (log_p + entropy[..., None])
        d_z = (d_z * scale).astype(hidden.dtype)
        d_hidden = jnp.einsum("RWV,VD->RWD", d_z, compute_head, preferred_element_type=jnp.float32)
        # Each part of the batch adds up its own gradient of the head; they meet once, after the
        # loop. A single sum would make every chunk wait for an all-reduce of [V, D].
        parts = (constrain(_by_shard(plan, x), "batch", None, None, None) for x in (d_z, hidden))
        d_head += jnp.einsum("ZRWV,ZRWD->ZVD", *parts, preferred_element_type=jnp.float32)
        return constrain(d_head, "batch", "vocab", None), d_hidden.astype(hidden.dtype)

    with jax.named_scope("token_log_probs_backward"):
        d_head = constrain(
            jnp.zeros((plan.shards, *head.shape), jnp.float32), "batch", "vocab", None
        )
        per_token = (hidden, targets, log_sum, entropy, *cotangents)
        d_head, d_hidden = jax.lax.scan(body, d_head, tuple(_cut(plan, x) for x in per_token))
        return _join(d_hidden, targets.shape[1]), d_head.sum(0).astype(head.dtype), None, None


def _by_shard(plan: _Plan, x: Array) -> Array:
    return x.reshape(plan.shards, x.shape[0] // plan.shards, *x.shape[1:])


_scan_log_probs.defvjp(_forward, _backward)
