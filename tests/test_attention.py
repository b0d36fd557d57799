"""Whole-row attention: plain JAX against NumPy, the fused kernels against both, who runs where.

Kernels of other platforms run here in disguise: splash attention interpreted, cuDNN's mask and
lengths given to XLA. That a TPU's compiler takes the real one is tested where libtpu is installed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdrl_jax.models import Decoder, ModelConfig, attention, kernels
from kdrl_jax.sharding import AXES, BATCH_AXES, make_mesh, param_shardings

# Bounds on differences of values and gradients that are about 1.
FP32, BF16 = 2e-5, 6e-2


def rows_of(*rows: list[tuple[int, int]]) -> jax.Array:
    """Segment ids from runs of (id, tokens)."""
    return jnp.array([[i for i, n in row for _ in range(n)] for row in rows], jnp.int32)


def layouts(length: int) -> dict[str, jax.Array]:
    a, b = length // 3, length // 5
    return {
        "padded": rows_of(
            [(0, a), (1, length - a - b), (0, b)], [(1, length)], [(1, a), (0, length - a)],
            [(0, length)],
        ),
        "packed": rows_of(
            [(1, a), (2, b), (3, length - a - b)], [(1, b), (2, a), (0, length - a - b)],
            [(0, a), (4, length - a)], [(1, length - 1), (2, 1)],
        ),
    }  # fmt: skip


def inputs(segment_ids: jax.Array, heads=4, kv_heads=2, width=8, dtype=jnp.float32):
    """Random (q, k, v) and a cotangent that is zero on padding."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(*segment_ids.shape, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    *qkv, g = (jax.random.normal(x, s).astype(dtype) for x, s in zip(keys, shapes, strict=True))
    return (*qkv, jnp.where((segment_ids != 0)[..., None, None], g, 0))


def oracle(q, k, v, g, segment_ids):
    """Values and the three gradients, dense and in fp64."""
    ids = np.asarray(segment_ids)
    q, k, v, g = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, g))
    (rows, length, heads, width), kv_heads = q.shape, k.shape[2]
    group = heads // kv_heads
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    seen = (ids[:, :, None] == ids[:, None]) & (ids[:, None] != 0)
    seen &= np.tril(np.ones((length, length), bool))
    scores = np.where(seen[:, None], np.einsum("rinh,rjnh->rnij", q, k) / width**0.5, -1e30)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("rinh,rjnh->rnij", g, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / width**0.5
    gradients = (
        np.einsum("rnij,rjnh->rinh", ds, k),
        *(
            np.einsum("rnij,rinh->rjnh", x, y).reshape(rows, length, kv_heads, group, width).sum(3)
            for x, y in ((ds, q), (p, g))
        ),
    )
    return np.einsum("rnij,rjnh->rinh", p, v), *gradients


def value_and_gradients(attend, q, k, v, g, segment_ids):
    """(values, dq, dk, dv) of `attend`."""

    @jax.jit
    def run(q, k, v, g):  # anew each time: what tests replace is no argument that jit would see
        out, back = jax.vjp(lambda *x: attend(*x, segment_ids), q, k, v)
        return out, *back(g.astype(out.dtype))

    return run(q, k, v, g)


def assert_same(found, expected, segment_ids, bound):
    real = np.asarray(segment_ids != 0)
    for x, y in zip(found, expected, strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x[real], y[real], atol=bound, rtol=bound)


@pytest.fixture
def interpreted(monkeypatch):
    """Splash attention by Pallas' interpreter."""
    interpreted = functools.partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", interpreted)


@pytest.fixture
def pretended(monkeypatch):
    """cuDNN by XLA, with the freedom that cuDNN has: anything may stand beyond the lengths."""
    real = jax.nn.dot_product_attention

    def pretend(q, k, v, *, implementation, query_seq_lengths=None, mask=None, **rest):
        assert implementation == "cudnn"
        with jax.numpy_rank_promotion("allow"):
            out = real(q, k, v, mask=mask, implementation="xla", **rest)
        if query_seq_lengths is None:
            assert mask.shape == (q.shape[0], 1, q.shape[1], k.shape[1])
            assert not mask.shape[2] % 2
            assert not mask.shape[3] % 2
            return out
        inside = jnp.arange(q.shape[1])[None, :] < query_seq_lengths[:, None]
        return jnp.where(inside[..., None, None], out, jnp.nan)

    monkeypatch.setattr(jax.nn, "dot_product_attention", pretend)


def choose(monkeypatch, implementation: str) -> None:
    monkeypatch.setattr(attention, "_implementation", lambda q, k: implementation)


@pytest.mark.parametrize(("length", "block"), [(40, 512), (45, 8), (600, 512)])
def test_plain_attention_is_the_oracles(length, block, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    ids = jnp.concatenate([*layouts(length).values()])
    args = inputs(ids)
    assert_same(value_and_gradients(attention.attend, *args, ids), oracle(*args, ids), ids, FP32)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "width", "dtype"),
    [(200, 4, 2, 64, jnp.float32), (300, 3, 1, 128, jnp.bfloat16), (520, 2, 2, 64, jnp.bfloat16)],
)
def test_splash_attention_is_the_oracles(length, heads, kv_heads, width, dtype, interpreted):
    ids = jnp.concatenate([*layouts(length).values()])
    args = inputs(ids, heads, kv_heads, width, dtype)
    found = value_and_gradients(kernels.splash, *args, ids)
    assert all(x.dtype == dtype for x in found)
    assert_same(found, oracle(*args, ids), ids, FP32 if dtype == jnp.float32 else BF16)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    ("length", "block", "dtype"), [(45, 512, jnp.float32), (200, 64, jnp.bfloat16)]
)
def test_cudnns_masks_and_lengths_are_right(layout, length, block, dtype, pretended, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    choose(monkeypatch, "cudnn")
    ids = layouts(length)[layout]
    args = inputs(ids, dtype=dtype)
    found = value_and_gradients(attention.attend, *args, ids)
    assert_same(found, oracle(*args, ids), ids, FP32 if dtype == jnp.float32 else BF16)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([(1, 6)], True),
        ([(0, 2), (3, 3), (0, 1)], True),
        ([(0, 6)], True),
        ([(1, 3), (2, 3)], False),
        ([(0, 1), (1, 2), (0, 1), (1, 2)], False),
        ([(1, 2), (0, 2), (2, 2)], False),
    ],
)
def test_packed_rows_are_told_from_padded_ones(row, expected):
    assert bool(kernels.is_unpacked(rows_of([(1, 6)], row))) == expected


