"""Chunked log-probs: float64 NumPy and naive autodiff as oracles, memory, and a split batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdrl_jax.objectives import support_log_probs, token_log_probs, top_support, top_tokens
from kdrl_jax.sharding import BATCH_AXES, make_mesh

R, T, D, V, VALID = 3, 10, 6, 11, 9
TAU = 0.6


def inputs(rng, rows=R, length=T, width=D, vocab=V, valid=VALID):
    hidden = rng.normal(size=(rows, length, width)).astype(np.float32)
    head = rng.normal(size=(vocab, width)).astype(np.float32)
    targets = rng.integers(0, valid, (rows, length)).astype(np.int32)
    return jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets)


def oracle(hidden, head, targets, temperature, valid):
    """log-softmax and entropy in float64, token by token."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    log_probs, entropy = np.zeros(targets.shape), np.zeros(targets.shape)
    for i in np.ndindex(targets.shape):
        logits = (head @ hidden[i])[:valid] / temperature
        log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        log_probs[i] = log_p[targets[i]]
        entropy[i] = -(np.exp(log_p) * log_p).sum()
    return log_probs, entropy


def naive(hidden, head, targets, temperature, valid):
    log_p = jax.nn.log_softmax((hidden @ head.T)[..., :valid] / temperature)
    chosen = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return chosen, -(jnp.exp(log_p) * log_p).sum(-1)


@pytest.mark.parametrize("chunk", [1, 7, 12, 512])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_values(rng, chunk, temperature):
    args = inputs(rng)
    f = jax.jit(lambda t, *a: token_log_probs(*a, temperature=t, valid_vocab=VALID, chunk=chunk))
    found = f(jnp.float32(temperature), *args)
    expected = oracle(*args, temperature, VALID)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == jnp.float32
        assert got.shape == (R, T)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 12, 512])
def test_gradients(rng, chunk):
    """Of a random combination of both outputs, against autodiff of the unchunked formula."""
    hidden, head, targets = inputs(rng)
    a, b = (jnp.asarray(rng.normal(size=(R, T)), jnp.float32) for _ in range(2))

    def combine(outputs):
        return jnp.sum(a * outputs[0]) + jnp.sum(b * outputs[1])

    def chunked(hidden, head):
        return combine(
            token_log_probs(hidden, head, targets, temperature=TAU, valid_vocab=VALID, chunk=chunk)
        )

    found = jax.jit(jax.grad(chunked, (0, 1)))(hidden, head)
    expected = jax.grad(lambda h, w: combine(naive(h, w, targets, TAU, VALID)), (0, 1))(
        hidden, head
    )
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(found[1][VALID:], 0.0)


def test_chunks_change_nothing(rng):
    args = inputs(rng)
    whole, cut = (token_log_probs(*args, temperature=TAU, valid_vocab=V, chunk=c) for c in (512, 4))
    np.testing.assert_allclose(whole, cut, rtol=1e-6, atol=3e-6)


def test_large_logits_are_exact(rng):
    """Logits in the thousands: the softmax is shifted, so nothing overflows."""
    hidden, head, targets = inputs(rng)
    hidden = hidden * 1000
    log_probs, entropy = token_log_probs(hidden, head, targets, temperature=1.0, valid_vocab=VALID)
    expected = oracle(hidden, head, targets, 1.0, VALID)
    np.testing.assert_allclose(log_probs, expected[0], rtol=1e-5, atol=2e-3)
    np.testing.assert_allclose(entropy, expected[1], atol=2e-3)
    assert np.asarray(entropy).min() >= 0


def test_bfloat16_hidden_float32_head(rng):
    """Products in bf16 accumulate in fp32: as good as bf16 inputs allow, gradients too."""
    hidden, head, targets = inputs(rng, rows=2, length=64, width=32, vocab=40, valid=40)
    hidden = hidden.astype(jnp.bfloat16)
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)

    def loss(hidden, head):
        return token_log_probs(
            hidden, head, targets, temperature=1.0, valid_vocab=40, chunk=16
        )[0].sum()  # fmt: skip

    found, _ = token_log_probs(hidden, head, targets, temperature=1.0, valid_vocab=40)
    expected, _ = oracle(hidden.astype(jnp.float32), rounded, targets, 1.0, 40)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    d_hidden, d_head = jax.grad(loss, (0, 1))(hidden, head)
    assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)
    expected = jax.grad(lambda w: naive(hidden.astype(jnp.float32), w, targets, 1.0, 40)[0].sum())(
        rounded
    )
    scale = np.abs(expected).max()
    np.testing.assert_allclose(d_head / scale, expected / scale, atol=4e-3)


