"""Supervised training on worked solutions: how the embedded teacher and the warm start are made.

It is the same fused step: with every advantage 1 and no teacher, the on-policy GRPO term's
gradient is −Σ w·∇log π, which is cross-entropy's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from kdrl_jax.objectives import token_weights
from kdrl_jax.sharding import put_batch
from kdrl_jax.training.batch import to_rows
from kdrl_jax.training.state import init_state, make_optimizer, make_schedule
from kdrl_jax.training.step import Metrics, make_hyper, make_update
from kdrl_jax.types import Params, TrainBatch, UserError

Example = tuple[list[int], list[int]]
"""Prompt ids and completion ids, the end token included."""


def train_supervised(
    model: Any,
    params: Params,
    examples: Sequence[Example],
    mesh: Mesh,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    valid_vocab: int,
    pad_id: int,
    chunk: int,
    report: Callable[[float], None] = lambda nll: None,
) -> Params:
    """Minimise −(1/B) Σ_i (1/|o_i|) Σ_t log π(o_{i,t}), cosine schedule, AdamW.

    Args:
      params: float32 weights in their shards; donated.
      examples: drawn in a seeded shuffle, each once per epoch.
      report: called with the batch's mean −log π (nats) at every step.

    Returns:
      The trained weights.

    Raises:
      UserError: loss or gradient is not finite.
    """
    schedule = make_schedule(
        learning_rate, max(steps // 20, 1), "cosine", steps, floor=learning_rate / 10
    )
    optimizer = make_optimizer(
        schedule, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.01, clip_norm=1.0
    )
    update = make_update(
        model,
        optimizer,
        mesh,
        micro_batches=1,
        valid_vocab=valid_vocab,
        chunk=chunk,
    )
    state = init_state(params, optimizer, mesh)
    hyper = make_hyper(mesh, beta=0.0, temperature=1.0)
    s = max(len(prompt) for prompt, _ in examples)
    t = max(len(completion) for _, completion in examples)
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    previous = None
    for _ in range(steps):
        while len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(len(examples))])
        chosen, order = order[:batch_size], order[batch_size:]
        padded = pad_examples([examples[i] for i in chosen], s, t, pad_id)
        batch = supervised_batch(*put_batch(mesh, padded))
        state, metrics = update(state, batch, hyper)
        if previous is not None:  # one step late, so that the host prepares while devices work
            _tell(report, previous)
        previous = metrics
    if previous is not None:
        _tell(report, previous)
    return state.params


def _tell(report: Callable[[float], None], metrics: Metrics) -> None:
    if float(metrics["update/skipped"]):
        raise UserError(
            "supervised training: loss or gradient is not finite; lower sft.learning_rate of the "
            "model that is being trained, student or teacher"
        )
    report(-float(metrics["log_probs/mean"]))


def pad_examples(
    examples: Sequence[Example], s: int, t: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Prompts [B, S] padded on the left and their lengths, completions [B, T] and theirs."""
    n = len(examples)
    prompts = np.full((n, s), pad_id, np.int32)
    completions = np.full((n, t), pad_id, np.int32)
    for i, (prompt, completion) in enumerate(examples):
        prompts[i, s - len(prompt) :] = prompt
        completions[i, : len(completion)] = completion
    prompt_lengths = np.array([len(prompt) for prompt, _ in examples], np.int32)
    lengths = np.array([len(completion) for _, completion in examples], np.int32)
    return prompts, prompt_lengths, completions, lengths


@jax.jit
def supervised_batch(
    prompts: Int[Array, "B S"],
    prompt_lengths: Int[Array, " B"],
    completions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> TrainBatch:
    """Rows of S + T tokens whose completions are trained on with weight 1 / (B·|o_i|)."""
    rows = to_rows(prompts, prompt_lengths, completions, lengths)
    n, t = completions.shape
    mask = jnp.arange(t)[None, :] < lengths[:, None]
    zeros = jnp.zeros((n, t), jnp.float32)
    return TrainBatch(
        *rows[:3],
        sampler_log_probs=zeros,
        old_log_probs=None,
        teacher_log_probs=None,
        advantages=jnp.ones((n, t), jnp.float32),
        weights=token_weights(mask, jnp.arange(n), "seq-mean-token-mean"),
        kd_weights=zeros,
    )
