"""What a request is sampled by: the settings of a call, and a key of each request's own."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from kdrl_jax.types import SamplingParams

DRAWING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p")
"""What `sampling_params` takes of a config's `rollout`."""


def sampling_params(
    shape: tuple[int, int],
    stop_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> SamplingParams:
    """The same settings for all [P, G] requests of a call, as device arrays."""
    return SamplingParams(
        temperature=jnp.float32(temperature),
        top_p=jnp.float32(top_p),
        top_k=jnp.int32(top_k),
        min_p=jnp.float32(min_p),
        max_new_tokens=jnp.full(shape, max_new_tokens, jnp.int32),
        stop_ids=jnp.asarray(stop_ids, jnp.int32),
    )


def request_keys(
    seed: int,
    step: int | Sequence[int],
    problems: Sequence[int] | Int[np.ndarray, " P"],
    group_size: int,
) -> Key[Array, "P G"]:
    """A key for each request, `[P, G]`, from (seed, step, problem, sample) alone.

    What a request draws thus depends on no other request, but for rounding. The same problem twice
    in one step draws the same samples.

    Args:
      step: of training; any other number that is to give fresh draws. One, or one per problem.
      problems: which problem each prompt is, an index into the data.
    """
    if isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: {seed} found; must be from 0 to 2**32 - 1")
    asked = np.asarray(problems, np.uint32)
    numbers = (np.uint32(seed), np.broadcast_to(np.asarray(step, np.uint32), asked.shape), asked)
    return _request_keys(*jax.device_put(numbers), group_size)


@functools.partial(jax.jit, static_argnums=3)
def _request_keys(seed: Array, steps: Array, problems: Array, group_size: int) -> Key[Array, "P G"]:
    key, fold = jax.random.key(seed), jax.random.fold_in
    of_problem = jax.vmap(lambda step, problem: fold(fold(key, step), problem))(steps, problems)
    samples = jnp.arange(group_size)
    return jax.vmap(lambda k: jax.vmap(lambda g: jax.random.fold_in(k, g))(samples))(of_problem)
