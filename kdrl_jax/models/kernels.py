"""Fused attention that others wrote: splash attention in Pallas (TPU), flash attention in cuDNN.

Neither repeats keys for the query heads that share them, and neither holds [L, L] scores. Which one
runs is `kdrl_jax.models.attention.attend`'s business.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Tiles of splash attention, of queries and of keys. Rows are padded to whole tiles.
SPLASH_BLOCKS = (512, 384, 256)

# cuDNN's masks must have even sides, and whole tiles are read fastest.
CUDNN_TILE = 64


def splash(
    q: Float[Array, "R L N H"],
    k: Float[Array, "R L K H"],
    v: Float[Array, "R L K H"],
    segment_ids: Int[Array, "R L"],
) -> Float[Array, "R L N H"]:
    """`attend` by jax's splash attention kernel: TPU, bf16. Padding sees the padding before it.

    Args:
      q, k, v: rotated queries and keys, and values; compute dtype.
      segment_ids: 0 = padding.
    """
    length, heads = q.shape[1:3]
    block = min(SPLASH_BLOCKS, key=lambda block: (-length % block, -block))
    kernel = splash_kernel(np.arange(length + -length % block), heads, block)
    padded = [pad_rows(x, length + -length % block) for x in (q, k, v, segment_ids)]
    q, k, v, segments = padded
    return run_splash(kernel, q, k, v, segments, segments)[:, :length]


def splash_kernel(columns: Int[np.ndarray, " Q"], heads: int, block: int, context: int = 1) -> Any:
    """The kernel for queries at `columns` of a row, which see the keys up to their own.

    Args:
      columns: as many as the row has, in the order of the queries.
      heads: on a device.
      block: edge of a tile; divides the queries of a device.
      context: devices that share the queries.
    """
    # Imported here: Pallas takes half a second, and other platforms have no use for it.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    causal = kernels.CausalMask((len(columns), len(columns)))
    causal.q_sequence = columns.astype(np.int32)
    return kernels.make_splash_mha(
        kernels.MultiHeadMask([causal] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=context,
    )


def run_splash(
    kernel: Any,
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R L K H"],
    v: Float[Array, "R L K H"],
    key_segments: Int[Array, "R L"],
    query_segments: Int[Array, "R Q"],
) -> Float[Array, "R Q N H"]:
    """A device's part of what `splash_kernel` made; lengths are multiples of its block."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # the kernel does not scale
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    segments = kernels.SegmentIds(query_segments, key_segments)
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v, segments), 1, 2)


def has_cudnn(q: Float[Array, "R L N H"], k: Float[Array, "R L K H"]) -> bool:
    """Whether this machine's GPU and cuDNN have flash attention for these heads and dtype."""
    if q.shape[-1] > 128:  # some GPUs have the forward pass of wider heads, but no backward pass
        return False
    shapes = [jax.ShapeDtypeStruct((1, CUDNN_TILE, *x.shape[2:]), x.dtype) for x in (q, k, k)]
    try:
        # '9.0' for CUDA, a name for ROCm. cuDNN's flash attention begins with Ampere.
        capability = str(getattr(jax.local_devices(backend="gpu")[0], "compute_capability", ""))
        jax.eval_shape(_cudnn, *shapes)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    major = capability.split(".")[0]
    return major.isdigit() and int(major) >= 8


def is_unpacked(segment_ids: Int[Array, "R L"]) -> Bool[Array, ""]:
    """Whether every row is padding, then one segment without gaps, then padding; each may lack."""
    first, count = _extent(segment_ids)
    column = jnp.arange(segment_ids.shape[1])[None, :]
    inside = (column >= first[:, None]) & (column < (first + count)[:, None])
    only = jnp.where(inside, segment_ids.max(-1, keepdims=True), 0)
    return jnp.all(segment_ids == only)


def cudnn_unpacked(
    q: Float[Array, "R L N H"],
    k: Float[Array, "R L K H"],
    v: Float[Array, "R L K H"],
    segment_ids: Int[Array, "R L"],
) -> Float[Array, "R L N H"]:
    """`attend` of rows that are `is_unpacked`, by cuDNN with no mask but causality and lengths.

    cuDNN knows padding on the right only, so each row is turned until it starts with its segment.

    Args:
      q, k, v: rotated queries and keys, and values; bf16 or fp16.
      segment_ids: 0 = padding.
    """
    length = q.shape[1]
    first, count = _extent(segment_ids)
    row, column = jnp.arange(q.shape[0])[:, None], jnp.arange(length)[None, :]

    def turn(x: Array, by: Array) -> Array:
        # Said to be unique, so that the gradient's scatter needs no atomic additions.
        at = x.at[row, (column + by[:, None]) % length]
        return at.get(unique_indices=True, mode="promise_in_bounds")

    # cuDNN may leave anything outside the lengths: it must reach neither values nor gradients.
    real = (segment_ids != 0)[..., None, None]
    q, k, v = (turn(jnp.where(real, x, 0), first) for x in (q, k, v))
    lengths = jnp.maximum(count, 1)  # a row of padding keeps one key
    out = _cudnn(q, k, v, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    return jnp.where(real, turn(out, -first), 0)


def cudnn_masked(
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R L K H"],
    v: Float[Array, "R L K H"],
    query_segments: Int[Array, "R Q"],
    key_segments: Int[Array, "R L"],
    query_index: Int[Array, " Q"],
) -> Float[Array, "R Q N H"]:
    """`attend` for the queries at `query_index` of each row, by cuDNN with a mask.

    Padding sees all that is before it: what a query without any key gets is left to no kernel.

    Args:
      q, k, v: rotated queries and keys, and values; bf16 or fp16; Q and L even.
      query_segments, key_segments: 0 = padding.
      query_index: columns of the queries.
    """
    same = query_segments[:, :, None] == key_segments[:, None, :]
    causal = query_index[:, None] >= jnp.arange(k.shape[1])[None, :]
    mask = (same | (query_segments == 0)[:, :, None]) & causal[None]
    return _cudnn(q, k, v, mask=mask[:, None])


def pad_rows(x: Array, length: int) -> Array:
    """Zeros after column L of [R, L, ...], up to `length` columns."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _cudnn(q: Array, k: Array, v: Array, **masks: Any) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **masks)


def _extent(segment_ids: Int[Array, "R L"]) -> tuple[Int[Array, " R"], Int[Array, " R"]]:
    """The first column of each row that is no padding, and how many there are."""
    real = segment_ids != 0
    return jnp.argmax(real, axis=-1).astype(jnp.int32), real.sum(-1, dtype=jnp.int32)
