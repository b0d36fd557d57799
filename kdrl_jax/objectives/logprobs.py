"""Log-probs and entropies from hidden states, without ever holding [rows, length, vocabulary].

Tokens go through the output head some columns of the batch at a time. The backward pass computes
each chunk's logits again, from the normaliser kept by the forward pass, and applies

    ∂log p(y)/∂z_v = 1[v = y] − p_v        ∂H/∂z_v = −p_v·(log p_v + H),   z = logits/τ

in closed form. Chunks run along the length, so a batch split over devices stays split.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdrl_jax.objectives._checks import require_rank, require_shape
from kdrl_jax.objectives._chunks import Plan, by_shard, cut, join, make_plan
from kdrl_jax.sharding import constrain


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
    plan, scale = make_plan(
        hidden, head, temperature=temperature, valid_vocab=valid_vocab, chunk=chunk
    )
    require_shape(hidden.shape[:2], "hidden's [R, T]", targets=targets)
    log_probs, entropy, _ = _scan_log_probs(plan, hidden, head, targets, None, scale)
    return log_probs, entropy


def support_log_probs(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "R T"],
    support: Int[Array, "R T K"],
    *,
    temperature: float | Float[Array, ""],
    valid_vocab: int,
    chunk: int = 512,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"], Float[Array, "R T K"]]:
    """`token_log_probs` that also gives the log-probs of K further ids at each position.

    Args:
      support: `[R, T, K]` integer token ids, repeated ones allowed: those of `top_tokens`, of
        this model or another.
      hidden, head, targets, temperature, valid_vocab, chunk: as of `token_log_probs`.

    Returns:
      (log_probs `[R, T]`, entropy `[R, T]`, support_log_probs `[R, T, K]`), float32, in nats, all
      differentiable in hidden and head. All are normalised over the whole valid vocabulary, so
      e^x sums to less than 1 over the support. An id outside [0, valid_vocab) has log-prob −inf
      and no gradient.

    Raises:
      ValueError: as `token_log_probs`.
    """
    plan, scale = make_plan(
        hidden, head, temperature=temperature, valid_vocab=valid_vocab, chunk=chunk
    )
    require_shape(hidden.shape[:2], "hidden's [R, T]", targets=targets)
    require_rank(3, "[R, T, K]", support=support)
    require_shape((*hidden.shape[:2], support.shape[2]), "[R, T of hidden, K]", support=support)
    return _scan_log_probs(plan, hidden, head, targets, support, scale)


def top_tokens(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "V D"],
    k: int,
    *,
    temperature: float | Float[Array, ""],
    valid_vocab: int,
    chunk: int = 512,
) -> tuple[Int[Array, "R T K"], Float[Array, "R T K"]]:
    """The k likeliest ids at each position, likeliest first, and their log-probs.

    Args:
      k: from 1 to valid_vocab; static. Of equal ones the lower id comes first.
      hidden, head, temperature, valid_vocab, chunk: as of `token_log_probs`.

    Returns:
      (ids int32, log_probs float32), each `[R, T, K]`, K = k; log-probs in nats, normalised over
      the whole valid vocabulary. No gradient.

    Raises:
      ValueError: as `token_log_probs`, or k is out of range.
    """
    targets = jnp.zeros(jnp.shape(hidden)[:2], jnp.int32)
    _, ids, log_probs = top_support(
        hidden,
        head,
        targets,
        k,
        temperature=temperature,
        valid_vocab=valid_vocab,
        chunk=chunk,
    )
    return ids, log_probs


def top_support(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "R T"],
    k: int,
    *,
    temperature: float | Float[Array, ""],
    valid_vocab: int,
    chunk: int = 512,
) -> tuple[Float[Array, "R T"], Int[Array, "R T K"], Float[Array, "R T K"]]:
    """`token_log_probs` of the targets and `top_tokens` from the same logits.

    Args:
      hidden, head, targets, temperature, valid_vocab, chunk: as of `token_log_probs`.
      k: as of `top_tokens`.

    Returns:
      (log_probs float32 `[R, T]`, ids int32 `[R, T, K]`, their log_probs float32), K = k. No
      gradient.

    Raises:
      ValueError: as `token_log_probs`, or k is out of range.
    """
    plan, scale = make_plan(
        hidden, head, temperature=temperature, valid_vocab=valid_vocab, chunk=chunk
    )
    require_shape(hidden.shape[:2], "hidden's [R, T]", targets=targets)
    if not 0 < k <= valid_vocab:
        raise ValueError(f"k: {k} found; must be from 1 to valid_vocab={valid_vocab}")
    hidden, head = jax.lax.stop_gradient((hidden, head))
    compute_head = in_compute_dtype(head, hidden)

    def body(_: None, xs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array, Array]]:
        hidden, targets = xs
        z = chunk_logits(plan, hidden, compute_head, scale)
        values, ids = jax.lax.top_k(z, k)
        log_sum = jax.nn.logsumexp(z, axis=-1, keepdims=True)
        found = jnp.take_along_axis(z, jnp.clip(targets, 0, z.shape[-1] - 1)[..., None], axis=-1)
        log_probs = jnp.where(_known(plan, targets), (found - log_sum)[..., 0], -jnp.inf)
        return None, (log_probs, ids.astype(jnp.int32), values - log_sum)

    with jax.named_scope("top_support"):
        xs = (cut(plan, hidden), cut(plan, targets))
        _, found = jax.lax.scan(body, None, xs)
        log_probs, ids, of_support = (join(x, hidden.shape[1], plan) for x in found)
    return log_probs, ids, of_support


class LogitScores(NamedTuple):
    """What a chunk's logits say of its tokens, float32."""

    log_probs: Float[Array, "R W"]
    entropy: Float[Array, "R W"]
    log_sum: Float[Array, "R W"]
    at_support: Float[Array, "R W J"] | None


