"""Estimators from distributions: expected gradients by enumeration, limits, memory, a split batch.

Mutations of objectives/distributions.py, each applied alone, and a test that then failed:

    student not renormalised
        test_expected_gradient_of_topk
    teacher not renormalised
        test_topk_value
    the rest dropped
        test_expected_gradient_of_topk
    student's rest without a guard
        test_topk_of_the_whole_vocabulary_is_full
    teacher's rest without a guard
        test_tail_stays_finite_where_no_mass_is_left
    gradient into the teacher (topk)
        test_topk_gradient_is_the_students_alone_and_nan_stays_in_its_place
    nan masked in the output only
        test_topk_gradient_is_the_students_alone_and_nan_stays_in_its_place
    forward KL (topk)
        test_expected_gradient_of_topk
    no floor outside the teacher's K
        test_expected_gradient_of_topk
    the floor's teacher not renormalised
        test_topk_value
    entropy without a gradient
        test_expected_gradient_of_topk
    nan of the teacher in the floor's entropy
        test_topk_gradient_is_the_students_alone_and_nan_stays_in_its_place
    backward without −KL
        test_expected_gradient_of_full
    sum not rescaled when the maximum rises
        test_expected_gradient_of_full
    excess not shifted with the maxima
        test_expected_gradient_of_full
    teacher's sum under the student's maximum
        test_topk_of_the_whole_vocabulary_is_full
    fill of the last block counted
        test_expected_gradient_of_full
    no temperature in the backward pass
        test_full_values_and_gradients
    gradient of a block added to the next
        test_full_values_and_gradients
    nan of the teacher under a cotangent of 0
        test_full_ignores_a_broken_teacher_where_nothing_is_asked
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import (
    LENGTHS,
    VOCAB,
    close,
    finite_difference,
    log_softmax,
    loss_gradient,
    prefix_probs,
    reverse_kl_gradient,
    score,
    sequence_probs,
    sequences,
    table,
    token_values,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_logprobs import largest

from kdrl_jax.objectives import (
    SUPPORTS,
    full_divergence,
    support_log_probs,
    token_log_probs,
    top_tokens,
    topk_divergence,
)
from kdrl_jax.sharding import BATCH_AXES, make_mesh

K = 3
LOG_FLOOR = -9.0  # of support "floor" here


# --- oracles: closed forms in float64 ------------------------------------------------------------


def chosen(student, teacher, support, k):
    """Ids `[rows, k]`: the student's k likeliest, or the teacher's, as "tail" and "floor" have."""
    return np.argsort(-(student if support == "student" else teacher), axis=-1)[:, :k]


def buckets(logits, ids, support):
    """Log-probs `[rows, k]` over the ids, and `[rows, k + 1]` with the rest."""
    inside = np.take_along_axis(log_softmax(logits), ids, -1)
    if support != "tail":
        return inside - np.log(np.exp(inside).sum(-1, keepdims=True))
    rest = np.log(np.maximum(1 - np.exp(inside).sum(-1, keepdims=True), 1e-300))
    return np.concatenate([inside, rest], -1)


def floored(teacher, ids):
    """Log-probs `[rows, V]` of the truncated teacher: on the ids renormalised, elsewhere ln ε."""
    out = np.full_like(teacher, LOG_FLOOR)
    np.put_along_axis(out, ids, buckets(teacher, ids, "teacher"), -1)
    return out


def topk_kl(student, teacher, ids, support):
    """D of each row of the table."""
    if support == "floor":
        p = log_softmax(student)
        return (np.exp(p) * (p - floored(teacher, ids))).sum(-1)
    p, q = (buckets(x, ids, support) for x in (student, teacher))
    return (np.exp(p) * (p - q)).sum(-1)


def topk_gradient(student, teacher, ids, support, reach):
    """Σ_s reach(s)·∇D(s). Renormalised: p̂_k·(log p̂_k/q̂_k − D) on the ids and 0 elsewhere.

    With a rest: p_v·(log p_b/q_b − D), b the bucket of v. With a floor: p_v·(log p_v/q̂_v − D).
    """
    if support == "floor":
        p, q = log_softmax(student), floored(teacher, ids)
        d = (np.exp(p) * (p - q)).sum(-1, keepdims=True)
        return reach[:, None] * np.exp(p) * (p - q - d)
    p, q = (buckets(x, ids, support) for x in (student, teacher))
    d = (np.exp(p) * (p - q)).sum(-1, keepdims=True)
    out = np.zeros_like(student)
    if support == "tail":
        out += (p - q - d)[:, -1:] * np.exp(log_softmax(student))
        inside = np.exp(p[:, :-1]) * (p - q - d)[:, :-1]
    else:
        inside = np.exp(p) * (p - q - d)
    np.put_along_axis(out, ids, inside, -1)
    return reach[:, None] * out


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("support", SUPPORTS)
def test_oracles_agree_with_finite_differences(support, length):
    student, teacher = table(0, length), table(1, length)
    reach = prefix_probs(table(2, length))
    ids = chosen(student, teacher, support, K)
    expected = finite_difference(lambda x: reach @ topk_kl(x, teacher, ids, support), student)
    found = topk_gradient(student, teacher, ids, support, reach)
    np.testing.assert_allclose(found, expected, atol=1e-8)


# --- enumeration: through the output head, as a loop would call it ------------------------------


def head_options(chunk=16):
    return {"temperature": 1.0, "valid_vocab": VOCAB, "chunk": chunk}


@functools.partial(jax.jit, static_argnames=("support", "k"))
def topk_of(student_hidden, teacher_hidden, support, k):
    """D `[N, length]` of hidden states that are the logits, under a head that is the identity."""
    head, options = jnp.eye(VOCAB), head_options()
    targets = jnp.zeros(student_hidden.shape[:2], jnp.int32)
    ids, _ = top_tokens(
        student_hidden if support == "student" else teacher_hidden, head, k, **options
    )
    (_, entropy, of_student), (_, _, of_teacher) = (
        support_log_probs(x, head, targets, ids, **options)
        for x in (student_hidden, teacher_hidden)
    )
    return topk_divergence(of_student, of_teacher, support, entropy=entropy, log_floor=LOG_FLOOR)


@jax.jit
def full_of(student_hidden, teacher_hidden):
    eye = jnp.eye(VOCAB)
    return full_divergence(
        student_hidden, eye, teacher_hidden, eye, vocab_chunk=2, **head_options()
    )


def expected_gradient(divergence, name, student, teacher, old, **options):
    """∇ of `kdrl_loss` over all sequences of `old`; the divergence comes from the tables."""
    _, rows = sequences(2)
    teacher_hidden = jnp.asarray(teacher[rows], jnp.float32)
    return loss_gradient(
        student,
        2,
        teacher=teacher,
        old=None if old is student else old,
        weights=sequence_probs(old, 2),
        kd_estimator=name,
        divergence=lambda x: divergence(x, teacher_hidden),
        **options,
    )


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("support", SUPPORTS)
def test_expected_gradient_of_topk(support, off_policy):
    """On the prefixes that π_old sampled; no ratio, for the next token is not sampled."""
    student, teacher = table(0, 2), table(1, 2)
    old = table(2, 2) if off_policy else student
    divergence = functools.partial(topk_of, support=support, k=K)
    found = expected_gradient(divergence, "topk", student, teacher, old, beta=1.0)
    ids = chosen(student, teacher, support, K)
    close(found, topk_gradient(student, teacher, ids, support, prefix_probs(old)))
    assert np.abs(found).max() > 0.01


def test_only_the_floor_penalises_what_the_teacher_leaves_out():
    """A student with half of its mass outside the teacher's K: the paper's form alone sees it."""
    teacher = np.log([[0.4, 0.3, 0.2, 0.06, 0.04]])
    inside, outside = (
        np.log([p]) for p in ([0.4, 0.3, 0.2, 0.06, 0.04], [0.2, 0.15, 0.1, 0.3, 0.25])
    )
    found = {}
    for support in SUPPORTS:
        ids = chosen(inside, teacher, "teacher", K)
        found[support] = [topk_kl(x, teacher, ids, support)[0] for x in (inside, outside)]
        gradient = topk_gradient(outside, teacher, ids, support, np.ones(1))[0]
        assert (gradient[3:].sum() > 1.0) == (support == "floor")  # pushes them down, and hard
    assert found["floor"][1] - found["floor"][0] > 3.0
    assert found["tail"][1] < 1.0
    assert found["teacher"][1] == pytest.approx(found["teacher"][0], abs=1e-9) == 0


@pytest.mark.parametrize("off_policy", [False, True])
def test_expected_gradient_of_full(off_policy):
    """That of k2 in expectation, without its variance; vocabulary in blocks of 2, 2 and 1."""
    student, teacher = table(0, 2), table(1, 2)
    old = table(2, 2) if off_policy else student
    found = expected_gradient(full_of, "full", student, teacher, old, beta=1.0)
    close(found, reverse_kl_gradient(student, teacher, prefix_probs(old)))
    k2 = loss_gradient(
        student, 2, teacher=teacher, old=old, weights=sequence_probs(old, 2), beta=1.0
    )
    close(found, k2)


def test_joint_gradient_with_rewards(rng):
    """−∇L = Σ w·Â·ρ·∇log π_θ − β·Σ_s reach(s)·∇D(s), off-policy, two tokens."""
    student, teacher, old = table(0, 2), table(1, 2), table(2, 2)
    weights = sequence_probs(old, 2)
    advantages = rng.normal(size=weights.shape)
    found = expected_gradient(
        full_of, "full", student, teacher, old, beta=0.3, advantages=advantages
    )
    ratio = np.exp(token_values(student, 2) - token_values(old, 2))
    kl = reverse_kl_gradient(student, teacher, prefix_probs(old))
    close(-found, score(student, 2, weights * advantages * ratio) - 0.3 * kl)


# --- top-k ---------------------------------------------------------------------------------------


def test_topk_of_the_whole_vocabulary_is_full():
    """K = V, value and gradient of each support, from distributions alike to ones far apart."""
    functions = [full_of, *(functools.partial(topk_of, support=s, k=VOCAB) for s in SUPPORTS)]

    @jax.jit
    def run(x, y):
        def total(x, f):
            d = f(x, y)
            return d.sum(), d

        return [jax.grad(functools.partial(total, f=f), has_aux=True)(x) for f in functions]

    _, rows = sequences(2)
    for scale in (0.01, 1.0, 8.0):
        student, teacher = table(0, 2, scale), table(1, 2, scale)
        found = run(*(jnp.asarray(t[rows], jnp.float32) for t in (student, teacher)))
        log_p, log_q = log_softmax(student), log_softmax(teacher)
        exact = (np.exp(log_p) * (log_p - log_q)).sum(-1)[rows]
        gradients = reverse_kl_gradient(student, teacher, np.ones(6))[rows]
        for gradient, value in found:
            np.testing.assert_allclose(value, exact, rtol=1e-5, atol=2e-6)
            np.testing.assert_allclose(gradient, gradients, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_topk_value(support, k):
    student, teacher = table(0, 2, 2.0), table(1, 2, 2.0)
    ids = chosen(student, teacher, support, k)
    log_p, log_q = (
        jnp.asarray(np.take_along_axis(log_softmax(x), ids, -1), jnp.float32)
        for x in (student, teacher)
    )
    entropy = jnp.asarray(-(np.exp(log_softmax(student)) * log_softmax(student)).sum(-1))
    found = topk_divergence(log_p, log_q, support, entropy=entropy, log_floor=LOG_FLOOR)
    expected = topk_kl(student, teacher, ids, support)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    if support == "tail":  # the data-processing inequality
        all_ids = np.broadcast_to(np.arange(VOCAB), student.shape)
        assert (expected <= topk_kl(student, teacher, all_ids, "teacher") + 1e-12).all()
        assert (expected > 0).all()
    elif k == 1 and support != "floor":
        np.testing.assert_array_equal(found, 0.0)


def test_tail_stays_finite_where_no_mass_is_left():
    """No rest: no term, no gradient of it. A rest that the teacher has not: large, not infinite."""
    some, none = np.log([0.6, 0.3]), np.log([0.75, 0.25])
    over = none + 1e-7  # sums to a little more than 1, as float32 may
    f = jax.jit(jax.value_and_grad(lambda p, q: topk_divergence(p, q, "tail")))
    for p in (none, over):
        value, gradient = f(jnp.asarray(p, jnp.float32), jnp.asarray(some, jnp.float32))
        np.testing.assert_allclose(value, (np.exp(p) * (p - some)).sum(), rtol=1e-5)
        np.testing.assert_allclose(gradient, np.exp(p) * (p - some + 1), rtol=1e-5)
        value, gradient = f(jnp.asarray(some, jnp.float32), jnp.asarray(p, jnp.float32))
        inside = (np.exp(some) * (some - p)).sum()
        np.testing.assert_allclose(value, inside + 0.1 * np.log(0.1 / 1e-6), rtol=1e-4)
        assert np.isfinite(gradient).all()
    # Next to nothing inside: log(1 − e^x) at the other end.
    low = jnp.full(2, -60.0)
    for value in (*f(low, jnp.asarray(some, jnp.float32)), *f(jnp.asarray(some), low)):
        assert np.isfinite(value).all()
    np.testing.assert_allclose(f(low, low)[0], 0.0, atol=1e-7)


@pytest.mark.parametrize("support", SUPPORTS)
def test_topk_gradient_is_the_students_alone_and_nan_stays_in_its_place(support):
    log_p, log_q = (jnp.asarray(log_softmax(table(s, 2))[:, :K], jnp.float32) for s in (0, 1))
    silent = log_q.at[2, 1].set(jnp.nan)

    def total(p, q):
        d = topk_divergence(p, q, support, entropy=jnp.where(jnp.arange(6) == 2, jnp.nan, 0.5))
        return jnp.where(jnp.isnan(d), 0.0, d).sum(), d

    (_, d), (into_student, into_teacher) = jax.value_and_grad(total, (0, 1), has_aux=True)(
        log_p, silent
    )
    np.testing.assert_array_equal(np.isnan(d), np.arange(6) == 2)
    np.testing.assert_array_equal(into_teacher, 0.0)
    np.testing.assert_array_equal(into_student[2], 0.0)
    rest = np.arange(6) != 2
    (_, whole), whole_gradient = jax.value_and_grad(total, has_aux=True)(log_p, log_q)
    np.testing.assert_array_equal(d[rest], whole[rest])
    np.testing.assert_array_equal(into_student[rest], whole_gradient[rest])


def test_topk_errors():
    with pytest.raises(ValueError, match=r"^support: 'both' is unknown; use one of teacher, stud"):
        topk_divergence(jnp.zeros((2, 3)), jnp.zeros((2, 3)), "both")
    with pytest.raises(ValueError, match=r"^teacher_log_probs: shape \(2, 4\) found; must be \(2"):
        topk_divergence(jnp.zeros((2, 3)), jnp.zeros((2, 4)), "tail")
    with pytest.raises(ValueError, match=r"^entropy: None found; support 'floor' needs the stud"):
        topk_divergence(jnp.zeros((2, 3)), jnp.zeros((2, 3)), "floor")
    with pytest.raises(ValueError, match=r"^entropy: shape \(3,\) found; must be \(2,\)"):
        topk_divergence(jnp.zeros((2, 3)), jnp.zeros((2, 3)), "floor", entropy=jnp.zeros(3))


# --- full ----------------------------------------------------------------------------------------

R, T, D, E, V, V2, VALID, TAU = 3, 10, 6, 4, 13, 11, 9, 0.6


def inputs(rng, rows=R, length=T, width=D, teacher_width=E, vocab=V, teacher_vocab=V2):
    shapes = [(rows, length, width), (vocab, width)]
    shapes += [(rows, length, teacher_width), (teacher_vocab, teacher_width)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def naive(hidden, head, teacher_hidden, teacher_head, temperature=TAU, valid=VALID):
    log_p, log_q = (
        jax.nn.log_softmax((h @ w.T)[..., :valid] / temperature)
        for h, w in ((hidden, head), (teacher_hidden, teacher_head))
    )
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def oracle(hidden, head, teacher_hidden, teacher_head, temperature=TAU, valid=VALID):
    pairs = ((hidden, head), (teacher_hidden, teacher_head))
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in pairs]
    p, q = (log_softmax((h @ w.T)[..., :valid] / temperature) for h, w in pairs)
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize(("chunk", "vocab_chunk"), [(1, 1), (7, 4), (12, 5), (512, 16_384)])
def test_full_values_and_gradients(rng, chunk, vocab_chunk):
    """Heads of 13 and 11 rows, 9 valid: blocks that divide neither, tokens that do not divide 10.

    The gradient is of a random combination, against autodiff of the formula without chunks.
    """
    args = inputs(rng)
    a = jnp.asarray(rng.normal(size=(R, T)), jnp.float32)

    @jax.jit
    def found(temperature, *args):
        def total(*args):
            d = full_divergence(
                *args, temperature=temperature, valid_vocab=VALID, chunk=chunk,
                vocab_chunk=vocab_chunk,
            )  # fmt: skip
            return jnp.sum(a * d), d

        return jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(*args)

    (_, d), gradients = found(jnp.float32(TAU), *args)
    assert d.dtype == jnp.float32
    np.testing.assert_allclose(d, oracle(*args), rtol=1e-5, atol=5e-6)
    f = jax.grad(lambda *x: jnp.sum(a * naive(*x, *args[2:])), (0, 1))
    expected = jax.jit(f)(*args[:2])
    for got, want in zip(gradients[:2], expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=5e-5, atol=5e-5)
    np.testing.assert_array_equal(gradients[1][VALID:], 0.0)
    for into_teacher in gradients[2:]:
        np.testing.assert_array_equal(into_teacher, 0.0)


def test_full_large_logits(rng):
    """Logits in the thousands, their largest in the last block: nothing overflows."""
    hidden, head, teacher_hidden, teacher_head = inputs(rng)
    order = jnp.argsort(hidden[0, 0] @ head[:VALID].T)
    args = [hidden * 300, head.at[:VALID].set(head[order])]
    args += [teacher_hidden * 300, teacher_head]

    def total(*x):
        d = full_divergence(*x, temperature=1.0, valid_vocab=VALID, chunk=8, vocab_chunk=2)
        return d.sum(), d

    (_, d), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(*args)
    expected = oracle(*args, temperature=1.0)
    assert expected.max() > 500
    np.testing.assert_allclose(d, expected, rtol=1e-5, atol=2e-3)
    assert all(np.isfinite(x).all() for x in gradients)


def test_full_of_the_same_model_is_zero(rng):
    hidden, head, *_ = inputs(rng)

    def total(hidden):
        d = full_divergence(
            hidden, head, hidden, head, temperature=TAU, valid_vocab=V, chunk=8, vocab_chunk=4
        )
        return d.sum(), d

    gradient, d = jax.jit(jax.grad(total, has_aux=True))(hidden)
    np.testing.assert_allclose(d, 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


def test_full_in_bfloat16_accumulates_in_float32(rng):
    args = [x.astype(jnp.bfloat16) for x in inputs(rng, 2, 16, 32, 24, 40, 40)]
    wide = [x.astype(jnp.float32) for x in args]

    options = {"temperature": 4.0, "valid_vocab": 40, "chunk": 8, "vocab_chunk": 16}

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(hidden, head):
        d = full_divergence(hidden, head, *args[2:], **options)
        return d.sum(), d

    gradients, found = run(args[0], wide[1])
    np.testing.assert_allclose(found, oracle(*wide, 4.0, 40), rtol=1e-4, atol=1e-4)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    f = jax.grad(lambda *x: naive(*x, *wide[2:], 4.0, 40).sum(), (0, 1))
    expected = jax.jit(f)(*wide[:2])
    for got, want in zip(gradients, expected, strict=True):
        scale = np.abs(want).max()
        np.testing.assert_allclose(got.astype(jnp.float32) / scale, want / scale, atol=1e-2)


def test_full_ignores_a_broken_teacher_where_nothing_is_asked(rng):
    """A cotangent of 0 at tokens whose teacher states are nan: gradient 0 there and none in V·D."""
    hidden, head, teacher_hidden, teacher_head = inputs(rng)
    asked = jnp.asarray(rng.uniform(size=(R, T)) > 0.4)
    broken = jnp.where(asked[..., None], teacher_hidden, jnp.nan)

    def total(hidden, head, teacher_hidden):
        d = full_divergence(
            hidden, head, teacher_hidden, teacher_head, temperature=TAU, valid_vocab=VALID,
            chunk=8, vocab_chunk=4,
        )  # fmt: skip
        return jnp.where(asked, d, 0.0).sum()

    f = jax.jit(jax.value_and_grad(total, (0, 1)))
    found = f(hidden, head, broken)
    jax.tree.map(np.testing.assert_array_equal, found, f(hidden, head, teacher_hidden))
    np.testing.assert_array_equal(found[1][0][~asked], 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": (R, T)}, r"hidden: shape"),
        ({"head": (V, D + 1)}, r"head: shape"),
        ({"teacher_hidden": (R, T + 1, E)}, r"teacher_hidden: shape \(3, 11, 4\)"),
        ({"teacher_head": (V2, D)}, r"teacher_head: shape"),
        ({"valid_vocab": V}, r"valid_vocab: 13 found; .* 11 rows of teacher_head"),
        ({"valid_vocab": 0}, r"valid_vocab: 0"),
        ({"chunk": 0}, r"chunk: 0"),
        ({"vocab_chunk": 0}, r"vocab_chunk: 0"),
        ({"temperature": (R,)}, r"temperature: shape"),
    ],
)
def test_full_errors_name_the_argument(rng, change, message):
    names = ("hidden", "head", "teacher_hidden", "teacher_head")
    args = dict(zip(names, inputs(rng), strict=True))
    args |= {"temperature": 1.0, "valid_vocab": VALID, "chunk": 4, "vocab_chunk": 4}
    args |= {k: jnp.zeros(v) if isinstance(v, tuple) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        full_divergence(**args)


def test_full_memory(rng):
    """Neither a [R, T, V] nor a chunk's [tokens, V] is held, by the jaxpr and as compiled."""
    rows, length, vocab, chunk, vocab_chunk = 4, 256, 512, 64, 128
    args = inputs(rng, rows, length, 8, 8, vocab, vocab)

    def chunked(*args):
        return full_divergence(
            *args, temperature=1.0, valid_vocab=vocab, chunk=chunk, vocab_chunk=vocab_chunk
        ).sum()

    both = jax.value_and_grad(chunked, (0, 1))
    block, states = chunk * vocab_chunk, rows * length * 8
    assert largest(jax.make_jaxpr(both)(*args).jaxpr) == max(block, states)
    memory = jax.jit(both).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * (6 * block + 12 * states + 6 * vocab * 8)
    assert memory.temp_size_in_bytes < 4 * rows * length * vocab / 2


