"""The order of a row's columns where several devices share its length.

With causal attention the last columns have the most to look at. So the length is cut into two
parts for each device, and a device gets one from the front and one from the back: all have the
same to do (the layout of arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kdrl_jax.sharding import shares

TILE = 256
"""Columns that a device's share is filled up to, where it is longer: a tile of the kernels."""


def context_parts() -> int:
    """Devices of the current mesh that share a row's length."""
    return shares("length", 0)


def context_length(length: int) -> int:
    """`length` filled up to what `context_parts` devices can share."""
    parts = context_parts()
    share = parts * (TILE if length > parts * TILE else 2)
    return length if parts == 1 else length + -length % share


def context_order(length: int, parts: int) -> Int[np.ndarray, " L"]:
    """Which column of a row comes where: each of `parts` devices has L / parts in a row."""
    halves = np.arange(length).reshape(2 * parts, -1)
    return np.stack([halves[:parts], halves[: -parts - 1 : -1]], 1).ravel()


def to_context(x: Array, parts: int) -> Array:
    """Columns, axis 1, from the order of the row to `context_order`."""
    rows, length, *rest = x.shape
    x = x.reshape(rows, 2 * parts, length // (2 * parts), *rest)
    return jnp.stack([x[:, :parts], x[:, : parts - 1 : -1]], axis=2).reshape(rows, length, *rest)


def from_context(x: Array, parts: int) -> Array:
    """The inverse of `to_context`."""
    rows, length, *rest = x.shape
    x = x.reshape(rows, parts, 2, length // (2 * parts), *rest)
    return jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1).reshape(rows, length, *rest)
