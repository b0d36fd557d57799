"""Collecting the rollouts of a step: order, lazy grading and dynamic sampling."""

import dataclasses
from concurrent.futures import Future

import numpy as np
import pytest

from kdrl_jax.data import PromptBatches
from kdrl_jax.rewards.supervisor import Counts
from kdrl_jax.rollout import DecodeStats, Finished, finished_requests
from kdrl_jax.training.carried import Group, from_text, new_group, to_text
from kdrl_jax.training.collect import Collector, mixed
from kdrl_jax.training.metrics import CLOCKED
from kdrl_jax.types import FINISH_EOS, UNFINISHED, Problem, Rollouts, Verdict

P, G, T = 4, 2, 3
# Sixteen problems, and how the two samples of each are graded.
PROBLEMS = [(Problem(f"p{i}", f"q{i}", f"a{i}"), [i + 1]) for i in range(16)]


class Engine:
    """Answers problem i, sample g, with the tokens [i + 1, g, 0]."""

    prompt_buckets = (1, 2)
    last = DecodeStats(steps=T, slot_steps=P * G * T, tokens=P * G * T, context=60)

    def __init__(self):
        self.widths, self.expected = [], []

    def generate(
        self, params, prompts, keys, sampling, *, expected_lengths, meanwhile, on_finished, progress
    ):
        assert keys.shape == (P, G)
        self.expected.append(expected_lengths)
        self.widths.append(prompts.tokens.shape[1])
        meanwhile()
        tokens = np.zeros((P, G, T), np.int32)
        tokens[..., 0] = prompts.tokens[:, -1:]
        tokens[..., 1] = np.arange(G)
        order = np.random.default_rng(0).permutation(P * G)
        for part in (order[:3], order[3:]):  # in any order, at any time
            on_finished([Finished(n, tokens.reshape(-1, T)[n, :-1]) for n in part])
        return Rollouts(
            prompt_tokens=prompts.tokens,
            prompt_lengths=prompts.lengths,
            tokens=tokens,
            log_probs=np.zeros((P, G, T), np.float32),
            lengths=np.full((P, G), T, np.int32),
            finish_reason=np.full((P, G), FINISH_EOS, np.int32),
        )


class Tokenizer:
    pad_id = 0

    def decode(self, ids):
        return " ".join(map(str, ids))


class Grader:
    """Sample g of problem i is right if `right(i, g)`."""

    def __init__(self, right):
        self.right, self.calls = right, 0

    def submit(self, texts, answers, metas):
        self.calls += 1
        done = Future()
        done.set_result(self.grade(texts, answers, metas))
        return done

    def grade(self, texts, answers, metas):
        found = []
        for text, answer in zip(texts, answers, strict=True):
            problem, sample = map(int, text.split())
            assert answer == f"a{problem - 1}"
            good = self.right(problem - 1, sample)
            found.append(Verdict(float(good), "correct" if good else "wrong"))
        return found


class Sampling:
    max_new_tokens = np.zeros((P, G))


def collector(right, **options) -> tuple[Collector, Engine, Grader]:
    engine, grader = Engine(), Grader(right)
    batches = PromptBatches(len(PROBLEMS), P, 0)
    made = Collector(engine, PROBLEMS, batches, Tokenizer(), grader, Sampling(), seed=0, **options)
    return made, engine, grader


def asked_at(position: int) -> list[int]:
    return PromptBatches(len(PROBLEMS), P, 0)[position].tolist()


def consistent(found) -> None:
    """Problems, tokens and verdicts of every group are of the same problem."""
    assert found.rollouts.tokens.shape == (P, G, T)
    tokens = np.asarray(found.rollouts.tokens)
    for p, (problem, ids) in enumerate(found.asked):
        assert problem.id == f"p{ids[0] - 1}"
        for g in range(G):
            assert tokens[p, g].tolist() == [ids[0], g, 0]
    assert found.rewards.dtype == np.float32


def test_a_step_without_refill_is_graded_as_its_requests_end() -> None:
    made, engine, grader = collector(lambda i, g: g == 0)
    seen = []
    found, position = made.collect(None, 2, lambda: seen.append(len(engine.widths)))
    assert position == 3
    assert seen == [1]
    assert grader.calls == 2
    assert [p.id for p, _ in found.asked] == [f"p{i}" for i in asked_at(2)]
    np.testing.assert_array_equal(found.rewards, [[1, 0]] * P)
    assert len(found.verdicts) == P * G
    assert grader.calls == 2
    assert found.metrics == {}
    assert engine.widths == [1]
    consistent(found)


def test_problems_seen_before_are_expected_to_take_as_long() -> None:
    made, engine, _ = collector(lambda i, g: g == 0)
    made.collect(None, 0)
    made._seen[asked_at(1)[0]] = 7.0
    made.collect(None, 1)
    assert engine.expected[0] == [0.0] * P  # nothing is known
    others = [T] * len(set(asked_at(0)) - {asked_at(1)[0]})
    assert engine.expected[1][0] == 7.0
    assert engine.expected[1][1] in (T, float(np.mean([7.0, *others])))


