"""The sampler: against NumPy truncation, enumerated distributions and the full forward pass."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from draws import (
    ROUNDING,
    assert_drawn,
    assert_same_requests,
    furthest,
    recorded,
    requests_of,
)

from kdrl_jax.models import Decoder, ModelConfig
from kdrl_jax.objectives import token_log_probs
from kdrl_jax.rollout import RolloutEngine, request_keys, sampling_params
from kdrl_jax.rollout import decode as device
from kdrl_jax.rollout.sampling import BLOCK, block_size, sample, truncate, uniforms
from kdrl_jax.rollout.schedule import Queue, plan_batches, smaller_batch, window_sizes
from kdrl_jax.sharding import make_mesh, param_shardings, put, replicated
from kdrl_jax.training.batch import rollout_rows
from kdrl_jax.training.compiling import CompileCounter
from kdrl_jax.types import FINISH_EOS, FINISH_LENGTH, UNFINISHED, Prompts

CONFIG = ModelConfig(
    vocab_size=16,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=32,
    rope_theta=10_000.0,
    rope_scaling=None,
    norm_eps=1e-6,
    qkv_bias=False,
    qk_norm=True,
    tie_embeddings=False,
    max_positions=64,
    model_type="qwen3",
)
MODEL = Decoder(CONFIG)
VALID, EOS, BUCKET, LENGTH = 13, 1, 8, 12


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(3))


def engine(**changes):
    settings = {"valid_vocab": VALID, "prompt_buckets": (BUCKET, 16), "max_new_tokens": LENGTH}
    return RolloutEngine(MODEL, **(settings | changes))


def left_padded(count, bucket=BUCKET, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, bucket + 1, count).astype(np.int32)
    tokens = np.zeros((count, bucket), np.int32)
    for row, n in zip(tokens, lengths, strict=True):
        row[bucket - n :] = rng.integers(2, VALID, n)
    return Prompts(tokens, lengths)


def settings(shape, stop_ids=(EOS,), temperature=1.0, max_new_tokens=LENGTH, **changes):
    return sampling_params(
        shape, stop_ids, max_new_tokens=max_new_tokens, temperature=temperature, **changes
    )


def drawn_as_asked(params, calls):
    """Every token of what was `recorded`, against the full forward pass on one device."""
    assert calls
    for call in calls:
        assert_drawn(MODEL, call._replace(params=params), VALID)


# --- one token ------------------------------------------------------------------------------


def numpy_truncate(p, top_p=1.0, top_k=0, min_p=0.0):
    """By sorting: top-k, then top-p of what is left, then min-p."""
    keep = np.zeros(len(p), bool)
    order = np.argsort(-p, kind="stable")
    order = order[:top_k] if top_k else order
    if top_p < 1:
        mass = np.cumsum(p[order]) / p[order].sum()
        order = order[: int(np.searchsorted(mass, top_p)) + 1]
    keep[order] = True
    return np.where(keep & (p >= min_p * p.max()), p, 0.0)


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 10_000},
        {"top_p": 0.9},
        {"top_p": 0.05},
        {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.7},
        {"top_k": 20, "top_p": 0.95, "min_p": 0.1},
    ],
    ids=str,
)
def test_truncation_against_sorting(rules):
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.full(1100, 0.02), 6).astype(np.float32)
    found = np.asarray(truncate(jnp.asarray(probs), settings((3, 2), **rules)))
    for row, kept in zip(probs, found, strict=True):
        np.testing.assert_array_equal(kept, numpy_truncate(row, **rules))


def test_tied_tokens_stay_together():
    probs = jnp.asarray([[0.3, 0.2, 0.2, 0.2, 0.1]])
    kept = truncate(probs, settings((1, 1), top_k=2))
    np.testing.assert_array_equal(np.asarray(kept) > 0, [[1, 1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("vocab", "block"), [(11, 11), (BLOCK * 3 + 7, BLOCK), (32_000, 500), (151_936, 128)]
)
def test_blocks_divide_the_vocabulary_where_they_can(vocab, block):
    assert block_size(vocab) == block


@pytest.mark.parametrize(
    "vocab", [11, BLOCK * 3 + 7, 1000], ids=["one level", "two levels", "two levels, no rest"]
)
@pytest.mark.parametrize("rules", [{}, {"top_p": 0.8}, {"top_k": 4, "min_p": 0.05}], ids=str)
def test_draws_follow_the_distribution(vocab, rules):
    """Chi-square of 20 000 draws; the tokens that matter lie in different blocks."""
    rng = np.random.default_rng(vocab)
    valid, draws, temperature = vocab - 2, 20_000, 0.7
    logits = np.full(vocab, -8.0, np.float32)
    heavy = np.linspace(0, valid - 1, 8).astype(int)
    logits[heavy] = rng.normal(0, 1, 8)
    logits[valid:] = 5.0  # of no token; must never be drawn
    keys = jax.random.split(jax.random.key(0), draws)
    tokens, log_probs = sample(
        jnp.broadcast_to(jnp.asarray(logits), (draws, vocab)),
        uniforms(keys, jnp.zeros(draws, int), 1)[0],
        settings((draws, 1), temperature=temperature, **rules),
        valid_vocab=valid,
    )
    scaled = logits[:valid].astype(np.float64) / temperature
    full = np.exp(scaled - np.logaddexp.reduce(scaled))
    expected = numpy_truncate(full, **rules)
    expected = np.pad(expected / expected.sum(), (0, vocab - valid)) * draws
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=vocab)
    assert counts[expected == 0].sum() == 0
    rare = (expected > 0) & (expected < 5)
    seen, wanted = [counts[expected >= 5]], [expected[expected >= 5]]
    if rare.any():
        seen, wanted = [*seen, [counts[rare].sum()]], [*wanted, [expected[rare].sum()]]
    p_value = scipy.stats.chisquare(np.concatenate(seen), np.concatenate(wanted)).pvalue
    assert p_value > 1e-3
    # The log-prob is of the whole distribution, not of what truncation left.
    np.testing.assert_allclose(
        np.asarray(log_probs).ravel(), np.log(full)[np.asarray(tokens).ravel()], rtol=1e-4
    )


def test_draws_at_the_ends_of_the_cdf():
    """No weight, no draw: not at uniform 0, and not beyond the last token that has weight."""
    from kdrl_jax.rollout.sampling import _invert

    weights = jnp.asarray([[0.0, 0.25, 0.0, 0.75, 0.0]]).T
    found = [int(_invert(weights, jnp.full(1, u))[0]) for u in (0.0, 0.2, 0.3, 0.9999999, 1.0)]
    assert found == [1, 1, 3, 3, 3]


# --- whole completions ----------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_log_probs_are_those_of_the_full_forward(params, temperature):
    prompts, shape = left_padded(4), (4, 3)
    keys = request_keys(0, 5, range(4), 3)
    out = engine().generate(params, prompts, keys, settings(shape, temperature=temperature))
    rows = rollout_rows(out)
    hidden = MODEL.apply(params, *rows[:3])[:, -LENGTH - 1 : -1]
    log_probs, _ = token_log_probs(
        hidden,
        MODEL.head(params),
        rows.tokens[:, -LENGTH:],
        temperature=temperature or 1.0,
        valid_vocab=VALID,
    )
    mask = np.arange(LENGTH) < np.asarray(out.lengths)[..., None]
    expected = np.where(mask, np.asarray(log_probs).reshape(mask.shape), 0.0)
    np.testing.assert_allclose(np.asarray(out.log_probs), expected, atol=1e-4)
    assert not np.asarray(out.tokens)[~mask].any()
    if temperature == 0:  # every token is the likeliest one of the full forward
        logits = np.asarray(MODEL.logits(params, hidden))[..., :VALID].reshape(*mask.shape, VALID)
        taken = np.take_along_axis(logits, np.asarray(out.tokens)[..., None], -1)[..., 0]
        assert (logits.max(-1) - taken)[mask].max() <= ROUNDING


def test_ends_and_limits(params):
    """Either an end token, kept, at the end and nowhere before; or the request's own maximum."""
    prompts, shape = left_padded(6, seed=2), (6, 8)
    limits = np.random.default_rng(0).integers(1, LENGTH + 1, shape).astype(np.int32)
    limits[0, 0] = LENGTH + 50  # counts as LENGTH
    stops = (EOS, 5)
    sampling = dataclasses.replace(settings(shape, stops), max_new_tokens=jnp.asarray(limits))
    out = jax.device_get(
        engine().generate(params, prompts, request_keys(1, 0, range(6), 8), sampling)
    )
    assert {FINISH_EOS, FINISH_LENGTH} == set(out.finish_reason.ravel().tolist())
    for index in np.ndindex(shape):
        n = out.lengths[index]
        body, last = out.tokens[index][: n - 1], out.tokens[index][n - 1]
        assert not np.isin(body, stops).any()
        if out.finish_reason[index] == FINISH_EOS:
            assert last in stops
            assert n <= min(limits[index], LENGTH)
        else:
            assert last not in stops
            assert n == min(limits[index], LENGTH)
    assert out.tokens.max() < VALID


