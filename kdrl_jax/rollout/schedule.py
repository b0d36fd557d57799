"""Which request goes to which slot, and how large the decode batch is: decided on the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

SHRINK = 4
"""The decode batch falls to a quarter when no more of it is in use."""


def window_sizes(longest: int, smallest: int) -> tuple[int, ...]:
    """Columns that caches may have, growing: `longest` halved while `smallest` still fits."""
    step = 128 if longest > 1024 else 8
    sizes = [_round_up(longest, step)]
    while (half := _round_up(-(-sizes[-1] // 2), step)) >= smallest and half < sizes[-1]:
        sizes.append(half)
    return tuple(reversed(sizes))


def choose_window(sizes: Sequence[int], needed: int) -> int:
    """The smallest size with room for `needed` columns."""
    return next(size for size in sizes if size >= needed)


def smaller_batch(slots: int, running: int, parts: int) -> int:
    """How many slots are enough for `running`: `slots`, or a quarter of it, or of that, …

    Args:
      parts: every size is a multiple of it.
    """
    while running <= slots // SHRINK and slots % (SHRINK * parts) == 0:
        slots //= SHRINK
    return slots


class Batch(NamedTuple):
    """Requests whose prompts go through one prefill."""

    rows: list[int]
    """For each row a request that begins with it: its prompt and what has been drawn for it."""
    requests: list[tuple[int, int]]
    """(row, request) of all that begin with one of the rows."""


class Queue:
    """Requests in the order of their batches."""

    def __init__(self, batches: Sequence[Batch]):
        self._batches = list(batches)
        self._places = [
            (n, row, request)
            for n, batch in enumerate(self._batches)
            for row, request in batch.requests
        ]
        self._next = 0

    def __len__(self) -> int:
        return len(self._places) - self._next

    @property
    def batch(self) -> int:
        """Which prefill the next request belongs to."""
        return self._places[self._next][0]

    def rows(self, batch: int) -> list[int]:
        """See `Batch`."""
        return self._batches[batch].rows

    def take(self, most: int) -> list[tuple[int, int]]:
        """Up to `most` requests of one prefill: (row, request)."""
        batch, taken = self.batch, self._places[self._next : self._next + most]
        taken = [place for place in taken if place[0] == batch]
        self._next += len(taken)
        return [(row, request) for _, row, request in taken]


def plan_batches(
    order: Sequence[int], drawn: Int[np.ndarray, "P G"], waiting: Bool[np.ndarray, "P G"], most: int
) -> list[Batch]:
    """The prefills of requests, each of up to `most` rows.

    Those of which something has been drawn come first, the longest before the others, each with a
    row of its own; then the others, with a row for each problem.

    Args:
      order: the problems, the first to start first.
      drawn: tokens that requests have already.
      waiting: which requests are to run.
    """
    group = drawn.shape[1]
    begun = np.flatnonzero(waiting & (drawn > 0))
    begun = begun[np.argsort(-drawn.reshape(-1)[begun], kind="stable")].tolist()
    batches = [
        Batch(part, list(enumerate(part)))
        for part in (begun[i : i + most] for i in range(0, len(begun), most))
    ]
    fresh = {
        p: [p * group + int(g) for g in np.flatnonzero(waiting[p] & (drawn[p] == 0))] for p in order
    }
    problems = [p for p in order if fresh[p]]
    for i in range(0, len(problems), most):
        part = problems[i : i + most]
        requests = [(row, request) for row, p in enumerate(part) for request in fresh[p]]
        batches.append(Batch([fresh[p][0] for p in part], requests))
    return batches


def longest_first(expected: Sequence[float]) -> list[int]:
    """Problems by expected length, the longest first; equal ones in their own order."""
    return sorted(range(len(expected)), key=lambda p: -expected[p])


@dataclasses.dataclass
class Seats:
    """Who sits in each slot, as the host knows it."""

    request: Int[np.ndarray, " B"]
    """−1: nobody."""
    lengths: Int[np.ndarray, " B"]
    """Columns of cache in use."""

    @classmethod
    def empty(cls, slots: int) -> Seats:
        """`slots` free seats."""
        return cls(np.full(slots, -1), np.zeros(slots, np.int64))

    @property
    def taken(self) -> Int[np.ndarray, " n"]:
        """Slots with a request in them."""
        return np.flatnonzero(self.request >= 0)

    @property
    def free(self) -> Int[np.ndarray, " n"]:
        """Slots without one."""
        return np.flatnonzero(self.request < 0)

    @property
    def longest(self) -> int:
        """Columns of cache that the fullest slot uses."""
        return int(self.lengths[self.taken].max(initial=0))

    def pick(self, rows: Int[np.ndarray, " n"]) -> Seats:
        """The slots `rows` alone."""
        return Seats(self.request[rows], self.lengths[rows])


def _round_up(x: int, step: int) -> int:
    return math.ceil(x / step) * step
