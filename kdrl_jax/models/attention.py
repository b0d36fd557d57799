"""Attention over whole rows, and of one new token over a cache. Softmax in fp32 throughout.

Grouped queries (arXiv 2305.13245) meet their shared key without the keys being repeated: query
head n = k·M + m belongs to key/value head k, so queries are viewed as [K, M] heads.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdrl_jax.models.layers import einsum
from kdrl_jax.types import KVCache

# Not -inf: a row of padding masks every key, and its softmax must stay finite.
MASKED = -1e30

# Longer rows attend in blocks of this many queries, so that scores take O(L) memory, not O(L²).
QUERY_BLOCK = 512
SPANS = 8


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
    if length <= QUERY_BLOCK:
        return _attend_block(q, k, v, segment_ids, segment_ids, jnp.arange(length))

    # Scores of one block at a time; the backward pass computes them again. Each span of blocks
    # looks at the keys up to its own end, so that little more than the causal half is computed.
    blocks = -(-length // QUERY_BLOCK)
    pad = blocks * QUERY_BLOCK - length
    ends = sorted({-(-blocks * (span + 1) // SPANS) for span in range(SPANS)})

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    index = jnp.arange(blocks * QUERY_BLOCK).reshape(blocks, QUERY_BLOCK)
    queries = (split(q), split(segment_ids), index)
    done = []
    for first, last in zip([0, *ends], ends, strict=False):
        until = min(last * QUERY_BLOCK, length)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def block(_: None, xs: tuple[Array, Array, Array], until=until) -> tuple[None, Array]:
            q_block, segments, rows = xs
            keys = (k[:, :until], v[:, :until], segments, segment_ids[:, :until])
            return None, _attend_block(q_block, *keys, rows)

        span = tuple(x[first:last] for x in queries)
        done.append(jax.lax.scan(block, None, span)[1])
    out = jnp.moveaxis(jnp.concatenate(done), 0, 1)
    return out.reshape(q.shape[0], blocks * QUERY_BLOCK, *q.shape[2:])[:, :length]


def _attend_block(
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R L K H"],
    v: Float[Array, "R L K H"],
    query_segments: Int[Array, "R Q"],
    key_segments: Int[Array, "R L"],
    query_index: Int[Array, "Q"],
) -> Float[Array, "R Q N H"]:
    """`attend` for the queries at `query_index` of each row."""
    rows, count, _, width = q.shape
    kv_heads, length = k.shape[2], k.shape[1]
    # The M query heads of a key head side by side on the query axis: one product of matrices per
    # row and key head. Division by the sum comes last, where there is least to divide.
    grouped = _group(q, kv_heads).transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, -1, width)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    scores = _scores("RKQH,RKSH->RKQS", grouped, k).reshape(rows, kv_heads, -1, count, length)
    same = query_segments[:, :, None] == key_segments[:, None, :]
    causal = query_index[:, None] >= jnp.arange(length)[None, :]
    mask = same & (key_segments != 0)[:, None, :] & causal[None]
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(v.dtype).reshape(rows, kv_heads, -1, length)
    out = einsum("RKQS,RKSH->RKQH", weights, v, jnp.float32)
    out = out.reshape(rows, kv_heads, -1, count, width) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def attend_cached(
    q: Float[Array, "B K M H"],
    cache: KVCache,
    lengths: Int[Array, "B"],
    recent: KVCache,
    count: Int[Array, ""] | int,
) -> Float[Array, "B K M H"]:
    """Attention of one new token per row over what its cache holds and the tokens since.

    One softmax runs over both parts. The cache is only read, so that a decode loop need not carry
    it; the loop writes to `recent`, at the same index in every row.

    Args:
      q: the new token's rotated queries, M = N / K for each key head.
      cache: [B, K, W, H]; a row's first `lengths` columns count.
      recent: [B, K, C, H]; the first `count` columns count, the new token's included.

    Returns:
      Weighted values, in q's dtype.
    """
    in_cache = jnp.arange(cache.k.shape[2])[None, :] < lengths[:, None]
    in_recent = jnp.arange(recent.k.shape[2])[None, :] < count

    def look(part: KVCache, seen: Array) -> Array:
        scores = _scores("BKMH,BKWH->BKMW", q, part.k)
        return jnp.where(seen[:, None, None, :], scores, MASKED)

    scores = look(cache, in_cache), look(recent, in_recent)
    top = jnp.maximum(*(part.max(-1, keepdims=True) for part in scores))
    weights = [jnp.exp(part - top) for part in scores]
    total, out = jnp.zeros_like(top), jnp.zeros(q.shape, jnp.float32)
    for part, v in zip(weights, (cache.v, recent.v), strict=True):
        total += part.sum(-1, keepdims=True)
        out += einsum("BKMW,BKWH->BKMH", part.astype(v.dtype), v, jnp.float32)
    return (out / total).astype(q.dtype)


def _group(q: Float[Array, "R L N H"], kv_heads: int) -> Float[Array, "R L K M H"]:
    """View N query heads as K key/value heads of M queries each."""
    return q.reshape(*q.shape[:2], kv_heads, q.shape[2] // kv_heads, q.shape[3])


def _scores(equation: str, q: Array, k: Array) -> Array:
    """q·k / sqrt(H), summed and returned in fp32 whatever the compute dtype."""
    return einsum(equation, q, k, jnp.float32) / math.sqrt(q.shape[-1])
