"""The loss from hidden states in one pass: gradients are formed while a chunk's logits are there.

`token_log_probs` computes logits once for the value and once more for the gradient, because what
follows is not known when it runs. A loss that is a sum over tokens is known: then three products
with the output head suffice instead of four, and still only one chunk's logits are ever held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdrl_jax.objectives._checks import require_shape
from kdrl_jax.objectives._chunks import Plan, cut, join, make_plan
from kdrl_jax.objectives.logprobs import (
    chunk_logits,
    head_gradients,
    in_compute_dtype,
    logit_gradient,
    measure_logits,
    new_head_gradient,
    valid_ids,
)

Metrics = dict[str, Float[Array, ""]]


class TokenScores(NamedTuple):
    """What the policy says of tokens: what a loss reads beside the batch. Float32, in nats."""

    log_probs: Float[Array, "R W"]
    entropy: Float[Array, "R W"]
    support_log_probs: Float[Array, "R W J"] | None = None
    """Of the ids in `PerToken.support`."""
    divergence: Float[Array, "R W"] | None = None
    """KL(policy‖teacher) over the whole vocabulary, where the teacher's states are given."""


class PerToken(NamedTuple):
    """What there is of each token; axes [R, T] first."""

    targets: Int[Array, "R T"]
    support: Int[Array, "R T J"] | None
    teacher_hidden: Float[Array, "R T E"] | None
    rest: Any
    """A tree of further arrays for the loss."""


class Shared(NamedTuple):
    """What is the same for all tokens."""

    scale: Float[Array, ""]
    teacher_head: Float[Array, "V2 E"] | None
    rest: Any


Loss = Callable[[TokenScores, Any, Any], tuple[Float[Array, ""], Metrics]]
"""(scores, per-token arrays, shared arrays) -> (a sum over tokens, metrics that are such sums)."""


