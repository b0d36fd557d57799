"""One call of the engine: the queue, the seats, and the device state that follows them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kdrl_jax.rollout import decode as device
from kdrl_jax.rollout.schedule import (
    SHRINK,
    Queue,
    Seats,
    choose_window,
    longest_first,
    plan_batches,
    smaller_batch,
)
from kdrl_jax.sharding import batch_parts, even_parts, put, put_batch, replicated
from kdrl_jax.types import (
    FINISH_EOS,
    FINISH_LENGTH,
    UNFINISHED,
    KVCache,
    Params,
    Prompts,
    Rollouts,
    SamplingParams,
)

if TYPE_CHECKING:
    from kdrl_jax.rollout.engine import RolloutEngine

REFILL = 16
"""While requests wait, decoding stops as soon as one in so many slots is free."""


class Drawn(NamedTuple):
    """What a request has just drawn."""

    number: int
    """p·G + g."""
    tokens: Int[np.ndarray, " n"]
    """With the end token, if that was drawn."""
    log_probs: Float[np.ndarray, " n"]
    """See `Rollouts`."""
    finish_reason: int
    """UNFINISHED while it goes on."""


class Finished(NamedTuple):
    """A request that has ended."""

    number: int
    """p·G + g."""
    tokens: Int[np.ndarray, " n"]
    """Without the end token."""


def finished_requests(
    rollouts: Rollouts, numbers: Int[np.ndarray, " n"] | None = None
) -> list[Finished]:
    """Those of host rollouts that have ended, or the ones of `numbers`."""
    ends, lengths = rollouts.finish_reason.reshape(-1), rollouts.lengths.reshape(-1)
    tokens = rollouts.tokens.reshape(len(ends), -1)
    chosen = np.flatnonzero(ends != UNFINISHED) if numbers is None else numbers
    keep = lengths - (ends == FINISH_EOS)
    return [Finished(int(n), tokens[n, : keep[n]]) for n in chosen]


def as_rollouts(
    prompts: Prompts, group: int, tokens: Any, log_probs: Any, lengths: Any, finish: Any
) -> Rollouts:
    """Host arrays of flat requests `[P·G, …]` as the rollouts of P problems."""

    def of_groups(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(prompts.lengths), group, *x.shape[1:])

    return Rollouts(
        prompt_tokens=prompts.tokens,
        prompt_lengths=prompts.lengths,
        tokens=of_groups(tokens),
        log_probs=of_groups(log_probs),
        lengths=of_groups(lengths),
        finish_reason=of_groups(finish),
    )


def tokens_seen(prompts: Int[np.ndarray, " n"], lengths: Int[np.ndarray, " n"]) -> int:
    """What all tokens of completions looked at: `DecodeStats.context`; both in tokens, int64.

    The first one is drawn with the whole prompt in sight, each later one with one more.
    """
    return int((lengths * prompts + lengths * (lengths - 1) // 2).sum())


@dataclasses.dataclass(frozen=True)
class DecodeStats:
    """What the devices did for some requests; sums add up."""

    steps: int = 0
    """Runs of the model over the decode batch."""
    slot_steps: int = 0
    """Slots of these runs: tokens that could have been drawn."""
    tokens: int = 0
    """Drawn by requests."""
    context: int = 0
    """Tokens of cache that the drawn ones looked at, themselves included."""

    def __add__(self, other: DecodeStats) -> DecodeStats:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return DecodeStats(*(a + b for a, b in zip(mine, theirs, strict=True)))


class Call:
    """See the module's docstring and `RolloutEngine.generate`."""

    def __init__(
        self,
        engine: RolloutEngine,
        params: Params,
        prompts: Prompts,
        request_keys: Key[Array, "P G"],
        sampling: SamplingParams,
        expected_lengths: Sequence[float] | None,
        begun: Rollouts | None,
        enough: int,
    ):
        self._engine, self._params, self._prompts = engine, params, prompts
        problems, group = request_keys.shape
        length, total = engine.max_new_tokens, problems * group
        limits, keys = jax.device_get((sampling.max_new_tokens, jax.random.key_data(request_keys)))
        self._limits = np.clip(np.broadcast_to(limits, (problems, group)), 1, length).reshape(-1)
        self._keys = keys.reshape(total, -1)
        self._sampling = self._put(sampling)
        self._right_padded = _to_the_left(prompts)
        self._weights = engine._unstack(params)
        self._group, self._enough = group, enough or problems

        self._tokens = np.zeros((total, length), np.int32)
        self._log_probs = np.zeros((total, length), np.float32)
        self._lengths = np.zeros(total, np.int32)
        self._finish = np.full(total, UNFINISHED, np.int32)
        if begun is not None:
            for name in ("tokens", "log_probs", "lengths"):
                there = getattr(begun, name)
                getattr(self, f"_{name}")[:] = there.reshape(total, *there.shape[2:])
            self._finish[:] = begun.finish_reason.reshape(-1)

        seats = min(engine.slots or total, total)
        at_once = min(problems, -(-seats // group))
        order = range(problems) if expected_lengths is None else longest_first(expected_lengths)
        waiting = (self._finish == UNFINISHED).reshape(problems, group)
        drawn = self._lengths.reshape(problems, group)
        self._queue = Queue(plan_batches(order, drawn, waiting, at_once))
        self._at_once = at_once
        self._prefilled: tuple[int, KVCache] | None = None
        self._seats = Seats.empty(seats)
        self._chunk: device.Chunk | None = None
        needed = prompts.tokens.shape[1] + engine._chunk
        self._window = choose_window(engine._windows, needed)
        self._slots = engine._empty(seats, self._window)

        self._ended = self._last = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int32)
        self._before, self._steps, self._slot_steps = self._lengths.copy(), 0, 0

    @property
    def unfinished(self) -> bool:
        """Whether fewer problems than enough have all their completions."""
        whole = (self._finish != UNFINISHED).reshape(-1, self._group).all(axis=1)
        return int(whole.sum()) < self._enough

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
            stop_at = fewer if fewer < min(slots, len(self._seats.taken)) else 0
        args = (self._weights, self._slots, self._sampling, self._put(np.int32(stop_at)))
        self._slots, self._chunk = self._engine._decode(*args)

    def collect(self) -> None:
        """Wait for the chunk; book its tokens and who has ended."""
        chunk, slots = jax.device_get(self._chunk), self._seats.taken
        requests, counts = self._seats.request[slots], chunk.counts[slots]
        steps = int(chunk.counts.max())  # some slot runs to the end of a chunk
        self._steps += steps
        self._slot_steps += steps * len(chunk.counts)
        drawn = np.arange(chunk.tokens.shape[1]) < counts[:, None]
        which, column = np.nonzero(drawn)
        where = requests[which], self._lengths[requests[which]] + column
        self._tokens[where] = chunk.tokens[slots][drawn]
        self._log_probs[where] = chunk.log_probs[slots][drawn]
        self._lengths[requests] += counts
        self._seats.lengths[slots] += counts
        gone, ended = ~chunk.running[slots], chunk.ended[slots]
        self._finish[requests[gone]] = np.where(ended, FINISH_EOS, FINISH_LENGTH)[gone]
        self._seats.request[slots[gone]] = -1
        self._ended, self._last, self._counts = requests[gone], requests, counts

    def report(
        self,
        on_finished: Callable[[list[Finished]], Any],
        on_drawn: Callable[[list[Drawn]], Any] | None,
    ) -> None:
        """Hand over what the last `collect` saw drawn, and what it saw end."""
        if on_drawn and self._last.size:
            ends = self._lengths[self._last]
            on_drawn(
                [
                    Drawn(
                        int(n),
                        self._tokens[n, end - count : end].copy(),
                        self._log_probs[n, end - count : end].copy(),
                        int(self._finish[n]),
                    )
                    for n, end, count in zip(self._last, ends, self._counts, strict=True)
                ]
            )
        if self._ended.size:
            on_finished(finished_requests(self.rollouts(), self._ended))

    @property
    def counts(self) -> tuple[int, int]:
        """Requests that have ended, and tokens drawn in this call."""
        return int((self._finish != UNFINISHED).sum()), int((self._lengths - self._before).sum())

    @property
    def stats(self) -> DecodeStats:
        """What has been done so far."""
        prompts = np.repeat(self._prompts.lengths, self._group)
        before, now = self._before.astype(np.int64), self._lengths.astype(np.int64)
        context = tokens_seen(prompts, now) - tokens_seen(prompts, before)
        drawn = int((now - before).sum())
        return DecodeStats(self._steps, self._slot_steps, drawn, context)

    def rollouts(self) -> Rollouts:
        """The results so far."""
        found = (self._tokens, self._log_probs, self._lengths, self._finish)
        return as_rollouts(self._prompts, self._group, *found)

    def _admit(self) -> None:
        """Give free slots to waiting requests, as many as one prefill covers."""
        batch = self._queue.batch
        if self._prefilled is None or self._prefilled[0] != batch:
            self._prefilled = None  # before the next one is made
            self._prefilled = (batch, self._run_prefill(batch))
        free = self._seats.free  # which a prefill may have put in another order
        rows, asked = (np.array(x) for x in zip(*self._queue.take(len(free)), strict=True))
        where = free[: len(asked)]
        drawn = self._lengths[asked]
        lengths = self._prompts.lengths[asked // self._group] + drawn - 1
        newest = self._right_padded[asked // self._group, np.where(drawn, 0, lengths)]
        newest = np.where(drawn, self._tokens[asked, drawn - 1], newest)
        requests = device.Requests(
            lengths=lengths,
            newest=newest,
            drawn=drawn,
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
        """Of prompts, with what has been drawn for requests that go on."""
        rows = self._queue.rows(batch)
        rows = [rows[i % len(rows)] for i in range(self._at_once)]
        problems = [r // self._group for r in rows]
        prompts, before = self._right_padded[problems], self._prompts.lengths[problems]
        lengths, width = before + self._lengths[rows], prompts.shape[1]
        if lengths.max() > width:
            width = choose_window(self._engine._windows, int(lengths.max()))
        tokens = np.zeros((len(rows), width), np.int32)
        tokens[:, : prompts.shape[1]] = prompts
        for row, request, n in zip(tokens, rows, before, strict=True):
            row[n : n + self._lengths[request]] = self._tokens[request, : self._lengths[request]]
        if width > self._window:
            self._fit(len(self._seats.request) // self._parts, width)
        placed = put_batch(self._engine.mesh, (tokens, lengths.astype(np.int32)))
        return self._engine._prefill(self._params, *placed)

    def _resize(self) -> None:
        """Enough cache columns for the next chunk, and no many more slots than are in use."""
        engine, slots = self._engine, len(self._seats.request)
        window = choose_window(engine._windows, self._seats.longest + engine._chunk)
        # Of the fullest device's part, as none gives a slot to another.
        used = (self._seats.request >= 0).reshape(self._parts, -1).sum(axis=1)
        fewer = self._enough_slots(int(used.max()) * self._parts)
        if fewer == slots and window <= self._window:
            return
        self._fit(fewer // self._parts, window)

    @property
    def _parts(self) -> int:
        """Into how many parts the mesh splits the slots."""
        return even_parts(self._engine.mesh, len(self._seats.request))

    def _fit(self, per_part: int, window: int) -> None:
        """So many slots on each device, first those in use, with so many columns of cache."""
        self._window, parts = window, self._parts
        free = (self._seats.request < 0).reshape(parts, -1)
        rows = np.argsort(free, axis=1, kind="stable")[:, :per_part]
        self._seats = self._seats.pick((rows + free.shape[1] * np.arange(parts)[:, None]).ravel())
        where = self._put(rows.astype(np.int32))
        self._slots = self._engine._fit(self._slots, where, window=window)

    def _enough_slots(self, running: int) -> int:
        """How many slots to keep for `running` requests: fewer only where that may pay."""
        slots, asked = len(self._seats.request), self._seats.request[self._seats.taken]
        left = (self._limits[asked] - self._lengths[asked]).max(initial=0)
        if len(self._queue) or left <= 2 * self._engine._chunk:
            return slots
        return smaller_batch(slots, running, batch_parts(self._engine.mesh))

    def _put(self, tree: Any) -> Any:
        return put(tree, replicated(self._engine.mesh))


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
