"""Reward functions and prompt styles that are given in Python instead of named in a config."""

import threading
import time
import warnings

import numpy as np
import pytest

from kdrl_jax import own_functions
from kdrl_jax.data import find_style
from kdrl_jax.own_functions import Caller, find_here, is_here, name_of, source_digest
from kdrl_jax.rewards import RewardFunctions
from kdrl_jax.types import Problem, UserError

KEY, STYLE = "reward.functions", "data.prompt_style"


def length(completions, **_):
    return [len(text) for text in completions]


def group(*completions):
    size = len(completions)
    return {
        "problems": ["p"] * size,
        "answers": ["1"] * size,
        "metas": [{"n": i} for i in range(size)],
        "completions": list(completions),
        "verdicts": ["wrong"] * size,
        "lengths": [3] * size,
        "truncated": [False] * size,
    }


def test_what_another_process_can_import_is_named_by_its_module():
    assert name_of(length, KEY) == f"{__name__}:length"
    assert name_of(threading.Thread.start, KEY) == "threading:Thread.start"


def test_what_it_cannot_import_belongs_to_this_process():
    def inner(completions):
        return [1.0] * len(completions)

    for function, name in ((inner, "inner"), (lambda completions: [], "function")):
        text = name_of(function, KEY)
        assert text == f"python:{name}"
        assert is_here(text)
        assert find_here(KEY, text) is function
    with pytest.raises(UserError, match=r"reward\.functions: 3 is no function"):
        name_of(3, KEY)


def test_of_a_program_itself(monkeypatch):
    """Functions of `__main__`, and those of a notebook's cells, which have it as their module."""

    def shown(completions):
        return [0.0] * len(completions)

    shown.__module__, shown.__qualname__ = "__main__", "shown"
    import __main__

    monkeypatch.setattr(__main__, "shown", shown, raising=False)
    assert name_of(shown, KEY) == "python:shown"


def test_a_function_that_nobody_gave_is_refused_with_the_key(monkeypatch):
    monkeypatch.setattr(own_functions, "_known", {})
    with pytest.raises(UserError, match=r"reward\.functions: 'python:gone' is a function that was"):
        RewardFunctions(("python:gone",))
    with pytest.raises(UserError, match=r"data\.prompt_style: 'python:gone'.*give it again"):
        find_style("python:gone")


def test_the_source_names_a_function():
    def one(completions):
        return [1.0]

    first = source_digest(KEY, name_of(one, KEY))

    def one(completions):
        return [2.0]

    assert source_digest(KEY, name_of(one, KEY)) != first


def test_here_and_in_workers_alike():
    """The same function by both ways gives the same numbers; both add to one reward."""

    def here(completions, metas, **_):
        return [len(text) + meta["n"] for text, meta in zip(completions, metas, strict=True)]

    texts = (f"{name_of(here, KEY)}*2", f"{__name__}:length")
    groups = [group("a", "bbb"), group("", "cc")]
    with RewardFunctions(texts, verdict_weight=0.0, workers=1, timeout_s=60.0) as functions:
        own = functions.ask(groups)
        np.testing.assert_array_equal(own["here"].values, [[1, 4], [0, 3]])
        np.testing.assert_array_equal(own["length"].values, [[1, 3], [0, 2]])
        total = functions.total(np.ones((2, 2), np.float32), own)
    np.testing.assert_array_equal(total, [[3, 11], [0, 8]])


def test_no_worker_is_started_for_functions_of_this_process():
    def here(completions):
        return [1.0] * len(completions)

    with RewardFunctions((name_of(here, KEY),), workers=1) as functions:
        assert functions.ask([group("a")])["here"].values.tolist() == [[1.0]]
        assert not functions._supervisor.workers


@pytest.mark.parametrize(
    ("returned", "kind"),
    [
        ([1.0], "returned 1 numbers for 2 completions"),
        ([float("nan"), 1.0], "returned nan"),
        (["a", "b"], "raised ValueError"),
        (None, "raised TypeError"),
    ],
)
def test_a_function_that_fails_adds_nothing(returned, kind):
    def bad(completions):
        return returned

    with (
        RewardFunctions((name_of(bad, KEY),), workers=1) as functions,
        pytest.warns(RuntimeWarning, match=kind),
    ):
        own = functions.ask([group("a", "b")])["bad"]
    assert own.failed.tolist() == [1.0]
    assert np.isnan(own.values).all()


def test_the_only_reward_that_never_works_ends_the_run():
    def conversational(completions):
        return [text[0]["content"] for text in completions]

    def works_once(completions):
        return [1.0] if completions == ["a"] else conversational(completions)

    here = name_of(conversational, KEY)
    with (
        RewardFunctions((here,), verdict_weight=0.0, workers=1) as functions,
        pytest.warns(RuntimeWarning),
        pytest.raises(UserError, match=r"conversational raised TypeError.*no call worked") as error,
    ):
        functions.ask([group("a", "b"), group("c", "d")])
    assert len(error.value.problems) == 1
    with (
        RewardFunctions((name_of(works_once, KEY),), verdict_weight=0.0, workers=1) as functions,
        warnings.catch_warnings(record=True),
    ):
        assert functions.ask([group("a")])["works_once"].failed.tolist() == [0.0]
        assert functions.ask([group("b")])["works_once"].failed.tolist() == [1.0]


def test_arguments_of_other_trainers_are_answered():
    def trl(prompts, completions, answer, level):
        return [0.0] * len(completions)

    with pytest.raises(UserError) as error:
        RewardFunctions((name_of(trl, KEY),))
    [line] = error.value.problems
    assert line.endswith(
        "prompts is problems here, answer is answers here, other columns of a row are in metas"
    )


def test_one_that_raises_system_exit_ends_nothing():
    def leaves(completions):
        raise SystemExit(3)

    with (
        RewardFunctions((name_of(leaves, KEY),), workers=1) as functions,
        pytest.warns(RuntimeWarning, match="raised SystemExit: 3"),
    ):
        assert functions.ask([group("a")])["leaves"].failed.tolist() == [1.0]


def test_one_that_hangs_is_left_to_itself_and_not_called_again_before_it_ends():
    begun, go_on = [], threading.Event()

    def hangs(completions):
        begun.append(len(completions))
        go_on.wait()
        return [1.0]

    caller = Caller(timeout_s=0.05)
    assert caller.call(hangs, {"completions": ["a"]}) == "timeout: "
    assert caller.call(hangs, {"completions": ["a"]}) == "timeout: "
    assert begun == [1]
    go_on.set()
    while caller._running[hangs].is_alive():
        time.sleep(0.001)
    assert caller.call(length, {"completions": ["abc"]}) == [3.0]


def test_a_prompt_style_of_this_process():
    style = find_style(name_of(lambda problem: f"Q: {problem}\nA:", STYLE))
    assert style(Problem("1", "2+2", "4")) == "Q: 2+2\nA:"
