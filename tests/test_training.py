"""The fused step: what must not change its result, and what must."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdrl_jax.models import Decoder, ModelConfig, quantize
from kdrl_jax.objectives import METHODS, SUPPORTS, topk_divergence
from kdrl_jax.objectives.distributions import LOG_FLOOR
from kdrl_jax.sharding import BATCH_AXES, make_mesh, param_shardings, put_batch, replicated
from kdrl_jax.training.batch import build_batch, by_mini_batch, rollout_rows
from kdrl_jax.training.learner import Weights, take_part
from kdrl_jax.training.scoring import Scorer, join_micro_batches, split_micro_batches
from kdrl_jax.training.sft import pad_examples, supervised_batch, train_supervised
from kdrl_jax.training.state import init_params, init_state, make_optimizer, make_schedule
from kdrl_jax.training.step import Objective, make_hyper, make_update
from kdrl_jax.types import FINISH_EOS, FINISH_LENGTH, Rollouts, Scores

VOCAB, VALID = 32, 29
P_, G, S, T = 4, 2, 6, 10
MODEL = Decoder(
    ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_size=32,
        qk_norm=True,
        tie_embeddings=True,
        max_positions=64,
        model_type="qwen3",
    )
)
ONE_DEVICE = make_mesh(devices=jax.devices()[:1])
PLAIN = Objective()


def rollouts(seed: int = 0) -> Rollouts:
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(2, S + 1, P_)
    lengths = rng.integers(1, T + 1, (P_, G))
    return Rollouts(
        prompt_tokens=rng.integers(0, VALID, (P_, S)).astype(np.int32),
        prompt_lengths=prompt_lengths.astype(np.int32),
        tokens=rng.integers(0, VALID, (P_, G, T)).astype(np.int32),
        log_probs=rng.normal(-3, 0.1, (P_, G, T)).astype(np.float32),
        lengths=lengths.astype(np.int32),
        finish_reason=np.where(lengths < T, FINISH_EOS, FINISH_LENGTH).astype(np.int32),
    )


def slots(**overrides):
    settings = {
        "aggregation": "group-token-mean",
        "kd_mask": "response",
        "scale": "group",
        "baseline": "mean",
        "method": METHODS["kdrl"],
        "overlong": (0, 1.0),
        "mask_truncated": False,
        "mask_final_eos": False,
        "max_new_tokens": T,
        "mini_batches": 1,
    }
    return settings | overrides


REWARDS = np.array([[1, 0], [0, 0], [1, 1], [0, 1]], np.float32)


def teacher_scores(seed: int = 1) -> Scores:
    rng = np.random.default_rng(seed)
    return Scores(teacher_log_probs=rng.normal(-3, 1, (P_ * G, T)).astype(np.float32))


def make_parts(scores: Scores, **overrides):
    """Mini-batches, from random rollouts and given scores, on one device."""
    sampled, beta = rollouts(), jnp.float32(0.5)
    rows = rollout_rows(sampled)
    return build_batch(rows, sampled, jnp.asarray(REWARDS), scores, beta, **slots(**overrides))


def make_batch(teacher_seed: int = 1, **overrides):
    """A batch with random teacher log-probs."""
    return take_part(make_parts(teacher_scores(teacher_seed), **overrides), 0)


def hyper(mesh, beta: float = 0.5):
    return make_hyper(mesh, beta=beta, temperature=0.8, entropy_coef=0.01)


def one_update(
    mesh,
    batch,
    micro_batches: int = 1,
    beta: float = 0.5,
    objective: Objective = PLAIN,
    head=None,
):
    """Weights after one plain SGD step of size 1, so that their change is −gradient."""
    optimizer = optax.sgd(1.0)
    update = make_update(
        MODEL,
        optimizer,
        mesh,
        objective=objective,
        micro_batches=micro_batches,
        valid_vocab=VALID,
        chunk=4,
    )
    state = init_state(init_params(MODEL, jax.random.key(0), mesh), optimizer, mesh)
    head = None if head is None else jax.device_put(head, replicated(mesh))
    state, metrics = update(state, put_batch(mesh, batch), hyper(mesh, beta), head)
    return jax.device_get(state.params), {k: float(v) for k, v in metrics.items()}


@pytest.fixture(scope="module")
def reference():
    return one_update(ONE_DEVICE, make_batch())


def assert_same(a, b, tolerance: float = 2e-6) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance)


def differ(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(np.abs(x - y).max() > 1e-4 for x, y in pairs)


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batch_split_changes_nothing(reference, micro_batches: int) -> None:
    params, metrics = one_update(ONE_DEVICE, make_batch(), micro_batches)
    assert_same(params, reference[0])
    assert metrics == pytest.approx(reference[1], abs=2e-5)


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 4, 2)])
def test_mesh_changes_nothing(reference, axes) -> None:
    params, metrics = one_update(make_mesh(*axes), make_batch(), micro_batches=2)
    assert_same(params, reference[0], 5e-6)
    assert metrics == pytest.approx(reference[1], abs=5e-5)


def test_order_of_groups_changes_nothing(reference) -> None:
    batch = make_batch()
    order = np.random.default_rng(3).permutation(P_ * G)
    params, _ = one_update(ONE_DEVICE, jax.tree.map(lambda x: np.asarray(x)[order], batch))
    assert_same(params, reference[0])


def test_more_padding_changes_nothing(reference) -> None:
    """Three columns of garbage left of the prompts and two right of the completions."""
    batch = jax.device_get(make_batch())

    def pad(x, left, fill):
        shape = (x.shape[0], left), (x.shape[0], 2)
        return np.concatenate(
            [np.full(shape[0], fill, x.dtype), x, np.full(shape[1], fill, x.dtype)], axis=1
        )

    rows = {k: pad(getattr(batch, k), 3, f) for k, f in (("tokens", 7), ("positions", 0))}
    rows["segment_ids"] = pad(batch.segment_ids, 3, 0)
    per_token = ("sampler_log_probs", "teacher_log_probs", "advantages", "weights", "kd_weights")
    rows |= {k: pad(getattr(batch, k), 0, 0) for k in per_token}
    params, _ = one_update(ONE_DEVICE, dataclasses.replace(batch, **rows))
    assert_same(params, reference[0])


def test_the_teacher_matters(reference) -> None:
    other, _ = one_update(ONE_DEVICE, make_batch(teacher_seed=2))
    assert differ(other, reference[0])


@pytest.mark.parametrize("fault", ["teacher_log_probs", "advantages"])
def test_an_update_that_is_not_finite_changes_nothing(fault: str) -> None:
    """Weights, moments and counters stay to the bit: the next update is as if it had not been."""
    optimizer = make_optimizer(
        make_schedule(1e-2, 3, "constant", 9),
        **{"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0},
    )
    head = {"valid_vocab": VALID, "chunk": 4}
    update = make_update(MODEL, optimizer, ONE_DEVICE, micro_batches=2, **head)
    batch = put_batch(ONE_DEVICE, make_batch(kd_mask="none"))
    spoilt = dataclasses.replace(batch, **{fault: getattr(batch, fault).at[0, 0].set(jnp.nan)})
    spoilt = put_batch(ONE_DEVICE, jax.device_get(spoilt))

    def run(*batches):
        state = init_state(init_params(MODEL, jax.random.key(0), ONE_DEVICE), optimizer, ONE_DEVICE)
        skipped = []
        for one in batches:
            state, metrics = update(state, one, hyper(ONE_DEVICE))
            skipped.append(float(metrics["update/skipped"]))
        return jax.device_get(state), skipped, metrics

    good, skipped, metrics = run(batch, batch)
    assert skipped == [0, 0]
    assert np.isfinite(metrics["loss"])
    assert int(good.step) == 2
    bad, skipped, metrics = run(batch, spoilt)
    assert skipped == [0, 1]
    assert np.isnan(metrics["loss"])
    assert metrics["params/update_norm"] == 0
    assert int(bad.step) == 1
    again, skipped, _ = run(batch, spoilt, batch)
    assert skipped == [0, 1, 0]
    jax.tree.map(np.testing.assert_array_equal, again, good)
    once, _, _ = run(batch)
    jax.tree.map(np.testing.assert_array_equal, bad, once)


def test_without_beta_the_teacher_does_not_matter() -> None:
    a, _ = one_update(ONE_DEVICE, make_batch(), beta=0.0)
    b, _ = one_update(ONE_DEVICE, make_batch(teacher_seed=2), beta=0.0)
    no_teacher = take_part(make_parts(Scores()), 0)
    c, metrics = one_update(ONE_DEVICE, no_teacher, beta=0.5)
    assert_same(a, b, 0.0)
    assert_same(a, c)
    assert "kl/teacher" not in metrics


# --- what each method puts into the slots ---------------------------------------------------


def test_kd_rkl_is_blind_to_rewards() -> None:
    batch = make_batch(method=METHODS["kd_rkl"], kd_mask="none")
    assert not np.any(batch.advantages)
    assert np.any(batch.kd_weights)


def test_sft_trains_on_right_responses_alone() -> None:
    settings = {"method": METHODS["sft"], "aggregation": "seq-mean-token-mean"}
    batch = jax.device_get(take_part(make_parts(Scores(), **settings), 0))
    right, lengths = REWARDS.reshape(-1) > 0, rollouts().lengths.reshape(-1)
    expected = np.where(right, 1 / right.sum() / lengths, 0)[:, None] * np.ones((1, T))
    expected[np.arange(T)[None, :] >= lengths[:, None]] = 0
    np.testing.assert_allclose(batch.weights, expected, rtol=1e-6)
    assert (batch.advantages == 1).all()
    assert not batch.kd_weights.any()


def test_reward_shaping_moves_the_teacher_into_the_advantages() -> None:
    sampled = rollouts()
    batch = jax.device_get(make_batch(method=METHODS["reward_shaping"], scale="none"))
    teacher = np.asarray(teacher_scores().teacher_log_probs).reshape(P_, G, T)
    mask = np.arange(T) < sampled.lengths[..., None]
    shaped = REWARDS - 0.5 * np.where(mask, sampled.log_probs - teacher, 0).sum(-1)
    expected = shaped - shaped.mean(1, keepdims=True)
    np.testing.assert_allclose(batch.advantages[:, 0], expected.reshape(-1), atol=1e-5)
    assert not batch.kd_weights.any()


def test_overlong_responses_lose_reward_and_may_be_masked() -> None:
    sampled = rollouts()
    batch = jax.device_get(make_batch(scale="none", overlong=(4, 0.5), mask_truncated=True))
    punished = REWARDS - 0.5 * np.clip((sampled.lengths - (T - 4)) / 4, 0, 1)
    expected = punished - punished.mean(1, keepdims=True)
    np.testing.assert_allclose(batch.advantages[:, 0], expected.reshape(-1), atol=1e-6)
    cut = sampled.finish_reason.reshape(-1) == FINISH_LENGTH
    assert cut.any()
    assert not batch.weights[cut].any()
    assert (batch.weights[~cut, 0] > 0).all()


@pytest.mark.parametrize("mode", ["group-token-mean", "token-mean", "seq-mean-token-mean"])
def test_mini_batches_are_whole_groups_normalised_alone(mode: str) -> None:
    parts = make_parts(teacher_scores(), aggregation=mode, mini_batches=2, kd_mask="none")
    whole = make_batch(aggregation=mode, kd_mask="none")
    for index in range(2):
        part = jax.device_get(take_part(parts, index))
        rows = np.concatenate([np.arange(G) + p * G for p in range(index, P_, 2)])
        np.testing.assert_array_equal(part.tokens, np.asarray(whole.tokens)[rows])
        np.testing.assert_array_equal(part.advantages, np.asarray(whole.advantages)[rows])
        assert part.weights.sum() == pytest.approx(1.0)
        assert part.kd_weights.sum() == pytest.approx(1.0)


def test_mini_batch_split_keeps_every_row_once() -> None:
    parts = by_mini_batch(jnp.arange(24).reshape(12, 2), groups=6, count=3)
    assert parts.shape == (3, 4, 2)
    np.testing.assert_array_equal(parts[1, :, 0] // 2, [2, 3, 8, 9])
    assert sorted(np.asarray(parts).reshape(-1).tolist()) == list(range(24))


# --- distillation from distributions --------------------------------------------------------


def distribution_batch(kind: str):
    """A batch with what `kind` needs of a second random model, and that model's head."""
    params = init_params(MODEL, jax.random.key(5), ONE_DEVICE)
    mine = init_params(MODEL, jax.random.key(0), ONE_DEVICE)
    scorer = Scorer(MODEL, ONE_DEVICE, rows=4, valid_vocab=VALID, chunk=3)
    rows, heat = rollout_rows(rollouts()), jnp.float32(0.8)
    scored = support = of_support = hidden = None
    if kind == "full":
        scored, hidden = scorer.hidden(params, rows, T, heat)
    elif kind == "student":
        _, support, _ = scorer.top_support(mine, rows, 7, T, heat)
        scored, of_support = scorer.at_support(params, rows, support, T, heat)
    else:
        scored, support, of_support = scorer.top_support(params, rows, 7, T, heat)
    scores = Scores(
        teacher_log_probs=scored,
        support=support,
        support_log_probs=of_support,
        teacher_hidden=hidden,
    )
    return take_part(make_parts(scores, kd_mask="none"), 0), MODEL.head(params), params


