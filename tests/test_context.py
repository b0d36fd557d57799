"""Rows whose length devices share: the same numbers as on one device, and equal work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from kdrl_jax.models import Decoder, ModelConfig, attention, kernels
from kdrl_jax.models.context import context_length, context_order, from_context, to_context
from kdrl_jax.objectives import token_log_probs
from kdrl_jax.sharding import make_mesh, param_shardings

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "mlp_size": 48}
MODEL = ModelConfig(**SHAPE, num_kv_heads=2, head_dim=8)


def packed_rows(rng, rows, length):
    """Two segments and padding at the end of each row."""
    column, first = np.arange(length), rng.integers(length // 4, length // 2, (rows, 1))
    segments = np.where(column < first, 1, 2) * (column < length - 3)
    positions = np.where(segments == 2, column - first, column)
    tokens = rng.integers(0, 60, (rows, length))
    return tuple(x.astype(np.int32) for x in (tokens, positions, segments))


@pytest.mark.parametrize("parts", [2, 4])
def test_every_device_gets_a_part_from_the_front_and_one_from_the_back(parts):
    order = context_order(48, parts)
    x = jnp.arange(96).reshape(2, 48)
    np.testing.assert_array_equal(to_context(x, parts), np.asarray(x)[:, order])
    np.testing.assert_array_equal(from_context(to_context(x, parts), parts), x)
    # The keys that a device's queries see, all devices alike.
    assert len(set((order.reshape(parts, -1) + 1).sum(1))) == 1


def test_lengths_are_filled_up_to_what_devices_can_share():
    assert context_length(131) == 131
    with jax.set_mesh(make_mesh(2, 1, 1, 4)):
        assert [context_length(n) for n in (131, 136, 1025)] == [136, 136, 2048]


@pytest.mark.parametrize(
    ("sizes", "length"),
    [((1, 1, 1, 8), 70), ((2, 1, 1, 4), 64), ((1, 2, 2, 2), 1150), ((1, 4, 1, 2), 51)],
)
def test_loss_and_gradients_are_those_of_one_device(sizes, length, rng):
    model = Decoder(MODEL, "float32", "full")
    params = jax.jit(model.init)(jax.random.key(0))
    rows = packed_rows(rng, 4, length)
    weights = rng.normal(size=(4, length - 1)).astype(np.float32) * (rows[2][:, 1:] > 0)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, tokens, positions, segments):
        hidden = model.apply(params, tokens, positions, segments)[:, :-1]
        heat = {"temperature": jnp.float32(0.7), "valid_vocab": 60, "chunk": 24}
        log_probs, entropy = token_log_probs(hidden, model.head(params), tokens[:, 1:], **heat)
        return jnp.sum(weights * (log_probs + 0.1 * entropy)), log_probs

    (value, log_probs), gradient = jax.jit(loss)(params, *rows)
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        split = jax.device_put(params, param_shardings(mesh, params))
        (found, there), gradients = jax.jit(loss)(split, *rows)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    real = rows[2][:, 1:] > 0
    np.testing.assert_allclose(np.asarray(there)[real], np.asarray(log_probs)[real], atol=2e-5)
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_kernels_see_the_keys_of_all_devices(kernel, rng, monkeypatch):
    """Splash attention interpreted, and cuDNN's masks with XLA for cuDNN."""
    real = jax.nn.dot_product_attention
    interpreted = functools.partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", interpreted)
    monkeypatch.setattr(kernels, "_cudnn", lambda *x, **masks: real(*x, **masks))
    length, shape = 1024, (2, 1024, 4, 64)
    q, k, v = (
        jnp.asarray(rng.normal(size=(*shape[:2], heads, 64)), jnp.bfloat16) for heads in (4, 2, 2)
    )
    ids = jnp.asarray(packed_rows(rng, 2, length)[2])
    weights = jnp.asarray(rng.normal(size=shape), jnp.bfloat16) * (ids > 0)[..., None, None]

    def total(q, k, v, parts):
        if parts > 1:
            q, k, v = (to_context(x, parts) for x in (q, k, v))
        out = attention.attend(q, k, v, ids)
        out = from_context(out, parts) if parts > 1 else out
        return (jnp.where((ids > 0)[..., None, None], out, 0) * weights).astype(jnp.float32).sum()

    def run(parts):
        gradients = jax.value_and_grad(functools.partial(total, parts=parts), argnums=(0, 1, 2))
        return jax.jit(gradients)(q, k, v)

    value, gradient = run(1)
    monkeypatch.setattr(attention, "_implementation", lambda q, k: kernel)
    with jax.set_mesh(make_mesh(2, 1, 2, 2)):
        found, gradients = run(2)
    np.testing.assert_allclose(found, value, rtol=0.02, atol=1.0)
    for x, y in zip(gradients, gradient, strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        np.testing.assert_allclose(x, y, atol=0.03 * np.abs(y).max())
