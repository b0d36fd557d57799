"""Attention over whole rows, and of one new token over a cache. Softmax in fp32 throughout.

Whole rows go to a fused kernel where the platform has one (`kdrl_jax.models.kernels`).

Grouped queries (arXiv 2305.13245) meet their shared key without the keys being repeated: query
head n = k·M + m belongs to key/value head k, so queries are viewed as [K, M] heads.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kdrl_jax.models import kernels
from kdrl_jax.models.context import context_order, context_parts, from_context
from kdrl_jax.models.layers import einsum
from kdrl_jax.sharding import activation_spec, shares
from kdrl_jax.types import KVCache

# Not -inf: a row of padding masks every key, and its softmax must stay finite.
MASKED = -1e30

# Longer rows attend in blocks of this many queries, so that scores take O(L) memory, not O(L²).
QUERY_BLOCK = 512
SPANS = 8

# Rows up to this length are too short for a fused kernel to win anything.
SHORT_ROW = 128


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
      q, k, v: rotated queries and keys, and values; compute dtype. Where devices share a row's
        length, their columns are in `context_order`.
      segment_ids: 0 = padding; in the order of the row.

    Returns:
      Weighted values, in q's dtype.
    """
    implementation = _implementation(q, k)
    if context_parts() > 1:
        return _in_context(q, k, v, segment_ids, implementation)
    if implementation == "blockwise":
        return _blockwise(q, k, v, segment_ids, _attend_block)
    kernel = {"splash": kernels.splash, "cudnn": _cudnn}[implementation]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, segment_ids)
    # The compiler cannot partition kernels: each device runs one on its own rows and heads. Queries
    # are split as their keys are.
    heads = activation_spec(mesh, k.shape, "batch", "length", "kv_heads", None)
    rows = activation_spec(mesh, segment_ids.shape, "batch", "length")
    parts = jax.shard_map(
        kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )
    return parts(q, k, v, segment_ids)


def _in_context(
    q: Float[Array, "R L N H"],
    k: Float[Array, "R L K H"],
    v: Float[Array, "R L K H"],
    segment_ids: Int[Array, "R L"],
    implementation: str,
) -> Float[Array, "R L N H"]:
    """`attend` where devices share a row's length: each has its queries see all keys.

    Keys and values are gathered, which is little where few heads have them. In plain JAX and
    cuDNN every query meets every key, those that the mask hides too.
    """
    mesh, parts = jax.sharding.get_abstract_mesh(), context_parts()
    length, share = q.shape[1], q.shape[1] // parts
    heads = activation_spec(mesh, k.shape, "batch", "length", "kv_heads", None)
    rows = activation_spec(mesh, segment_ids.shape, "batch", None)
    order = context_order(length, parts)
    kernel, of_kernel, attend_block = None, P(), _attend_block
    tiles = [block for block in kernels.SPLASH_BLOCKS if share % block == 0]
    if implementation == "splash" and tiles:
        local = q.shape[2] // (shares("kv_heads", k.shape[2]))
        kernel = kernels.splash_kernel(order, local, tiles[0], parts)
        of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, "context")))
    elif implementation == "cudnn":
        attend_block = kernels.cudnn_masked

    @functools.partial(
        jax.shard_map,
        in_specs=(of_kernel, heads, heads, heads, rows, P("context")),
        out_specs=heads,
        check_vma=False,
    )
    def attend_all(
        kernel: Any, q: Array, k: Array, v: Array, segment_ids: Array, columns: Array
    ) -> Array:
        k, v = (
            from_context(jax.lax.all_gather(x, "context", axis=1, tiled=True), parts)
            for x in (k, v)
        )
        mine = jnp.take(segment_ids, columns, axis=1)
        if kernel is not None:
            return kernels.run_splash(kernel, q, k, v, segment_ids, mine)
        return _query_blocks(q, mine, columns, k, v, segment_ids, attend_block)

    return attend_all(kernel, q, k, v, segment_ids, jnp.asarray(order, jnp.int32))


