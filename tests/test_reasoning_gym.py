"""reasoning-gym as a source of questions: which ones, reproducible, graded by our graders."""

import sys

import pytest

from kdrl_jax.rewards import Grader
from kdrl_jax.tasks import get_task, reasoning_gym, split_of, task_problems, task_verifier
from kdrl_jax.types import UserError


@pytest.fixture
def gym():
    return pytest.importorskip("reasoning_gym", reason="needs the extra `reasoning`")


def test_only_data_sets_with_one_right_answer(gym):
    names = reasoning_gym.names()
    assert 20 < len(names) < len(gym.factory.DATASETS)
    # Numbers, words and yes/no against: many right answers, a scorer that executes the answer.
    assert {"gcd", "basic_arithmetic", "caesar_cipher", "syllogism"} <= set(names)
    assert not {"countdown", "n_queens", "word_ladder", "sudoku", "rubiks_cube"} & set(names)
    for name, (kind, _) in gym.factory.DATASETS.items():
        own_scorer = any("score_answer" in vars(c) for c in kind.__mro__[:-1] if
                         c.__name__ != "ProceduralDataset")  # fmt: skip
        assert own_scorer != (name in names)


def test_no_scorer_of_the_library_is_called(gym, monkeypatch):
    def refuse(*_):
        raise AssertionError("a scorer was called")

    for kind, _ in gym.factory.DATASETS.values():
        monkeypatch.setattr(kind, "score_answer", kind.score_answer)
    monkeypatch.setattr(gym.factory.DATASETS["gcd"][0], "score_answer", refuse)
    with pytest.raises(UserError, match="'reasoning_gym/gcd' has no single right answer"):
        get_task("reasoning_gym/gcd")


@pytest.mark.parametrize("name", ["gcd", "syllogism", "rotate_matrix", "bf", "caesar_cipher"])
def test_problems_and_their_grading(gym, name, capsys):
    name = f"reasoning_gym/{name}"
    train = task_problems(name, 60, 1)
    test = task_problems(name, 20, 1, split="test")
    assert train == task_problems(name, 60, 1)
    assert train[:10] == task_problems(name, 10, 1)
    assert len({p.problem for p in train}) == len({p.id for p in train}) == 60
    assert [p.problem for p in train] != [p.problem for p in task_problems(name, 60, 2)]
    assert {split_of(p.problem) for p in train} == {"train"}
    assert {split_of(p.problem) for p in test} == {"test"}
    assert capsys.readouterr().out == ""
    boxed = "<think></think>\\boxed{{{}}}"
    with Grader(workers=1, verify=task_verifier(name)) as grader:
        golds = [p.answer for p in train]
        assert {v.reward for v in grader.grade([boxed.format(g) for g in golds], golds)} == {1.0}
        wrong = grader.grade([boxed.format(g + "1") for g in golds], golds)
        assert {v.outcome for v in wrong} == {"wrong"}
        assert not grader._pool


def test_answers_are_right_by_another_computation(gym):
    import math
    import re

    for problem in task_problems("reasoning_gym/gcd", 50, 0, args='{"max_value": 90}'):
        numbers = [int(n) for n in re.findall(r"\d+", problem.problem)]
        assert max(numbers) <= 90
        assert math.gcd(*numbers) == int(problem.answer)
    for problem in task_problems("reasoning_gym/count_bits", 50, 0):
        number = int(re.search(r"number (\d+)", problem.problem)[1])
        assert number.bit_count() == int(problem.answer)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("gdc", "", "no data set 'reasoning_gym/gdc'; the nearest that can be used is"),
        ("countdown", "", "'reasoning_gym/countdown' has no single right answer to compare with"),
        ("gcd", '{"numbers": 3}', "no argument 'numbers'; reasoning_gym/gcd has min_numbers"),
        ("gcd", '{"seed": 3}', "no argument 'seed'"),
        ("gcd", '{"min_numbers": 1}', "reasoning_gym/gcd refuses {'min_numbers': 1}: "),
        ("gcd", '{"min_numbers": "x"}', "reasoning_gym/gcd refuses"),
    ],
)
def test_what_is_refused(gym, name, args, message):
    with pytest.raises(UserError) as caught:
        task_problems(f"reasoning_gym/{name}", 5, 0, args=args)
    assert message in str(caught.value)


def test_few_problems_are_an_error_and_not_a_hang(gym):
    args = '{"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 3}'
    with pytest.raises(UserError, match="reasoning_gym/gcd: 100 different train problems wanted"):
        task_problems("reasoning_gym/gcd", 100, 0, args=args)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"needs reasoning-gym .*; pip install reasoning-gym"):
        get_task("reasoning_gym/gcd")
