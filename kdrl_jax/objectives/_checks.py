"""Shape checks that name the array at fault."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp


def require_shape(shape: tuple[int, ...], like: str, **arrays: Any) -> None:
    """Raises ValueError, one line per array whose shape is not `shape`, that of `like`."""
    problems = [
        f"{name}: shape {jnp.shape(x)} found; must be {shape}, that of {like}"
        for name, x in arrays.items()
        if jnp.shape(x) != shape
    ]
    if problems:
        raise ValueError("\n".join(problems))


def require_rank(rank: int, axes: str, **arrays: Any) -> None:
    """Raises ValueError, one line per array that has not `rank` axes."""
    problems = [
        f"{name}: shape {jnp.shape(x)} found; must have the {rank} axes {axes}"
        for name, x in arrays.items()
        if jnp.ndim(x) != rank
    ]
    if problems:
        raise ValueError("\n".join(problems))


def require_name(argument: str, found: str, known: Iterable[str]) -> None:
    """Raises ValueError unless `found` is one of `known`."""
    if found not in (names := list(known)):
        raise ValueError(f"{argument}: {found!r} is unknown; use one of {', '.join(names)}")