def objective_of(kind: str) -> Objective:
    return Objective(kd_estimator="full" if kind == "full" else "topk", support=kind)


@pytest.mark.parametrize("kind", [*SUPPORTS, "full"])
def test_distributions_reach_the_loss_unchanged_by_micro_batches_and_mesh(kind: str) -> None:
    batch, head, other = distribution_batch(kind)
    params, metrics = one_update(ONE_DEVICE, batch, objective=objective_of(kind), head=head)
    assert metrics["loss/kd"] == pytest.approx(0.5 * plain_divergence(kind, batch, other), rel=1e-4)
    if kind in ("floor", "full"):  # by top k and by hidden states: the two ways there are
        mesh = make_mesh(2, 2, 2)
        again, same = one_update(mesh, batch, 2, objective=objective_of(kind), head=head)
        assert_same(again, params, 5e-6)
        assert same == pytest.approx(metrics, abs=5e-5)


def plain_divergence(kind: str, batch, teacher_params) -> float:
    """Σ w·D from whole logits, in NumPy."""
    mine = init_params(MODEL, jax.random.key(0), ONE_DEVICE)
    log_p, log_q = (
        whole_log_probs(params, batch.tokens, batch.positions, batch.segment_ids, 0.8)
        for params in (mine, teacher_params)
    )
    if kind == "full":
        divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    else:
        by = log_p if kind == "student" else log_q
        chosen = np.argsort(-by, axis=-1)[..., :7]
        if kind == "floor":
            q = np.full_like(log_q, LOG_FLOOR)
            inside = np.take_along_axis(log_q, chosen, -1)
            inside -= np.log(np.exp(inside).sum(-1, keepdims=True))
            np.put_along_axis(q, chosen, inside, -1)
            divergence = (np.exp(log_p) * (log_p - q)).sum(-1)
            return float((np.asarray(batch.kd_weights) * divergence).sum())
        p, q = (np.exp(np.take_along_axis(x, chosen, -1)) for x in (log_p, log_q))
        if kind == "tail":
            p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        divergence = (p * np.log(p / q)).sum(-1)
    return float((np.asarray(batch.kd_weights) * divergence).sum())