def test_distribution_of_whole_sequences(params):
    """Two sampled tokens against the enumeration of all pairs by the full forward (chi-square)."""
    prompts, samples = left_padded(1, seed=4), 6000
    sampling = settings((1, samples), stop_ids=(-1,), max_new_tokens=2)
    out = engine(max_new_tokens=2).generate(
        params, prompts, request_keys(0, 0, [0], samples), sampling
    )
    pairs = np.array(list(itertools.product(range(VALID), repeat=2)), np.int32)
    prompt = prompts.tokens[0, BUCKET - prompts.lengths[0] :]
    tokens = np.concatenate([np.tile(prompt, (len(pairs), 1)), pairs], axis=1)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    logits = MODEL.logits(params, MODEL.apply(params, tokens, positions, np.ones_like(tokens)))
    log_p = np.asarray(jax.nn.log_softmax(logits[:, -3:-1, :VALID], axis=-1))
    log_p = np.take_along_axis(log_p, pairs[..., None], axis=-1).astype(np.float64)
    probs = np.exp(log_p.sum((1, 2)))
    np.testing.assert_allclose(probs.sum(), 1, rtol=1e-5)
    counts = np.zeros(len(pairs))
    np.add.at(counts, np.asarray(out.tokens)[0] @ [VALID, 1], 1)
    common = probs * samples >= 5
    seen = np.append(counts[common], counts[~common].sum())
    wanted = np.append(probs[common], probs[~common].sum()) * samples
    assert common.sum() > 20
    assert scipy.stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-3


