"""Weights of a frozen model in 8 bits: half the memory of bfloat16, computed with as bfloat16.

The projections of the decoder layers, each with a scale per output channel: W ≈ scale · Q, with Q
of integers from −127 to 127. Embedding, output head and norms stay as they are: the head's rounding
would reach every log-prob.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from kdrl_jax.sharding import path_name
from kdrl_jax.types import Params

# Axes of a stacked kernel that a product sums over.
_INPUTS = {"q_proj": (1,), "k_proj": (1,), "v_proj": (1,), "o_proj": (1, 2)}
_INPUTS |= {"gate_proj": (1,), "up_proj": (1,), "down_proj": (1,)}


class Quantized(NamedTuple):
    """A kernel, of which the inputs' axes of `scale` have size 1."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]


@jax.jit
def quantize(params: Params) -> Params:
    """`params` with every projection in the layers as `Quantized`; scales are float32."""

    def one(path: Any, x: Array) -> Any:
        parts = path_name(path).split("/")
        if parts[-1] != "kernel" or parts[0] != "layers":
            return x
        x = x.astype(jnp.float32)
        scale = jnp.abs(x).max(_INPUTS[parts[-2]], keepdims=True) / 127
        scale = jnp.where(scale > 0, scale, 1.0)
        return Quantized(jnp.round(x / scale).astype(jnp.int8), scale)

    return jax.tree_util.tree_map_with_path(one, params)


def dequantize(params: Params, dtype: Any) -> Params:
    """`Quantized` kernels as arrays of `dtype`; whatever else there is as it is."""

    def one(x: Any) -> Any:
        if not isinstance(x, Quantized):
            return x
        return (x.values.astype(jnp.float32) * jnp.broadcast_to(x.scale, x.values.shape)).astype(
            dtype
        )

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, Quantized))