def chunk_logits(
    plan: Plan, hidden: Float[Array, "R W D"], head: Float[Array, "V D"], scale: Array
) -> Float[Array, "R W V"]:
    """Logits over temperature, float32, −inf from valid_vocab on."""
    z = _product("TD,VD->TV", hidden.reshape(-1, hidden.shape[-1]), head) * scale
    z = constrain(z.reshape(*hidden.shape[:2], -1), "tokens", None, "vocab")
    return z if plan.valid_vocab == z.shape[-1] else jnp.where(valid_ids(plan, z), z, -jnp.inf)


def measure_logits(
    plan: Plan,
    z: Float[Array, "R W V"],
    targets: Int[Array, "R W"],
    support: Int[Array, "R W J"] | None,
) -> LogitScores:
    """Log-probs and entropies of a chunk, in passes over its logits that keep nothing."""

    def at(ids: Array) -> Array:
        """Log-probs of ids `[R, W, n]`."""
        found = jnp.take_along_axis(z, jnp.clip(ids, 0, z.shape[-1] - 1), axis=-1)
        return jnp.where(_known(plan, ids), found - top - log_total, -jnp.inf)

    # Everything relative to the largest logit, so that large logits cost no digits.
    z = jax.lax.optimization_barrier(z)
    top = z.max(-1, keepdims=True)
    total = jnp.exp(z - top).sum(-1, keepdims=True)
    log_total = jnp.log(total)
    # Computed again for its own sum: two sums over one array would make compilers store it.
    again, top_again = jax.lax.optimization_barrier((z, top))
    shifted = jnp.where(valid_ids(plan, z), again - top_again, 0.0)
    weighted = jnp.where(valid_ids(plan, z), jnp.exp(shifted) * shifted, 0.0)
    entropy = log_total - weighted.sum(-1, keepdims=True) / total
    return LogitScores(
        log_probs=at(targets[..., None])[..., 0],
        entropy=entropy[..., 0],
        log_sum=(top + log_total)[..., 0],
        at_support=None if support is None else at(support),
    )


def logit_gradient(
    plan: Plan,
    z: Float[Array, "R W V"],
    targets: Int[Array, "R W"],
    support: Int[Array, "R W J"] | None,
    scores: LogitScores,
    d_log_probs: Float[Array, "R W"],
    d_entropy: Float[Array, "R W"],
    d_support: Float[Array, "R W J"] | None,
) -> Float[Array, "R W V"]:
    """What a loss that has these gradients in the scores has in the logits."""
    log_p = jnp.where(valid_ids(plan, z), z - scores.log_sum[..., None], 0.0)
    p = jnp.where(valid_ids(plan, z), jnp.exp(log_p), 0.0)
    d_log_probs = jnp.where(_known(plan, targets), d_log_probs, 0.0)[..., None]
    d_z = jnp.where(_ids(z) == targets[..., None], d_log_probs, 0.0) - d_log_probs * p
    if support is not None and d_support is not None:
        d_support = jnp.where(_known(plan, support), d_support, 0.0)
        d_z -= d_support.sum(-1, keepdims=True) * p
        add = jax.vmap(jax.vmap(lambda d, ids, x: d.at[ids].add(x)))
        d_z = add(d_z, jnp.clip(support, 0, z.shape[-1] - 1), d_support)
    return d_z - d_entropy[..., None] * p * (log_p + scores.entropy[..., None])


