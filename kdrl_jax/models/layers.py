"""Building blocks of a decoder layer: projections, norms, MLP and rotary embeddings.

Parameters are fp32 master weights; each block casts its own to the compute dtype when it runs.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kdrl_jax.models.config import ModelConfig, RopeScaling
from kdrl_jax.models.lora import LoRA, adapter_of, bound_of
from kdrl_jax.sharding import constrain


def einsum(equation: str, x: Array, y: Array, dtype: Any = None) -> Array:
    """`jnp.einsum` with a result of `dtype`, by default x's; accelerators sum in fp32 inside.

    fp32 operands ask for true fp32 products: accelerators would otherwise round them to TF32 or
    bf16, which is far outside the parity bound.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dtype = x.dtype if dtype is None else dtype
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=dtype)


class Projection(nnx.Module):
    """x · kernel + bias over the last axes of x, with kernel ~ N(0, scale² / fan_in).

    Args:
      inputs, outputs: the axes of x that are summed over, and those that come in their place; the
        kernel has both.
      lora: of the adapter, if it has one: A is random and B zero, so it changes nothing yet.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        bias: bool = False,
        scale: float = 1.0,
        lora: LoRA | None = None,
    ):
        self.inputs, self.outputs = inputs, outputs
        std = scale / math.sqrt(math.prod(inputs))
        shape = (*inputs, *outputs)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.bias = nnx.data(None)
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))
        self.lora_a, self.lora_b, self.lora = nnx.data(None), nnx.data(None), lora
        if lora:
            a, most = (*inputs, lora.rank), bound_of(inputs)
            self.lora_a = nnx.Param(
                jax.random.uniform(rngs.params(), a, jnp.float32, minval=-most, maxval=most)
            )
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, *outputs), jnp.float32))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        # As a product of two matrices, which compilers do best: more axes cost the backward pass
        # twice the time on CPU.
        fan_in, rows = math.prod(self.inputs), x.shape[: x.ndim - len(self.inputs)]
        kernel = self.kernel[...].astype(x.dtype).reshape(fan_in, -1)
        x = x.reshape(-1, fan_in)
        y = einsum("BD,DF->BF", x, kernel)
        if self.lora is not None and self.lora_a is not None and self.lora_b is not None:
            # Beside the product, never in its weights: so none has a gradient of their size.
            a = self.lora_a[...].astype(x.dtype).reshape(fan_in, -1)
            b = self.lora_b[...].astype(x.dtype).reshape(self.lora.rank, -1)
            y = y + einsum("BR,RF->BF", self.lora.scale * einsum("BD,DR->BR", x, a), b)
        y = y.reshape(*rows, *self.outputs)
        if self.bias is not None:
            bias = self.bias[...].astype(x.dtype)
            y = y + jnp.broadcast_to(bias, y.shape)
        return y


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · scale over the last axis, in fp32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, *, rngs: nnx.Rngs):
        del rngs  # the scale starts at one; the argument keeps the blocks alike
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(x: Float[Array, "... D"], scale: Array, eps: float) -> Float[Array, "... D"]:
    """`RMSNorm` with a scale that has some of the last axes of x."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * jnp.broadcast_to(scale.astype(jnp.float32), y.shape)).astype(x.dtype)


class MLP(nnx.Module):
    """down(silu(gate(x)) · up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, lora: LoRA | None = None, *, rngs: nnx.Rngs):
        d, f, by = config.hidden_size, config.mlp_size, functools.partial(adapter_of, lora)
        self.gate_proj = Projection((d,), (f,), rngs=rngs, lora=by("gate_proj"))
        self.up_proj = Projection((d,), (f,), rngs=rngs, lora=by("up_proj"))
        down = residual_scale(config)
        self.down_proj = Projection((f,), (d,), rngs=rngs, scale=down, lora=by("down_proj"))

    def __call__(self, x: Float[Array, "R L D"]) -> Float[Array, "R L D"]:
        y = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(constrain(y, "batch", "length", "mlp"))


class AttentionProjections(nnx.Module):
    """What attention learns: q, k, v and output projections, and Qwen3's norms of q and k.

    How queries meet keys (a whole row, or a cache) is `kdrl_jax.models.attention`'s business.
    """

    def __init__(self, config: ModelConfig, lora: LoRA | None = None, *, rngs: nnx.Rngs):
        d, n, k, h = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        by = functools.partial(adapter_of, lora)

        def heads(name: str, count: int) -> Projection:
            return Projection((d,), (count, h), rngs=rngs, bias=config.qkv_bias, lora=by(name))

        self.q_proj = heads("q_proj", n)
        self.k_proj, self.v_proj = heads("k_proj", k), heads("v_proj", k)
        out = residual_scale(config)
        self.o_proj = Projection((n, h), (d,), rngs=rngs, scale=out, lora=by("o_proj"))
        self.q_norm = nnx.data(None)
        self.k_norm = nnx.data(None)
        if config.qk_norm:
            self.q_norm = RMSNorm(h, config.norm_eps, rngs=rngs)
            self.k_norm = RMSNorm(h, config.norm_eps, rngs=rngs)

    def qkv(
        self, x: Float[Array, "R L D"], rope: tuple[Array, Array]
    ) -> tuple[Float[Array, "R L N H"], Float[Array, "R L K H"], Float[Array, "R L K H"]]:
        """Queries and keys, normed (Qwen3) and rotated to their positions, and values."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = constrain(rotate(q, *rope), "batch", "length", "heads", None)
        k = constrain(rotate(k, *rope), "batch", "length", "kv_heads", None)
        return q, k, constrain(v, "batch", "length", "kv_heads", None)