def test_a_request_does_not_depend_on_its_neighbours(params):
    """Among others, in another order, in a larger group or in another bucket: drawn as asked."""
    prompts, make = left_padded(5, seed=6), engine()
    order = np.array([3, 1])
    some = Prompts(prompts.tokens[order], prompts.lengths[order])
    wide = Prompts(np.pad(some.tokens, [(0, 0), (8, 0)]), some.lengths)
    with recorded() as calls:
        make.generate(params, prompts, request_keys(2, 3, range(5), 4), settings((5, 4)))
        make.generate(params, some, request_keys(2, 3, order, 6), settings((2, 6)))
        make.generate(params, wide, request_keys(2, 3, order, 6), settings((2, 6)))
    drawn_as_asked(params, calls)
    whole, part, padded = (call.requests for call in calls)
    for row, place in enumerate(order):
        for g in range(4):
            assert_same_requests([whole[4 * place + g]], [part[6 * row + g]])
    assert_same_requests(part, padded)
    # Other steps, problems, samples and seeds draw otherwise.
    keys = [request_keys(s, step, [p], 2) for s, step, p in [(0, 0, 0), (1, 0, 0), (0, 1, 0)]]
    keys = np.concatenate([jax.random.key_data(k).reshape(-1, 2) for k in keys])
    assert len(np.unique(keys, axis=0)) == 6


