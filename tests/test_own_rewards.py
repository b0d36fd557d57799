"""Rewards of the user's own: what they are given, what they may do, and what stays a verdict's."""

from __future__ import annotations

import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from commands import HANG_S
from hanging import only_hanging_is_timed
from test_collect import G as GROUP
from test_collect import P, asked_at
from test_collect import collector as collector_of
from test_training import P_, REWARDS, make_batch, rollouts, slots, teacher_scores

from kdrl_jax.config import ROOT, load_config
from kdrl_jax.objectives import METHODS
from kdrl_jax.rewards import OwnReward, RewardFunctions, parse_functions
from kdrl_jax.rewards.functions import RewardFunction
from kdrl_jax.training.batch import build_batch, rollout_rows
from kdrl_jax.training.health import Health
from kdrl_jax.training.learner import take_part
from kdrl_jax.training.telemetry import rollout_metrics
from kdrl_jax.training.validation import validate
from kdrl_jax.types import UserError

MODULE = """
import math, os, sys, time
import numpy as np

def brevity(lengths): return [1 - n / 10 for n in lengths]
def everything(problems, answers, metas, completions, verdicts, lengths, truncated):
    rows = zip(problems, answers, metas, completions, verdicts, lengths, truncated)
    return np.array([len(p) + len(a) + m["k"] + len(c) + (v == "correct") + n + t
                     for p, a, m, c, v, n, t in rows], np.float32)
def some(completions, **rest):
    assert set(rest) >= {"problems", "metas"}
    return [None if c == "b" else 2 for c in completions]
def trouble(problems, completions, scale=1.0):
    what = problems[0]
    if what == "raise": raise ValueError("no such thing")
    if what == "hang": time.sleep(1000)
    if what == "exit": os._exit(3)
    if what == "nan": return [math.nan] * len(completions)
    if what == "large": return [1e39] * len(completions)
    if what == "short": return [1.0]
    if what == "words": return ["good"] * len(completions)
    if what == "number": return 1.0
    print("noise")
    return [scale] * len(completions)
def strange(prompts, completions): return [0.0]
def mean(completions): return [0.0]
class Holder:
    @staticmethod
    def brevity(lengths): return lengths
NUMBER = 7
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield
    sys.modules.pop("own_rewards", None)


def group(problem="p", completions=("a", "b", "c"), **changes):
    n = len(completions)
    columns = {
        **{"problems": [problem] * n, "answers": ["42"] * n, "metas": [{"k": 100}] * n},
        **{"completions": list(completions), "verdicts": ["correct", *["wrong"] * (n - 1)]},
        **{"lengths": [2, 4, 6][:n], "truncated": [False, False, True][:n]},
    }
    return columns | changes


def test_what_functions_are_given_and_what_they_give(module):
    texts = ("own_rewards:brevity*0.5", "own_rewards:everything", "own_rewards:some*-1e-1")
    with RewardFunctions(texts, 2.0, workers=2, timeout_s=HANG_S) as functions:
        found = functions.ask([group(), group("long one", ("x", "y", "z"))])
    assert found["brevity"].values.dtype == np.float32
    np.testing.assert_allclose(found["brevity"].values, [[0.8, 0.6, 0.4]] * 2, rtol=1e-6)
    first = [1 + 2 + 100 + 1 + 1 + 2, 1 + 2 + 100 + 1 + 4, 1 + 2 + 100 + 1 + 6 + 1]
    np.testing.assert_array_equal(found["everything"].values, [first, np.add(first, 7)])
    np.testing.assert_array_equal(found["some"].values, [[2, np.nan, 2], [2, 2, 2]])
    assert all(not x.failed.any() for x in found.values())
    correct = np.array([[1, 0, 0], [0, 0, 1]], np.float32)
    total = functions.total(correct, found)
    own = found["everything"].values + [[0.4, 0.3, 0.2]] * 2 - [[0.2, 0, 0.2], [0.2] * 3]
    np.testing.assert_allclose(total, 2 * correct + own, rtol=1e-6)
    assert total.dtype == np.float32


def test_a_call_that_fails_adds_nothing_to_its_group(module, monkeypatch):
    """Whatever it does: it is counted, said once by name, and others are not touched."""
    bad = {
        "raise": r"own_rewards:trouble raised ValueError: no such thing, for 'raise'",
        "hang": r"own_rewards:trouble took over 5 s \(reward\.timeout_s\)",
        "exit": r"own_rewards:trouble ended its process",
        "nan": r"own_rewards:trouble returned nan",
        "short": r"own_rewards:trouble returned 1 numbers for 3 completions",
        "words": r"own_rewards:trouble raised ValueError: could not convert",
        "number": r"own_rewards:trouble raised TypeError",
    }
    only_hanging_is_timed(monkeypatch, "hang")
    groups = [group("fine"), *map(group, bad), group("large"), group("fine too")]
    texts = ("own_rewards:trouble", "own_rewards:brevity")
    with RewardFunctions(texts, workers=2, timeout_s=5.0) as functions:
        with pytest.warns(RuntimeWarning, match="adds nothing") as said:
            found = functions.ask(groups)
        again = functions.ask(groups[:2])
    assert found["trouble"].failed.tolist() == [0, *[1] * len(bad), 1, 0]
    assert not found["brevity"].failed.any()
    np.testing.assert_array_equal(again["trouble"].failed, [0, 1])
    correct = np.zeros((len(groups), 3), np.float32)
    total = functions.total(correct, found) - found["brevity"].values
    np.testing.assert_allclose(total[0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(total[1:-1], 0.0, atol=1e-6)
    lines = [str(w.message) for w in said if w.category is RuntimeWarning]
    # ValueError is one kind, said once.
    for what in bad.keys() - {"words"}:
        assert len([x for x in lines if re.search(bad[what], x)]) == 1, (what, lines)
    assert len(lines) == len(bad) - 1
    assert all("reward/trouble_failed_frac" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("brevity", "'brevity' is not 'module:function' or 'module:function*weight'"),
        ("own_rewards:brevity*much", "is not 'module:function' or"),
        ("own_rewards:brevity*nan", "is not 'module:function' or"),
        (7, "7 is not 'module:function'"),
        ("no_such_module:f", "importing no_such_module failed, ModuleNotFoundError"),
        ("own_rewards:briefness", "has no attribute 'briefness'; there are brevity, everything"),
        ("own_rewards:NUMBER", "own_rewards:NUMBER is no function but 7"),
        ("own_rewards:strange", "takes prompts; there are problems, answers, metas, completions"),
        ("own_rewards:mean", "reward/mean is a metric already; rename the function"),
    ],
)
def test_functions_that_cannot_be(module, text, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        parse_functions([text])
    assert str(caught.value).startswith("reward.functions: ")


def test_everything_wrong_with_a_config_is_said_at_once(module):
    functions = ("own_rewards:brevity", "own_rewards:Holder.brevity", "own_rewards:gone")
    config = load_config(ROOT / "configs" / "demo.py", [f"reward.functions={functions!r}"])
    config.objective, config.data.prompt_style = "kd_rkl", "own_rewards:gone"
    config.teacher.sft.steps = 1
    with pytest.raises(UserError) as caught:
        validate(config)
    text = str(caught.value)
    assert "reward/brevity is that of own_rewards:brevity already" in text
    assert "reward.functions: 'own_rewards:gone': own_rewards has no attribute 'gone'" in text
    assert "data.prompt_style: 'own_rewards:gone': own_rewards has no attribute" in text
    assert "but objective='kd_rkl' learns from no reward" in text
    nothing = load_config(ROOT / "configs" / "demo.py", ["reward.verdict_weight=0"])
    with pytest.raises(UserError, match="leaves no reward at all"):
        validate(nothing)


# --- within a step -------------------------------------------------------------------------------


class Tokens:
    """Gives sample g of a problem the reward g, and fails for problem p3."""

    functions = parse_functions(())

    def __init__(self):
        self.asked = []

    def ask(self, groups):
        self.asked += [g["problems"][0] for g in groups]
        values = np.array([[float(c.split()[1]) for c in g["completions"]] for g in groups])
        failed = np.array([g["problems"][0] == "q3" for g in groups], np.float32)
        values[failed == 1] = np.nan
        return {"sample": OwnReward(values.astype(np.float32), failed)}

    total = RewardFunctions.total
    _verdict_weight = 1.0


def own_collector(right, **options):
    functions = Tokens()
    functions.functions = [RewardFunction("m:sample", "sample", 0.5, ())]
    made, *_ = collector_of(right, functions=functions, **options)
    return made, functions


def expected(found):
    """Rewards by problem: sample 1 has half a point more, but where the function failed."""
    extra = np.where([[p.id == "p3"] for p, _ in found.asked], 0.0, [[0.0, 0.5]])
    return (found.correct + extra).astype(np.float32)


def test_rewards_of_a_step_are_of_its_own_groups():
    made, functions = own_collector(lambda i, g: i % 2 == 0)
    found, _ = made.collect(None, 0)
    np.testing.assert_array_equal(found.correct, [[i % 2 == 0] * GROUP for i in asked_at(0)])
    np.testing.assert_array_equal(found.rewards, expected(found))
    assert found.rewards.dtype == np.float32
    assert sorted(functions.asked) == sorted(f"q{i}" for i in asked_at(0))


def test_refill_goes_by_verdicts_and_keeps_what_functions_said():
    """All groups differ in reward; only those with right and wrong responses are kept."""
    made, functions = own_collector(lambda i, g: i % 2 == 1 and g == 0, refill=3)
    found, position = made.collect(None, 0)
    assert position > 1
    assert found.metrics["rollout/useful_frac"] == 1.0
    np.testing.assert_array_equal(found.rewards, expected(found))
    assert len(functions.asked) == position * P, "each group is asked about once"


def test_metrics_tell_rewards_from_verdicts():
    made, _ = own_collector(lambda i, g: True)
    found, _ = made.collect(None, 0)
    row = rollout_metrics(found.rollouts, found.verdicts, found.rewards, found.own)
    failed = np.mean([p.id == "p3" for p, _ in found.asked])
    assert row["reward/all_right_frac"] == row["reward/correct_frac"] == 1.0
    assert row["reward/mean"] == pytest.approx(expected(found).mean())
    assert row["reward/sample"] == 0.5
    assert row["reward/sample_failed_frac"] == failed
    assert row["reward/equal_frac"] == failed  # right or not, there is something to learn
    plain = rollout_metrics(found.rollouts, found.verdicts, found.correct)
    assert not {"reward/equal_frac", "reward/sample"} & plain.keys()
    config = load_config(ROOT / "configs" / "base.py").health.to_dict() | {"window": 1}
    alerts = [
        Health(config, METHODS["grpo"], "none").observe(1, x)[0]["health/alerts"]
        for x in (row, plain)
    ]
    assert alerts == [0, 1], "no_signal trips where verdicts alone are all there is"


def test_masks_of_distillation_go_by_the_verdict():
    """With rewards that are nowhere 0, the batch distils where verdicts are 0."""
    sampled = rollouts()
    rewards = (REWARDS + np.linspace(0.1, 0.4, REWARDS.size).reshape(REWARDS.shape)).astype("f4")
    for mask in ("none", "response", "group"):
        rows, settings = rollout_rows(sampled), slots(kd_mask=mask)
        args = (rows, sampled, jnp.asarray(rewards), teacher_scores(), jnp.float32(0.5))
        own = take_part(build_batch(*args, jnp.asarray(REWARDS), **settings), 0)
        plain = make_batch(kd_mask=mask)
        np.testing.assert_array_equal(own.kd_weights, plain.kd_weights)
        np.testing.assert_array_equal(own.weights, plain.weights)
        centred = rewards - rewards.mean(1, keepdims=True)
        scaled = centred / (rewards.std(1, keepdims=True) + 1e-6)
        advantages = np.asarray(own.advantages)[:, 0].reshape(P_, -1)
        np.testing.assert_allclose(np.sign(advantages), np.sign(scaled))
        assert not np.allclose(own.advantages, plain.advantages)
    supervised = slots(method=METHODS["sft"])
    own = take_part(build_batch(*args, jnp.asarray(REWARDS), **supervised), 0)
    trained = np.asarray(own.weights).sum(1) > 0
    np.testing.assert_array_equal(trained, REWARDS.reshape(-1) > 0)


def test_verdict_weight_alone_scales_the_reward():
    found = RewardFunctions((), 0.25).total(np.float32([[1, 0]]), {})
    np.testing.assert_array_equal(found, [[0.25, 0]])
    plain = np.float32([[1, 0]])
    np.testing.assert_array_equal(RewardFunctions().total(plain, {}), plain)
