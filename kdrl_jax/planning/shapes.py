"""Shapes that stand for arrays on devices that need not be there."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from kdrl_jax.sharding import placed, placed_batch, replicated


def device_bytes(tree: Any) -> float:
    """Bytes of a device that arrays of these shapes and shardings take."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def results(lowered: jax.stages.Lowered) -> Any:
    """Shapes and shardings of what a program returns."""
    return placed(lowered.out_info, lowered.compile().output_shardings)


def to_mesh(mesh: Mesh, tree: Any) -> Any:
    """As `kdrl_jax.sharding.to_mesh`, for shapes."""
    return placed(tree, jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), tree))


def alike(tree: Any, other: Any) -> bool:
    """Whether all arrays lie alike."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    """int32 of a shape, nowhere yet."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(mesh: Mesh, *shape: int) -> jax.ShapeDtypeStruct:
    """float32 split as a batch is."""
    return placed_batch(mesh, jax.ShapeDtypeStruct(shape, np.float32))


def number(mesh: Mesh, dtype: Any) -> Any:
    """A scalar on every device."""
    return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))
