"""The memory plan: beside XLA's own account, what it refuses, and what it says after a failure."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import command, refused, rows, run

from kdrl_jax import train
from kdrl_jax.config import ROOT, apply_overrides, load_config
from kdrl_jax.models import Decoder, ModelConfig
from kdrl_jax.rollout import RolloutEngine, sampling_params
from kdrl_jax.rollout import decode as device
from kdrl_jax.sharding import make_mesh, param_shardings
from kdrl_jax.training import step
from kdrl_jax.training.batch import Rows
from kdrl_jax.training.display import Display
from kdrl_jax.training.footprint import Placed
from kdrl_jax.training.learner import Learner
from kdrl_jax.training.memory import GIB, Levers, Planner
from kdrl_jax.training.memory_check import (
    LEARNING,
    SAMPLING,
    MemoryCheck,
    device_limit,
    out_of_memory,
)
from kdrl_jax.training.meshes import Meshes
from kdrl_jax.training.scoring import Scorer
from kdrl_jax.training.state import abstract_state, make_optimizer, make_schedule
from kdrl_jax.training.validation import validate
from kdrl_jax.types import TrainBatch, UserError

MIB = 2**20
# Estimates over XLA's sums on one device were between 0.92 and 1.12 for updates, scoring and
# decoding of rows up to 1024 tokens, and 0.76 (update, 4096) to 1.35 (prefill) at the extremes;
# vocabularies of 1,024 to 151,936 rows, every remat, both dtypes.
LOW, HIGH = 0.7, 1.6


def shape(vocab=32_000, layers=4, **changes) -> ModelConfig:
    sizes = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    settings = {"vocab_size": vocab, "num_layers": layers, "mlp_size": 768} | sizes
    return ModelConfig(**settings | {"max_positions": 2**20} | changes)


def config_of(**changes):
    """Base, with a teacher of the same shape and rollouts of 8 groups of 4: 32 rows of 256."""
    settings = {
        "teacher.sft.steps": 1,
        "data.task": "arithmetic",
        "data.prompt_buckets": "(64,)",
        "data.max_prompt_tokens": 64,
        "rollout.prompts_per_step": 8,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 192,
        "micro_batch": 16,
        "logprob_chunk": 512,
        "student.dtype": "float32",
        "teacher.dtype": "float32",
        "student.remat": "none",
        "eval.every": 0,
        **changes,
    }
    base = load_config(ROOT / "configs" / "base.py")
    return apply_overrides(base, [f"{key}={value}" for key, value in settings.items()])


def one_device():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def planner_of(config, model, mesh=None, on_cpu=True):
    mesh = mesh or one_device()
    both = {"student": model, "teacher": model}
    return Planner(config, validate(config), both, Meshes(mesh, mesh, mesh), on_cpu)


def bytes_of(lowered) -> int:
    """What XLA takes for a program on one device: arguments, results that are new, temporaries."""
    m = lowered.compile().memory_analysis()
    new = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.argument_size_in_bytes + new + m.temp_size_in_bytes


def near(estimate: float, lowered) -> None:
    ratio = estimate / bytes_of(lowered)
    assert LOW < ratio < HIGH, f"estimate / XLA = {ratio:.2f}"


def arrays(count, length, tail) -> TrainBatch:
    def of(dtype, n):
        return jax.ShapeDtypeStruct((count, n), dtype)

    ids, numbers = of(jnp.int32, length), of(jnp.float32, tail)
    return TrainBatch(ids, ids, ids, numbers, None, numbers, numbers, numbers, numbers)


def lowered_update(config, model, mesh, lora=None):
    """The update's program, from shapes alone."""
    decoder = Decoder(model, config.student.dtype, config.student.remat, lora)
    optimizer = make_optimizer(
        make_schedule(1e-3, 0, "constant", 9),
        **{"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0},
    )
    state = abstract_state(decoder, optimizer, mesh)
    hyper = step.make_hyper(mesh, beta=1e-3, temperature=1.0)
    rollouts = config.rollout.prompts_per_step * config.rollout.group_size
    tail = config.rollout.max_new_tokens
    row = config.data.prompt_buckets[-1] + tail
    split = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split),
        arrays(rollouts, row, tail),
    )
    update = step.make_update(
        decoder,
        optimizer,
        mesh,
        micro_batches=rollouts // config.micro_batch,
        valid_vocab=model.vocab_size,
        chunk=config.logprob_chunk,
    )
    base = decoder.base.shapes() if lora else None
    return update.lower(state, batch, hyper, base=base)