def test_equal_groups_are_replaced_in_place() -> None:
    """Even problems are answered alike by all samples, odd ones not."""
    made, engine, _ = collector(lambda i, g: i % 2 == 1 and g == 0, refill=3)
    found, position = made.collect(None, 0)
    assert (found.rewards.max(1) != found.rewards.min(1)).all()
    consistent(found)
    first = asked_at(0)
    for p, i in enumerate(first):
        if i % 2:  # what was useful stays where it was
            assert found.asked[p][0].id == f"p{i}"
    drawn = [i for at in range(position) for i in asked_at(at)]
    odd = [i for i in drawn if i % 2]
    assert len(odd) >= P
    assert sorted(int(p.id[1:]) for p, _ in found.asked) == sorted(odd[:P])
    assert found.metrics["rollout/batches"] == position
    assert found.decoding.steps == position * T
    assert found.decoding.context == position * 60
    assert found.metrics["rollout/useful_frac"] == 1.0
    assert found.metrics["reward/drawn_mean"] == pytest.approx(len(odd) / len(drawn) / 2)
    assert set(engine.widths) == {2}, "all batches of a step have one width"


def test_what_cannot_be_replaced_stays() -> None:
    made, _, grader = collector(lambda i, g: False, refill=2)
    found, position = made.collect(None, 0)
    assert position == 3
    assert grader.calls == 2 * 3
    assert [p.id for p, _ in found.asked] == [f"p{i}" for i in asked_at(0)]
    assert found.metrics["rollout/useful_frac"] == 0.0
    consistent(found)


def test_useful_for_policy_gradients() -> None:
    rewards = np.array([[0, 0], [1, 0], [1, 1]], np.float32)
    assert mixed(rewards).tolist() == [False, True, False]


# --- partial rollouts -----------------------------------------------------------------------


class SlowEngine(Engine):
    """Draws few tokens a call for sample 1 of every odd problem, and answers the rest at once."""

    max_new_tokens = T

    def generate(self, params, prompts, keys, sampling, *, on_finished, begun, enough, **options):
        options.pop("meanwhile")()
        lengths, finish = begun.lengths.copy(), begun.finish_reason.copy()
        tokens = begun.tokens.copy()
        answer = np.stack([prompts.tokens[:, -1:] + 0 * np.arange(G), *[0 * tokens[..., 0]] * 2], 2)
        answer[..., 1] = np.arange(G)
        before = finish != UNFINISHED
        slow = (prompts.tokens[:, -1:] % 2 == 0) & (np.arange(G) == 1)
        lengths = np.where(before | slow, lengths, T)
        while (lengths == T).all(1).sum() < enough or (lengths[slow] == begun.lengths[slow]).any():
            lengths = np.where(slow, np.minimum(lengths + 1, T), lengths)
        lengths = lengths.astype(np.int32)
        tokens = np.where(np.arange(T) < lengths[..., None], answer, 0).astype(np.int32)
        finish = np.where(lengths == T, FINISH_EOS, UNFINISHED).astype(np.int32)
        self.widths.append((lengths.shape[0], enough))
        out = dataclasses.replace(begun, tokens=tokens, lengths=lengths, finish_reason=finish)
        ended = np.flatnonzero((finish != UNFINISHED) & ~before)
        on_finished(finished_requests(out, ended))
        return out


def slow_collector(carried: str = ""):
    sampling = Sampling()
    sampling.max_new_tokens = np.zeros((P + 4, G))
    batches = PromptBatches(len(PROBLEMS), P, 0)
    options = {"seed": 0, "carry": 4, "carried": carried}
    engine, grader = SlowEngine(), Grader(lambda i, g: g == 0)
    made = Collector(engine, PROBLEMS, batches, Tokenizer(), grader, sampling, **options)
    return made, engine


def test_groups_that_are_not_done_go_on_in_the_next_step() -> None:
    made, engine = slow_collector()
    position, steps, texts = 0, [], []
    for _ in range(4):
        found, position = made.collect(None, position)
        consistent(found)
        np.testing.assert_array_equal(found.rewards, [[1, 0]] * P)
        steps.append([int(p.id[1:]) for p, _ in found.asked])
        texts.append(found.metrics)
        # A collector that starts from what was saved does the same.
        again, _ = slow_collector(made.carried)
        assert again.carried == made.carried
    asked = [i for at in range(-(-position // P)) for i in asked_at(at)][:position]
    answered = [i for step in steps for i in step]
    waiting = [group.problem for group in made._carried]
    assert sorted(answered + waiting) == sorted(asked)
    assert set(engine.widths) == {(P + 4, P)}
    assert texts[0]["rollout/carried_frac"] == 0
    assert max(x["rollout/carried_frac"] for x in texts) > 0
    assert all(0 <= x["rollout/stale_frac"] <= x["rollout/carried_frac"] for x in texts)


def test_what_is_carried_survives_text_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    groups = [
        new_group(7, 3, G, T),
        Group(
            9,
            1,
            rng.integers(0, 9, (G, T)).astype(np.int32),
            rng.normal(size=(G, T)).astype(np.float32),
            np.array([1, T], np.int32),
            np.array([UNFINISHED, FINISH_EOS], np.int32),
        ),
    ]
    for before, after in zip(groups, from_text(to_text(groups)), strict=True):
        for x, y in zip(before, after, strict=True):
            np.testing.assert_array_equal(x, y)
            assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
    assert from_text(to_text([])) == []


def test_what_the_verifier_did_goes_into_the_metrics():
    made, _, grader = collector(lambda i, g: True)
    counts = Counts(asked=5, timeouts=1, seconds=4.0, seconds_max=3.0)
    grader.take_counts = lambda: counts
    assert made.verification() == {
        "verifier/asked": 5,
        "verifier/timeouts": 1,
        "verifier/crashes": 0,
        "verifier/restarts": 0,
        "verifier/seconds": 4.0,
        "verifier/seconds_max": 3.0,
    }
    assert all(name.startswith(CLOCKED) for name in made.verification())