def test_what_is_not_drawn_as_asked_is_noticed(params):
    """By these tests: another key, another prompt, a token next to the one that was drawn."""
    prompts, keys = left_padded(6, seed=6), request_keys(2, 3, range(6), 4)
    out = engine().generate(params, prompts, keys, settings((6, 4), stop_ids=(-1,)))
    requests = requests_of(out, keys)
    assert max(furthest(MODEL, params, requests, VALID)) <= ROUNDING
    others = [*requests[4:], *requests[:4]]
    for changed in (
        [r._replace(key=other.key) for r, other in zip(requests, others, strict=True)],
        [r._replace(prompt=other.prompt) for r, other in zip(requests, others, strict=True)],
        [r._replace(tokens=[(r.tokens[0] + 1) % VALID, *r.tokens[1:]]) for r in requests],
        [r._replace(tokens=[*r.tokens[:-1], (r.tokens[-1] + 1) % VALID]) for r in requests],
    ):
        assert min(furthest(MODEL, params, changed, VALID)) > ROUNDING


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def test_sharded_draws_as_one_device(params, shape):
    mesh = make_mesh(*shape)
    split = jax.device_put(params, param_shardings(mesh, params))
    with recorded() as calls:
        engine(mesh=mesh).generate(
            split, left_padded(8, seed=8), request_keys(0, 1, range(8), 2), settings((8, 2))
        )
    drawn_as_asked(params, calls)


def test_batch_that_the_mesh_does_not_divide(params):
    mesh = make_mesh(2, 2, 2)
    split = jax.device_put(params, param_shardings(mesh, params))
    prompts, keys = left_padded(3), request_keys(0, 1, range(3), 2)
    with recorded() as calls:
        engine(mesh=mesh).generate(split, prompts, keys, settings((3, 2)))
    drawn_as_asked(params, calls)


def test_nothing_recompiles_for_new_values(params):
    make, prompts = engine(), left_padded(4)
    counter = CompileCounter()

    def call(step, **changes):
        keys = request_keys(step, step, np.arange(4) + step, 2)
        return make.generate(params, left_padded(4, seed=step), keys, settings((4, 2), **changes))

    jax.block_until_ready(call(0))
    before = counter.count
    assert before > 0
    for step, changes in enumerate(
        [{"temperature": 0.3}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}]
    ):
        jax.block_until_ready(call(step + 1, **changes))
    assert counter.count == before
    wide = Prompts(np.pad(prompts.tokens, [(0, 0), (8, 0)]), prompts.lengths)
    jax.block_until_ready(
        make.generate(params, wide, request_keys(0, 0, range(4), 2), settings((4, 2)))
    )
    assert counter.count > before  # the second bucket is a program of its own


class Spy:
    """A decoder that records what is traced and counts what runs."""

    def __init__(self):
        self.prefilled, self.decoded = [], []

    def __getattr__(self, name):
        return getattr(MODEL, name)

    def prefill(self, params, tokens, *rest):
        self.prefilled.append(tokens.shape)
        return MODEL.prefill(params, tokens, *rest)

    def decode(self, params, tokens, *rest, **options):
        jax.debug.callback(lambda: self.decoded.append(1))
        return MODEL.decode(params, tokens, *rest, **options)


def test_one_prefill_per_prompt_and_early_exit(params):
    spy = Spy()
    make = RolloutEngine(spy, valid_vocab=VALID, prompt_buckets=(BUCKET,), max_new_tokens=LENGTH)
    prompts, keys = left_padded(2), request_keys(0, 0, range(2), 5)
    out = make.generate(params, prompts, keys, settings((2, 5), max_new_tokens=4, stop_ids=(-1,)))
    jax.effects_barrier()
    assert spy.prefilled == [(2, BUCKET)]  # not 10 rows
    assert np.asarray(out.lengths).tolist() == [[4] * 5] * 2
    assert len(spy.decoded) == 4  # not twelve