@pytest.mark.parametrize("implementation", ["splash", "cudnn"])
@pytest.mark.parametrize(
    ("rows", "sizes", "spec"),
    [
        (4, (2, 2, 2), P(BATCH_AXES, None, "tensor")),
        (3, (1, 2, 4), P()),  # nothing divides: every device runs everything
    ],
)
def test_kernels_run_on_each_devices_part(
    implementation, rows, sizes, spec, interpreted, pretended, monkeypatch
):
    ids = layouts(130)["packed"][:rows]
    args = inputs(ids, width=64, dtype=jnp.bfloat16)
    expected = value_and_gradients(attention.attend, *args, ids)
    choose(monkeypatch, implementation)
    with jax.set_mesh(make_mesh(*sizes)):
        found = value_and_gradients(attention.attend, *args, ids)
    assert_same(found, expected, ids, BF16)
    assert found[0].sharding.spec == spec


def test_a_model_has_the_same_gradient_with_a_kernel(interpreted, monkeypatch):
    model = Decoder(config(64, num_layers=1), jnp.bfloat16, remat="dots")
    params = jax.jit(model.init)(jax.random.key(0))
    ids = layouts(130)["packed"][:1]
    tokens = jax.random.randint(jax.random.key(1), ids.shape, 0, 32)
    positions = jnp.arange(130)[None, :]
    weights = jax.random.normal(jax.random.key(2), (*ids.shape, 16))

    def gradient():
        def loss(params):
            return (
                model.apply(params, tokens, positions, ids).astype(weights.dtype) * weights
            ).sum()

        with jax.set_mesh(make_mesh(1, 1, 2, devices=jax.devices()[:2])):
            return jax.jit(jax.grad(loss))(params)

    expected = gradient()
    choose(monkeypatch, "splash")
    for x, y in zip(jax.tree.leaves(gradient()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=0.05 * float(jnp.abs(y).max()))


def config(width: int, **sizes: int) -> ModelConfig:
    small = {"vocab_size": 32, "hidden_size": 16, "mlp_size": 24, "num_layers": 2}
    return ModelConfig(**(small | {"num_heads": 4, "num_kv_heads": 2} | sizes), head_dim=width)


@pytest.mark.parametrize(
    ("platform", "length", "dtype", "cudnn", "expected"),
    [
        ("tpu", 129, jnp.bfloat16, True, "splash"),
        ("tpu", 128, jnp.bfloat16, True, "blockwise"),
        ("tpu", 129, jnp.float16, True, "blockwise"),
        ("tpu", 129, jnp.float32, True, "blockwise"),
        ("gpu", 129, jnp.bfloat16, True, "cudnn"),
        ("gpu", 129, jnp.float16, True, "cudnn"),
        ("gpu", 129, jnp.float16, False, "blockwise"),
        ("gpu", 129, jnp.float32, True, "blockwise"),
        ("cpu", 129, jnp.bfloat16, True, "blockwise"),
    ],
)
def test_the_platform_chooses(platform, length, dtype, cudnn, expected, monkeypatch):
    monkeypatch.setattr(kernels, "has_cudnn", lambda q, k: cudnn)
    monkeypatch.setattr(attention, "_cudnn_agrees", lambda *kind: True)
    q, k = (jax.ShapeDtypeStruct((2, length, n, 64), dtype) for n in (4, 2))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: platform)
        assert attention._implementation(q, k) == expected
    device = AbstractDevice("a device", 1, platform)
    mesh = AbstractMesh((1,) * 4, AXES, (AxisType.Auto,) * 4, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention._implementation(q, k) == expected


def test_without_a_gpu_there_is_no_cudnn():
    q, k = (jax.ShapeDtypeStruct((2, 256, n, 64), jnp.bfloat16) for n in (4, 2))
    if jax.default_backend() != "gpu":
        assert not kernels.has_cudnn(q, k)


@pytest.mark.parametrize("fault", ["", "raises", "wrong"])
def test_cudnn_is_used_only_where_it_agrees_with_plain_jax(fault, pretended, monkeypatch):
    """Asked while tracing for a mesh, as the step does."""
    attention._cudnn_agrees.cache_clear()
    jax.clear_caches()  # which know the kernels of the last case
    honest = kernels.cudnn_masked

    def faulty(*args):
        if fault == "raises":
            raise ValueError("No valid execution plans built.")
        return honest(*args) * (1.5 if fault == "wrong" else 1.0)

    monkeypatch.setattr(kernels, "cudnn_masked", faulty)

    def traced(x):
        return x if attention._cudnn_agrees("bfloat16", 2, 32) else 0 * x

    with jax.set_mesh(make_mesh(2, 2, 2)):
        if fault:
            said = {"raises": "No valid execution plans", "wrong": "other numbers than plain JAX"}
            with pytest.warns(RuntimeWarning, match=said[fault]):
                assert jax.jit(traced)(1.0) == 0
        else:
            assert jax.jit(traced)(1.0) == 1
    attention._cudnn_agrees.cache_clear()


def test_cudnns_calls_lower_for_cuda(monkeypatch):
    """As far as jax goes without a GPU: its checks pass, and both kernels are in the program."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    choose(monkeypatch, "cudnn")
    ids = layouts(600)["packed"]
    q, k, v, _ = inputs(ids, width=128, dtype=jnp.bfloat16)

    def loss(q, k, v):
        return attention.attend(q, k, v, ids).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("Softmax", "ScaleBiasSoftmax", "SoftmaxBackward", "ScaleBiasSoftmaxBackward"):
        assert f"@__cudnn$fmha{name}(" in text
    assert "PADDING_CAUSAL" in text


@pytest.mark.parametrize(
    ("fsdp", "tensor", "context"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
)
def test_a_tpus_compiler_takes_splash_attention(fsdp, tensor, context, monkeypatch):
    pytest.importorskip("libtpu", reason="needs libtpu, as in the extra `tpu`; no TPU")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # else it looks for a TPU's host
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may compile as well
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = make_mesh(1, fsdp, tensor, context, devices=devices[: fsdp * tensor * context])
    model = Decoder(config(128, hidden_size=256), jnp.bfloat16, remat="full")
    shapes = model.shapes()
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        param_shardings(mesh, shapes),
    )
    split = NamedSharding(mesh, P(BATCH_AXES))
    rows = jax.ShapeDtypeStruct((4, 256 * (2 * context - 1)), jnp.int32, sharding=split)

    def loss(params, *rows):
        return model.apply(params, *rows).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(params, rows, rows, rows).compile().as_text()
    assert 'custom_call_target="tpu_custom_call"' in text
    for name in ("mha_fwd", "mha_dq", "mha_dkv"):
        assert f"splash_{name}_segmented" in text
