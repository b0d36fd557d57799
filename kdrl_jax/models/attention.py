"""Attention over whole rows, and of one new token over a cache. Softmax in fp32 throughout.

Grouped queries (arXiv 2305.13245) meet their shared key without the keys being repeated: query
head n = k·M + m belongs to key/value head k, so queries are viewed as [K, M] heads.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdrl_jax.models.layers import einsum

# Not -inf: a row of padding masks every key, and its softmax must stay finite.
MASKED = -1e30

# Longer rows attend in blocks of this many queries, so that scores take O(L) memory, not O(L²).
QUERY_BLOCK = 512


def attend(
    q: Float[Array, "R L N H"],
    k: Float[Array, "R L K H"],
    v: Float[Array, "R L K H"],
    segment_ids: Int[Array, "R L"],
) -> Float[Array, "R L N H"]:
    """Causal self-attention within the segments of each row.

    Token i sees token j if j <= i in row order and both carry the same non-zero segment id. Where
    nothing may be seen (padding, id 0) the output is meaningless but finite.

    Args:
      q, k, v: rotated queries and keys, and values; compute dtype.
      segment_ids: 0 = padding.

    Returns:
      Weighted values, in q's dtype.
    """
    length = q.shape[1]
    index = jnp.arange(length)
    if length <= QUERY_BLOCK:
        return _attend_block(q, k, v, segment_ids, segment_ids, index)

    # Scores of one block at a time; the backward pass computes them again.
    blocks = -(-length // QUERY_BLOCK)
    pad = blocks * QUERY_BLOCK - length

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(_: None, xs: tuple[Array, Array, Array]) -> tuple[None, Array]:
        q_block, segments, rows = xs
        return None, _attend_block(q_block, k, v, segments, segment_ids, rows)

    rows = jnp.arange(blocks * QUERY_BLOCK).reshape(blocks, QUERY_BLOCK)
    _, out = jax.lax.scan(block, None, (split(q), split(segment_ids), rows))
    out = jnp.moveaxis(out, 0, 1).reshape(q.shape[0], blocks * QUERY_BLOCK, *q.shape[2:])
    return out[:, :length]


def _attend_block(
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R L K H"],
    v: Float[Array, "R L K H"],
    query_segments: Int[Array, "R Q"],
    key_segments: Int[Array, "R L"],
    query_index: Int[Array, "Q"],
) -> Float[Array, "R Q N H"]:
    """`attend` for the queries at `query_index` of each row."""
    key_index = jnp.arange(k.shape[1])
    same = query_segments[:, :, None] == key_segments[:, None, :]
    causal = query_index[:, None] >= key_index[None, :]
    mask = same & (key_segments != 0)[:, None, :] & causal[None]
    scores = _scores("RQKMH,RSKH->RKMQS", _group(q, k.shape[2]), k)
    probs = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    return einsum("RKMQS,RSKH->RQKMH", probs.astype(v.dtype), v).reshape(q.shape)


def attend_cached(
    q: Float[Array, "P G N H"],
    prompt_k: Float[Array, "P K S H"],
    prompt_v: Float[Array, "P K S H"],
    prompt_mask: Bool[Array, "P S"],
    completion_k: Float[Array, "P G K T H"],
    completion_v: Float[Array, "P G K T H"],
    completion_mask: Bool[Array, "T"],
) -> Float[Array, "P G N H"]:
    """Attention of one new token per rollout over its prompt and its own completion.

    The G rollouts of a prompt read the same prompt cache. One softmax runs over both parts.

    Args:
      q: the new token's rotated queries.
      prompt_mask: True at the real tokens of the prompt.
      completion_mask: True at the completion slots written so far, the new token's included.

    Returns:
      Weighted values, in q's dtype.
    """
    grouped = _group(q, prompt_k.shape[1])
    on_prompt = _scores("PGKMH,PKSH->PGKMS", grouped, prompt_k)
    on_completion = _scores("PGKMH,PGKTH->PGKMT", grouped, completion_k)
    scores = jnp.concatenate(
        [
            jnp.where(prompt_mask[:, None, None, None, :], on_prompt, MASKED),
            jnp.where(completion_mask[None, None, None, None, :], on_completion, MASKED),
        ],
        axis=-1,
    )
    probs = jax.nn.softmax(scores, axis=-1).astype(prompt_v.dtype)
    over_prompt, over_completion = jnp.split(probs, [prompt_k.shape[2]], axis=-1)
    out = einsum("PGKMS,PKSH->PGKMH", over_prompt, prompt_v)
    out = out + einsum("PGKMT,PGKTH->PGKMH", over_completion, completion_v)
    return out.reshape(q.shape)


def _group(q: Float[Array, "R L N H"], kv_heads: int) -> Float[Array, "R L K M H"]:
    """View N query heads as K key/value heads of M queries each."""
    return q.reshape(*q.shape[:2], kv_heads, q.shape[2] // kv_heads, q.shape[3])


def _scores(equation: str, q: Array, k: Array) -> Array:
    """q·k / sqrt(H), summed and returned in fp32 whatever the compute dtype."""
    return einsum(equation, q, k, jnp.float32) / math.sqrt(q.shape[-1])