def residual_scale(config: ModelConfig) -> float:
    """1/sqrt(2Y) for the two projections a layer adds to the residual stream (GPT-2)."""
    return 1.0 / math.sqrt(2 * config.num_layers)


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """The angle per position of each pair of dimensions, and the factor on cos and sin.

    Computed in float32 step by step as `transformers` does, since a rounding of 1e-7 in a
    frequency is 1e-3 radians at position 10,000.

    Returns:
      (frequencies float32 [H/2] in radians per position, attention factor).
    """
    h = config.head_dim
    exponent = np.arange(0, h, 2, dtype=np.float32) / np.float32(h)
    inverse = np.float32(1.0) / np.float32(config.rope_theta) ** exponent
    scaling = config.rope_scaling
    if scaling is None:
        return inverse, 1.0
    if scaling.kind == "linear":
        return inverse / np.float32(scaling.factor), 1.0
    if scaling.kind == "llama3":
        return _llama3_frequencies(inverse, scaling), 1.0
    return _yarn_frequencies(inverse, scaling, config), _yarn_attention_factor(scaling)


def _llama3_frequencies(inverse: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Short wavelengths kept, long ones stretched by `factor`, a linear blend in between."""
    length = np.float32(s.original_max_positions)
    wavelength = np.float32(2 * math.pi) / inverse
    kept = (length / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return ((1 - kept) * inverse / s.factor + kept * inverse).astype(np.float32)


def _yarn_frequencies(inverse: np.ndarray, s: RopeScaling, config: ModelConfig) -> np.ndarray:
    """YaRN (arXiv 2309.00071, eq. 17-23): a ramp over dimensions from kept to stretched."""
    h, theta = config.head_dim, config.rope_theta

    def dimension(turns: float) -> float:
        """Where a pair of dimensions turns `turns` times over the original context."""
        ratio = s.original_max_positions / (turns * 2 * math.pi)
        return h * math.log(ratio) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, h - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(h // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    stretched = np.clip(ramp, 0, 1)
    return (inverse / s.factor * stretched + inverse * (1 - stretched)).astype(np.float32)


def _yarn_attention_factor(s: RopeScaling) -> float:
    """The temperature of YaRN's eq. 22 as a factor on cos and sin: 0.1·mscale·ln(factor) + 1."""
    if s.attention_factor is not None:
        return float(s.attention_factor)

    def mscale(weight: float) -> float:
        return 1.0 if s.factor <= 1 else 0.1 * weight * math.log(s.factor) + 1.0

    if s.mscale and s.mscale_all_dim:
        return mscale(s.mscale) / mscale(s.mscale_all_dim)
    return mscale(1.0)


def rope_angles(
    config: ModelConfig, positions: Int[Array, "*rows"]
) -> tuple[Float[Array, "*rows 1 half"], Float[Array, "*rows 1 half"]]:
    """cos and sin of each position's angles in fp32, with an axis for the heads."""
    frequencies, factor = rope_frequencies(config)
    angles = positions.astype(jnp.float32)[..., None, None] * jnp.broadcast_to(
        jnp.asarray(frequencies), (*positions.shape, 1, frequencies.size)
    )
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "R L N H"], cos: Float[Array, "#R #L 1 half"], sin: Float[Array, "#R #L 1 half"]
) -> Float[Array, "R L N H"]:
    """Rotate the pairs (x[i], x[i + H/2]) by the given angles (RoPE, arXiv 2104.09864), in fp32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
