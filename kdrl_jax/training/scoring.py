"""Scoring rollouts with weights that are not being trained: teacher, reference, old student."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kdrl_jax.objectives import support_log_probs, token_log_probs, top_support
from kdrl_jax.sharding import BATCH_AXES, constrain, put, replicated
from kdrl_jax.training.batch import Rows
from kdrl_jax.types import Params

CPU_CHUNK = 192
"""Tokens whose logits a CPU scores at once: fresh memory for more costs it more than the products
win. An update has no such bound: it adds to the gradient of the whole head once a chunk."""


def scoring_chunk(chunk: int, on_cpu: bool) -> int:
    """How many tokens' logits a device holds at a time, when asked for up to `chunk`."""
    return min(chunk, CPU_CHUNK) if on_cpu else chunk


class Scorer:
    """A forward pass a few rows at a time; never [rows, length, vocab].

    All methods return arrays that are still being computed, 0 for packed rows that are not in use.
    `temperature` divides the logits, as it does the student's in the loss.

    Args:
      model: the decoder.
      mesh: where the weights that will be given are.
      home: where the rows come from and the results go; default: `mesh`.
      rows: how many rows one forward holds; must divide the rows given.
      valid_vocab: ids the tokenizer knows; the softmax is over these.
      chunk: tokens whose logits a device holds at once; see `scoring_chunk`.
      mini_batches: into which packed rows are divided.
    """

    def __init__(
        self,
        model: Any,
        mesh: Mesh,
        home: Mesh | None = None,
        *,
        rows: int,
        valid_vocab: int,
        chunk: int,
        mini_batches: int = 1,
    ):
        self.model, self.mesh, self._rows = model, mesh, rows
        self._mini_batches = mini_batches
        self._home = NamedSharding(home or mesh, P(BATCH_AXES))
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._head = {"valid_vocab": valid_vocab, "chunk": scoring_chunk(chunk, on_cpu)}
        self._log_probs_of = self._mapped(self._token_log_probs)
        self._support_of = self._mapped(self._support_log_probs)
        self._top_of = self._mapped(self._top_support, static="k")
        self._hidden_of = self._mapped(self._hidden_states)

    def log_probs(
        self, params: Params, rows: Rows, length: int, temperature: Float[Array, ""]
    ) -> Float[Array, "B T"]:
        """log π of the last `length` tokens of each row, float32."""
        return self._run(self._log_probs_of, params, rows, (), length, temperature)

    def at_support(
        self,
        params: Params,
        rows: Rows,
        support: Int[Array, "B T J"],
        length: int,
        temperature: Float[Array, ""],
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T J"]]:
        """`log_probs`, and log π of the tokens `support` of each position."""
        return self._run(self._support_of, params, rows, (support,), length, temperature)

    def top_support(
        self, params: Params, rows: Rows, k: int, length: int, temperature: Float[Array, ""]
    ) -> tuple[Float[Array, "B T"], Int[Array, "B T J"], Float[Array, "B T J"]]:
        """`log_probs`, the J = k likeliest tokens of each position, and log π of these."""
        return self._run(self._top_of, params, rows, (), length, temperature, k=k)

    def hidden(
        self, params: Params, rows: Rows, length: int, temperature: Float[Array, ""]
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T D"]]:
        """`log_probs`, and the states that the output head turns into distributions."""
        return self._run(self._hidden_of, params, rows, (), length, temperature)

    def _states(self, params: Params, rows: Rows, t: int) -> Array:
        return self.model.apply(params, *rows[:3])[:, -t - 1 : -1]

    def _token_log_probs(self, params: Params, rows: Rows, t: int, heat: Array) -> Array:
        hidden, targets = self._states(params, rows, t), rows.tokens[:, -t:]
        head = self.model.head(params)
        return token_log_probs(hidden, head, targets, temperature=heat, **self._head)[0]

    def _support_log_probs(
        self, params: Params, rows: Rows, support: Array, t: int, heat: Array
    ) -> tuple[Array, Array]:
        hidden, targets = self._states(params, rows, t), rows.tokens[:, -t:]
        log_probs, _, of_support = support_log_probs(
            hidden, self.model.head(params), targets, support, temperature=heat, **self._head
        )
        return log_probs, of_support

    def _top_support(
        self, params: Params, rows: Rows, t: int, heat: Array, k: int
    ) -> tuple[Array, Array, Array]:
        hidden, targets = self._states(params, rows, t), rows.tokens[:, -t:]
        head = self.model.head(params)
        return top_support(hidden, head, targets, k, temperature=heat, **self._head)

    def _hidden_states(
        self, params: Params, rows: Rows, t: int, heat: Array
    ) -> tuple[Array, Array]:
        hidden, targets = self._states(params, rows, t), rows.tokens[:, -t:]
        head = self.model.head(params)
        log_probs = token_log_probs(hidden, head, targets, temperature=heat, **self._head)[0]
        return log_probs, hidden

    def _mapped(self, forward: Any, static: str | None = None) -> Any:
        """`forward` over groups of rows, jitted."""

        def score(
            params: Params, all_rows: Any, used: Array, heat: Array, t: int, **options: int
        ) -> Any:
            count = all_rows[0].tokens.shape[0] // self._rows
            micro = split_micro_batches(all_rows, count)

            def one(index: Array | int) -> Any:
                return forward(params, *jax.tree.map(lambda x: x[index], micro), t, heat, **options)

            def write(index: Array, out: Any) -> Any:
                return jax.tree.map(lambda all, x: all.at[index].set(x), out, one(index))

            def empty(x: Any) -> Array:
                return constrain(
                    jnp.zeros((count, *x.shape), x.dtype), None, "batch", *[None] * (x.ndim - 1)
                )

            out = jax.tree.map(empty, jax.eval_shape(one, 0))
            out = jax.lax.fori_loop(0, used * self._mini_batches, write, out)
            return jax.tree.map(join_micro_batches, out)

        return jax.jit(score, static_argnames=["t", *([static] if static else [])])

    def _run(
        self,
        score: Any,
        params: Params,
        rows: Rows,
        more: tuple[Array, ...],
        length: int,
        temperature: Float[Array, ""],
        **options: int,
    ) -> Any:
        """Move the rows to the weights' mesh, score them there, and move the result home."""
        passes = np.int32(len(rows.tokens) // self._rows // self._mini_batches)
        used = passes if rows.packing is None else rows.packing.used
        plain = rows._replace(packing=None)
        moved = put((plain, *more), NamedSharding(self.mesh, P(BATCH_AXES)))
        numbers = put((used, temperature), replicated(self.mesh))
        with jax.set_mesh(self.mesh):
            out = score(params, moved, *numbers, t=length, **options)
        return put(out, self._home)


def split_micro_batches(tree: Any, count: int) -> Any:
    """[B, …] → [count, B / count, …], strided, so that each device keeps the rows it has."""

    def one(x: Array) -> Array:
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(one, tree)


def join_micro_batches(x: Array) -> Array:
    """The inverse of `split_micro_batches` for one array."""
    return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])