# --- eight devices -------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "rows"), [((2, 2, 2), 8), ((1, 4, 2), 3)])
def test_full_split_over_devices(rng, sizes, rows):
    """Rows over data and fsdp, heads over tensor and fsdp: the values of one device."""
    args = inputs(rng, rows, 12, 8, 4, 16, 16)
    a = jnp.asarray(rng.normal(size=(rows, 12)), jnp.float32)

    def total(hidden, head, teacher_hidden, teacher_head, a):
        d = full_divergence(
            hidden, head, teacher_hidden, teacher_head, temperature=TAU, valid_vocab=14, chunk=6,
            vocab_chunk=4,
        )  # fmt: skip
        return jnp.sum(a * d), d

    f = jax.value_and_grad(total, (0, 1), has_aux=True)
    expected = jax.jit(f)(*args, a)
    mesh = make_mesh(*sizes)
    batch = NamedSharding(mesh, P(BATCH_AXES) if rows == 8 else P())
    split_head = NamedSharding(mesh, P("tensor", "fsdp"))
    with jax.set_mesh(mesh):
        found = jax.jit(f)(*jax.device_put([*args, a], [batch, split_head] * 2 + [batch]))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), found, expected
    )


def test_full_reduces_the_head_gradient_once(rng):
    """The devices' gradients of the head meet after the loops, not once for every block."""
    args = inputs(rng, 8, 64, 8, 8, 16, 16)
    mesh = make_mesh(8, 1, 1)
    batch, whole = NamedSharding(mesh, P(BATCH_AXES)), NamedSharding(mesh, P())

    def total(hidden, head, teacher_hidden, teacher_head):
        return full_divergence(
            hidden, head, teacher_hidden, teacher_head, temperature=1.0, valid_vocab=16, chunk=4,
            vocab_chunk=4,
        ).sum()  # fmt: skip

    with jax.set_mesh(mesh):
        placed = jax.device_put(args, [batch, whole] * 2)
        text = jax.jit(jax.grad(total, 1)).lower(*placed).compile().as_text()
    lines = [line for line in text.splitlines() if "all-reduce(" in line or "all-gather(" in line]
    assert len(lines) == 1, lines
    assert "while/body" not in lines[0]


