"""kdrl_jax on the workloads: its rollout engine, its fused step, its scorer.

Variants: W2 "longest" starts long requests first (their lengths must be known or guessed); W3 and
W5 "none" keeps every activation instead of computing layers again.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import workloads as w
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdrl_jax.models import Decoder, ModelConfig
from kdrl_jax.rollout import RolloutEngine, request_keys, sampling_params
from kdrl_jax.sharding import BATCH_AXES, make_mesh
from kdrl_jax.training.batch import Rows
from kdrl_jax.training.scoring import Scorer
from kdrl_jax.training.state import abstract_state, init_state
from kdrl_jax.training.step import Hyper, make_hyper, make_update
from kdrl_jax.types import Params, Prompts, TrainBatch

Run = Callable[[], None]


def make_model(shape: w.Shape, dtype: str = "float32", remat: str = "full") -> Decoder:
    """A decoder without weights."""
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
    return Decoder(config, jnp.dtype(dtype), remat)


def one_device() -> Mesh:
    """The mesh that everything here runs on."""
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def rollout(
    model: Decoder, params: Params, lengths: np.ndarray, *, group=1, slots=0, longest_first=False
) -> Run:
    """Rollouts of `lengths` tokens, `group` of each prompt; checked to have these."""
    count, most = len(lengths) // group, int(lengths.max())
    vocab = model.config.vocab_size
    prompts = Prompts(w.prompts(vocab, count), np.full(count, w.PROMPT, np.int32))
    engine = RolloutEngine(
        model, valid_vocab=vocab, prompt_buckets=(w.PROMPT,), max_new_tokens=most, slots=slots
    )
    lengths = lengths.reshape(count, group)
    sampling = sampling_params((count, group), (-1,), max_new_tokens=most, temperature=1.0)
    sampling = dataclasses.replace(sampling, max_new_tokens=jnp.asarray(lengths))
    expected = lengths.max(1).tolist() if longest_first else None
    seeds = itertools.count()

    def run() -> None:
        keys = request_keys(next(seeds), 0, range(count), group)
        out = engine.generate(params, prompts, keys, sampling, expected_lengths=expected)
        np.testing.assert_array_equal(out.lengths, lengths)

    return run


def packed(tokens: jax.Array) -> Rows:
    """Rows without padding."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return Rows(tokens, positions, jnp.ones_like(tokens))


def score(model: Decoder, params: Params, data: dict[str, np.ndarray]) -> Run:
    """Log-probs of all but the prompts."""
    rows = packed(jnp.asarray(data["tokens"]))
    count, length = data["tokens"].shape
    head = {"valid_vocab": model.config.vocab_size, "chunk": 512}
    scorer, heat = Scorer(model, one_device(), rows=count, **head), jnp.float32(1.0)

    def run() -> None:
        jax.block_until_ready(scorer.log_probs(params, rows, length - w.PROMPT, heat))

    return run


def make_optimizer() -> optax.GradientTransformation:
    """The workloads' AdamW."""
    return optax.adamw(**w.ADAM)


def train_batch(data: dict[str, np.ndarray], **changes) -> TrainBatch:
    """The rows with old and teacher log-probs; every token after the prompts counts alike."""
    old = jnp.asarray(data["old"])
    weight = jnp.full(old.shape, 1 / old.size, jnp.float32)
    fields = {
        "sampler_log_probs": old,
        "old_log_probs": old,
        "teacher_log_probs": jnp.asarray(data["teacher"]),
        "advantages": jnp.broadcast_to(jnp.asarray(data["advantages"])[:, None], old.shape),
        "weights": weight,
        "kd_weights": weight,
    }
    return TrainBatch(*packed(jnp.asarray(data["tokens"]))[:3], **{**fields, **changes})


def train(model: Decoder, params: Params, data: dict[str, np.ndarray], chunk: int) -> Run:
    """One update of all rows; takes `params`."""
    mesh, optimizer = one_device(), make_optimizer()
    holder = [init_state(params, optimizer, mesh)]
    head = {"valid_vocab": model.config.vocab_size, "chunk": chunk}
    update = make_update(model, optimizer, mesh, micro_batches=1, **head)
    batch, hyper = train_batch(data), make_hyper(mesh, beta=w.KL_WEIGHT, temperature=1.0)

    def run() -> None:
        holder[0], metrics = update(holder[0], batch, hyper)
        jax.block_until_ready((holder[0], metrics))

    return run


def lower_train(model: Decoder, mesh: Mesh, rows: int, length: int, chunk: int):
    """The update as a program (`jax.stages.Lowered`) for devices that need not be there."""
    shape = w.Shape(0, 0, 0, 0, 0, model.config.vocab_size)
    optimizer = make_optimizer()
    state = abstract_state(model, optimizer, mesh)
    batch = jax.eval_shape(lambda: train_batch(w.train_rows(shape, rows, length)))
    hyper = jax.eval_shape(lambda: Hyper(*np.zeros(len(Hyper._fields), np.float32)))
    split = NamedSharding(mesh, P(BATCH_AXES))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), batch)
    head = {"valid_vocab": model.config.vocab_size, "chunk": chunk}
    update = make_update(model, optimizer, mesh, micro_batches=1, **head)
    return update.lower(state, batch, hyper)


def main() -> None:
    """One workload."""
    args = w.arguments()
    shape, size = w.SHAPES[args.shape], (args.rows, args.length)
    model = make_model(shape, args.dtype, "none" if args.variant == "none" else "full")
    params = jax.jit(model.init)(jax.random.key(0))
    if args.workload in ("W3", "W5"):
        chunk = 512 if args.workload == "W3" else 128
        run = train(model, params, w.train_rows(shape, *size), chunk)
        del params  # the state has its own
        return w.measure(run, args.rows * args.length, args.repeats)
    params = model.cast(params)  # frozen weights are kept in the compute dtype
    if args.workload == "W4":
        run = score(model, params, w.train_rows(shape, *size))
        return w.measure(run, args.rows * args.length, args.repeats)
    lengths = w.wanted_lengths(args.workload, *size)
    slots = w.AT_ONCE if args.workload == "W2" else 0
    run = rollout(model, params, lengths, slots=slots, longest_first=args.variant == "longest")
    return w.measure(run, int(lengths.sum()), args.repeats)


if __name__ == "__main__":
    main()
