"""kdrl_jax on the workloads: its rollout engine, its fused step, its scorer.

Variants: W2 "longest" starts long requests first (their lengths must be known or guessed); W3 and
W5 "none" keeps every activation instead of computing layers again.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import workloads as w

from kdrl_jax.models import Decoder, ModelConfig
from kdrl_jax.rollout import RolloutEngine, request_keys, sampling_params
from kdrl_jax.sharding import make_mesh
from kdrl_jax.training.batch import Rows
from kdrl_jax.training.scoring import Scorer
from kdrl_jax.training.state import init_state
from kdrl_jax.training.step import make_hyper, make_update
from kdrl_jax.types import Prompts, TrainBatch

MESH = make_mesh(1, 1, 1, jax.devices()[:1])


def main() -> None:
    """One workload."""
    args = w.arguments()
    shape = w.SHAPES[args.shape]
    config = ModelConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        mlp_size=shape.mlp,
        rope_theta=1e6,
    )
    model = Decoder(config, remat="none" if args.variant == "none" else "full")
    params = model.init(jax.random.key(0))
    if args.workload in w.ROLLOUT:
        rollout(args, shape, model, params)
    else:
        rows(args, shape, model, params)


def rollout(args, shape, model, params) -> None:
    count, most = w.ROLLOUT[args.workload]
    prompts = Prompts(w.prompts(shape, count), np.full(count, w.PROMPT, np.int32))
    lengths = np.full(count, most, np.int32)
    if args.workload == "W2":
        lengths = w.long_tail(count, most)
    engine = RolloutEngine(
        model,
        valid_vocab=shape.vocab,
        prompt_buckets=(w.PROMPT,),
        max_new_tokens=most,
        slots=w.AT_ONCE if args.workload == "W2" else 0,
    )
    sampling = sampling_params((count, 1), (-1,), max_new_tokens=most, temperature=1.0)
    sampling = dataclasses.replace(sampling, max_new_tokens=jnp.asarray(lengths[:, None]))
    expected = lengths.tolist() if args.variant == "longest" else None
    seeds = itertools.count()

    def run() -> None:
        keys = request_keys(next(seeds), 0, range(count), 1)
        out = engine.generate(params, prompts, keys, sampling, expected_lengths=expected)
        np.testing.assert_array_equal(out.lengths[:, 0], lengths)

    w.measure(run, int(lengths.sum()), args.repeats)


def rows(args, shape, model, params) -> None:
    data = w.train_rows(shape, args.workload, args.length)
    tokens = jnp.asarray(data["tokens"])
    count, length = tokens.shape
    scored = length - w.PROMPT
    packed = Rows(tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape), jnp.ones_like(tokens))
    head = {"valid_vocab": shape.vocab, "chunk": 512 if args.workload != "W5" else 128}
    if args.workload == "W4":
        scorer = Scorer(model, MESH, rows=count, **head)
        heat = jnp.float32(1.0)

        def run() -> None:
            jax.block_until_ready(scorer.log_probs(params, packed, scored, heat))
    else:
        adam = {key: value for key, value in w.ADAM.items() if key != "learning_rate"}
        optimizer = optax.adamw(w.ADAM["learning_rate"], **adam)
        holder = [init_state(params, optimizer, MESH)]
        del params
        weight = jnp.full((count, scored), 1 / (count * scored), jnp.float32)
        batch = TrainBatch(
            *packed,
            sampler_log_probs=jnp.asarray(data["old"]),
            old_log_probs=jnp.asarray(data["old"]),
            teacher_log_probs=jnp.asarray(data["teacher"]),
            advantages=jnp.broadcast_to(jnp.asarray(data["advantages"])[:, None], weight.shape),
            weights=weight,
            kd_weights=weight,
        )
        update = make_update(model, optimizer, MESH, micro_batches=1, **head)
        hyper = make_hyper(MESH, beta=w.KL_WEIGHT, temperature=1.0)

        def run() -> None:
            holder[0], metrics = update(holder[0], batch, hyper)
            jax.block_until_ready((holder[0], metrics))

    w.measure(run, tokens.size, args.repeats)


if __name__ == "__main__":
    main()