def new_head_gradient(plan: Plan, head: Array) -> Float[Array, "Z V D"]:
    """Zeros to which `head_gradients` adds: a sum for each part of the batch.

    The parts meet once, after the loop over chunks. A single sum would make every chunk wait for
    an all-reduce of [V, D].
    """
    return constrain(jnp.zeros((plan.shards, *head.shape), jnp.float32), "tokens", "vocab", None)


def head_gradients(
    plan: Plan,
    d_head: Float[Array, "Z V D"],
    d_z: Float[Array, "R W V"],
    hidden: Float[Array, "R W D"],
    head: Float[Array, "V D"],
) -> tuple[Float[Array, "Z V D"], Float[Array, "R W D"]]:
    """d_head with a chunk's part added, and the chunk's d_hidden; `d_z` of the raw products."""
    d_z = d_z.astype(hidden.dtype)
    flat = (x.reshape(-1, x.shape[-1]) for x in (d_z, hidden))
    d_z, tokens = (by_shard(plan, x) for x in flat)
    d_hidden = _product("TV,VD->TD", d_z.reshape(-1, d_z.shape[-1]), head)
    if plan.shards == 1:
        d_head += _product("TV,TD->VD", d_z[0], tokens[0])[None]
    else:
        d_head += _product("ZTV,ZTD->ZVD", d_z, tokens)
    d_hidden = d_hidden.astype(hidden.dtype).reshape(hidden.shape)
    return constrain(d_head, "tokens", "vocab", None), d_hidden


def _product(equation: str, x: Array, y: Array) -> Array:
    """Matrix products, accumulated in float32: tokens on one axis is what compilers do best."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def valid_ids(plan: Plan, z: Float[Array, "R W V"]) -> Bool[Array, "1 1 V"]:
    """Which columns of `z` are of the tokenizer's ids."""
    return _ids(z) < plan.valid_vocab


def _ids(z: Float[Array, "R W V"]) -> Int[Array, "1 1 V"]:
    return jax.lax.broadcasted_iota(jnp.int32, (1, 1, z.shape[-1]), 2)


def _known(plan: Plan, ids: Int[Array, "..."]) -> Bool[Array, "..."]:
    return (ids >= 0) & (ids < plan.valid_vocab)


def in_compute_dtype(head: Array, hidden: Array) -> Array:
    """The head as the products read it, gathered once over the axes that split its width."""
    return constrain(head.astype(hidden.dtype), "vocab", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_log_probs(
    plan: Plan, hidden: Array, head: Array, targets: Array, support: Array | None, scale: Array
) -> tuple[Array, Array, Any]:
    return _forward(plan, hidden, head, targets, support, scale)[0]


def _forward(
    plan: Plan, hidden: Array, head: Array, targets: Array, support: Array | None, scale: Array
) -> tuple[tuple[Array, Array, Array | None], tuple[Array | None, ...]]:
    compute_head = in_compute_dtype(head, hidden)

    def body(_: None, xs: tuple[Array, ...]) -> tuple[None, LogitScores]:
        hidden, targets, support = xs
        z = chunk_logits(plan, hidden, compute_head, scale)
        return None, measure_logits(plan, z, targets, support)

    with jax.named_scope("token_log_probs"):
        xs = jax.tree.map(functools.partial(cut, plan), (hidden, targets, support))
        _, outputs = jax.lax.scan(body, None, xs)
        scores = jax.tree.map(lambda x: join(x, targets.shape[1], plan), outputs)
    saved = (hidden, head, targets, support, scale, scores)
    return (scores.log_probs, scores.entropy, scores.at_support), saved


def _backward(
    plan: Plan, saved: tuple[Array, ...], cotangents: tuple[Array, Array, Array | None]
) -> tuple[Array, Array, None, None, None]:
    hidden, head, targets, support, scale, scores = saved
    compute_head = in_compute_dtype(head, hidden)

    def body(d_head: Array, xs: tuple[Any, ...]) -> tuple[Array, Array]:
        hidden, targets, support, scores, cotangents = xs
        z = chunk_logits(plan, hidden, compute_head, scale)
        d_z = logit_gradient(plan, z, targets, support, scores, *cotangents)
        return head_gradients(plan, d_head, d_z * scale, hidden, compute_head)

    with jax.named_scope("token_log_probs_backward"):
        per_token = (hidden, targets, support, scores, cotangents)
        xs = jax.tree.map(functools.partial(cut, plan), per_token)
        d_head, d_hidden = jax.lax.scan(body, new_head_gradient(plan, head), xs)
        d_hidden, d_head = join(d_hidden, targets.shape[1], plan), d_head.sum(0).astype(head.dtype)
        return d_hidden, d_head, None, None, None


_scan_log_probs.defvjp(_forward, _backward)