def fused_loss(
    loss: Loss,
    hidden: Float[Array, "R T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "R T"],
    per_token: Any,
    shared: Any,
    *,
    temperature: float | Float[Array, ""],
    valid_vocab: int,
    chunk: int = 512,
    support: Int[Array, "R T J"] | None = None,
    teacher_hidden: Float[Array, "R T E"] | None = None,
    teacher_head: Float[Array, "V2 E"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Σ over tokens of `loss`, whose logits exist only some tokens at a time.

    Equal to `loss(TokenScores(*token_log_probs(hidden, head, …)), per_token, shared)`, in value
    and in gradient with respect to hidden and head, whatever the chunk. Nothing else has a
    gradient. Under `jax.grad` logits are computed once, and their gradient multiplied at once.

    Args:
      loss: static; sums over whatever tokens it is given, so that chunks add up.
      hidden, head, targets, temperature, valid_vocab, chunk: as of `token_log_probs`.
      per_token: a tree of arrays `[R, T, …]`, cut as the tokens are.
      shared: a tree of arrays that every chunk gets whole.
      support: ids at which `loss` wants log-probs too, see `support_log_probs`.
      teacher_hidden, teacher_head: the teacher's, for the divergence over the whole vocabulary.

    Returns:
      (loss, metrics), float32.

    Raises:
      ValueError: as `token_log_probs`.
    """
    plan, scale = make_plan(
        hidden, head, temperature=temperature, valid_vocab=valid_vocab, chunk=chunk
    )
    require_shape(hidden.shape[:2], "hidden's [R, T]", targets=targets)
    pieces = PerToken(targets, support, teacher_hidden, per_token)
    return _fused(loss, plan, hidden, head, pieces, Shared(scale, teacher_head, shared))


def _scores(
    plan: Plan, z: Array, piece: PerToken, shared: Shared
) -> tuple[Any, TokenScores, Array | None]:
    """Raw scores, what the loss sees of them, and log p − log q where there is a teacher."""
    raw = measure_logits(plan, z, piece.targets, piece.support)
    divergence = excess = None
    if piece.teacher_hidden is not None and shared.teacher_head is not None:
        of_teacher = in_compute_dtype(shared.teacher_head, piece.teacher_hidden)[: z.shape[-1]]
        # The teacher's table may have fewer rows of padding.
        z_q = chunk_logits(plan, piece.teacher_hidden, of_teacher, shared.scale)
        z_q = jnp.pad(z_q, [(0, 0), (0, 0), (0, z.shape[-1] - z_q.shape[-1])])
        valid = valid_ids(plan, z)
        log_p = z - raw.log_sum[..., None]
        log_q = jax.nn.log_softmax(jnp.where(valid, z_q, -jnp.inf), axis=-1)
        excess = jnp.where(valid, log_p - log_q, 0.0)
        divergence = (jnp.exp(log_p) * excess).sum(-1)
    return raw, TokenScores(raw.log_probs, raw.entropy, raw.at_support, divergence), excess


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(
    loss: Loss, plan: Plan, hidden: Array, head: Array, pieces: PerToken, shared: Shared
) -> tuple[Array, Metrics]:
    compute_head = in_compute_dtype(head, hidden)

    def body(carry: Any, xs: tuple[Array, PerToken]) -> tuple[Any, None]:
        found = _of_chunk(loss, plan, compute_head, shared, xs)
        return jax.tree.map(jnp.add, carry, found), None

    xs = jax.tree.map(functools.partial(cut, plan), (hidden, pieces))
    return jax.lax.scan(body, _zeros(loss, plan, compute_head, shared, xs), xs)[0]


def _of_chunk(
    loss: Loss, plan: Plan, head: Array, shared: Shared, xs: tuple[Array, PerToken]
) -> tuple[Array, Metrics]:
    """What `loss` returns for one chunk's hidden states and pieces."""
    hidden, piece = xs
    z = chunk_logits(plan, hidden, head, shared.scale)
    return loss(_scores(plan, z, piece, shared)[1], piece.rest, shared.rest)


def _zeros(loss: Loss, plan: Plan, head: Array, shared: Shared, xs: Any) -> Any:
    """What `loss` returns, with zeros in it."""
    first = jax.tree.map(lambda x: x[0], xs)
    like = jax.eval_shape(functools.partial(_of_chunk, loss, plan), head, shared, first)
    return jax.tree.map(jnp.zeros_like, like)


def _forward(
    loss: Loss, plan: Plan, hidden: Array, head: Array, pieces: PerToken, shared: Shared
) -> tuple[tuple[Array, Metrics], tuple[Array, Array]]:
    compute_head = in_compute_dtype(head, hidden)

    def body(carry: tuple[Any, Array], xs: tuple[Array, PerToken]) -> tuple[Any, Array]:
        (total, d_head), (hidden, piece) = carry, xs
        z = chunk_logits(plan, hidden, compute_head, shared.scale)
        raw, scores, excess = _scores(plan, z, piece, shared)
        found, d = _value_and_gradient(loss, scores, piece.rest, shared.rest)
        d_z = logit_gradient(
            plan, z, piece.targets, piece.support, raw, d.log_probs, d.entropy, d.support_log_probs
        )
        if excess is not None and scores.divergence is not None:
            weight = d.divergence[..., None]
            p = jnp.exp(z - raw.log_sum[..., None])
            more = weight * p * (excess - scores.divergence[..., None])
            # Where nothing is asked for, a teacher without an opinion has no gradient either.
            d_z += jnp.where(weight != 0, more, 0.0)
        d_head, d_hidden = head_gradients(plan, d_head, d_z * shared.scale, hidden, compute_head)
        return (jax.tree.map(jnp.add, total, found), d_head), d_hidden

    with jax.named_scope("fused_loss"):
        xs = jax.tree.map(functools.partial(cut, plan), (hidden, pieces))
        zeros = _zeros(loss, plan, compute_head, shared, xs)
        start = (zeros, new_head_gradient(plan, head))
        (total, d_head), d_hidden = jax.lax.scan(body, start, xs)
    return total, (join(d_hidden, hidden.shape[1], plan), d_head.sum(0).astype(head.dtype))


def _value_and_gradient(loss: Loss, scores: TokenScores, rest: Any, shared: Any) -> Any:
    """((loss, metrics), gradient with respect to the scores)."""
    return jax.value_and_grad(lambda s: loss(s, rest, shared), has_aux=True)(scores)


def _backward(
    loss: Loss, plan: Plan, saved: tuple[Array, Array], cotangents: tuple[Array, Metrics]
) -> tuple[Array, Array, None, None]:
    d_hidden, d_head = saved
    by = cotangents[0]
    return (d_hidden * by).astype(d_hidden.dtype), (d_head * by).astype(d_head.dtype), None, None


_fused.defvjp(_forward, _backward)