# --- the estimates ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        shape(),
        shape(tie_embeddings=False, model_type="llama", qk_norm=False),
        shape(model_type="qwen2", qk_norm=False, qkv_bias=True),
    ],
    ids=lambda m: m.model_type,
)
def test_weights_are_counted(model):
    assert model.num_params == sum(x.size for x in jax.tree.leaves(Decoder(model).shapes()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [256, 1024])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_a_layer_keeps(dtype, length, remat):
    """Against what JAX's own trace hands from the forward to the backward pass, on any backend."""
    model, count = shape(1024, layers=5), 3
    decoder = Decoder(model, dtype, remat)
    ids = jax.ShapeDtypeStruct((count, length), jnp.int32)

    def total(params, ids):
        return decoder.apply(params, ids, ids, ids).sum()

    trace = jax.make_jaxpr(jax.grad(total))(decoder.shapes(), ids)
    scan = next(e for e in trace.eqns if e.primitive.name == "scan" and e.params["length"] == 5)
    handed = [v.aval for v in scan.outvars if v.aval.shape[:1] == (5,)]
    # Weights in the compute dtype are handed on as well; here only what grows with the rows.
    of_rows = [x for x in handed if x.shape[1] == count or count in x.shape[:3]]
    of_rows += [x for x in handed if x.shape[1] == count * length]
    kept = sum(x.size * x.dtype.itemsize for x in of_rows) / 5 / count / length
    placed = Placed.on(one_device(), model, dtype, on_cpu=False)
    assert placed.kept(remat, length) == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize(
    ("vocab", "changes"),
    [
        (32_000, {}),  # 1.03
        (32_000, {"student.remat": "dots", "student.dtype": "bfloat16"}),  # 1.06
        (151_936, {"student.remat": "full"}),  # 0.97
    ],
    ids=str,
)
def test_update_beside_xla(vocab, changes):
    config, model = config_of(**changes), shape(vocab)
    planner = planner_of(config, model)
    parts = planner.plan(Levers.of(config)).phases["update"]
    estimate = sum(parts.values()) - parts["teacher"]
    near(estimate, lowered_update(config, model, one_device()))


def test_update_on_a_mesh_beside_xla():
    """Per device of 2 x 2 x 2: 0.74, the least sure of all; 1.19 for 1 x 8 x 1."""
    config, model = config_of(**{"student.remat": "full"}), shape()
    mesh = make_mesh(2, 2, 2)
    parts = planner_of(config, model, mesh).plan(Levers.of(config)).phases["update"]
    estimate = sum(parts.values()) - parts["teacher"]
    near(estimate, lowered_update(config, model, mesh))


def test_scoring_beside_xla():
    """1.00."""
    vocab = 151_936
    config, model = config_of(), shape(vocab)
    decoder, mesh = Decoder(model), one_device()
    scorer = Scorer(decoder, mesh, rows=16, valid_vocab=vocab, chunk=512)
    ids = jax.ShapeDtypeStruct((32, 256), jnp.int32)
    with jax.set_mesh(mesh):
        program = scorer._log_probs_of.lower(
            decoder.shapes(), (Rows(ids, ids, ids),), jnp.int32(2), jnp.float32(1), t=192
        )
    parts = planner_of(config, model).plan(Levers.of(config)).phases["score"]
    near(sum(parts.values()) - parts["weights"] - parts["moments"], program)


def test_decoding_beside_xla():
    """1.00: the loop over tokens, with what it reads."""
    dtype = "bfloat16"
    changes = {"student.dtype": dtype, "rollout.prompts_per_step": 16, "micro_batch": 64}
    changes["data.prompt_buckets"] = "(128,)"
    config, model = config_of(**changes, **{"rollout.max_new_tokens": 96}), shape(151_936)
    decoder = Decoder(model, dtype)
    weights = jax.eval_shape(decoder.unstack, decoder.shapes())
    window = 128 + 96 + device_chunk(config)
    slots = jax.eval_shape(functools.partial(device.empty_slots, decoder, 64, window))
    draw = functools.partial(
        device.decode, decoder, steps=device_chunk(config), valid_vocab=model.vocab_size
    )
    sampling = sampling_params((16, 4), [1], max_new_tokens=96, temperature=1.0)
    program = jax.jit(draw, donate_argnums=1).lower(weights, slots, sampling, jnp.int32(0))
    planner = planner_of(config, model)
    parts = planner.plan(Levers.of(config)).phases["rollout"]
    assert "logits" in parts, "decoding is the worst moment"
    others = {*planner.resident(), "batch", "prompts' cache"}
    near(sum(size for name, size in parts.items() if name not in others), program)


def device_chunk(config) -> int:
    """Tokens between two looks of the host, as the engine takes them."""
    engine = RolloutEngine(
        Decoder(shape(64)),
        valid_vocab=64,
        prompt_buckets=config.data.prompt_buckets,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    return engine._chunk


def test_a_mesh_takes_its_share():
    config, model = config_of(), shape()
    whole = planner_of(config, model).plan(Levers.of(config)).phases
    split = planner_of(config, model, make_mesh(1, 8, 1)).plan(Levers.of(config)).phases
    for phase in whole:
        for part in ("weights", "moments"):
            assert split[phase][part] == whole[phase][part] / 8
    copy = "rollout's copy of weights"
    assert split["rollout"][copy] == whole["rollout"][copy], "whole on fsdp"
    tensor = planner_of(config, model, make_mesh(4, 1, 2)).plan(Levers.of(config)).phases
    assert tensor["rollout"][copy] == whole["rollout"][copy] / 2
    alone = Placed.on(one_device(), model, "float32", on_cpu=True)
    by_both = Placed.on(make_mesh(2, 2, 2), model, "float32", on_cpu=True)
    assert by_both.cache(16, 100) == alone.cache(16, 100) / 8
    placed = Placed.on(make_mesh(1, 8, 1), model, "float32", on_cpu=True)
    assert (placed.rows(12), placed.rows(16)) == (12, 2), "12 rows stay whole on 8 devices"


def test_levers_take_their_share_away():
    """Offload, weights in 8 bits, moments over `data`, rollouts in another dtype."""

    def phases(mesh=None, **changes):
        config = config_of(**changes)
        planner = planner_of(config, shape(), *([mesh] if mesh else []))
        return planner.plan(Levers.of(config)).phases

    plain, waiting = phases(), phases(**{"optimizer.offload": True, "teacher.offload": True})
    for phase, parts in plain.items():
        kept = {"update": ["moments"], "score": ["teacher"]}.get(phase, [])
        for name in ("moments", "teacher"):
            assert waiting[phase].get(name) == (parts[name] if name in kept else None)
    half = phases(**{"teacher.dtype": "bfloat16"})["score"]["teacher"]
    eighth = phases(**{"teacher.dtype": "int8"})["score"]["teacher"]
    assert half == plain["score"]["teacher"] / 2
    layers = 4 * shape().layer_matrices
    assert eighth == half - layers
    copies = phases(mesh=make_mesh(8, 1, 1))["update"]
    assert copies["weights"] == plain["update"]["weights"]
    assert copies["moments"] == plain["update"]["moments"] / 8
    smaller = phases(**{"rollout.dtype": "bfloat16"})["rollout"]
    assert smaller["rollout's copy of weights"] < plain["rollout"]["rollout's copy of weights"]


# --- what is refused -------------------------------------------------------------------------


def test_what_a_server_draws_with_is_not_counted():
    own = config_of(**{"eval.every": 5})
    served = config_of(
        **{"eval.every": 5, "rollout.server.url": "http://a:1", "rollout.server.model": "m"}
    )
    levers = Levers.of(own)
    here, there = (planner_of(config, shape()).plan(levers) for config in (own, served))
    assert here.phases.keys() - there.phases.keys() == {"rollout", "eval"}
    assert there.phases["update"] == here.phases["update"]


def test_a_longer_evaluation_takes_no_more_cache_than_rollouts():
    """As many responses fewer at once: 32 of 256 tokens in rollouts, 12 of 640 in evaluations."""
    equal = config_of(**{"eval.every": 5, "eval.batch": 8, "eval.samples": 4})
    longer = config_of(
        **{"eval.every": 5, "eval.batch": 8, "eval.samples": 4, "eval.max_new_tokens": 576}
    )
    levers = Levers.of(equal)
    here, there = (planner_of(config, shape()).plan(levers).phases for config in (equal, longer))
    assert there["rollout"] == here["rollout"]
    cache = there["eval"]["KV cache"] / here["eval"]["KV cache"]
    assert 0.7 < cache < 1.4  # but for the sizes that caches grow by


def check_of(config, model=None, mesh=None) -> MemoryCheck:
    mesh = mesh or one_device()
    both = dict.fromkeys(("student", "teacher"), model or shape())
    return MemoryCheck(config, validate(config), both, Meshes(mesh, mesh, mesh))


LONG = {
    "rollout.max_new_tokens": 16_384,
    "rollout.prompts_per_step": 64,
    "rollout.group_size": 16,
    "micro_batch": 64,
    "student.dtype": "bfloat16",
}


def test_what_would_fit_does_fit():
    """Every change that is named, made, passes the same check."""
    with pytest.raises(UserError) as refusal:
        check_of(config_of(memory_gib=24.0, **LONG)).require(Display(quiet=True))
    sampling, learning = refusal.value.problems
    assert sampling.startswith("rollout.slots=1024, rollout.max_new_tokens=16384: rollout needs ")
    assert learning.startswith("micro_batch=64, student.remat=none: ")
    assert "update needs" in learning
    of_rollout = re.search(r"what fits: (rollout\.slots=\d+) \(", sampling)[1]
    options = re.search(r"what fits: (.*) \(an estimate", learning)[1].split("; or ")
    assert len(options) > 1
    assert any("student.remat=dots" in option for option in options)
    sizes = [int(re.search(r"micro_batch=(\d+)", option)[1]) for option in options]
    assert sizes == sorted(set(sizes)), "each further change buys a larger micro-batch"
    for option in options:
        changes = dict(pair.split("=") for pair in [of_rollout, *option.split(", ")])
        check = check_of(config_of(**LONG | {"memory_gib": 24.0} | changes))
        check.require(Display(quiet=True))
        assert check.plan.peak > 0.2 * 24 * GIB, "and not by giving everything up"


def test_a_budget_that_no_slot_has_room_for():
    check = check_of(config_of(memory_gib=1.0, **LONG), shape(layers=32))
    for group in (SAMPLING, LEARNING):
        advice = check.advice(group, GIB)
        assert advice.startswith("nothing that leaves results alone fits; ")
        budget = int(re.search(r"rollout.max_new_tokens=(\d+)", advice)[1])
        assert 500 < budget < 4096


def test_weights_that_do_not_fit():
    with pytest.raises(UserError, match=r"mesh.fsdp: weights, optimizer .* alone take"):
        check_of(config_of(memory_gib=0.1)).require(Display(quiet=True))


def test_the_limit(monkeypatch):
    assert device_limit(1.5) == 1.5 * GIB
    assert 0 < device_limit(0.0) * len(jax.devices()) < 2**50

    class Accelerator:
        platform = "gpu"

        def __init__(self, limit):
            self.memory_stats = lambda: limit and {"bytes_limit": limit}

    monkeypatch.setattr(jax, "local_devices", lambda: [Accelerator(7), Accelerator(5)])
    assert device_limit(0.0) == 5
    monkeypatch.setattr(jax, "local_devices", lambda: [Accelerator(None)])
    assert device_limit(0.0) is None


def test_a_run_that_does_not_fit_is_refused_before_it_starts(tmp_path, capsys):
    argv = command(tmp_path / "run", tmp_path / "cache", memory_gib=0.0001)
    lines = refused(capsys, *argv)
    assert any("a device's 0 MiB" in line for line in lines)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


# --- running out while running ---------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def out_of_memory_at(call, real):
    """`real`, but for its call number `call`, which asks for more than any machine has."""
    calls = []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == call:
            with jax.transfer_guard("allow"):
                return jnp.zeros(2**50, jnp.float32).block_until_ready()
        return real(*args, **options)

    return failing


CHANGES = {"eval.every": 0, "steps": 4, "student.remat": "none"}


def test_running_out_in_rollouts(cache, tmp_path, capsys, monkeypatch):
    """A real failure of XLA's allocator; then the same command, with fewer slots."""
    folder = tmp_path / "run"
    generate = RolloutEngine.generate
    monkeypatch.setattr(RolloutEngine, "generate", out_of_memory_at(4, generate))
    (line,) = refused(capsys, *command(folder, cache, **CHANGES))
    assert "rollout.slots=16, rollout.max_new_tokens=10: step 4, rollout: a device ran" in line
    assert "RESOURCE_EXHAUSTED" in line
    assert "what fits: rollout.slots=" in line
    assert "the checkpoint of step 2 is whole" in line
    monkeypatch.undo()
    smaller = dict([re.search(r"what fits: ([\w.]+=\d+)", line)[1].split("=")])
    found = run(folder, cache, **{**CHANGES, **smaller, "student.remat": "full"})
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in found)


@pytest.mark.parametrize("method", ["learn", "score"])
def test_running_out_in_the_update_before_any_checkpoint(
    cache, tmp_path, capsys, monkeypatch, method
):
    monkeypatch.setattr(Learner, method, out_of_memory_at(1, getattr(Learner, method)))
    (line,) = refused(capsys, *command(tmp_path / "run", cache, **CHANGES))
    phase = {"learn": "update", "score": "score"}[method]
    assert f"micro_batch=8, student.remat=none: step 1, {phase}: a device ran out" in line
    assert "no checkpoint has been made" in line
    # The mesh has eight parts, each with one row of the micro-batch.
    assert ("what fits: student.remat=dots" in line) == (method == "learn")


def test_running_out_while_the_update_is_waited_for(cache, tmp_path, capsys, monkeypatch):
    """Programs run while Python goes on: the failure of step 2's update shows in step 3."""
    settle = train.Run.wait

    def wait(self, then="rollout"):
        if self._step == 2:
            monkeypatch.setattr(jax, "device_get", fail)
        return settle(self, then)

    def fail(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: Out of memory while trying to allocate 9 bytes")

    monkeypatch.setattr(train.Run, "wait", wait)
    (line,) = refused(
        capsys, *command(tmp_path / "run", cache, **CHANGES | {"checkpoint.every": 1})
    )
    monkeypatch.undo()
    assert "step 2, update: a device ran out of memory" in line
    assert "the checkpoint of step 1 is whole" in line
    assert rows(tmp_path / "run")[-1]["step"] == 1


def test_what_counts_as_running_out():
    """JAX raises a ValueError where a program that has run before cannot be dispatched."""
    for kind in (jax.errors.JaxRuntimeError, ValueError):
        assert out_of_memory(kind("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."))
    assert not out_of_memory(ValueError("Out of memory is no word of a config key"))
    assert not out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: of a queue"))


def test_other_failures_are_left_alone(cache, tmp_path, monkeypatch):
    def generate(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(RolloutEngine, "generate", generate)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        train.main(command(tmp_path / "run", cache, **CHANGES))


def test_shardings_of_the_mesh_are_those_planned():
    """The share of weights is what the partition table gives a device, but for norms."""
    mesh, model = make_mesh(2, 2, 2), shape()
    shapes = Decoder(model).shapes()
    shards = jax.tree.map(
        lambda x, s: np.prod(s.shard_shape(x.shape)), shapes, param_shardings(mesh, shapes)
    )
    placed = Placed.on(mesh, model, "float32", on_cpu=True)
    assert placed.stored(1) == pytest.approx(sum(jax.tree.leaves(shards)), rel=1e-3)