def _query_blocks(
    q: Float[Array, "R Q N H"],
    query_segments: Int[Array, "R Q"],
    columns: Int[Array, " Q"],
    k: Float[Array, "R L K H"],
    v: Float[Array, "R L K H"],
    segment_ids: Int[Array, "R L"],
    attend_block: Callable[..., Array],
) -> Float[Array, "R Q N H"]:
    """Queries at any columns over all keys, some queries at a time, by `attend_block`."""
    count = q.shape[1]
    blocks = -(-count // QUERY_BLOCK)
    size = -(-count // blocks)
    size += size % 2  # which cuDNN asks for

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(_: None, xs: tuple[Array, Array, Array]) -> tuple[None, Array]:
        queries, segments, index = xs
        return None, attend_block(queries, k, v, segments, segment_ids, index)

    split = functools.partial(_split, blocks=blocks, size=size)
    index = jnp.pad(columns, (0, blocks * size - count)).reshape(blocks, size)
    out = jax.lax.scan(block, None, (split(q), split(query_segments), index))[1]
    return _join(out, count)


def _implementation(q: Float[Array, "R L N H"], k: Float[Array, "R L K H"]) -> str:
    """What `attend` runs: 'splash' on TPU, 'cudnn' on GPU, 'blockwise' where neither fits.

    Chosen while tracing, by the devices of the mesh, which need not be this machine's: a program
    for a TPU can be compiled on a CPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device else jax.default_backend()
    if q.shape[1] > SHORT_ROW:
        if platform == "tpu" and q.dtype == jnp.bfloat16:
            return "splash"
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        if (
            platform == "gpu"
            and half
            and kernels.has_cudnn(q, k)
            and _cudnn_agrees(str(q.dtype), q.shape[2] // k.shape[2], q.shape[3])
        ):
            return "cudnn"
    return "blockwise"


@functools.cache
def _cudnn_agrees(dtype: str, shared: int, width: int) -> bool:
    """Whether cuDNN runs here and gives what plain JAX gives, on padded and on packed rows.

    Its versions and the GPUs' generations differ in what they take; asked once, in a second.

    Args:
      shared: query heads of a key head.
    """

    def run(form: Callable[..., Array], ids: Array) -> list[Array]:
        shapes = [(*ids.shape, heads, width) for heads in (2 * shared, 2, 2)]
        keys = jax.random.split(jax.random.key(0), 3)
        rows = [jax.random.normal(x, s, dtype) for x, s in zip(keys, shapes, strict=True)]

        def total(*qkv: Array) -> Array:
            out = form(*qkv, ids).astype(jnp.float32)
            return jnp.where((ids != 0)[..., None, None], out * jnp.cos(out), 0).sum()

        value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*rows)
        return [value / ids.size, *gradients]

    def same() -> bool:
        column = jnp.arange(2 * SHORT_ROW)
        padded = jnp.stack([column >= 40, column < 199]).astype(jnp.int32)
        packed = jnp.stack([1 + column // 100, 1 + column // 57])
        plain = functools.partial(_blockwise, attend_block=_attend_block)
        for ids in (padded, packed):
            for x, y in zip(run(_cudnn, ids), run(plain, ids), strict=True):
                if not jnp.abs(x - y).max() < 0.02 * jnp.abs(y).max():  # nor NaN
                    return False
        return True

    try:
        # In a thread of its own: this one is tracing, perhaps for a mesh.
        with ThreadPoolExecutor(1) as aside:
            agrees = aside.submit(same).result()
        problem = "other numbers than plain JAX"
    except Exception as error:  # whatever a library that is not at hand here may raise
        agrees, problem = False, str(error).partition("\n")[0][:200]
    if not agrees:
        warnings.warn(
            f"cuDNN attention is not used, as it gave: {problem}", RuntimeWarning, stacklevel=2
        )
    return agrees


# Without this checkpoint the backward pass would find the residuals of both branches stored.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _cudnn(
    q: Float[Array, "R L N H"],
    k: Float[Array, "R L K H"],
    v: Float[Array, "R L K H"],
    segment_ids: Int[Array, "R L"],
) -> Float[Array, "R L N H"]:
    """`attend` by cuDNN, which knows lengths but no segments: packed rows need masks."""
    length = q.shape[1]
    padded = length + -length % kernels.CUDNN_TILE
    packed = functools.partial(_blockwise, attend_block=kernels.cudnn_masked)
    rows = [kernels.pad_rows(x, padded) for x in (q, k, v, segment_ids)]
    out = jax.lax.cond(kernels.is_unpacked(rows[-1]), kernels.cudnn_unpacked, packed, *rows)
    return out[:, :length]


def _blockwise(
    q: Float[Array, "R L N H"],
    k: Float[Array, "R L K H"],
    v: Float[Array, "R L K H"],
    segment_ids: Int[Array, "R L"],
    attend_block: Callable[..., Array],
) -> Float[Array, "R L N H"]:
    """`attend` by blocks of queries, each by `attend_block`."""
    length = q.shape[1]
    if length <= QUERY_BLOCK:
        return attend_block(q, k, v, segment_ids, segment_ids, jnp.arange(length))

    # Scores of one block at a time; the backward pass computes them again. Each span of blocks
    # looks at the keys up to its own end, so that little more than the causal half is computed.
    blocks = -(-length // QUERY_BLOCK)
    ends = sorted({-(-blocks * (span + 1) // SPANS) for span in range(SPANS)})

    split = functools.partial(_split, blocks=blocks, size=QUERY_BLOCK)
    index = jnp.arange(blocks * QUERY_BLOCK).reshape(blocks, QUERY_BLOCK)
    queries = (split(q), split(segment_ids), index)
    done = []
    for first, last in zip([0, *ends], ends, strict=False):
        until = min(last * QUERY_BLOCK, length)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def block(_: None, xs: tuple[Array, Array, Array], until=until) -> tuple[None, Array]:
            q_block, segments, rows = xs
            keys = (k[:, :until], v[:, :until], segments, segment_ids[:, :until])
            return None, attend_block(q_block, *keys, rows)

        span = tuple(x[first:last] for x in queries)
        done.append(jax.lax.scan(block, None, span)[1])
    return _join(jnp.concatenate(done), length)


def _split(x: Array, blocks: int, size: int) -> Array:
    """`[R, L, …]` to `[blocks, R, size, …]`, zeros after column L."""
    x = kernels.pad_rows(x, blocks * size)
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)


def _join(x: Array, length: int) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _attend_block(
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R L K H"],
    v: Float[Array, "R L K H"],
    query_segments: Int[Array, "R Q"],
    key_segments: Int[Array, "R L"],
    query_index: Int[Array, " Q"],
) -> Float[Array, "R Q N H"]:
    """`attend` for the queries at `query_index` of each row, in plain JAX."""
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
    lengths: Int[Array, " B"],
    recent: KVCache,
    count: Int[Array, ""] | int,
) -> Float[Array, "B K M H"]:
    """Attention of one new token per row over what its cache holds and the tokens since.

    One softmax runs over both parts. The cache is only read, so that a decode loop need not carry
    it; the loop writes to `recent`, at the same index in every row.

    Args:
      q: the new token's rotated queries, M = N / K for each key head.
      cache: see `KVCache`; a row's first `lengths` columns count.
      recent: likewise, with C columns, of which the first `count` count, the new token's included.

    Returns:
      Weighted values, in q's dtype.
    """
    width, width_recent = cache.v.shape[2], recent.v.shape[2]
    column = jnp.arange(width + width_recent)[None, :]
    seen = (column < lengths[:, None]) | ((column >= width) & (column < width + count))
    scores = [_scores("BKMH,BKHW->BKMW", q, part.k) for part in (cache, recent)]
    joined = jnp.concatenate(scores, axis=-1)
    joined = jnp.where(seen[:, None, None, :], joined, MASKED)
    weights = jnp.exp(joined - joined.max(-1, keepdims=True))
    out = jnp.zeros(q.shape, jnp.float32)
    for part, v in ((weights[..., :width], cache.v), (weights[..., width:], recent.v)):
        out += einsum("BKMW,BKWH->BKMH", part.astype(v.dtype), v, jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(q.dtype)


def _group(q: Float[Array, "R L N H"], kv_heads: int) -> Float[Array, "R L K M H"]:
    """View N query heads as K key/value heads of M queries each."""
    return q.reshape(*q.shape[:2], kv_heads, q.shape[2] // kv_heads, q.shape[3])


def _scores(equation: str, q: Array, k: Array) -> Array:
    """q·k / sqrt(H), summed and returned in fp32 whatever the compute dtype."""
    return einsum(equation, q, k, jnp.float32) / math.sqrt(q.shape[-1])