def whole_log_probs(params, tokens, positions, segment_ids, temperature: float) -> np.ndarray:
    """log π over the known vocabulary `[B, T, VALID]`, without chunks, float64."""
    hidden = MODEL.apply(params, tokens, positions, segment_ids)
    logits = np.asarray(MODEL.logits(params, hidden), np.float64)
    logits = logits[:, -T - 1 : -1, :VALID] / temperature
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.mark.parametrize("kind", SUPPORTS)
def test_whole_support_is_the_full_divergence(kind: str, rng) -> None:
    log_p, log_q = (jax.nn.log_softmax(rng.normal(size=(3, 9))) for _ in range(2))
    full = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    found = topk_divergence(log_p, log_q, kind, entropy=entropy)
    np.testing.assert_allclose(found, full, atol=2e-6)


def test_trrd_has_its_own_ratio(reference) -> None:
    batch = make_batch(method=METHODS["trrd"])
    trrd, metrics = one_update(ONE_DEVICE, batch, objective=Objective(ratio="trrd"))
    assert "trrd/clamped_frac" in metrics
    # make_hyper's alpha is 1: that is GRPO, whoever the teacher is.
    grpo, _ = one_update(ONE_DEVICE, take_part(make_parts(Scores()), 0))
    assert_same(trrd, grpo)


