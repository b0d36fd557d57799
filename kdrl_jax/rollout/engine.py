"""Rollouts on demand: prompts and keys in, completions with their log-probs out.

Continuous batching: a number of slots decode together; a request that ends leaves its slot to the
next one. The devices draw many tokens between two looks of the host, which sees only small arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from kdrl_jax.rollout import decode as device
from kdrl_jax.rollout.schedule import (
    SHRINK,
    Queue,
    Seats,
    choose_window,
    longest_first,
    smaller_batch,
    window_sizes,
)
from kdrl_jax.sharding import batch_parts, make_mesh, put_batch, replicated
from kdrl_jax.types import (
    FINISH_EOS,
    FINISH_LENGTH,
    KVCache,
    Params,
    Prompts,
    Rollouts,
    SamplingParams,
)

CHUNK = 32
"""Tokens that a slot draws at most between two looks of the host."""

REFILL = 16
"""While requests wait, decoding stops as soon as one in so many slots is free."""


class Finished(NamedTuple):
    """A request that has ended."""

    number: int
    """p·G + g."""
    tokens: Int[np.ndarray, "n"]
    """Without the end token."""


class RolloutEngine:
    """A sampler with continuous batching; a few programs for each shape it meets.

    The tokens of a request depend on its prompt, its key and the weights, not on the slots, the
    mesh or what else is decoded (but for rounding, which these can change).

    Args:
      model: the policy, see `kdrl_jax.models.Decoder`.
      valid_vocab: only ids below it are sampled, the ids the tokenizer knows.
      prompt_buckets: the padded prompt lengths there may be.
      max_new_tokens: T, the completion slots; the end token takes one.
      slots: requests that are decoded at once; 0: all that are asked for.
      mesh: where the parameters are; default: the first device.
    """

    def __init__(
        self,
        model: Any,
        *,
        valid_vocab: int,
        prompt_buckets: Sequence[int],
        max_new_tokens: int,
        slots: int = 0,
        mesh: Mesh | None = None,
    ):
        self.mesh = mesh or make_mesh(1, 1, 1, jax.devices()[:1])
        self.prompt_buckets = tuple(prompt_buckets)
        self.max_new_tokens = max_new_tokens
        self.slots = slots
        # One chunk for a small budget: nothing is gained by looking in between.
        self._chunk = CHUNK if max_new_tokens > 2 * CHUNK else max_new_tokens
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
        request_keys: PRNGKeyArray,
        sampling: SamplingParams,
        *,
        expected_lengths: Sequence[float] | None = None,
        meanwhile: Callable[[], Any] = lambda: None,
        on_finished: Callable[[list[Finished]], Any] = lambda finished: None,
    ) -> Rollouts:
        """G completions of each of P prompts, as host arrays.

        Args:
          params: the policy's weights, in their shards.
          prompts: left-padded to one of the buckets.
          request_keys: `[P, G]`, see `request_keys`.
          sampling: device arrays; values may change between calls without a new program.
          expected_lengths: of the completions of each problem: the longest start first, so that
            no straggler begins last. Default: in the order given.
          meanwhile: called once, when the devices have work.
          on_finished: called with every request that has ended, some at a time, while the devices
            draw the tokens of others.

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
        with jax.set_mesh(self.mesh):
            call = _Call(self, params, prompts, request_keys, sampling, expected_lengths)
            call.dispatch()
            meanwhile()
            call.collect()
            while call.unfinished:
                call.dispatch()
                call.report(on_finished)
                call.collect()
        call.report(on_finished)
        return call.rollouts()


