"""Rollouts on demand: prompts and keys in, completions with their log-probs out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from kdrl_jax.rollout.decode import generate
from kdrl_jax.sharding import make_mesh, put_batch, replicated
from kdrl_jax.types import Params, Prompts, Rollouts, SamplingParams


class RolloutEngine:
    """A jitted sampler: one program for each prompt bucket and batch shape [P, G].

    Args:
      model: the policy, see `kdrl_jax.models.Decoder`.
      valid_vocab: only ids below it are sampled, the ids the tokenizer knows.
      prompt_buckets: the padded prompt lengths there may be.
      max_new_tokens: T, the completion slots; the end token takes one.
      mesh: where the parameters are; default: the first device.
    """

    def __init__(
        self,
        model: Any,
        *,
        valid_vocab: int,
        prompt_buckets: Sequence[int],
        max_new_tokens: int,
        mesh: Mesh | None = None,
    ):
        self.mesh = mesh or make_mesh(1, 1, 1, jax.devices()[:1])
        self.prompt_buckets = tuple(prompt_buckets)
        self.max_new_tokens = max_new_tokens
        bound = functools.partial(generate, model, length=max_new_tokens, valid_vocab=valid_vocab)
        self._generate = jax.jit(bound)

    def generate(
        self,
        params: Params,
        prompts: Prompts,
        request_keys: PRNGKeyArray,
        sampling: SamplingParams,
    ) -> Rollouts:
        """G completions of each of P prompts; returns at once, with arrays still to be computed.

        Args:
          params: the policy's weights, in their shards.
          prompts: left-padded to one of the buckets.
          request_keys: `[P, G]`, see `request_keys`.
          sampling: device arrays; values may change between calls without a new program.

        Raises:
          ValueError: prompts of a length that is no bucket, or keys for another number of them.
        """
        if prompts.tokens.shape[1] not in self.prompt_buckets:
            raise ValueError(
                f"prompts padded to {prompts.tokens.shape[1]} tokens, no bucket of "
                f"{self.prompt_buckets}; pad them with kdrl_jax.data.pad_prompts"
            )
        if request_keys.shape[:1] != prompts.lengths.shape or request_keys.ndim != 2:
            raise ValueError(
                f"request_keys: shape {request_keys.shape} for {len(prompts.lengths)} prompts; "
                "must be [P, G]"
            )
        tokens, lengths = put_batch(self.mesh, tuple(prompts))
        rest = jax.device_put((request_keys, sampling), replicated(self.mesh))
        with jax.set_mesh(self.mesh):
            return self._generate(params, tokens, lengths, *rest)


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
    seed: int, step: int, problems: Sequence[int] | Int[np.ndarray, "P"], group_size: int
) -> PRNGKeyArray:
    """A key for each request, `[P, G]`, from (seed, step, problem, sample) alone.

    What a request draws thus depends on no other request. The same problem twice in one step
    draws the same samples.

    Args:
      step: of training; any other number that is to give fresh draws.
      problems: which problem each prompt is, an index into the data.
    """
    if isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: {seed} found; must be from 0 to 2**32 - 1")
    numbers = (np.uint32(seed), np.uint32(step), np.asarray(problems, np.uint32))
    return _request_keys(*jax.device_put(numbers), group_size)


@functools.partial(jax.jit, static_argnums=3)
def _request_keys(seed: Array, step: Array, problems: Array, group_size: int) -> PRNGKeyArray:
    key = jax.random.fold_in(jax.random.key(seed), step)
    of_problem = jax.vmap(lambda problem: jax.random.fold_in(key, problem))(problems)
    samples = jnp.arange(group_size)
    return jax.vmap(lambda k: jax.vmap(lambda g: jax.random.fold_in(k, g))(samples))(of_problem)
