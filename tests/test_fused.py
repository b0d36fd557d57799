"""The loss in one pass against the loss from log-probs, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdrl_jax.objectives import (
    TokenScores,
    full_divergence,
    fused_loss,
    support_log_probs,
    token_log_probs,
)
from kdrl_jax.sharding import BATCH_AXES, make_mesh

R, T, D, V, VALID, E, J = 4, 10, 6, 11, 9, 5, 3


def arrays(rng):
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "hidden": normal(R, T, D),
        "head": normal(V, D),
        "targets": jnp.asarray(rng.integers(0, VALID, (R, T)), jnp.int32),
        "support": jnp.asarray(rng.integers(0, VALID, (R, T, J)), jnp.int32),
        "teacher_hidden": normal(R, T, E),
        "teacher_head": normal(V + 2, E),
        "old": normal(R, T),
        "weights": jnp.asarray(rng.random((R, T)) * (rng.random((R, T)) > 0.3), jnp.float32),
    }


def loss(scores: TokenScores, per_token, shared):
    """Nonlinear in everything there is."""
    w, ratio = per_token["weights"], jnp.exp(scores.log_probs - per_token["old"])
    terms = w * (jnp.minimum(ratio, 1.5) + shared["c"] * scores.entropy**2)
    if scores.support_log_probs is not None:
        terms += w * (jnp.exp(scores.support_log_probs) * scores.support_log_probs).sum(-1)
    if scores.divergence is not None:
        terms += w * scores.divergence**2
    return terms.sum(), {"ratio": (w * ratio).sum()}


def separate(a, kind, chunk, temperature=0.7):
    """The same from the functions that compute logits twice."""
    options = {"temperature": temperature, "valid_vocab": VALID, "chunk": chunk}

    def run(hidden, head):
        at_support = divergence = None
        log_probs, entropy = token_log_probs(hidden, head, a["targets"], **options)
        if kind == "support":
            args = (hidden, head, a["targets"], a["support"])
            log_probs, entropy, at_support = support_log_probs(*args, **options)
        if kind == "full":
            args = (hidden, head, a["teacher_hidden"], a["teacher_head"])
            divergence = full_divergence(*args, **options)
        scores = TokenScores(log_probs, entropy, at_support, divergence)
        return loss(scores, {"weights": a["weights"], "old": a["old"]}, {"c": 0.3})

    return run


def fused(a, kind, chunk, temperature=0.7):
    more = {"support": a["support"]} if kind == "support" else {}
    if kind == "full":
        more = {"teacher_hidden": a["teacher_hidden"], "teacher_head": a["teacher_head"]}

    def run(hidden, head):
        return fused_loss(
            loss,
            hidden,
            head,
            a["targets"],
            {"weights": a["weights"], "old": a["old"]},
            {"c": jnp.float32(0.3)},
            temperature=temperature,
            valid_vocab=VALID,
            chunk=chunk,
            **more,
        )

    return run


@pytest.mark.parametrize("kind", ["plain", "support", "full"])
@pytest.mark.parametrize("chunk", [1, 12, 512])
def test_equals_the_loss_from_log_probs(rng, kind, chunk):
    a = arrays(rng)
    args = a["hidden"], a["head"]
    (value, metrics), found = jax.jit(
        jax.value_and_grad(fused(a, kind, chunk), (0, 1), has_aux=True)
    )(*args)
    (wanted, of_metrics), expected = jax.value_and_grad(
        separate(a, kind, chunk), (0, 1), has_aux=True
    )(*args)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio"], of_metrics["ratio"], rtol=1e-5)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    # Without a gradient asked for, the same value.
    np.testing.assert_allclose(jax.jit(fused(a, kind, chunk))(*args)[0], wanted, rtol=1e-5)


def test_gradient_scales_with_what_follows(rng):
    """The gradient formed in the forward pass is multiplied by that of the loss."""
    a = arrays(rng)
    args = a["hidden"], a["head"]
    found = jax.grad(lambda *x: 3.0 * fused(a, "plain", 4)(*x)[0] ** 2, (0, 1))(*args)
    expected = jax.grad(lambda *x: 3.0 * separate(a, "plain", 4)(*x)[0] ** 2, (0, 1))(*args)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 1, 2), (2, 2, 2)], ids=str)
def test_on_a_mesh(rng, shape):
    a = arrays(rng)
    mesh = make_mesh(*shape)
    expected = jax.grad(lambda *x: fused(a, "plain", 4)(*x)[0], (0, 1))(a["hidden"], a["head"])
    rows = NamedSharding(mesh, P(BATCH_AXES))
    split = {k: jax.device_put(x, rows) if x.shape[0] == R else x for k, x in a.items()}
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(lambda *x: fused(split, "plain", 4)(*x)[0], (0, 1)))(
            split["hidden"], split["head"]
        )
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_no_array_of_all_logits():
    """Temporaries of value and gradient stay far below [rows, length, vocabulary]."""
    rows, length, width, vocab = 4, 256, 32, 4096
    like = jax.ShapeDtypeStruct
    hidden, head = like((rows, length, width), "float32"), like((vocab, width), "float32")
    targets, weights = like((rows, length), "int32"), like((rows, length), "float32")

    def run(hidden, head, targets, weights):
        per_token = {"weights": weights, "old": weights}
        options = {"temperature": 1.0, "valid_vocab": vocab, "chunk": 64}
        return fused_loss(loss, hidden, head, targets, per_token, {"c": 0.1}, **options)[0]

    compiled = jax.jit(jax.grad(run, (0, 1))).lower(hidden, head, targets, weights).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        pytest.skip("this backend reports no memory use")
    assert memory.temp_size_in_bytes < 0.35 * rows * length * vocab * 4