# --- rows and scores ------------------------------------------------------------------------


def test_rows_put_prompts_left_and_completions_right() -> None:
    sampled = rollouts()
    rows = jax.device_get(rollout_rows(sampled))
    for b in range(P_ * G):
        p, g = divmod(b, G)
        n, m = int(sampled.prompt_lengths[p]), int(sampled.lengths[p, g])
        real = rows.segment_ids[b] == 1
        expected = np.concatenate([sampled.prompt_tokens[p, S - n :], sampled.tokens[p, g, :m]])
        np.testing.assert_array_equal(rows.tokens[b][real], expected)
        np.testing.assert_array_equal(rows.positions[b][real], np.arange(n + m))
        np.testing.assert_array_equal(np.flatnonzero(real), np.arange(S - n, S + m))


def test_final_end_token_is_not_distilled_for_another_end_token() -> None:
    sampled = rollouts()
    kept = jax.device_get(make_batch(kd_mask="none"))
    masked = jax.device_get(make_batch(kd_mask="none", mask_final_eos=True))
    lengths = sampled.lengths.reshape(-1)
    ended = sampled.finish_reason.reshape(-1) == FINISH_EOS
    assert ended.any()
    assert not ended.all()
    expected = kept.kd_weights.copy()
    expected[np.flatnonzero(ended), lengths[ended] - 1] = 0
    np.testing.assert_array_equal(masked.kd_weights, expected)
    assert np.isnan(masked.teacher_log_probs).sum() == ended.sum()