def test_ids_outside_the_vocabulary(rng):
    hidden, head, targets = inputs(rng)
    targets = targets.at[0, 0].set(VALID).at[1, 1].set(-1).at[2, 2].set(V + 3)
    outside = np.zeros((R, T), bool)
    outside[[0, 1, 2], [0, 1, 2]] = True

    def total(hidden):
        log_probs, entropy = token_log_probs(
            hidden, head, targets, temperature=TAU, valid_vocab=VALID, chunk=8
        )
        return jnp.where(outside, 0.0, log_probs).sum() + entropy.sum() * 0, (log_probs, entropy)

    gradient, (log_probs, entropy) = jax.grad(total, has_aux=True)(hidden)
    assert np.isneginf(np.asarray(log_probs)[outside]).all()
    assert np.isfinite(np.asarray(log_probs)[~outside]).all()
    assert np.isfinite(np.asarray(entropy)).all()
    assert np.isfinite(np.asarray(gradient)).all()
    np.testing.assert_array_equal(np.asarray(gradient)[outside], 0.0)


def test_temperature_is_traced_and_zero_means_one(rng):
    args, traces = inputs(rng), []

    @jax.jit
    def f(temperature):
        traces.append(1)
        return token_log_probs(*args, temperature=temperature, valid_vocab=VALID)

    greedy, one, warm = (f(jnp.float32(t)) for t in (0.0, 1.0, 2.0))
    assert len(traces) == 1
    np.testing.assert_array_equal(greedy[0], one[0])
    assert np.abs(np.asarray(warm[0] - one[0])).max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": (R, T + 1)}, "targets"),
        ({"head": (V, D + 1)}, "head"),
        ({"hidden": (R, T)}, "hidden"),
        ({"valid_vocab": V + 1}, "valid_vocab"),
        ({"chunk": 0}, "chunk"),
        ({"temperature": (R,)}, "temperature"),
    ],
)
def test_errors_name_the_argument(rng, change, message):
    hidden, head, targets = inputs(rng)
    args = {"hidden": hidden, "head": head, "targets": targets, "temperature": 1.0}
    args |= {"valid_vocab": VALID, "chunk": 4}
    for name, value in change.items():
        args[name] = jnp.zeros(value, jnp.int32) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=f"^{message}"):
        token_log_probs(**args)


# --- more ids than the target -----------------------------------------------------------------


def supports(rng, rows=R, length=T, valid=VALID, k=4):
    """Random ids, repeated ones among them."""
    return jnp.asarray(rng.integers(0, valid, (rows, length, k)), jnp.int32)


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_support_values_and_gradients(rng, chunk):
    """Of a random combination of the three outputs, against autodiff of the unchunked formula."""
    hidden, head, targets = inputs(rng)
    support = supports(rng)
    assert any(len(set(ids)) < 4 for ids in np.asarray(support).reshape(-1, 4))
    a, b = (jnp.asarray(rng.normal(size=(R, T)), jnp.float32) for _ in range(2))
    c = jnp.asarray(rng.normal(size=(R, T, 4)), jnp.float32)

    def combine(x, y, z):
        return jnp.sum(a * x) + jnp.sum(b * y) + jnp.sum(c * z)

    def chunked(hidden, head):
        outputs = support_log_probs(
            hidden, head, targets, support, temperature=TAU, valid_vocab=VALID, chunk=chunk
        )
        return combine(*outputs), outputs

    def unchunked(hidden, head):
        log_p = jax.nn.log_softmax((hidden @ head.T)[..., :VALID] / TAU)
        outputs = (*naive(hidden, head, targets, TAU, VALID),
                   jnp.take_along_axis(log_p, support, -1))  # fmt: skip
        return combine(*outputs), outputs

    found, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, head)
        for f in (chunked, unchunked)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), found, expected
    )
    np.testing.assert_array_equal(found[1][1][VALID:], 0.0)