# --- continuous batching ---------------------------------------------------------------------


def many(
    params,
    slots,
    monkeypatch,
    expected=None,
    chunk=5,
    mesh=None,
    counts=None,
    lengths=(1, 2, 5, 9, 40),
):
    """24 requests of very different lengths, decoded with so many slots; drawn as asked."""
    monkeypatch.setattr("kdrl_jax.rollout.engine.CHUNK", chunk)
    make = engine(max_new_tokens=40, slots=slots, mesh=mesh)
    if counts is not None:
        inner = make._decode

        def counted(*args):
            slots_, chunk_ = inner(*args)
            counts.append((len(chunk_.counts), int(chunk_.counts.max()), int(chunk_.counts.sum())))
            return slots_, chunk_

        make._decode = counted
    prompts, keys = left_padded(8, seed=9), request_keys(3, 1, range(8), 3)
    limits = np.random.default_rng(5).choice(lengths, (8, 3)).astype(np.int32)
    limits[5, 1] = 40
    sampling = dataclasses.replace(settings((8, 3), (-1,)), max_new_tokens=jnp.asarray(limits))
    with recorded() as calls:
        out = make.generate(params, prompts, keys, sampling, expected_lengths=expected)
    np.testing.assert_array_equal(out.lengths, limits)
    drawn_as_asked(jax.device_get(params), calls)
    return out


@pytest.mark.parametrize("slots", [0, 1, 3, 16])
@pytest.mark.parametrize("chunk", [5, 40])
def test_results_do_not_depend_on_the_schedule(params, slots, chunk, monkeypatch):
    """All at once, fewer slots, shorter chunks, another order: each request is drawn as asked."""
    many(params, slots, monkeypatch, chunk=chunk)
    many(params, slots, monkeypatch, expected=list(range(8)), chunk=chunk)


def test_requests_are_handed_over_as_they_end(params):
    """Each once, whole, and most of them while others are still being decoded."""
    make, (prompts, keys) = (
        engine(max_new_tokens=80, slots=4),
        (
            left_padded(4, seed=9),
            request_keys(3, 1, range(4), 3),
        ),
    )
    limits = np.array([[1, 2, 70], [40, 5, 6], [7, 8, 9], [80, 11, 12]], np.int32)
    sampling = dataclasses.replace(settings((4, 3), (2, 3)), max_new_tokens=jnp.asarray(limits))
    calls, counts = [], []
    out = make.generate(
        *(params, prompts, keys, sampling),
        on_finished=calls.append,
        progress=lambda *count: counts.append(count),
    )
    # How far it is, at each look of the host and in the end.
    assert counts == sorted(counts)
    assert len(counts) > 2
    assert counts[-1] == (12, out.lengths.sum())
    finished = [request for call in calls for request in call]
    assert sorted(request.number for request in finished) == list(range(12))
    assert sum(map(bool, calls)) > 2
    ended = out.finish_reason.reshape(-1) == FINISH_EOS
    assert ended.any()
    for number, tokens in finished:
        length = out.lengths.reshape(-1)[number] - ended[number]
        np.testing.assert_array_equal(tokens, out.tokens.reshape(12, -1)[number, :length])


def test_refilled_slots_on_a_mesh(params, monkeypatch):
    mesh = make_mesh(2, 2, 2)
    split = jax.device_put(params, param_shardings(mesh, params))
    many(split, 4, monkeypatch, mesh=mesh)


def test_slots_that_shrink_on_a_mesh(params, monkeypatch):
    """16 slots in four parts, of which a quarter each goes on: drawn as asked."""
    mesh, counts = make_mesh(2, 2, 2), []
    split = jax.device_put(params, param_shardings(mesh, params))
    many(split, 16, monkeypatch, mesh=mesh, counts=counts, lengths=(3, 4))
    assert {16, 4} <= {size for size, *_ in counts}