def test_micro_batches_join_to_what_was_split() -> None:
    x = jnp.arange(24).reshape(12, 2)
    assert (join_micro_batches(split_micro_batches(x, 3)) == x).all()


@pytest.mark.parametrize("mesh", [ONE_DEVICE, make_mesh(2, 2, 2)], ids=["1", "2x2x2"])
def test_scores_equal_a_plain_softmax(mesh) -> None:
    """Chunked, micro-batched and on its own mesh, against NumPy on the whole logits."""
    params = init_params(MODEL, jax.random.key(5), mesh)
    rows = jax.device_get(rollout_rows(rollouts()))
    scorer = Scorer(MODEL, mesh, ONE_DEVICE, rows=4, valid_vocab=VALID, chunk=3)
    got = scorer.log_probs(params, rows, T, jnp.float32(0.7))
    assert got.sharding.is_equivalent_to(NamedSharding(ONE_DEVICE, P(BATCH_AXES)), got.ndim)
    alone = jax.device_put(jax.device_get(params), ONE_DEVICE.devices.flat[0])
    everything = whole_log_probs(alone, *rows[:3], 0.7)
    expected = np.take_along_axis(everything, rows.tokens[:, -T:, None], -1)[..., 0]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    support = np.random.default_rng(0).integers(0, VALID, (P_ * G, T, 3)).astype(np.int32)
    again, of_support = scorer.at_support(params, rows, support, T, jnp.float32(0.7))
    np.testing.assert_allclose(again, expected, atol=1e-4)
    chosen = np.take_along_axis(everything, support, -1)
    np.testing.assert_allclose(of_support, chosen, atol=1e-4)


