"""What training uses, with shapes for arrays: they lower the programs that a run would run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kdrl_jax.data import prompt_lengths
from kdrl_jax.models import Decoder
from kdrl_jax.planning.shapes import device_bytes, floats, ints, number, results
from kdrl_jax.rollout import RolloutEngine
from kdrl_jax.rollout.decode import Slots
from kdrl_jax.rollout.schedule import choose_window
from kdrl_jax.sharding import even_parts, placed, placed_batch, replicated
from kdrl_jax.training.batch import Rows
from kdrl_jax.training.learner import Learner, Weights, take_part
from kdrl_jax.training.scoring import Scorer
from kdrl_jax.training.step import Hyper
from kdrl_jax.types import Params, SamplingParams

STOP_IDS = 2
"""Ids that end a completion, of most tokenizers; a few numbers more or less."""


class NotingScorer(Scorer):
    """A scorer that notes the programs it is asked for, and returns shapes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.noted: list[tuple[Params, Callable[[], jax.stages.Lowered], int]] = []

    def _run(
        self,
        score: Any,
        params: Params,
        rows: Rows,
        more: tuple[Any, ...],
        length: int,
        temperature: Any,
        **options: int,
    ) -> Any:
        moved = placed_batch(self.mesh, (rows._replace(packing=None), *more))
        numbers = [number(self.mesh, dtype) for dtype in (jnp.int32, jnp.float32)]

        @functools.cache
        def lower() -> jax.stages.Lowered:
            with jax.set_mesh(self.mesh):
                return score.lower(params, moved, *numbers, t=length, **options)

        self.noted.append((params, lower, rows.tokens.shape[0] // self._rows))
        found = lower().out_info
        return placed(found, jax.tree.map(lambda _: self._home, found))


class OutlineLearner(Learner):
    """A learner with shapes for weights."""

    def _whole_head(self, teacher: Weights) -> Any:
        head = jax.eval_shape(teacher.model.head, teacher.params)
        return placed(head, replicated(self._mesh))

    def lower_update(self, state: Any, part: Any, scores: Any, used: Any) -> jax.stages.Lowered:
        """The program of an update."""
        head = self._teacher_head if scores.teacher_hidden is not None else None
        hyper = Hyper(*(number(self._mesh, jnp.float32) for _ in Hyper._fields))
        return self._update.lower(state, part, hyper, head, used, self._base)

    def batch(self, rows: Rows, rollouts: Any, scores: Any) -> tuple[Any, Any]:
        """Shapes of a step's batch and of one mini-batch."""
        rewards = floats(self._mesh, *rollouts.lengths.shape)
        beta = number(self._mesh, jnp.float32)
        # Training leaves their layout to the compiler, so it is asked.
        whole = results(self._fill_slots.lower(rows, rollouts, rewards, scores, beta))
        return whole, results(take_part.lower(whole, 0))

    def noted(self) -> Iterator[tuple[str, Any, Callable[[], jax.stages.Lowered], int]]:
        """Each scoring program with the role of its weights."""
        scorers = {"student": self._of_student, "reference": self._of_reference}
        for role, scorer in (scorers | {"teacher": self._of_teacher}).items():
            for found in scorer.noted if isinstance(scorer, NotingScorer) else ():
                yield role, *found


class OutlineEngine(RolloutEngine):
    """The rollout engine's programs at their largest, for shapes."""

    def __init__(self, model: Decoder, mesh: Mesh, *, config: ConfigDict, ids: int):
        super().__init__(
            model,
            valid_vocab=ids,
            prompt_buckets=prompt_lengths(
                config.data.prompt_buckets, config.data.max_prompt_tokens
            ),
            max_new_tokens=config.rollout.max_new_tokens,
            slots=config.rollout.slots,
            mesh=mesh,
        )
        self.steps, self.windows = self._chunk, self._windows
        self._slots: dict[tuple[int, int], Slots] = {}

    def seat(self, params: Params, problems: int, group: int) -> None:
        """As `Call` does for so many requests of these weights."""
        total = problems * group
        self.params = params
        self.seats = min(self.slots or total, total)
        self.prompts = min(problems, -(-self.seats // group))
        first = choose_window(self.windows, self.prompt_buckets[-1] + self.steps)
        self.window_of_prefill = self.windows[-1] if total > self.seats else first

    def lower_unstack(self) -> jax.stages.Lowered:
        """The weights as decoding reads them."""
        with jax.set_mesh(self.mesh):
            return self._unstack.lower(self.params)

    @functools.cached_property
    def weights(self) -> Any:
        """What comes out of that, and where it lies: only the compiler knows."""
        return results(self.lower_unstack())

    @functools.cached_property
    def copy_bytes(self) -> float:
        """Of the weights for decoding."""
        return device_bytes(self.weights)

    def lower_prefill(self) -> jax.stages.Lowered:
        """Prompts of the largest bucket."""
        tokens = ints(self.prompts, self.prompt_buckets[-1])
        rows = placed_batch(self.mesh, (tokens, ints(self.prompts)))
        with jax.set_mesh(self.mesh):
            return self._prefill.lower(self.params, *rows)

    @property
    def prompt_bytes(self) -> float:
        """Keys and values of the prompts of one prefill."""
        return self._cache_bytes(self.prompts, self.prompt_buckets[-1])

    def cache_bytes(self, window: int) -> float:
        """Keys and values of all slots."""
        return self._cache_bytes(self.seats, window)

    def _cache_bytes(self, rows: int, window: int) -> float:
        return device_bytes(self._slots_of(rows, window).cache)

    def _slots_of(self, rows: int, window: int) -> Slots:
        if (rows, window) not in self._slots:
            with jax.set_mesh(self.mesh):
                self._slots[rows, window] = results(self._empty.lower(rows, window))
        return self._slots[rows, window]

    def lower_grow(self) -> jax.stages.Lowered:
        """The largest window but one to the largest."""
        slots = self._slots_of(self.seats, self.windows[-2])
        parts = even_parts(self.mesh, self.seats)
        rows = placed(ints(parts, self.seats // parts), replicated(self.mesh))
        with jax.set_mesh(self.mesh):
            return self._fit.lower(slots, rows, window=self.windows[-1])

    def lower_decode(self) -> jax.stages.Lowered:
        """A chunk of tokens at the largest window."""
        whole = functools.partial(number, self.mesh)
        sampling = SamplingParams(
            *(whole(jnp.float32), whole(jnp.float32), whole(jnp.int32), whole(jnp.float32)),
            max_new_tokens=placed(ints(self.seats, 1), replicated(self.mesh)),
            stop_ids=placed(ints(STOP_IDS), replicated(self.mesh)),
        )
        slots = self._slots_of(self.seats, self.windows[-1])
        with jax.set_mesh(self.mesh):
            return self._decode.lower(self.weights, slots, sampling, whole(jnp.int32))
