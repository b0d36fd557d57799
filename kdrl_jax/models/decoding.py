"""One token of every row: the same layers as in training, in as few products as they allow.

While tokens are drawn one by one, products are small and their number is what costs. So weights
are laid out once before many tokens: queries, keys and values in one product, gate and up in
another, queries and keys normed and rotated together.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdrl_jax.models.attention import attend_cached
from kdrl_jax.models.config import ModelConfig
from kdrl_jax.models.layers import einsum, rms_norm, rotate
from kdrl_jax.sharding import constrain, shares
from kdrl_jax.types import COLUMNS, KVCache, Params


class DecodeLayer(NamedTuple):
    """A layer's weights as `decode_layer` reads them. M = N / K query heads share a key head."""

    input_norm: Float[Array, "D"]
    qkv: Float[Array, "D K*(M+2)*H"]
    """For each key head its queries, the key and the value."""
    qkv_bias: Float[Array, "K M+2 H"] | None
    qk_norm: Float[Array, "M+1 H"] | None
    """Scales of the norms of queries and key."""
    out: Float[Array, "NH D"]
    post_norm: Float[Array, "D"]
    gate_up: Float[Array, "D 2*F"]
    """For each device that has a share of them its gates, then its ups."""
    down: Float[Array, "F D"]


class DecodeWeights(NamedTuple):
    """All weights as decoding reads them: whole on `fsdp`, in the compute dtype but for norms."""

    embedding: Float[Array, "V D"]
    layers: list[DecodeLayer]
    final_norm: Float[Array, "D"]
    head: Float[Array, "V D"] | None
    """None: the embedding."""


def fuse_layer(config: ModelConfig, weights: Params) -> DecodeLayer:
    """The weights of one layer, gathered over `fsdp` and laid out for `decode_layer`."""
    k, h, d = config.num_kv_heads, config.head_dim, config.hidden_size
    shared = config.num_heads // k
    attn, mlp = weights["attn"], weights["mlp"]
    names = ("q_proj", "k_proj", "v_proj")

    def by_key_head(name: str, leaf: str) -> Array:
        x = attn[name][leaf]
        return x.reshape(*x.shape[:-2], k, x.shape[-2] // k, h)

    qkv = jnp.concatenate([by_key_head(name, "kernel") for name in names], axis=-2)
    bias = scales = None
    if config.qkv_bias:
        bias = jnp.concatenate([by_key_head(name, "bias") for name in names], axis=-2)
    if config.qk_norm:
        q, key = attn["q_norm"]["scale"], attn["k_norm"]["scale"]
        scales = jnp.stack([q] * shared + [key])
    of_parts = (d, shares("mlp", config.mlp_size), -1)
    gate, up = (mlp[name]["kernel"].reshape(of_parts) for name in ("gate_proj", "up_proj"))
    # Two axes each: with more a TPU lays them out anew for every chunk of tokens.
    qkv, gate_up = qkv.reshape(d, -1), jnp.stack([gate, up], axis=2).reshape(d, -1)
    return DecodeLayer(
        input_norm=weights["input_norm"]["scale"],
        qkv=constrain(qkv, None, "kv_heads" if shares("kv_heads", k) > 1 else None),
        qkv_bias=bias,
        qk_norm=scales,
        out=constrain(attn["o_proj"]["kernel"].reshape(-1, d), "heads", None),
        post_norm=weights["post_norm"]["scale"],
        gate_up=constrain(gate_up, None, "mlp"),
        down=constrain(mlp["down_proj"]["kernel"], "mlp", None),
    )


def decode_layer(
    config: ModelConfig,
    weights: DecodeLayer,
    x: Float[Array, "B D"],
    rope: tuple[Float[Array, "B 1 1 half"], Float[Array, "B 1 1 half"]],
    cache: KVCache,
    lengths: Int[Array, "B"],
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
        heads = _product(y, weights.qkv).reshape(rows, k, -1, h)
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
        x = x + _product(out.reshape(rows, -1), weights.out)
    with jax.named_scope("mlp"):
        y = rms_norm(x, weights.post_norm, eps)
        gate_up = _product(y, weights.gate_up)
        gate_up = gate_up.reshape(rows, shares("mlp", config.mlp_size), 2, -1)
        y = (jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]).reshape(rows, -1)
        x = x + _product(constrain(y, "batch", "mlp"), weights.down)
    return constrain(x, "batch", "embed"), recent


def _product(x: Float[Array, "B D"], kernel: Float[Array, "D F"]) -> Float[Array, "B F"]:
    return einsum("BD,DF->BF", x, kernel)


def _write(index: Array | int, cache: Array, new: Array, axis: int) -> Array:
    """Put a token's part at column `index` of `cache`."""
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), index, axis=axis)