def test_support_changes_nothing_of_the_target(rng):
    """Log-prob, entropy and their gradients are those of `token_log_probs` to the bit."""
    hidden, head, targets = inputs(rng)
    support, options = supports(rng), {"temperature": TAU, "valid_vocab": VALID, "chunk": 7}

    def alone(hidden, head):
        x, y = token_log_probs(hidden, head, targets, **options)
        return (x + 0.3 * y).sum(), (x, y)

    def among_others(hidden, head):
        x, y, _ = support_log_probs(hidden, head, targets, support, **options)
        return (x + 0.3 * y).sum(), (x, y)

    results = [
        jax.value_and_grad(f, (0, 1), has_aux=True)(hidden, head) for f in (alone, among_others)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_support_ids_outside_the_vocabulary(rng):
    hidden, head, targets = inputs(rng)
    support = supports(rng).at[0, 0].set(jnp.array([VALID, -1, V + 3, 2]))
    outside = np.zeros(support.shape, bool)
    outside[0, 0, :3] = True

    def total(hidden, mask):
        x = support_log_probs(
            hidden, head, targets, support, temperature=TAU, valid_vocab=VALID, chunk=8
        )[2]
        return jnp.where(mask, 0.0, x).sum(), x

    f = jax.jit(jax.grad(total, has_aux=True))
    gradient, x = f(hidden, outside)
    np.testing.assert_array_equal(np.isneginf(x), outside)
    assert np.isfinite(np.asarray(gradient)).all()
    assert np.asarray(gradient)[0, 0].any()
    # Nor from a cotangent that is not 0.
    np.testing.assert_array_equal(f(hidden, np.zeros_like(outside))[0], gradient)


@pytest.mark.parametrize(("k", "chunk"), [(1, 7), (4, 1), (VALID, 512)])
def test_top_tokens_against_sorting(rng, k, chunk):
    hidden, head, _ = inputs(rng)
    f = jax.jit(lambda *a: top_tokens(*a, k, temperature=TAU, valid_vocab=VALID, chunk=chunk))
    ids, log_probs = f(hidden, head)
    assert (ids.dtype, log_probs.dtype) == (jnp.int32, jnp.float32)
    every = np.stack(
        [oracle(hidden, head, np.full((R, T), v), TAU, VALID)[0] for v in range(VALID)], -1
    )
    order = np.argsort(-every, axis=-1)[..., :k]
    np.testing.assert_array_equal(ids, order)
    expected = np.take_along_axis(every, order, -1)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5, atol=1e-5)
    into = jax.grad(lambda h: top_tokens(h, head, k, temperature=TAU, valid_vocab=VALID)[1].sum())
    np.testing.assert_array_equal(into(hidden), 0.0)


def test_top_support_is_both_in_one_pass(rng):
    hidden, head, targets = inputs(rng)
    targets = targets.at[0, :2].set(jnp.array([-1, VALID])) if T > 1 else targets
    options = {"temperature": TAU, "valid_vocab": VALID, "chunk": 4}
    log_probs, ids, of_support = top_support(hidden, head, targets, 3, **options)
    alone, _ = token_log_probs(hidden, head, targets, **options)
    np.testing.assert_allclose(log_probs, alone, rtol=1e-5, atol=1e-5)
    assert np.isneginf(np.asarray(log_probs)[0, :2]).all()
    for x, y in zip((ids, of_support), top_tokens(hidden, head, 3, **options), strict=True):
        np.testing.assert_array_equal(x, y)


def test_top_tokens_of_equals_are_the_first(rng):
    ids, log_probs = top_tokens(
        jnp.zeros((1, 2, D)), jnp.zeros((V, D)), 3, temperature=0.0, valid_vocab=VALID
    )
    np.testing.assert_array_equal(ids, [[[0, 1, 2]] * 2])
    np.testing.assert_allclose(log_probs, -np.log(VALID), rtol=1e-6)


def test_errors_of_more_ids(rng):
    hidden, head, targets = inputs(rng)
    options = {"temperature": 1.0, "valid_vocab": VALID}
    for shape in ((R, T), (R, T + 1, 4)):
        with pytest.raises(ValueError, match=r"^support: shape"):
            support_log_probs(hidden, head, targets, jnp.zeros(shape, jnp.int32), **options)
    for k in (0, VALID + 1):
        with pytest.raises(ValueError, match=rf"^k: {k} found; must be from 1 to valid_vocab=9"):
            top_tokens(hidden, head, k, **options)


# --- memory ----------------------------------------------------------------------------------


def largest(jaxpr) -> int:
    """Elements of the largest value anywhere in a jaxpr, inner ones included."""
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [int(np.prod(v.aval.shape)) for v in eqn.outvars]
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                sizes.append(largest(inner))
    return max(sizes)


