"""Rollouts side by side in rows, so that few passes hold all their tokens.

Made on the host while the devices are idle anyway: the lengths are known only then. Rows keep one
shape; what changes from step to step is how many micro-batches have anything in them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from kdrl_jax.training.batch import Packing, Rows
from kdrl_jax.types import Rollouts


def first_fit_decreasing(
    lengths: Sequence[int] | Int[np.ndarray, " n"], capacity: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """A row and a first column for each of n sequences: the longest first, where it first fits.

    At most 11/9 of the fewest rows there can be, and 6/9 of a row (Dósa, 2007).

    Raises:
      ValueError: a sequence is longer than `capacity`.
    """
    sizes = np.asarray(lengths)
    if sizes.max(initial=0) > capacity:
        raise ValueError(f"lengths: {sizes.max()} found; a row has {capacity} columns")
    used = np.zeros(len(sizes), np.int64)
    rows, starts = np.zeros((2, len(sizes)), np.int64)
    for i in np.argsort(-sizes, kind="stable"):
        rows[i] = np.argmax(used + sizes[i] <= capacity)
        starts[i] = used[rows[i]]
        used[rows[i]] += sizes[i]
    return rows, starts


def pack_rows(rollouts: Rollouts, *, mini_batches: int, micro_batch: int) -> Rows:
    """Rows `[B, S + T]` of a step, most of them empty where completions are short.

    The rollouts of a mini-batch share its rows, and the rows its micro-batches: the first ones are
    filled first.

    Args:
      rollouts: host arrays.
      mini_batches, micro_batch: as in the config; both divide as there.

    Returns:
      Host arrays, with `packing`.
    """
    p, g, t = rollouts.tokens.shape
    rows, columns = p * g, rollouts.prompt_tokens.shape[1] + t
    passes = rows // mini_batches // micro_batch
    prompts = np.repeat(rollouts.prompt_lengths, g).astype(np.int64)
    lengths = rollouts.lengths.reshape(-1).astype(np.int64)
    completions = rollouts.tokens.reshape(rows, t)
    row, start, used = np.zeros(rows, np.int64), np.zeros(rows, np.int64), 1
    for part in range(mini_batches):
        mine = np.flatnonzero(np.arange(rows) // g % mini_batches == part)
        place, start[mine] = first_fit_decreasing((prompts + lengths)[mine], columns)
        used = max(used, place.max() // micro_batch + 1)
        # As `split_micro_batches` and `by_mini_batch` take rows apart.
        row[mine] = (place % micro_batch * passes + place // micro_batch) * mini_batches + part

    tokens, positions, segments = np.zeros((3, rows, columns), np.int32)
    sources = np.full((rows, columns - 1), -1, np.int32)
    places = np.zeros((rows, t), np.int32)
    for b in np.lexsort((start, row)):
        first, middle, end = start[b], start[b] + prompts[b], start[b] + prompts[b] + lengths[b]
        r = row[b]
        tokens[r, first:middle] = rollouts.prompt_tokens[b // g, -prompts[b] :]
        tokens[r, middle:end] = completions[b, : lengths[b]]
        positions[r, first:end] = np.arange(end - first)
        segments[r, first:end] = 1 + (segments[r, first - 1] if first else 0)
        sources[r, middle - 1 : end - 1] = b * t + np.arange(lengths[b])
        places[b, : lengths[b]] = r * (columns - 1) + np.arange(middle - 1, end - 1)
    packing = Packing(sources, places, np.int32(used))
    return Rows(tokens, positions, segments, packing)
