"""One token of every row: the same layers as in training, in as few products as they allow.

While tokens are drawn one by one, products are small and their number is what costs. So weights
are laid out once before many tokens: queries, keys and values in one product, gate and up in
another, queries and keys normed and rotated together. Adapters (`kdrl_jax.models.lora`) become part
of weights that are float32. In a narrower dtype they stay beside them: what a kernel is rounded by
is often more than they change, and the policy that draws must be the one that is trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdrl_jax.models.attention import attend_cached
from kdrl_jax.models.config import ModelConfig
from kdrl_jax.models.layers import einsum, rms_norm, rotate
from kdrl_jax.models.lora import LEAVES, LoRA, merge_projection
from kdrl_jax.sharding import constrain, shares
from kdrl_jax.types import COLUMNS, KVCache, Params


class LowRank(NamedTuple):
    """What is added to a product: the adapters of all projections in it, side by side."""

    a: Float[Array, "D R"]
    """R: the ranks of those projections that have one, added up."""
    b: Float[Array, "R F"]
    """Laid out as the product's kernel, scaled; 0 where a rank is another projection's."""


class DecodeLayer(NamedTuple):
    """A layer's weights as `decode_layer` reads them. M = N / K query heads share a key head."""

    input_norm: Float[Array, " D"]
    qkv: Float[Array, "D K*(M+2)*H"]
    """For each key head its queries, the key and the value."""
    qkv_bias: Float[Array, "K M+2 H"] | None
    qk_norm: Float[Array, "M+1 H"] | None
    """Scales of the norms of queries and key."""
    out: Float[Array, "NH D"]
    post_norm: Float[Array, " D"]
    gate_up: Float[Array, "D 2*F"]
    """For each device that has a share of them its gates, then its ups."""
    down: Float[Array, "F D"]
    qkv_lora: LowRank | None = None
    out_lora: LowRank | None = None
    gate_up_lora: LowRank | None = None
    down_lora: LowRank | None = None


class DecodeWeights(NamedTuple):
    """All weights as decoding reads them: whole on `fsdp`, in the compute dtype but for norms."""

    embedding: Float[Array, "V D"]
    layers: list[DecodeLayer]
    final_norm: Float[Array, " D"]
    head: Float[Array, "V D"] | None
    """None: the embedding."""


