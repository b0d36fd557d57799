"""Reverse KL to the teacher from next-token distributions, not only from the tokens sampled.

    D = KL(π_θ‖π_T) = Σ_v p_v·(log p_v − log q_v)        p of the student, q of the teacher

per position, for `kd_divergence` of `kdrl_loss`: over K ids (`topk_divergence`) or exactly, over
the whole vocabulary (`full_divergence`). The expectation over the next token is then exact and no
importance ratio multiplies it; only the prefixes are sampled.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdrl_jax.objectives._checks import require_name, require_shape
from kdrl_jax.objectives._chunks import Plan, by_shard, cut, join, make_plan, require_head
from kdrl_jax.sharding import constrain

Support = Literal["teacher", "student", "tail", "floor"]
SUPPORTS: tuple[Support, ...] = ("teacher", "student", "tail", "floor")

LOG_FLOOR = math.log(1e-8)
"""Log-prob, in nats, of an id that the truncated teacher leaves out; support "floor"."""

MIN_REST = 1e-6
"""Mass beyond the K ids that float32 sums can still tell from 0."""


def topk_divergence(
    student_log_probs: Float[Array, "... K"],
    teacher_log_probs: Float[Array, "... K"],
    support: Support = "teacher",
    *,
    entropy: Float[Array, "..."] | None = None,
    log_floor: float = LOG_FLOOR,
) -> Float[Array, "..."]:
    """Returns the reverse KL to a teacher that is known at K ids of each position.

        floor              −H(p) − Σ_k p_k·log q̂_k − (1 − Σ_k p_k)·ln ε
        teacher, student   Σ_k p̂_k·log(p̂_k/q̂_k)
        tail               Σ_k p_k·log(p_k/q_k) + p_r·log(p_r/q_r)     r: all other ids at once

    p̂ and q̂ are renormalised over the K ids. "floor" is the Top-K of arXiv 2506.02208, appendix
    A.3: the teacher's logits outside its K are −∞ there, and the student keeps its whole
    vocabulary. The reverse KL to it is infinite, so the teacher gets the small probability ε
    outside its K: each such token is penalised by −ln ε nats. The other three supports take that
    penalty away: "teacher" and "student" compare the K ids alone, and "tail" puts the rest into
    one bucket, which makes it a lower bound of the full KL. All four are the full KL where K is the
    whole vocabulary.

    Args:
      student_log_probs: `[..., K]` in nats, normalised over the whole vocabulary; differentiable.
      teacher_log_probs: `[..., K]` of the same ids; no gradient.
      support: whose K likeliest ids these are, "teacher" or "student" (one formula: the caller
        has chosen them), "tail" for ids of either, or "floor" for the teacher's; static.
      entropy: H(p) `[...]` of the student over the whole vocabulary, in nats, differentiable;
        "floor" needs it, the others do not read it.
      log_floor: ln ε of "floor", in nats, below 0.

    Returns:
      D `[...]`. Where a log-prob of the teacher is nan, nan without gradient: mask it there.

    Raises:
      ValueError: shapes differ, `support` is unknown, or "floor" has no entropy.
    """
    require_name("support", support, SUPPORTS)
    shape = jnp.shape(student_log_probs)
    require_shape(shape, "student_log_probs", teacher_log_probs=teacher_log_probs)
    teacher = jax.lax.stop_gradient(jnp.asarray(teacher_log_probs))
    silent = jnp.isnan(teacher).any(-1)
    student = jnp.where(silent[..., None], 0.0, jnp.asarray(student_log_probs))
    teacher = jnp.where(silent[..., None], 0.0, teacher)
    if support == "floor":
        if entropy is None:
            raise ValueError("entropy: None found; support 'floor' needs the student's entropy")
        require_shape(shape[:-1], "student_log_probs without K", entropy=entropy)
        entropy = jnp.where(silent, 0.0, entropy)
        cross = (jnp.exp(student) * jax.nn.log_softmax(teacher)).sum(-1)
        cross += _rest_mass(jax.nn.logsumexp(student, axis=-1)) * log_floor
        return jnp.where(silent, jnp.nan, -entropy - cross)
    rest: Any = 0.0
    if support == "tail":
        rest = _rest_term(student, teacher)
    else:
        student, teacher = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    inside = (jnp.exp(student) * (student - teacher)).sum(-1)
    return jnp.where(silent, jnp.nan, inside + rest)


def _rest_mass(log_inside: Float[Array, "..."]) -> Array:
    """Returns 1 − e^log_inside by expm1; 0, without a gradient, where it is below MIN_REST."""
    some = log_inside < -MIN_REST
    # An argument that keeps value and gradient finite.
    return jnp.where(some, -jnp.expm1(jnp.where(some, log_inside, -1.0)), 0.0)


def _rest_term(student: Float[Array, "... K"], teacher: Float[Array, "... K"]) -> Array:
    """Returns p_r·log(p_r/q_r) of the mass beyond the ids; 0 where the student has none there."""
    log_inside, log_inside_q = (jax.nn.logsumexp(x, axis=-1) for x in (student, teacher))
    rest = _rest_mass(log_inside)
    rest_q = -jnp.expm1(jnp.minimum(log_inside_q, -MIN_REST))
    some = rest > 0
    log_rest = jnp.log(jnp.where(some, rest, 1.0))
    return jnp.where(some, rest * (log_rest - jnp.log(rest_q)), 0.0)


class _Blocks(NamedTuple):
    """The vocabulary in `number` blocks of `width` ids; the last one is filled up."""

    number: int
    width: int


def full_divergence(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "V D"],
    teacher_hidden: Float[Array, "R T E"],
    teacher_head: Float[Array, "V2 E"],
    *,
    temperature: float | Float[Array, ""],
    valid_vocab: int,
    chunk: int = 512,
    vocab_chunk: int = 16_384,
) -> Float[Array, "R T"]:
    """KL(π_θ‖π_T) over the whole vocabulary at each position, exactly.

    Neither [R, T, V] nor [chunk, V] is ever held: the vocabulary streams past in blocks, under a
    running maximum (Milakov and Gimelshein, arXiv 1805.02867), and the backward pass computes
    each block again for

        ∂KL/∂z_v = p_v·(log p_v − log q_v − KL)        z = student's logits/τ

    Differentiable in hidden and head, in reverse mode; the teacher has no gradient. Products run
    in the dtype of each model's hidden states and accumulate in float32.

    Args:
      hidden, teacher_hidden: `[R, T, D]` and `[R, T, E]` after the final norms, at the same
        positions of the same rows.
      head, teacher_head: `[V, D]` and `[V2, E]`; the first valid_vocab rows are the same ids.
      temperature: τ of both, a scalar, may be traced; 0 means 1. No gradient.
      valid_vocab: ids from here on have probability 0 for both.
      chunk: tokens that one device has in work at a time (one column of its rows at least).
      vocab_chunk: ids at a time; it need not divide anything.

    Returns:
      D, float32 `[R, T]`, in nats; never negative up to rounding.

    Raises:
      ValueError: shapes do not fit, or valid_vocab, chunk or vocab_chunk is out of range.
    """
    plan, scale = make_plan(
        hidden, head, temperature=temperature, valid_vocab=valid_vocab, chunk=chunk
    )
    require_head(valid_vocab, teacher_hidden=teacher_hidden, teacher_head=teacher_head)
    like = (*hidden.shape[:2], teacher_hidden.shape[2])
    require_shape(like, "[R, T of hidden, E]", teacher_hidden=teacher_hidden)
    if vocab_chunk < 1:
        raise ValueError(f"vocab_chunk: {vocab_chunk} found; must be 1 or more")
    width = min(vocab_chunk, valid_vocab)
    blocks = _Blocks(math.ceil(valid_vocab / width), width)
    return _scan_divergence(plan, blocks, hidden, head, teacher_hidden, teacher_head, scale)


def _in_blocks(plan: Plan, blocks: _Blocks, head: Array, hidden: Array) -> Float[Array, "n V D"]:
    """The valid rows of a head, block by block, in the dtype of the products."""
    head = head[: plan.valid_vocab].astype(hidden.dtype)
    head = jnp.pad(head, [(0, blocks.number * blocks.width - plan.valid_vocab), (0, 0)])
    return constrain(head.reshape(blocks.number, blocks.width, -1), None, "vocab", None)


def _block_logits(hidden: Array, block: Array, scale: Array) -> Float[Array, "R W V"]:
    z = jnp.einsum("RWD,VD->RWV", hidden, block, preferred_element_type=jnp.float32) * scale
    return constrain(z, "tokens", None, "vocab")


def _valid(plan: Plan, blocks: _Blocks, index: Int[Array, ""]) -> Bool[Array, "1 1 V"]:
    ids = jax.lax.broadcasted_iota(jnp.int32, (1, 1, blocks.width), 2)
    return ids + index * blocks.width < plan.valid_vocab


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan_divergence(
    plan: Plan,
    blocks: _Blocks,
    hidden: Array,
    head: Array,
    teacher_hidden: Array,
    teacher_head: Array,
    scale: Array,
) -> Array:
    return _forward(plan, blocks, hidden, head, teacher_hidden, teacher_head, scale)[0]


def _forward(
    plan: Plan,
    blocks: _Blocks,
    hidden: Array,
    head: Array,
    teacher_hidden: Array,
    teacher_head: Array,
    scale: Array,
) -> tuple[Array, tuple[Array, ...]]:
    heads = (
        jnp.arange(blocks.number),
        _in_blocks(plan, blocks, head, hidden),
        _in_blocks(plan, blocks, teacher_head, teacher_hidden),
    )

    def tokens(_: None, xs: tuple[Array, Array]) -> tuple[None, tuple[Array, ...]]:
        hidden, teacher_hidden = xs

        def block(carry: tuple[Array, ...], xs: tuple[Array, ...]) -> tuple[Any, None]:
            # Σe^y and Σe^y·(y − y_T), with y and y_T relative to the largest logits so far.
            top, total, excess, top_q, total_q = carry
            index, rows, teacher_rows = xs
            valid = _valid(plan, blocks, index)
            z = _block_logits(hidden, rows, scale)
            z_q = _block_logits(teacher_hidden, teacher_rows, scale)
            new_top = jnp.maximum(top, jnp.where(valid, z, -jnp.inf).max(-1))
            new_top_q = jnp.maximum(top_q, jnp.where(valid, z_q, -jnp.inf).max(-1))
            y = jnp.where(valid, z - new_top[..., None], -jnp.inf)
            y_q = jnp.where(valid, z_q - new_top_q[..., None], -jnp.inf)
            e, step, step_q = jnp.exp(y), top - new_top, top_q - new_top_q
            excess = jnp.exp(step) * (excess + total * (step - step_q))
            excess += (e * jnp.where(valid, y - y_q, 0.0)).sum(-1)
            total = jnp.exp(step) * total + e.sum(-1)
            total_q = jnp.exp(step_q) * total_q + jnp.exp(y_q).sum(-1)
            return (new_top, total, excess, new_top_q, total_q), None

        zero = jnp.zeros(hidden.shape[:2], jnp.float32)
        low = zero - 1e30  # below any logit, and finite: 0·(low − top) must not be nan
        carry, _ = jax.lax.scan(block, (low, zero, zero, low, zero), heads)
        top, total, excess, top_q, total_q = carry
        log_total, log_total_q = jnp.log(total), jnp.log(total_q)
        divergence = excess / total - log_total + log_total_q
        return None, (divergence, top + log_total, top_q + log_total_q)

    with jax.named_scope("full_divergence"):
        _, outputs = jax.lax.scan(tokens, None, (cut(plan, hidden), cut(plan, teacher_hidden)))
        divergence, log_sum, log_sum_q = (join(x, hidden.shape[1], plan) for x in outputs)
    saved = (hidden, head, teacher_hidden, teacher_head, scale, divergence, log_sum, log_sum_q)
    return divergence, saved


def _backward(
    plan: Plan, blocks: _Blocks, saved: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, None, None, None]:
    hidden, head, teacher_hidden, teacher_head, scale, *per_token = saved
    heads = (
        jnp.arange(blocks.number),
        _in_blocks(plan, blocks, head, hidden),
        _in_blocks(plan, blocks, teacher_head, teacher_hidden),
    )

    def tokens(d_head: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden, teacher_hidden, d, *per_token = xs
        by_part = by_shard(plan, hidden)
        d, divergence, log_sum, log_sum_q = (x[..., None] for x in (d, *per_token))

        def block(d_hidden: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
            index, rows, teacher_rows, d_rows = xs
            valid = _valid(plan, blocks, index)
            log_p = _block_logits(hidden, rows, scale) - log_sum
            log_q = _block_logits(teacher_hidden, teacher_rows, scale) - log_sum_q
            d_z = d * jnp.exp(log_p) * (log_p - log_q - divergence)
            # Where nothing is asked for, a teacher without an opinion has no gradient either.
            d_z = jnp.where(valid & (d != 0), d_z, 0.0)
            d_z = (d_z * scale).astype(hidden.dtype)
            d_hidden += jnp.einsum("RWV,VD->RWD", d_z, rows, preferred_element_type=jnp.float32)
            # As in `logprobs`: the parts of the batch meet once, after the loops.
            parts = (by_shard(plan, d_z), by_part)
            d_rows += jnp.einsum("ZRWV,ZRWD->ZVD", *parts, preferred_element_type=jnp.float32)
            return d_hidden, constrain(d_rows, "tokens", "vocab", None)

        zeros = jnp.zeros(hidden.shape, jnp.float32)
        d_hidden, d_head = jax.lax.scan(block, zeros, (*heads, d_head))
        return constrain(d_head, None, "tokens", "vocab", None), d_hidden.astype(hidden.dtype)

    with jax.named_scope("full_divergence_backward"):
        shape = (blocks.number, plan.shards, blocks.width, head.shape[1])
        d_head = constrain(jnp.zeros(shape, jnp.float32), None, "tokens", "vocab", None)
        xs = tuple(cut(plan, x) for x in (hidden, teacher_hidden, cotangent, *per_token))
        d_head, d_hidden = jax.lax.scan(tokens, d_head, xs)
        d_head = d_head.sum(1).reshape(-1, head.shape[1])[: plan.valid_vocab]
        d_head = jnp.pad(d_head, [(0, head.shape[0] - plan.valid_vocab), (0, 0)])
        return join(d_hidden, hidden.shape[1], plan), d_head.astype(head.dtype), None, None, None


_scan_divergence.defvjp(_forward, _backward)