def test_memory(rng):
    """Forward and backward hold chunks of logits only, by the jaxpr and as compiled."""
    rows, length, vocab, chunk = 4, 256, 512, 64
    hidden, head, targets = inputs(rng, rows, length, 8, vocab, vocab)

    def chunked(hidden, head):
        log_probs, entropy = token_log_probs(
            hidden, head, targets, temperature=1.0, valid_vocab=vocab, chunk=chunk
        )
        return log_probs.sum() + entropy.sum()

    def unchunked(hidden, head):
        return sum(x.sum() for x in naive(hidden, head, targets, 1.0, vocab))

    everything, one_chunk = rows * length * vocab, chunk * vocab
    for f, holds_all in ((chunked, False), (unchunked, True)):
        both = jax.value_and_grad(f, (0, 1))
        size = largest(jax.make_jaxpr(both)(hidden, head).jaxpr)
        assert size == (everything if holds_all else one_chunk)
        temporaries = jax.jit(both).lower(hidden, head).compile().memory_analysis()
        assert (temporaries.temp_size_in_bytes >= 4 * everything) == holds_all
    support = supports(rng, rows, length, vocab)

    def of_support(hidden, head):
        outputs = support_log_probs(
            hidden, head, targets, support, temperature=1.0, valid_vocab=vocab, chunk=chunk
        )
        return sum(x.sum() for x in outputs)

    def of_top(hidden, head):
        return top_tokens(hidden, head, 4, temperature=1.0, valid_vocab=vocab, chunk=chunk)

    for f in (jax.value_and_grad(of_support, (0, 1)), of_top):
        assert largest(jax.make_jaxpr(f)(hidden, head).jaxpr) == one_chunk
        temporaries = jax.jit(f).lower(hidden, head).compile().memory_analysis()
        assert temporaries.temp_size_in_bytes < 4 * everything / 2
    # The bound that matters: a few chunks of logits beside copies of [R, T, D].
    temporaries = jax.jit(jax.value_and_grad(chunked, (0, 1))).lower(hidden, head).compile()
    used = temporaries.memory_analysis().temp_size_in_bytes
    assert used < 4 * (4 * one_chunk + 8 * hidden.size + 4 * head.size)


# --- eight devices ---------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "rows"), [((2, 2, 2), 8), ((1, 4, 2), 3)])
def test_split_over_devices(rng, sizes, rows):
    """Rows over data and fsdp, head over tensor and fsdp: the values of one device."""
    hidden, head, targets = inputs(rng, rows, 12, 8, 16, 14)
    a = jnp.asarray(rng.normal(size=targets.shape), jnp.float32)
    options = {"temperature": TAU, "valid_vocab": 14, "chunk": 6}

    def loss(hidden, head, targets, a):
        log_probs, entropy = token_log_probs(hidden, head, targets, **options)
        ids, top = top_tokens(hidden, head, 3, **options)
        *_, of_top = support_log_probs(hidden, head, targets, ids, **options)
        terms = a * log_probs + a * a * entropy + a * of_top[..., 0] - of_top[..., 2]
        return jnp.sum(terms), (log_probs, entropy, ids, top, of_top)

    f = jax.value_and_grad(loss, (0, 1), has_aux=True)
    expected = jax.jit(f)(hidden, head, targets, a)
    mesh = make_mesh(*sizes)
    batch = NamedSharding(mesh, P(BATCH_AXES) if rows == 8 else P())
    split_head = NamedSharding(mesh, P("tensor", "fsdp"))
    with jax.set_mesh(mesh):
        args = (
            jax.device_put(hidden, batch),
            jax.device_put(head, split_head),
            jax.device_put(targets, batch),
            jax.device_put(a, batch),
        )
        found = jax.jit(f)(*args)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), found, expected
    )


def test_one_reduction_of_the_head_gradient(rng):
    """The devices' gradients of the head meet after the loop, not once for every chunk."""
    hidden, head, targets = inputs(rng, 8, 64, 8, 16, 16)
    mesh = make_mesh(8, 1, 1)
    batch = NamedSharding(mesh, P(BATCH_AXES))

    def loss(head, hidden, targets):
        return token_log_probs(
            hidden, head, targets, temperature=1.0, valid_vocab=16, chunk=4
        )[0].sum()  # fmt: skip

    with jax.set_mesh(mesh):
        args = (
            jax.device_put(head, NamedSharding(mesh, P())),
            *jax.device_put((hidden, targets), batch),
        )
        text = jax.jit(jax.grad(loss)).lower(*args).compile().as_text()
    lines = [line for line in text.splitlines() if "all-reduce(" in line or "all-gather(" in line]
    assert len(lines) == 1, lines
    assert "while/body" not in lines[0]