def test_no_cache_goes_to_another_device_when_slots_change():
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        slots = jax.jit(lambda: device.empty_slots(MODEL, 32, 64))()
        rows = put(np.tile(np.array([[3, 1]], np.int32), (4, 1)), replicated(mesh))
        fit = jax.jit(device.fit, static_argnames="window")
        text = fit.lower(slots, rows, window=128).compile().as_text()
        for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
            assert f"{name}(" not in text
        marked = slots._replace(
            requests=slots.requests._replace(drawn=jnp.arange(32, dtype=jnp.int32)),
            cache=jax.tree.map(lambda x: x + jnp.arange(32)[:, None, None, None], slots.cache),
        )
        kept = fit(marked, rows, window=128)
    expected = [3, 1, 11, 9, 19, 17, 27, 25]
    np.testing.assert_array_equal(kept.requests.drawn, expected)
    np.testing.assert_array_equal(kept.cache[1].v[:, 0, 0, 0], expected)
    assert kept.cache[0].v.shape[2] == 128


def test_a_slot_that_ends_is_taken_by_the_next_request(params, monkeypatch):
    counts: list[tuple[int, int, int]] = []
    out = many(params, 4, monkeypatch, counts=counts)
    steps = sum(most for _, most, _ in counts)
    assert int(out.lengths.sum()) == sum(total for *_, total in counts)
    waves = out.lengths.reshape(-1, 4).max(1).sum()  # static batches of 4
    assert steps < 0.75 * waves


def test_the_batch_shrinks_to_the_stragglers(params, monkeypatch):
    counts: list[tuple[int, int, int]] = []
    many(params, 16, monkeypatch, counts=counts, lengths=(3, 4))
    sizes = [size for size, *_ in counts]
    assert sizes == sorted(sizes, reverse=True)
    assert {16, 4} <= set(sizes)


def queued(drawn, waiting, most=2):
    """[(batch, row, request)] as they are taken, and the rows of each batch."""
    batches = plan_batches([2, 0, 1], np.array(drawn), np.array(waiting), most)
    queue, taken = Queue(batches), []
    while len(queue):
        batch = queue.batch
        taken += [(batch, row, request) for row, request in queue.take(3)]
    return taken, [queue.rows(n) for n in range(len(batches))]


def test_the_queue_prefills_whole_groups_once():
    taken, rows = queued(np.zeros((3, 2), int), np.ones((3, 2), bool))
    assert taken == [(0, 0, 4), (0, 0, 5), (0, 1, 0), (0, 1, 1), (1, 0, 2), (1, 0, 3)]
    assert rows == [[4, 0], [2]]


def test_the_queue_begins_with_the_longest_that_go_on():
    taken, rows = queued([[0, 3], [9, 1], [0, 0]], [[True, True], [True, False], [True, True]])
    assert rows == [[2, 1], [4, 0]]
    assert taken == [(0, 0, 2), (0, 1, 1), (1, 0, 4), (1, 0, 5), (1, 1, 0)]


@pytest.mark.parametrize("slots", [0, 5])
def test_partial_rollouts_go_on_as_if_never_stopped(params, slots):
    """Stopped as soon as two, four, six problems are done, and continued: drawn as asked."""
    make, prompts = engine(max_new_tokens=80, slots=slots), left_padded(6, seed=9)
    keys = request_keys(3, 1, range(6), 3)
    limits = np.array([[2, 80, 2], [9, 2, 9], [2, 40, 9], [70, 1, 1], [5, 5, 5], [40, 80, 2]])
    sampling = dataclasses.replace(settings((6, 3), (-1,)), max_new_tokens=jnp.asarray(limits))
    part, stops, ended, before = None, [], [], [[]] * 18
    for enough in (2, 4, 6, 6):
        part = make.generate(
            params, prompts, keys, sampling, begun=part, enough=enough, on_finished=ended.extend
        )
        done = part.finish_reason != UNFINISHED
        assert done.all(axis=1).sum() >= enough
        stops.append(int(done.sum()))
        requests = requests_of(part, keys)
        assert max(furthest(MODEL, params, requests, VALID)) <= ROUNDING
        now = [r.tokens for r in requests]
        assert [new[: len(old)] for new, old in zip(now, before, strict=True)] == before
        before = now
    assert stops[0] < stops[2] == 18
    assert sorted(request.number for request in ended) == list(range(18))
    assert (part.finish_reason == FINISH_LENGTH).all()
    np.testing.assert_array_equal(part.lengths, limits)


