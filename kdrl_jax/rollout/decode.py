"""The device side of the rollout engine: slots, and the programs that change them.

A slot is a row of the decode batch with a cache of its own. `prefill` runs prompts, `admit` puts
requests into free slots, `decode` draws many tokens of all slots without asking the host, `fit`
changes the number of slots and of cache columns. Nothing here knows how requests are scheduled.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdrl_jax.rollout.sampling import sample, uniforms
from kdrl_jax.sharding import constrain
from kdrl_jax.types import COLUMNS, KVCache, Params, SamplingParams


class Requests(NamedTuple):
    """What a slot must know of its request."""

    lengths: Int[Any, " B"]
    """Tokens in the cache: all but the newest."""
    newest: Int[Any, " B"]
    """The token to feed next; at first the prompt's last."""
    drawn: Int[Any, " B"]
    """Tokens of the completion so far: the next one is drawn with fold_in(key, drawn)."""
    limits: Int[Any, " B"]
    """Tokens that the completion may have."""
    keys: Int[Any, "B 2"]
    """Key data."""
    running: Bool[Any, " B"]


class Slots(NamedTuple):
    """The decode batch."""

    cache: list[KVCache]
    requests: Requests


class Chunk(NamedTuple):
    """What one call of `decode` drew, for the host: small arrays, the same on every device."""

    tokens: Int[Array, "B C"]
    log_probs: Float[Array, "B C"]
    counts: Int[Array, " B"]
    """How many of them are real."""
    running: Bool[Array, " B"]
    ended: Bool[Array, " B"]
    """Whether the last one is an end token."""


def prefill(model: Any, params: Params, tokens: Int[Array, "P S"], lengths: Array) -> KVCache:
    """Keys and values, of all layers, of right-padded prompts."""
    index = jnp.arange(tokens.shape[1])[None, :]
    positions = jnp.broadcast_to(index, tokens.shape)
    return model.prefill(params, tokens, positions, (index < lengths[:, None]).astype(jnp.int32))[1]


def empty_slots(model: Any, count: int, window: int) -> Slots:
    """`count` slots with nothing in them, and `window` columns of cache each."""
    numbers = jnp.zeros((count,), jnp.int32)
    keys, running = jnp.zeros((count, 2), jnp.uint32), jnp.zeros((count,), bool)
    requests = Requests(numbers, numbers, numbers, numbers, keys, running)
    return Slots(model.new_cache(count, window), _whole(requests))


def admit(
    slots: Slots,
    prompts: KVCache,
    rows: Int[Array, " A"],
    where: Int[Array, " A"],
    requests: Requests,
) -> Slots:
    """Put A requests into slots `where`, with the prompts' cache at `rows` for a beginning.

    The last token of a prompt is fed again by `decode`, which draws the first token with it: so
    there is one place that draws.

    Args:
      where: a number beyond the slots admits nothing.
    """
    width = prompts.v.shape[3]

    def place(cache: Array, new: Array, axis: int) -> Array:
        begin, every = slice(width), slice(None)
        columns = (every, begin) if axis == COLUMNS.k else (begin, every)
        out = cache.at[where, :, *columns].set(new[rows], mode="drop")
        return constrain(out, "batch", "kv_heads", None, None)

    cache = [
        jax.tree.map(place, old, jax.tree.map(lambda x, y=y: x[y], prompts), COLUMNS)
        for y, old in enumerate(slots.cache)
    ]
    merged = jax.tree.map(
        lambda x, new: x.at[where].set(new, mode="drop"), slots.requests, requests
    )
    return Slots(cache, _whole(merged))


def fit(slots: Slots, rows: Int[Array, "Z n"], *, window: int) -> Slots:
    """Some slots alone, with `window` columns of cache.

    Args:
      rows: for each of Z equal, contiguous parts of the slots, which of them stay. With Z the parts
        that a mesh splits slots into, no cache goes from one device to another.
    """
    parts, kept = rows.shape
    per_part = slots.requests.lengths.shape[0] // parts
    flat = (rows + per_part * jnp.arange(parts)[:, None]).reshape(-1)

    def change(x: Array, axis: int) -> Array:
        x = x.reshape(parts, per_part, *x.shape[1:])
        x = constrain(x, "batch", None, "kv_heads", None, None)
        x = jax.vmap(lambda part, which: part[which])(x, constrain(rows, "batch", None))
        x = x.reshape(parts * kept, *x.shape[2:])
        x = jax.lax.slice_in_dim(x, 0, min(window, x.shape[axis]), axis=axis)
        pad = [(0, 0)] * 4
        pad[axis] = (0, window - x.shape[axis])
        return constrain(jnp.pad(x, pad), "batch", "kv_heads", None, None)

    requests = jax.tree.map(lambda x: x[flat], slots.requests)
    cache = [jax.tree.map(change, layer, COLUMNS) for layer in slots.cache]
    return Slots(cache, _whole(requests))


