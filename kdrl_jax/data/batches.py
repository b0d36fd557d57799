"""Which problems each training step sees."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


class PromptBatches:
    """`batches[position]` are the problems of a step: shuffled epochs, end to end.

    A `grain.MapDataset` that is a function of (seed, position) alone: the position is all there is
    to save, and any process computes its own part. Every epoch is shuffled anew and cut into whole
    steps, so no step asks a problem twice; the `num % per_step` problems that are left at the end
    of an epoch are dropped, other ones in each epoch.
    """

    def __init__(self, num: int, per_step: int, seed: int, *, shard: tuple[int, int] = (0, 1)):
        """
        Args:
          num: problems in all.
          per_step: problems of a step over all processes, at most `num`.
          seed: from 0 to 2**32 - 1.
          shard: (index, count) of this process; it gets the index-th of `count` equal, contiguous
            parts of every step.

        Raises:
          ValueError: an argument out of range.
        """
        index, count = shard
        if not 1 <= per_step <= num:
            raise ValueError(f"per_step must be in 1..{num}: {per_step}")
        if not 0 <= index < count or per_step % count:
            raise ValueError(f"shard {shard} must be one of parts that divide {per_step} problems")
        # Half a second, and most imports of this package need no batches.
        import grain

        self.num, self.per_step, self.seed, self.shard = num, per_step, seed, shard
        part = per_step // count
        # grain shuffles epoch e of seed s like epoch 0 of seed s + e; mixed, seeds share nothing.
        mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self.dataset = (
            grain.MapDataset.range(num)
            .shuffle(seed=mixed)
            .batch(per_step, drop_remainder=True)
            .repeat()
            .map(lambda batch: batch[index * part : (index + 1) * part].astype(np.int64))
        )

    def __getitem__(self, position: int) -> Int[np.ndarray, " P"]:
        """Indices [per_step / count] into the problems, int64."""
        if position < 0:
            raise IndexError(f"position must not be negative: {position}")
        return self.dataset[position]
