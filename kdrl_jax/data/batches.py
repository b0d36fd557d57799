"""Which problems each training step sees."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


class PromptBatches:
    """`batches[step]` are the problems of a step: shuffled epochs, end to end.

    A function of (seed, step) alone, so a run resumes without a saved position. Every epoch holds
    each problem once. Where a step takes the end of one epoch and the head of the next, the head
    is rearranged so that no step asks a problem twice.
    """

    def __init__(self, num: int, per_step: int, seed: int):
        """num: problems in all. per_step: problems of a step, at most `num`."""
        if not 1 <= per_step <= num:
            raise ValueError(f"per_step must be in 1..{num}: {per_step}")
        self.num, self.per_step, self.seed = num, per_step, seed
        self._known = (-1, np.empty(0, np.int64))

    def __getitem__(self, step: int) -> Int[np.ndarray, "P"]:
        """Indices [per_step] into the problems, int64."""
        if step < 0:
            raise IndexError(f"step must not be negative: {step}")
        epoch, offset = divmod(step * self.per_step, self.num)
        head = self._order(epoch)[offset : offset + self.per_step]
        missing = self.per_step - len(head)
        return np.concatenate([head, self._order(epoch + 1)[:missing]]) if missing else head.copy()

    def _order(self, epoch: int) -> Int[np.ndarray, "num"]:
        """The order of all problems in an epoch."""
        known, order = self._known
        if known != epoch:
            # Only the first per_step places are rearranged: with two steps or more in an epoch,
            # that leaves the end alone, and so the next epoch's head depends on one shuffle only.
            start = max(0, epoch - 1) if self.num >= 2 * self.per_step else 0
            if not start <= known < epoch:
                known, order = start, self._shuffle(start)
            for e in range(known + 1, epoch + 1):
                order = self._rearranged(self._shuffle(e), e, order)
            self._known = (epoch, order)
        return order

    def _rearranged(self, order: np.ndarray, epoch: int, previous: np.ndarray) -> np.ndarray:
        """Move the problems that the step across the border already has behind that step."""
        shared = epoch * self.num % self.per_step  # this many of its problems are of `previous`
        if not shared:
            return order
        head, rest = order[: self.per_step], order[self.per_step :]
        asked = np.isin(head, previous[-shared:])
        return np.concatenate([head[~asked], head[asked], rest])

    def _shuffle(self, epoch: int) -> np.ndarray:
        """Sorting raw random words: NumPy promises their stream, unlike that of permutation()."""
        entropy = (self.seed % 2**64, epoch)
        words = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(self.num)
        return np.argsort(words, kind="stable")