# --- the whole way -------------------------------------------------------------------------------


def test_steps_move_the_student_to_the_teacher(rng):
    """Hidden states and head learn from a divergence alone, and both divergences fall."""
    hidden, head, teacher_hidden, teacher_head = inputs(rng, 2, 3)
    options = {"temperature": 1.0, "valid_vocab": VALID, "chunk": 8}
    targets = jnp.zeros((2, 3), jnp.int32)
    ids, _ = top_tokens(teacher_hidden, teacher_head, 4, **options)
    of_teacher = support_log_probs(teacher_hidden, teacher_head, targets, ids, **options)[2]

    def losses(params):
        of_student = support_log_probs(*params, targets, ids, **options)[2]
        full = full_divergence(*params, teacher_hidden, teacher_head, **options)
        return full.sum(), topk_divergence(of_student, of_teacher, "tail").sum()

    @jax.jit
    def step(params, which):
        values, pull = jax.vjp(losses, params)
        (gradient,) = pull((which, 1.0 - which))
        return jax.tree.map(lambda x, g: x - 0.05 * g, params, gradient), jnp.stack(values)

    for which in (0.0, 1.0):
        params, values = (hidden, head), []
        for _ in range(100):
            params, value = step(params, which)
            values.append(value)
        assert (values[1] < values[0]).all()
        assert (values[-1] < 0.3 * values[0]).all()


def test_k1_of_the_target_is_one_entry_of_the_support(rng):
    """The three functions of the head agree on what they share."""
    hidden, head, *_ = inputs(rng)
    options = {"temperature": TAU, "valid_vocab": VALID, "chunk": 8}
    ids, top = top_tokens(hidden, head, K, **options)
    log_probs, entropy, of_support = support_log_probs(hidden, head, ids[..., 1], ids, **options)
    np.testing.assert_array_equal(log_probs, of_support[..., 1])
    np.testing.assert_allclose(of_support, top, rtol=1e-5, atol=1e-6)
    for got, want in zip(
        (log_probs, entropy), token_log_probs(hidden, head, ids[..., 1], **options), strict=True
    ):
        np.testing.assert_array_equal(got, want)
