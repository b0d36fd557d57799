"""The sampler as one program: prefill every prompt once, then decode its group together."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from kdrl_jax.rollout.sampling import sample
from kdrl_jax.sharding import constrain
from kdrl_jax.types import FINISH_EOS, FINISH_LENGTH, KVCache, Params, Rollouts, SamplingParams


def prompt_layout(
    lengths: Int[Array, "P"], slots: int
) -> tuple[Int[Array, "P S"], Bool[Array, "P S"]]:
    """Positions and real tokens of prompts left-padded to `slots`; padding is at position 0."""
    offsets = jnp.arange(slots)[None, :] - (slots - lengths)[:, None]
    return jnp.maximum(offsets, 0), offsets >= 0


class _Loop(NamedTuple):
    """What the decode loop carries; `slot` is where the next token goes."""

    slot: Int[Array, ""]
    newest: Int[Array, "P G"]
    cache: KVCache
    tokens: Int[Array, "P G T"]
    log_probs: Float[Array, "P G T"]
    lengths: Int[Array, "P G"]
    running: Bool[Array, "P G"]
    finish_reason: Int[Array, "P G"]


def generate(
    model: Any,
    params: Params,
    prompt_tokens: Int[Array, "P S"],
    prompt_lengths: Int[Array, "P"],
    keys: PRNGKeyArray,
    sampling: SamplingParams,
    *,
    length: int,
    valid_vocab: int,
) -> Rollouts:
    """G completions of each prompt, in a device-side loop that ends when all have ended.

    A prompt is prefilled once, and its G rollouts read one cache. Completions share one slot index
    because every prompt ends at column S. Token j of a request is drawn with fold_in(key, j).

    Args:
      model: see `kdrl_jax.models.Decoder`.
      prompt_tokens: left-padded.
      keys: `[P, G]`, one for each request.
      sampling: `max_new_tokens` above `length` counts as `length`.
      length: T, the slots of a completion.
    """
    slots = prompt_tokens.shape[1]
    groups, size = keys.shape
    # Cast the weights once, not once a token.
    params = model.cast(params)
    positions, prompt_mask = prompt_layout(prompt_lengths, slots)
    hidden, prompt_cache = model.prefill(
        params, prompt_tokens, positions, prompt_mask.astype(jnp.int32)
    )
    last = jnp.broadcast_to(hidden[:, -1:], (groups, size, hidden.shape[-1]))
    limits = jnp.clip(sampling.max_new_tokens, 1, length)
    stop_ids = sampling.stop_ids[None, None, :]

    def advance(loop: _Loop, hidden: Float[Array, "P G D"]) -> _Loop:
        """Sample the token at `slot` from the hidden state before it and book it."""
        logits = constrain(model.logits(params, hidden), "batch", None, None)
        draw = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, loop.slot)))(keys)
        token, log_prob = sample(logits, draw, sampling, valid_vocab=valid_vocab)
        token = jnp.where(loop.running, token, 0)
        ended = loop.running & (token[..., None] == stop_ids).any(-1)
        count = loop.slot + 1
        return _Loop(
            slot=count,
            newest=token,
            cache=loop.cache,
            tokens=_put(loop.tokens, token, loop.slot),
            log_probs=_put(loop.log_probs, jnp.where(loop.running, log_prob, 0.0), loop.slot),
            lengths=jnp.where(loop.running, count, loop.lengths),
            running=loop.running & ~ended & (count < limits),
            finish_reason=jnp.where(ended, FINISH_EOS, loop.finish_reason),
        )

    def body(loop: _Loop) -> _Loop:
        index = loop.slot - 1  # the newest token's
        hidden, cache = model.decode(
            params,
            loop.newest,
            prompt_lengths[:, None] + index,
            prompt_cache,
            prompt_mask,
            loop.cache,
            index,
        )
        return advance(loop._replace(cache=cache), hidden)

    start = _Loop(
        slot=jnp.int32(0),
        newest=jnp.zeros((groups, size), jnp.int32),
        cache=model.new_cache(groups, size, length),
        tokens=jnp.zeros((groups, size, length), jnp.int32),
        log_probs=jnp.zeros((groups, size, length), jnp.float32),
        lengths=jnp.zeros((groups, size), jnp.int32),
        running=jnp.ones((groups, size), bool),
        finish_reason=jnp.full((groups, size), FINISH_LENGTH, jnp.int32),
    )
    end = jax.lax.while_loop(lambda loop: loop.running.any(), body, advance(start, last))
    return Rollouts(
        prompt_tokens=prompt_tokens,
        prompt_lengths=prompt_lengths,
        tokens=end.tokens,
        log_probs=end.log_probs,
        lengths=end.lengths,
        finish_reason=end.finish_reason,
    )


def _put(record: Array, column: Array, index: Array) -> Array:
    """Write `column` [P, G] at `index` of `record` [P, G, T]."""
    return jax.lax.dynamic_update_slice_in_dim(record, column[..., None], index, axis=2)
