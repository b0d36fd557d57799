"""MFU, rooflines and shares of time: formulas beside XLA's count and sums done by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rollout import BUCKET, LENGTH, MODEL, VALID, Spy, left_padded, settings

from kdrl_jax.models import Decoder, ModelConfig
from kdrl_jax.rollout import DecodeStats, RolloutEngine, request_keys
from kdrl_jax.sharding import make_mesh
from kdrl_jax.training.footprint import Placed
from kdrl_jax.training.metrics import CLOCKED
from kdrl_jax.training.performance import (
    Ideal,
    Peak,
    decode_seconds,
    forward_flops,
    measured_peak,
    peak_of,
    speeds,
)

ONE_LAYER = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_size=384,
)
ONE_LAYER_BF16 = (ONE_LAYER, "bfloat16", False)


@pytest.mark.parametrize(
    ("kind", "tera", "giga"),
    [
        ("TPU v5 lite", 197, 819),
        ("TPU v5", 459, 2765),
        ("TPU v6 lite", 918, 1638),
        ("NVIDIA H100 80GB HBM3", 989, 3352),
        ("NVIDIA H100 PCIe", 756, 2000),
        ("NVIDIA H200", 989, 4800),
        ("NVIDIA A100-SXM4-40GB", 312, 1555),
        ("NVIDIA A100 80GB PCIe", 312, 1935),
        ("NVIDIA L4", 121, 300),
        ("Tesla T4", 65, 320),
    ],
)
def test_data_sheets(kind, tera, giga):
    assert peak_of(kind) == Peak(tera * 1e12, giga * 1e9)


@pytest.mark.parametrize("kind", ["cpu", "TPU v5 litepod", "NVIDIA L400", "TPU v4 lite"])
def test_other_kinds_are_measured(kind):
    assert peak_of(kind) is None


def test_a_measured_peak_is_that_of_a_computer():
    peak = measured_peak("float32")
    assert 1e8 < peak.flops < 1e16
    assert 1e7 < peak.bandwidth < 1e14
    assert measured_peak("float32") is peak, "measured once"


def test_flops_of_a_forward_pass_beside_xla():
    """One layer, as XLA counts a loop's body once; short rows, where all scores are computed."""
    model, count, length = Decoder(ONE_LAYER), 4, 64
    ids = jax.ShapeDtypeStruct((count, length), jnp.int32)

    def forward(params, ids):
        return model.logits(params, model.apply(params, ids, ids, ids))

    cost = jax.jit(forward).lower(model.shapes(), ids).compile().cost_analysis()
    tokens = count * length
    found = forward_flops(ONE_LAYER, tokens, tokens * length, tokens)
    assert found == pytest.approx(cost["flops"], rel=0.06)  # XLA also counts norms and softmax


def test_the_roofline_of_decoding():
    """By hand: ten steps of 4 slots, each token with 100 tokens of cache."""
    model = Placed.on(
        make_mesh(1, 1, 1, devices=jax.devices()[:1]), ONE_LAYER, "bfloat16", on_cpu=False
    )
    done = DecodeStats(steps=10, slot_steps=40, tokens=40, context=4000)
    weights = 128 * 32 * (4 + 2 + 2 + 4) + 3 * 128 * 384 + 512 * 128
    read = 10 * weights * 2 + 4000 * 2 * 2 * 32 * 2
    flops = 2 * weights * 40 + 4 * 4 * 32 * 4000
    assert decode_seconds(model, done, Peak(1e30, 1e9)) == pytest.approx(read / 1e9)
    assert decode_seconds(model, done, Peak(1e9, 1e30)) == pytest.approx(flops / 1e9)
    # Split over tensor, each of two devices reads half of everything.
    split = Placed.on(
        make_mesh(1, 1, 2, devices=jax.devices()[:2]), ONE_LAYER, "bfloat16", on_cpu=False
    )
    assert decode_seconds(split, done, Peak(1e30, 1e9)) == pytest.approx(read / 2e9)
    # Split over the batch, each reads all weights and half of the cache.
    rows = Placed.on(
        make_mesh(2, 1, 1, devices=jax.devices()[:2]), ONE_LAYER, "bfloat16", on_cpu=False
    )
    half = 10 * weights * 2 + 2000 * 2 * 2 * 32 * 2
    assert decode_seconds(rows, done, Peak(1e30, 1e9)) == pytest.approx(half / 1e9)


@pytest.mark.parametrize("slots", [0, 3])
def test_what_the_engine_says_it_did(slots):
    """Requests of unequal lengths; the model counts its own runs."""
    spy, prompts, limits = Spy(), left_padded(4), np.arange(12).reshape(4, 3) % LENGTH + 1
    make = RolloutEngine(
        spy, valid_vocab=VALID, prompt_buckets=(BUCKET,), max_new_tokens=LENGTH, slots=slots
    )
    sampling = dataclasses.replace(settings((4, 3)), max_new_tokens=jnp.asarray(limits))
    params = MODEL.init(jax.random.key(3))
    out = make.generate(params, prompts, request_keys(0, 0, range(4), 3), sampling)
    jax.effects_barrier()
    done, lengths = make.last, out.lengths.ravel()
    assert done.steps == len(spy.decoded)
    assert done.tokens == lengths.sum() <= done.slot_steps
    if slots:
        assert done.slot_steps == slots * done.steps
    else:
        assert done.steps == lengths.max()
    each = zip(np.repeat(prompts.lengths, 3), lengths, strict=True)
    assert done.context == sum(prompt + j for prompt, count in each for j in range(count))
    assert done + done == DecodeStats(*(2 * x for x in vars(done).values()))


def test_shares_and_speeds():
    ideal = Ideal(0.5, 0.1, 0.6, drawn=800, slot_use=0.8, kept=600, trained=900)
    times = {"time/rollout_s": 2.0, "time/score_s": 1.0, "time/update_s": 3.0, "time/eval_s": 4.0}
    found = speeds(ideal, times | {"time/compilations": 7, "loss": 1.0})
    assert found == {
        "perf/decode_roofline": 0.25,
        "perf/mfu_score": 0.1,
        "perf/mfu_update": pytest.approx(0.2),
        "perf/slot_use": 0.8,
        "tokens_per_s/rollout": 400,
        "tokens_per_s/update": 300,
        "tokens_per_s/total": 60,
        "share/rollout": 0.2,
        "share/score": 0.1,
        "share/update": 0.3,
        "share/eval": 0.4,
    }
    assert all(name.startswith(CLOCKED) for name in found)
    assert "perf/mfu_score" not in speeds(ideal._replace(score=0.0), times)
    by_server = speeds(ideal._replace(rollout=0.0, slot_use=0.0), times)
    assert found.keys() - by_server.keys() == {"perf/decode_roofline", "perf/slot_use"}
