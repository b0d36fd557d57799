"""Whether the teacher is heard: what its values, shuffled, would change in the gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from kdrl_jax.objectives.distributions import Support
from kdrl_jax.sharding import param_shardings, replicated
from kdrl_jax.training.batch import Rows
from kdrl_jax.training.scoring import split_micro_batches
from kdrl_jax.training.step import Hyper, Loss
from kdrl_jax.types import Params, Rollouts, Scores, TrainBatch

HEARD = ("advantages", "teacher_log_probs", "support", "support_log_probs", "teacher_hidden")
"""Fields of a batch that depend on what the teacher says."""
SAID = ("teacher_log_probs", "support", "support_log_probs", "teacher_hidden")
"""Fields of `Scores` that are the teacher's."""


Fields = dict[str, Array | None]


def shuffled_slots(
    fill_slots: Callable[..., TrainBatch], support: Support
) -> Callable[..., Fields]:
    """`fill_slots` as it would be with another teacher: its fields `HEARD`, to be jitted.

    What the teacher said of the rows is moved on by a row and a column; what the student did stays.

    Args:
      fill_slots: (rows, rollouts, rewards, scores, beta, correct) → batch; see `build_batch`.
      support: whose tokens `scores.support` are; those of the student stay.
    """

    def fill(
        rows: Rows,
        rollouts: Rollouts,
        rewards: Array,
        scores: Scores,
        beta: Array,
        correct: Array | None = None,
    ) -> Fields:
        own = {"support": scores.support} if support == "student" else {}
        said = {name: getattr(scores, name) for name in SAID}
        moved = jax.tree.map(lambda x: jnp.roll(x, (1, 1), (0, 1)), said) | own
        other = dataclasses.replace(scores, **moved)
        batch = fill_slots(rows, rollouts, rewards, other, beta, correct)
        return {name: getattr(batch, name) for name in HEARD}

    return fill


class TeacherProbe:
    """`probe(params, batch, other, hyper, …)`: the norm of ∇L(batch) − ∇L(other), jitted.

    The gradients of a micro-batch of one and of the other are taken in turn and added, with their
    signs, to one sum: so it needs little more memory than an update (`Planner` counts it), and is 0
    exactly where the two batches are one to the loss.

    Args:
      loss: see `make_loss`.
      micro_batches: divides the rows of a batch.
    """

    def __init__(self, loss: Loss, mesh: Mesh, micro_batches: int):
        self._loss, self._mesh, self._micro_batches = loss, mesh, micro_batches
        self._jitted = jax.jit(self._probe, out_shardings=replicated(mesh))

    def __call__(self, *args: Any) -> Float[Array, ""]:
        """The norm, still to come.

        Args:
          params: of the student; they are not donated.
          batch: one update's.
          other: its fields `HEARD` as another teacher would have them.
          hyper, teacher_head, used, base: as an update has them.
        """
        with jax.set_mesh(self._mesh):
            return self._jitted(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """The program for arrays or shapes like these."""
        with jax.set_mesh(self._mesh):
            return self._jitted.lower(*args)

    def _probe(
        self,
        params: Params,
        batch: TrainBatch,
        other: Fields,
        hyper: Hyper,
        teacher_head: Array | None,
        used: Array | None,
        base: Params | None = None,
    ) -> Float[Array, ""]:
        whole = split_micro_batches((batch, other), self._micro_batches)
        layout = param_shardings(self._mesh, params)

        def loss(params: Params, part: TrainBatch) -> Array:
            return self._loss(params, part, hyper, teacher_head, base)[0]

        def add(index: Array, total: Params) -> Params:
            part, instead = jax.tree.map(lambda x: x[index // 2], whole)
            plain = index % 2 == 0
            chosen = {
                name: jax.tree.map(lambda a, b: jnp.where(plain, a, b), getattr(part, name), new)
                for name, new in instead.items()
            }
            found = jax.grad(loss)(params, dataclasses.replace(part, **chosen))
            total = jax.tree.map(lambda a, b: jnp.where(plain, a + b, a - b), total, found)
            return jax.lax.with_sharding_constraint(total, layout)

        passes = self._micro_batches if used is None else used
        start = jax.tree.map(jnp.zeros_like, params)
        return optax.global_norm(jax.lax.fori_loop(0, 2 * passes, add, start))