class _Loop(NamedTuple):
    step: Int[Array, ""]
    newest: Int[Array, " B"]
    running: Bool[Array, " B"]
    recent: list[KVCache]
    out: Chunk


def decode(
    model: Any,
    weights: Any,
    slots: Slots,
    sampling: SamplingParams,
    stop_at: Int[Array, ""],
    *,
    steps: int,
    valid_vocab: int,
) -> tuple[Slots, Chunk]:
    """Draw up to `steps` tokens of every running slot; stop when `stop_at` or fewer still run.

    New keys and values gather in buffers that all slots write at one index, and join the slots'
    caches, each at its own length, once at the end.

    Args:
      weights: see `Decoder.unstack`.
      sampling: `max_new_tokens` is not looked at: limits are the requests' own.
      steps: C; every running slot's cache must have as many columns to spare.
    """
    cache, asked = slots
    count = asked.lengths.shape[0]
    uniform = uniforms(jax.random.wrap_key_data(asked.keys), asked.drawn, steps)
    stop_ids = sampling.stop_ids[None, :]
    rope = model.angles(asked.lengths, steps)

    def body(loop: _Loop) -> _Loop:
        logits, recent = model.decode(
            weights, loop.newest, rope, cache, asked.lengths, loop.recent, loop.step
        )
        logits = constrain(logits, "batch", None)
        nth = asked.drawn + loop.step
        token, log_prob = sample(logits, uniform[loop.step], sampling, valid_vocab=valid_vocab)
        token = jnp.where(loop.running, token, 0)
        log_prob = jnp.where(loop.running, log_prob, 0.0)
        ended = loop.running & (token[:, None] == stop_ids).any(-1)
        running = loop.running & ~ended & (nth + 1 < asked.limits)
        return _Loop(
            step=loop.step + 1,
            newest=jnp.where(loop.running, token, loop.newest),
            running=running,
            recent=recent,
            out=Chunk(
                tokens=_put(loop.out.tokens, token, loop.step),
                log_probs=_put(loop.out.log_probs, log_prob, loop.step),
                counts=loop.out.counts + loop.running,
                running=running,
                ended=loop.out.ended | ended,
            ),
        )

    start = _Loop(
        step=jnp.int32(0),
        newest=asked.newest,
        running=asked.running,
        recent=model.new_cache(count, steps),
        out=Chunk(
            tokens=jnp.zeros((count, steps), jnp.int32),
            log_probs=jnp.zeros((count, steps), jnp.float32),
            counts=jnp.zeros((count,), jnp.int32),
            running=asked.running,
            ended=jnp.zeros((count,), bool),
        ),
    )
    end = jax.lax.while_loop(
        lambda loop: (loop.step < steps) & (loop.running.sum() > stop_at), body, start
    )
    requests = asked._replace(
        lengths=asked.lengths + end.out.counts,
        newest=end.newest,
        drawn=asked.drawn + end.out.counts,
        running=end.running,
    )
    joined = [
        join_recent(layer, new, asked.lengths) for layer, new in zip(cache, end.recent, strict=True)
    ]
    return Slots(joined, _whole(requests)), _whole(end.out)


def _put(record: Array, column: Array, index: Array) -> Array:
    """Write `column` [B] at `index` of `record` [B, C]."""
    return jax.lax.dynamic_update_slice_in_dim(record, column[:, None], index, axis=1)


def join_recent(cache: KVCache, recent: KVCache, lengths: Int[Array, " B"]) -> KVCache:
    """Write the columns of `recent` behind the `lengths` columns of each row of `cache`.

    Columns that were not drawn are written too: they lie beyond the new length.
    """

    def join(cache: Array, recent: Array, axis: int) -> Array:
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
        return constrain(jax.vmap(write)(cache, recent, lengths), "batch", "kv_heads", None, None)

    return jax.tree.map(join, cache, recent, COLUMNS)


def _whole(tree: Any) -> Any:
    """The same small arrays on every device, so that every process can read them."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)