def fuse_layer(config: ModelConfig, weights: Params, lora: LoRA | None = None) -> DecodeLayer:
    """The weights of one layer, gathered over `fsdp` and laid out for `decode_layer`."""
    k, h = config.num_kv_heads, config.head_dim
    attn, mlp = weights["attn"], weights["mlp"]
    if lora and attn["q_proj"]["kernel"].dtype == jnp.float32:
        merged = functools.partial(merge_projection, scale=lora.scale)
        attn, mlp = ({name: merged(x) for name, x in group.items()} for group in (attn, mlp))
        lora = None

    def qkv_of(q: Array, key: Array, v: Array) -> Array:
        """[…, heads, H] of each as one axis, by key heads."""
        parts = [x.reshape(*x.shape[:-2], k, x.shape[-2] // k, h) for x in (q, key, v)]
        return jnp.concatenate(parts, axis=-2)

    def gate_up_of(gate: Array, up: Array) -> Array:
        of_parts = (len(gate), shares("mlp", config.mlp_size), -1)
        return jnp.stack([gate.reshape(of_parts), up.reshape(of_parts)], axis=2)

    # Two axes each: with more a TPU lays them out anew for every chunk of tokens.
    def flat_qkv(*heads: Array) -> Array:
        split = "kv_heads" if shares("kv_heads", k) > 1 else None
        return constrain(qkv_of(*heads).reshape(len(heads[0]), -1), None, split)

    def flat_gate_up(*halves: Array) -> Array:
        return constrain(gate_up_of(*halves).reshape(len(halves[0]), -1), None, "mlp")

    def rows_of(name: str) -> Callable[[Array], Array]:
        return lambda x: constrain(x.reshape(-1, x.shape[-1]), name, None)

    of_qkv = [attn[name] for name in ("q_proj", "k_proj", "v_proj")]
    of_mlp = [mlp[name] for name in ("gate_proj", "up_proj")]
    bias = scales = None
    if config.qkv_bias:
        bias = qkv_of(*(x["bias"] for x in of_qkv))
    if config.qk_norm:
        q, key = attn["q_norm"]["scale"], attn["k_norm"]["scale"]
        scales = jnp.stack([q] * (config.num_heads // k) + [key])
    low_rank = functools.partial(_low_rank, lora)
    return DecodeLayer(
        input_norm=weights["input_norm"]["scale"],
        qkv=flat_qkv(*(x["kernel"] for x in of_qkv)),
        qkv_bias=bias,
        qk_norm=scales,
        out=rows_of("heads")(attn["o_proj"]["kernel"]),
        post_norm=weights["post_norm"]["scale"],
        gate_up=flat_gate_up(*(x["kernel"] for x in of_mlp)),
        down=rows_of("mlp")(mlp["down_proj"]["kernel"]),
        qkv_lora=low_rank(of_qkv, flat_qkv),
        out_lora=low_rank([attn["o_proj"]], _whole, rows_of("heads")),
        gate_up_lora=low_rank(of_mlp, flat_gate_up),
        down_lora=low_rank([mlp["down_proj"]], _whole, rows_of("mlp")),
    )


def _whole(x: Array) -> Array:
    return constrain(x, None, None)


def _low_rank(
    lora: LoRA | None,
    projections: Sequence[Params],
    lay_out: Callable[..., Array],
    rows: Callable[[Array], Array] = _whole,
) -> LowRank | None:
    """The adapters of projections whose kernels `lay_out` makes one of; None: there are none.

    Args:
      projections: several have kernels `[D, *outputs]`.
      rows: what makes one axis of the inputs.
    """
    adapted = [i for i, x in enumerate(projections) if LEAVES[0] in x]
    if lora is None or not adapted:
        return None
    a = jnp.concatenate([rows(projections[i][LEAVES[0]]) for i in adapted], axis=-1)

    def block(i: int, j: int) -> Array:
        """What the adapter of projection j adds to projection i."""
        x = projections[i]
        if i == j:
            return lora.scale * x[LEAVES[1]]
        return jnp.zeros((lora.rank, *x["kernel"].shape[1:]), a.dtype)

    columns = (jnp.concatenate([block(i, j) for j in adapted]) for i in range(len(projections)))
    return LowRank(a, lay_out(*columns))


def decode_layer(
    config: ModelConfig,
    weights: DecodeLayer,
    x: Float[Array, "B D"],
    rope: tuple[Float[Array, "B 1 1 half"], Float[Array, "B 1 1 half"]],
    cache: KVCache,
    lengths: Int[Array, " B"],
    recent: KVCache,
    index: Int[Array, ""] | int,
) -> tuple[Float[Array, "B D"], KVCache]:
    """`DecoderLayer` for one new token of each row, which attends over `cache` and `recent`.

    Returns:
      The states, and `recent` with the token's key and value in column `index`.
    """
    rows, eps = len(x), config.norm_eps
    with jax.named_scope("attention"):
        k, h = config.num_kv_heads, config.head_dim
        y = rms_norm(x, weights.input_norm, eps)
        heads = _product(y, weights.qkv, weights.qkv_lora).reshape(rows, k, -1, h)
        if weights.qkv_bias is not None:
            heads += jnp.broadcast_to(weights.qkv_bias, heads.shape)
        heads = constrain(heads, "batch", "kv_heads", None, None)
        qk, v = heads[:, :, :-1], heads[:, :, -1:]
        if weights.qk_norm is not None:
            qk = rms_norm(qk, weights.qk_norm, eps)
        qk = rotate(qk, *rope)
        new = KVCache(k=jnp.swapaxes(qk[:, :, -1:], 2, 3), v=v)
        recent = jax.tree.map(functools.partial(_write, index), recent, new, COLUMNS)
        out = attend_cached(qk[:, :, :-1], cache, lengths, recent, index + 1)
        x = x + _product(out.reshape(rows, -1), weights.out, weights.out_lora)
    with jax.named_scope("mlp"):
        y = rms_norm(x, weights.post_norm, eps)
        gate_up = _product(y, weights.gate_up, weights.gate_up_lora)
        gate_up = gate_up.reshape(rows, shares("mlp", config.mlp_size), 2, -1)
        y = (jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]).reshape(rows, -1)
        x = x + _product(constrain(y, "batch", "mlp"), weights.down, weights.down_lora)
    return constrain(x, "batch", "embed"), recent


def _product(
    x: Float[Array, "B D"], kernel: Float[Array, "D F"], beside: LowRank | None
) -> Float[Array, "B F"]:
    y = einsum("BD,DF->BF", x, kernel)
    if beside is None:
        return y
    return y + einsum("BR,RF->BF", einsum("BD,DR->BR", x, beside.a), beside.b)


def _write(index: Array | int, cache: Array, new: Array, axis: int) -> Array:
    """Put a token's part at column `index` of `cache`."""
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), index, axis=axis)
