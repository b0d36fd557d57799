"""Rollouts on demand: prompts and keys in, completions with their log-probs out.

Continuous batching: a number of slots decode together; a request that ends leaves its slot to the
next one. The devices draw many tokens between two looks of the host, which sees only small arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from kdrl_jax.rollout import decode as device
from kdrl_jax.rollout.call import Call, DecodeStats, Drawn, Finished
from kdrl_jax.rollout.schedule import window_sizes
from kdrl_jax.sharding import make_mesh, to_mesh
from kdrl_jax.types import Params, Prompts, Rollouts, SamplingParams

CHUNK = 32
"""Tokens that a slot draws at most between two looks of the host."""


def chunk_size(max_new_tokens: int) -> int:
    """One chunk for a small budget: nothing is gained by looking in between."""
    return CHUNK if max_new_tokens > 2 * CHUNK else max_new_tokens


class RolloutEngine:
    """A sampler with continuous batching; a few programs for each shape it meets.

    The tokens of a request depend on its prompt, its key and the weights, not on the slots, the
    mesh or what else is decoded, but for rounding, which these can change: then a draw that lies
    within rounding of the boundary between two tokens takes the other one, and the request goes on
    from there. The same call on the same devices is the same to the bit.

    Args:
      model: the policy, see `kdrl_jax.models.Decoder`.
      valid_vocab: only ids below it are sampled, the ids the tokenizer knows.
      prompt_buckets: the padded prompt lengths there may be.
      max_new_tokens: T, the completion slots; the end token takes one.
      slots: requests that are decoded at once; 0: all that are asked for.
      chunk: tokens that a slot draws at most between two looks of the host; 0: as is fastest. Few
        where somebody watches (`on_drawn`); the tokens are the same but for rounding.
      mesh: where rollouts are drawn; its `context` is 1. Default: the first device.

    Attributes:
      last: what the last `generate` did.
    """

    def __init__(
        self,
        model: Any,
        *,
        valid_vocab: int,
        prompt_buckets: Sequence[int],
        max_new_tokens: int,
        slots: int = 0,
        chunk: int = 0,
        mesh: Mesh | None = None,
    ):
        self.mesh = mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1])
        self.prompt_buckets = tuple(prompt_buckets)
        self.max_new_tokens = max_new_tokens
        self.slots = slots
        self.last = DecodeStats()
        self._chunk = min(chunk, max_new_tokens) or chunk_size(max_new_tokens)
        longest = max(prompt_buckets) + max_new_tokens + self._chunk
        self._windows = window_sizes(longest, min(prompt_buckets) + self._chunk)
        bound = functools.partial
        self._unstack = jax.jit(model.unstack)
        self._prefill = jax.jit(bound(device.prefill, model))
        self._empty = jax.jit(bound(device.empty_slots, model), static_argnums=(0, 1))
        self._admit = jax.jit(device.admit, donate_argnums=0)
        self._fit = jax.jit(device.fit, static_argnames="window")
        draw = bound(device.decode, model, steps=self._chunk, valid_vocab=valid_vocab)
        self._decode = jax.jit(draw, donate_argnums=1)

    def generate(
        self,
        params: Params,
        prompts: Prompts,
        request_keys: Key[Array, "P G"],
        sampling: SamplingParams,
        *,
        expected_lengths: Sequence[float] | None = None,
        meanwhile: Callable[[], Any] = lambda: None,
        on_finished: Callable[[list[Finished]], Any] = lambda finished: None,
        progress: Callable[[int, int], Any] = lambda finished, tokens: None,
        on_drawn: Callable[[list[Drawn]], Any] | None = None,
        begun: Rollouts | None = None,
        enough: int = 0,
    ) -> Rollouts:
        """G completions of each of P prompts, as host arrays.

        Args:
          params: the policy's weights, in their shards; sent to this engine's mesh if they are
            laid out otherwise.
          prompts: left-padded to one of the buckets.
          request_keys: `[P, G]`, see `request_keys`.
          sampling: device arrays; values may change between calls without a new program.
          expected_lengths: of the completions of each problem: the longest start first, so that
            no straggler begins last. Default: in the order given.
          meanwhile: called once, when the devices have work.
          on_finished: called with every request that has ended, some at a time, while the devices
            draw the tokens of others.
          progress: called after each look of the host with the number of requests that have ended
            and of tokens drawn so far.
          on_drawn: called with what every running request has drawn, a chunk at a time, likewise.
            What it raises ends the call, and the engine is as good as new.
          begun: partial rollouts of the same prompts and keys: what is UNFINISHED goes on from
            where it is, with the tokens it would have had but for rounding; the rest stays.
          enough: stop when so many problems have all their completions, and leave the others
            UNFINISHED; 0: all of them.

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
        params = to_mesh(self.mesh, params)
        with jax.set_mesh(self.mesh):
            call = Call(
                self, params, prompts, request_keys, sampling, expected_lengths, begun, enough
            )
            if call.unfinished:
                call.dispatch()
            meanwhile()
            if call.unfinished:
                call.collect()
            while call.unfinished:
                call.dispatch()
                call.report(on_finished, on_drawn)
                progress(*call.counts)
                call.collect()
        call.report(on_finished, on_drawn)
        progress(*call.counts)
        self.last = call.stats
        return call.rollouts()