def test_supervised_gradient_is_cross_entropy() -> None:
    """The step with all advantages 1 against autodiff of a plain cross-entropy."""
    examples = [([3, 4, 5], [6, 7, 1]), ([8], [9, 10, 11, 12, 1])]
    batch = supervised_batch(*pad_examples(examples, 4, 6, pad_id=0))
    optimizer = optax.sgd(1.0)
    update = make_update(
        MODEL,
        optimizer,
        ONE_DEVICE,
        micro_batches=1,
        valid_vocab=VALID,
        chunk=16,
    )
    params = init_params(MODEL, jax.random.key(0), ONE_DEVICE)
    before = jax.device_get(params)
    flat = make_hyper(ONE_DEVICE, beta=0.0, temperature=1.0)
    state = init_state(params, optimizer, ONE_DEVICE)
    state, _ = update(state, put_batch(ONE_DEVICE, batch), flat)

    def cross_entropy(params):
        total = 0.0
        for prompt, completion in examples:
            ids = jnp.array([prompt + completion])
            hidden = MODEL.apply(params, ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
            logits = MODEL.logits(params, hidden)[0, :-1, :VALID]
            picked = jax.nn.log_softmax(logits)[jnp.arange(ids.shape[1] - 1), ids[0, 1:]]
            total -= picked[len(prompt) - 1 :].mean() / len(examples)
        return total

    expected = jax.tree.map(lambda p, g: p - g, before, jax.grad(cross_entropy)(before))
    assert_same(jax.device_get(state.params), expected, 1e-5)


def test_supervised_training_learns_its_examples() -> None:
    examples = [([i, 20], [i, i, 1]) for i in range(2, 18)]
    seen: list[float] = []
    train_supervised(
        MODEL,
        init_params(MODEL, jax.random.key(0), ONE_DEVICE),
        examples,
        ONE_DEVICE,
        steps=150,
        batch_size=16,
        learning_rate=2e-2,
        seed=0,
        valid_vocab=VALID,
        pad_id=0,
        chunk=16,
        report=seen.append,
    )
    assert len(seen) == 150
    assert seen[0] > 2.5
    assert seen[-1] < 0.1


def test_optimizer_state_is_sharded_as_its_weights() -> None:
    mesh = make_mesh(1, 4, 2)
    params = init_params(MODEL, jax.random.key(0), mesh)
    optimizer = make_optimizer(
        make_schedule(1e-3, 2, "cosine", 10), b1=0.9, b2=0.99, eps=1e-8, weight_decay=0, clip_norm=1
    )
    state = init_state(params, optimizer, mesh)
    expected = jax.tree.leaves(param_shardings(mesh, params))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len(expected)
    for moment, sharding in zip(moments, expected * 2, strict=True):
        assert moment.sharding == sharding


def test_learning_rate_schedule() -> None:
    warm = make_schedule(1.0, 4, "constant", 10)
    assert [float(warm(i)) for i in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    cosine = make_schedule(1.0, 0, "cosine", 10)
    expected = [0.5 * (1 + np.cos(np.pi * i / 10)) for i in range(11)]
    assert [float(cosine(i)) for i in range(11)] == pytest.approx(expected, abs=1e-6)


# --- memory ---------------------------------------------------------------------------------


def test_moments_are_split_over_data_too() -> None:
    """AdamW on a mesh with whole copies of the weights: the same update, no moment kept twice."""
    mesh, optimizer = make_mesh(4, 1, 2), optax.adamw(1e-2)
    results = []
    for where in (ONE_DEVICE, mesh):
        update = make_update(MODEL, optimizer, where, micro_batches=1, valid_vocab=VALID, chunk=4)
        state = init_state(init_params(MODEL, jax.random.key(0), where), optimizer, where)
        for _ in range(2):
            state, _ = update(state, put_batch(where, make_batch()), hyper(where))
        results.append(jax.device_get((state.params, state.opt_state)))
    assert_same(*results, tolerance=2e-5)
    kernel = state.params["layers"]["mlp"]["up_proj"]["kernel"]
    moment = state.opt_state[0].mu["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    assert moment.sharding.spec == P(None, ("fsdp", "data", "context"), "tensor")
    assert 4 * moment.addressable_shards[0].data.size == kernel.addressable_shards[0].data.size


@pytest.mark.parametrize("mesh", [ONE_DEVICE, make_mesh(2, 2, 2)], ids=["1", "2x2x2"])
def test_weights_wait_in_host_memory(mesh) -> None:
    params = init_params(MODEL, jax.random.key(0), mesh)
    teacher = Weights(MODEL, params, mesh, offload=True)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(teacher._params)}
    assert kinds == {"pinned_host"}
    for x, y in zip(jax.tree.leaves(teacher.params), jax.tree.leaves(params), strict=True):
        assert x.sharding == y.sharding
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("mesh", [ONE_DEVICE, make_mesh(2, 2, 2)], ids=["1", "2x2x2"])
def test_weights_in_8_bits_score_alike(mesh) -> None:
    params = init_params(MODEL, jax.random.key(5), mesh)
    small = quantize(params)
    kernel, kept = params["layers"]["mlp"]["up_proj"], small["layers"]["mlp"]["up_proj"]["kernel"]
    assert kept.values.dtype == jnp.int8
    error = np.abs(kept.values * np.asarray(kept.scale) - np.asarray(kernel["kernel"]))
    assert (error <= 0.5001 * np.asarray(kept.scale)).all()
    assert small["embed"]["embedding"].dtype == params["embed"]["embedding"].dtype
    scorer = Scorer(MODEL, mesh, ONE_DEVICE, rows=4, valid_vocab=VALID, chunk=3)
    rows = jax.device_get(rollout_rows(rollouts()))
    plain, rounded = (scorer.log_probs(p, rows, T, jnp.float32(1.0)) for p in (params, small))
    assert 0 < np.abs(plain - rounded).max() < 0.1
    assert np.abs(plain - rounded).mean() < 0.02
    down = jax.jit(MODEL.unstack)(small).layers[1].down  # as decoding reads them
    kept = small["layers"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_allclose(down, kept.values[1] * np.asarray(kept.scale)[1], rtol=1e-6)
