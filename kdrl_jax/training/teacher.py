"""The teacher: a frozen model of its own architecture, dtype and mesh that scores rollouts."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from kdrl_jax.objectives import token_log_probs
from kdrl_jax.sharding import BATCH_AXES, constrain
from kdrl_jax.training.batch import Rows
from kdrl_jax.types import Params


class Teacher:
    """Per-token log-probs of a frozen model, a few rows at a time, never [rows, length, vocab].

    Args:
      model: the decoder; params: its weights, already in their shards on `mesh`.
      rows: how many rows one forward holds; must divide the rows given.
      valid_vocab: ids the tokenizer knows; the softmax is over these.
      chunk: tokens whose logits a device holds at once.
    """

    def __init__(
        self, model: Any, params: Params, mesh: Mesh, *, rows: int, valid_vocab: int, chunk: int
    ):
        self.params, self.mesh = params, mesh

        def forward(params: Params, rows_in: Rows, t: int, temperature: Array) -> Array:
            hidden = model.apply(params, *rows_in)[:, -t - 1 : -1]
            return token_log_probs(
                hidden,
                model.head(params),
                rows_in.tokens[:, -t:],
                temperature=temperature,
                valid_vocab=valid_vocab,
                chunk=chunk,
            )[0]

        def score(params: Params, all_rows: Rows, temperature: Array, t: int) -> Array:
            n = all_rows.tokens.shape[0]
            micro = split_micro_batches(all_rows, n // rows)
            out = jax.lax.map(lambda r: forward(params, r, t, temperature), micro)
            return join_micro_batches(out)

        self._score = jax.jit(score, static_argnames="t")

    def score(
        self, rows: Rows, length: int, temperature: Float[Array, ""], like: NamedSharding
    ) -> Float[Array, "B T"]:
        """log π_T of the last `length` tokens of each row, in float32; does not block.

        Args:
          rows: on the student's mesh.
          length: T.
          temperature: divides the logits, as it does the student's.
          like: where the result goes: the student's batch sharding.
        """
        moved = jax.device_put(rows, NamedSharding(self.mesh, P(BATCH_AXES)))
        heat = jax.device_put(temperature, NamedSharding(self.mesh, P()))
        with jax.set_mesh(self.mesh):
            scores = self._score(self.params, moved, heat, t=length)
        return jax.device_put(scores, like)


def split_micro_batches(tree: Any, count: int) -> Any:
    """[B, …] → [count, B / count, …], strided, so that each device keeps the rows it has."""

    def one(x: Array) -> Array:
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(one, tree)


def join_micro_batches(x: Array) -> Array:
    """The inverse of `split_micro_batches` for one array."""
    return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])