def test_sizes_of_batches_and_caches():
    assert [smaller_batch(64, n, 1) for n in (64, 17, 16, 4, 1)] == [64, 64, 16, 4, 1]
    assert [smaller_batch(64, n, 8) for n in (16, 1)] == [16, 16]
    assert window_sizes(448, 64) == (112, 224, 448)
    assert window_sizes(448, 56) == (56, 112, 224, 448)
    assert window_sizes(21_536, 1056)[0] >= 1056


def test_decoding_does_not_copy_the_cache(params):
    """The loop only reads it, and the join writes in place: temporaries stay below its size."""
    slots = device.empty_slots(MODEL, 4, 4096)
    weights = MODEL.unstack(params)
    step = jax.jit(
        lambda slots: device.decode(
            MODEL, weights, slots, settings((4, 1)), jnp.int32(0), steps=8, valid_vocab=VALID
        ),
        donate_argnums=0,
    )
    memory = step.lower(slots).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend reports no memory use")
    size = sum(c.nbytes for c in jax.tree.leaves(slots.cache))
    assert memory.temp_size_in_bytes < 0.5 * size
    assert memory.alias_size_in_bytes >= size


def test_wrong_shapes_are_refused(params):
    prompts = left_padded(2)
    with pytest.raises(ValueError, match="no bucket"):
        engine(prompt_buckets=(32,)).generate(
            params, prompts, request_keys(0, 0, range(2), 2), settings((2, 2))
        )
    with pytest.raises(ValueError, match=r"must be \[P, G\]"):
        engine().generate(params, prompts, request_keys(0, 0, range(3), 2), settings((3, 2)))


# --- tokens as they are drawn ---------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_tokens_can_be_watched_without_changing_them(params, chunk):
    """What is handed out joins to what is returned, whatever the chunk; slots are refilled."""
    prompts, keys = left_padded(5, seed=9), request_keys(4, 0, range(5), 3)
    seen = {}

    def watch(drawn):
        for number, tokens, log_probs, finish in drawn:
            assert 0 < len(tokens) <= chunk
            assert number not in seen or seen[number][2] == UNFINISHED
            before = seen.get(number, ((), (), UNFINISHED))
            seen[number] = (*before[0], *tokens), (*before[1], *log_probs), finish

    with recorded() as calls:
        out = engine(chunk=chunk, slots=4).generate(
            params, prompts, keys, settings((5, 3)), on_drawn=watch
        )
    drawn_as_asked(params, calls)
    for number, (tokens, log_probs, finish) in seen.items():
        place = divmod(number, 3)
        n = out.lengths[place]
        np.testing.assert_array_equal(tokens, out.tokens[place][:n])
        np.testing.assert_array_equal(log_probs, out.log_probs[place][:n])
        assert finish == out.finish_reason[place]
    assert len(seen) == 15


def test_who_watches_may_stop_a_call(params):
    prompts, keys, make = left_padded(2), request_keys(4, 0, range(2), 1), engine(chunk=2)
    whole = make.generate(params, prompts, keys, settings((2, 1), stop_ids=(-1,)))

    def stop(drawn):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        make.generate(params, prompts, keys, settings((2, 1), stop_ids=(-1,)), on_drawn=stop)
    again = make.generate(params, prompts, keys, settings((2, 1), stop_ids=(-1,)))
    np.testing.assert_array_equal(whole.tokens, again.tokens)