class _Call:
    """One `generate`: the queue, the seats and the device state that follows them."""

    def __init__(
        self,
        engine: RolloutEngine,
        params: Params,
        prompts: Prompts,
        request_keys: PRNGKeyArray,
        sampling: SamplingParams,
        expected_lengths: Sequence[float] | None,
    ):
        self._engine, self._params, self._prompts = engine, params, prompts
        problems, group = request_keys.shape
        length, total = engine.max_new_tokens, problems * group
        limits, keys = jax.device_get((sampling.max_new_tokens, jax.random.key_data(request_keys)))
        self._limits = np.clip(np.broadcast_to(limits, (problems, group)), 1, length).reshape(-1)
        self._keys = keys.reshape(total, -1)
        self._sampling = jax.device_put(sampling, replicated(engine.mesh))
        self._right_padded = _to_the_left(prompts)
        self._weights = engine._unstack(params)

        seats = min(engine.slots or total, total)
        at_once = min(problems, -(-seats // group))
        order = range(problems) if expected_lengths is None else longest_first(expected_lengths)
        self._queue = Queue(order, group, at_once)
        self._at_once = at_once
        self._prefilled: tuple[int, KVCache] | None = None
        self._seats = Seats.empty(seats)
        self._chunk: device.Chunk | None = None
        needed = prompts.tokens.shape[1] + engine._chunk
        self._window = choose_window(engine._windows, needed)
        self._slots = engine._empty(seats, self._window)

        self._tokens = np.zeros((total, length), np.int32)
        self._log_probs = np.zeros((total, length), np.float32)
        self._lengths = np.zeros(total, np.int32)
        self._finish = np.full(total, FINISH_LENGTH, np.int32)
        self._ended = np.zeros(0, np.int64)
        self._group = group

    @property
    def unfinished(self) -> bool:
        """Whether requests wait or run."""
        return bool(len(self._queue)) or len(self._seats.taken) > 0

    def dispatch(self) -> None:
        """Fill the free slots and have the devices draw a chunk of tokens."""
        while len(self._queue) and len(self._seats.free):
            self._admit()
        self._resize()
        slots = len(self._seats.request)
        if len(self._queue):
            stop_at = slots - max(1, slots // REFILL)
        else:
            # Where a quarter would do, stop once no more than a quarter runs.
            fewer = self._enough_slots(slots // SHRINK)
            stop_at = fewer if fewer < slots else 0
        args = (self._weights, self._slots, self._sampling, self._put(np.int32(stop_at)))
        self._slots, self._chunk = self._engine._decode(*args)

    def collect(self) -> None:
        """Wait for the chunk; book its tokens and who has ended."""
        chunk, slots = jax.device_get(self._chunk), self._seats.taken
        requests, counts = self._seats.request[slots], chunk.counts[slots]
        drawn = np.arange(chunk.tokens.shape[1]) < counts[:, None]
        which, column = np.nonzero(drawn)
        where = requests[which], self._lengths[requests[which]] + column
        self._tokens[where] = chunk.tokens[slots][drawn]
        self._log_probs[where] = chunk.log_probs[slots][drawn]
        self._lengths[requests] += counts
        self._seats.lengths[slots] += counts
        self._finish[requests[chunk.ended[slots]]] = FINISH_EOS
        gone = ~chunk.running[slots]
        self._seats.request[slots[gone]] = -1
        self._ended = requests[gone]

    def report(self, on_finished: Callable[[list[Finished]], Any]) -> None:
        """Hand over what the last `collect` saw end."""
        keep = self._lengths - (self._finish == FINISH_EOS)
        if self._ended.size:
            on_finished([Finished(int(n), self._tokens[n, : keep[n]]) for n in self._ended])

    def rollouts(self) -> Rollouts:
        """The results so far."""
        problems = len(self._prompts.lengths)

        def of_groups(x: np.ndarray) -> np.ndarray:
            return x.reshape(problems, self._group, *x.shape[1:])

        return Rollouts(
            prompt_tokens=self._prompts.tokens,
            prompt_lengths=self._prompts.lengths,
            tokens=of_groups(self._tokens),
            log_probs=of_groups(self._log_probs),
            lengths=of_groups(self._lengths),
            finish_reason=of_groups(self._finish),
        )

    def _admit(self) -> None:
        """Give free slots to waiting requests, as many as one prefill covers."""
        batch, free = self._queue.batch, self._seats.free
        if self._prefilled is None or self._prefilled[0] != batch:
            self._prefilled = None  # before the next one is made
            self._prefilled = (batch, self._run_prefill(batch))
        rows, asked = (np.array(x) for x in zip(*self._queue.take(len(free)), strict=True))
        where = free[: len(asked)]
        problem = asked // self._group
        lengths = self._prompts.lengths[problem] - 1
        requests = device.Requests(
            lengths=lengths,
            newest=self._right_padded[problem, lengths],
            drawn=np.zeros_like(lengths),
            limits=self._limits[asked],
            keys=self._keys[asked],
            running=np.ones(len(asked), bool),
        )
        # A few sizes of admissions, not one program for each number.
        size = _next_power_of_4(len(asked), len(self._seats.request))
        fill = functools.partial(_fill, size=size)
        args = (fill(rows, 0), fill(where, len(self._seats.request)))
        more = jax.tree.map(lambda x: fill(x, 0), requests)
        self._slots = self._engine._admit(
            self._slots, self._prefilled[1], *self._put((*args, more))
        )
        self._seats.request[where] = asked
        self._seats.lengths[where] = lengths

    def _run_prefill(self, batch: int) -> KVCache:
        problems = self._queue.problems(batch)
        filled = [problems[i % len(problems)] for i in range(self._at_once)]
        prompts = put_batch(
            self._engine.mesh, (self._right_padded[filled], self._prompts.lengths[filled])
        )
        return self._engine._prefill(self._params, *prompts)

    def _resize(self) -> None:
        """Enough cache columns for the next chunk, and no many more slots than are in use."""
        engine, taken, slots = self._engine, self._seats.taken, len(self._seats.request)
        window = choose_window(engine._windows, self._seats.longest + engine._chunk)
        fewer = self._enough_slots(len(taken))
        if fewer == slots and window <= self._window:
            return
        rows = np.arange(slots)
        if fewer < slots:
            rows = np.concatenate([taken, self._seats.free])[:fewer]
            self._seats = self._seats.pick(rows)
        self._window = window
        self._slots = engine._fit(self._slots, self._put(rows.astype(np.int32)), window=window)

    def _enough_slots(self, running: int) -> int:
        """How many slots to keep for `running` requests: fewer only where that may pay."""
        slots, asked = len(self._seats.request), self._seats.request[self._seats.taken]
        left = (self._limits[asked] - self._lengths[asked]).max(initial=0)
        if len(self._queue) or left <= 2 * self._engine._chunk:
            return slots
        return smaller_batch(slots, running, batch_parts(self._engine.mesh))

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, replicated(self._engine.mesh))


def _to_the_left(prompts: Prompts) -> Int[np.ndarray, "P S"]:
    """Left-padded prompts padded on the right instead."""
    slots = prompts.tokens.shape[1]
    index = np.arange(slots) + (slots - prompts.lengths)[:, None]
    return np.take_along_axis(np.asarray(prompts.tokens), index % slots, axis=1)


def _fill(x: np.ndarray, value: int, *, size: int) -> np.ndarray:
    """`x` with `value` behind it, up to `size` rows; 64-bit numbers as 32."""
    x = x.astype(np.int32) if x.dtype == np.int64 else x
    return np.concatenate([x, np.full((size - len(x), *x.shape[1:]), value, x.dtype)])


def _next_power_of_4(count: int, most: int) -> int:
    size = 1
    while size < count:
        size *= 4
    return min(size, most)


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
