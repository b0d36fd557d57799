"""Low-rank adapters (LoRA, arXiv 2106.09685): W + (alpha / rank) · A·B, of which A and B learn.

A model's tree of weights is then two trees: the base, which nothing changes, and the adapters,
`lora_a` and `lora_b` beside the `kernel` that they add to. `split` and `join` go between them and
the one tree that a `Decoder` reads. There is no dropout: a policy that samples otherwise than it
is trained would not be on-policy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kdrl_jax.models.config import ModelConfig
from kdrl_jax.types import Params

ATTN, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = (*ATTN, *MLP)
"""The projections of a layer, by the names that PEFT and Hugging Face give them."""
ALL_LINEAR = "all-linear"
"""PEFT's word for all of them."""
LEAVES = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which projections have adapters, and of what rank.

    Attributes:
      alpha: the sum of products is scaled by alpha / rank, as in PEFT.
      targets: of TARGETS.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What A·B is multiplied by."""
        return self.alpha / self.rank

    @property
    def names(self) -> str:
        """The targets in words."""
        return ALL_LINEAR if set(self.targets) == set(TARGETS) else ", ".join(self.targets)

    def sizes(self, config: ModelConfig) -> dict[str, tuple[int, int]]:
        """(numbers in A, numbers in B) of all layers, by target."""
        y, r = config.num_layers, self.rank
        widths = projection_widths(config)
        return {t: (y * r * widths[t][0], y * r * widths[t][1]) for t in self.targets}

    def num_params(self, config: ModelConfig) -> int:
        """Numbers in all adapters."""
        return sum(map(sum, self.sizes(config).values()))


def adapter_of(lora: LoRA | None, name: str) -> LoRA | None:
    """`lora` if it adapts the projection `name`."""
    return lora if lora and name in lora.targets else None


def projection_widths(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each projection."""
    d, f, h = config.hidden_size, config.mlp_size, config.head_dim
    q, kv = config.num_heads * h, config.num_kv_heads * h
    return {
        **{"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)},
        **{"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)},
    }


def split(params: Params) -> tuple[Params, Params]:
    """(adapters, base) of a tree that has both; neither holds an empty dict."""
    adapters: Params = {}
    base: Params = {}
    for key, value in params.items():
        if not isinstance(value, dict):
            (adapters if key in LEAVES else base)[key] = value
            continue
        for side, part in zip((adapters, base), split(value), strict=True):
            if part:
                side[key] = part
    return adapters, base


def join(base: Params, adapters: Params) -> Params:
    """The tree that `split` took apart: the same arrays, nothing is computed."""
    both = dict(base)
    for key, value in adapters.items():
        both[key] = join(base[key], value) if isinstance(value, dict) else value
    return both


def product(a: Float[Array, "..."], b: Float[Array, "..."], scale: float) -> Array:
    """scale · A·B of one layer in float32, in the shape of its kernel.

    Args:
      a: `[*inputs, r]`; b: `[r, *outputs]`.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return scale * jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)


def merge_projection(weights: Params, scale: float) -> Params:
    """The weights of one layer's projection with its adapter, if it has one, in the kernel.

    Added in float32, then rounded to the kernel's dtype.
    """
    if LEAVES[0] not in weights:
        return weights
    kernel, (a, b) = weights["kernel"], (weights[name] for name in LEAVES)
    merged = (kernel.astype(jnp.float32) + product(a, b, scale)).astype(kernel.dtype)
    return {k: v for k, v in weights.items() if k not in LEAVES} | {"kernel": merged}


def merge(params: Params, scale: float) -> Params:
    """A joined tree as plain weights, one layer at a time; to be jitted, with its kernels donated.

    Args:
      params: see `join`; stacked over layers.
    """

    def one(weights: Params) -> Params:
        if LEAVES[0] not in weights:
            return weights
        parts = {name: weights[name] for name in ("kernel", *LEAVES)}
        merged = jax.lax.map(lambda layer: merge_projection(layer, scale), parts)
        return {k: v for k, v in weights.items() if k not in LEAVES} | merged

    layers = dict(params["layers"])
    for group in ("attn", "mlp"):
        layers[group] = {name: one(weights) for name, weights in layers[group].items()}
    return {**params, "layers": layers}


class Merged:
    """A stacked kernel that lies somewhere, with its adapter: merged block by block, on the host.

    Attributes:
      shape, dtype: of the kernel; blocks are float32, so that whoever stores them rounds once.
      piece: layers that are best read at a time.
    """

    def __init__(self, kernel: Any, a: np.ndarray, b: np.ndarray, scale: float):
        """Args: a kernel `[Y, *inputs, *outputs]` with `read`, A `[Y, *inputs, r]`, B, the scale.

        See `hf_save.Stored`.
        """
        self._kernel, self._a, self._b, self._scale = kernel, a, b, scale
        self.shape, self.dtype = tuple(kernel.shape), np.dtype(kernel.dtype)
        self.piece: int = kernel.piece

    def read(self, index: Sequence[slice]) -> np.ndarray:
        """The block `index`, float32."""
        found = self._kernel.read(index).astype(np.float32)
        inputs, rank = self._a.ndim - 2, self._a.shape[-1]
        for i, layer in enumerate(range(*index[0].indices(self.shape[0]))):
            a = self._a[layer][tuple(index[1 : 1 + inputs])].astype(np.float32)
            b = self._b[layer][(slice(None), *index[1 + inputs :])].astype(np.float32)
            delta = a.reshape(-1, rank) @ b.reshape(rank, -1)
            found[i] += np.float32(self._scale) * delta.reshape(found[i].shape)
        return found


def merged_stored(base: Params, adapters: Params, scale: float) -> Params:
    """`base`, a tree of things with `read`, with every adapted kernel as `Merged`.

    Args:
      adapters: host arrays, stacked over layers.
    """
    both = dict(base)
    if LEAVES[0] in adapters:
        a, b = (np.asarray(adapters[name]) for name in LEAVES)
        return both | {"kernel": Merged(base["kernel"], a, b, scale)}
    for key, value in adapters.items():
        both[key] = merged_stored(base[key], value, scale)
    return both


def bound_of(inputs: Sequence[int]) -> float:
    """A is drawn from U(−x, x), x = 1/sqrt(fan-in): PEFT's kaiming_uniform_(a=√5)."""
    return 1.0 / math.sqrt(math.prod(inputs))
