"""The built-in task: right by an independent evaluator, reproducible, splits apart."""

import re

import numpy as np
import pytest

from kdrl_jax.data import SentencePieceTokenizer
from kdrl_jax.rewards import grade
from kdrl_jax.tasks import arithmetic
from kdrl_jax.tasks.registry import TASKS
from kdrl_jax.types import UserError

PIECES = ("<think>", "</think>", "\\boxed{", "}")


def value_of(expression: str) -> int:
    """Left to right with a sign carried along, character by character."""
    total, sign, number = 0, 1, ""
    for c in expression + "+":
        if c.isdigit():
            number += c
            continue
        total, number = total + sign * int(number), ""
        sign = {"+": 1, "-": -1}[c]
    return total


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "shape", [{}, {"min_terms": 2, "max_terms": 6}, {"max_operand": 99, "max_value": 500}]
)
def test_solutions_are_right_step_by_step(split, shape):
    lengths = set()
    for problem in arithmetic.problems(300, 5, split=split, **shape):
        assert problem.problem.endswith("=")
        expression = problem.problem[:-1]
        assert value_of(expression) == int(problem.answer)
        match = re.fullmatch(
            r"<think>(.*)</think>\\boxed\{(\d+)\}", arithmetic.solution(problem), re.ASCII
        )
        assert match
        assert match[2] == problem.answer
        numbers = re.findall(r"\d+", expression)
        lengths.add(len(numbers))
        running = numbers[0]
        for step, number in zip(match[1].split(","), numbers[1:], strict=True):
            left, _, right = step.partition("=")
            assert re.fullmatch(rf"{running}[+-]{number}", left)
            assert value_of(left) == int(right)
            assert 0 <= int(right) <= shape.get("max_value", 99)
            assert 1 <= int(number) <= shape.get("max_operand", 9)
            running = right
        assert running == problem.answer
    assert lengths == set(range(shape.get("min_terms", 4), shape.get("max_terms", 4) + 1))


def test_answers_and_operations_are_spread_out():
    """Neither guessing one answer nor one operation gets far."""
    found = arithmetic.problems(2000, 0)
    answers = np.bincount([int(p.answer) for p in found], minlength=100)
    assert answers.max() < 0.05 * len(found)
    plus = np.mean([p.problem.count("+") / 3 for p in found])
    assert 0.4 < plus < 0.6


def test_problems_are_a_function_of_the_arguments():
    found = arithmetic.problems(200, 1)
    assert found == arithmetic.problems(200, 1)
    assert found[:50] == arithmetic.problems(50, 1)
    assert [p.problem for p in found] != [p.problem for p in arithmetic.problems(200, 2)]
    assert len({p.problem for p in found}) == len({p.id for p in found}) == 200
    # Recorded: other Python versions must draw the same ones.
    assert [p.problem for p in found[:2]] == RECORDED


RECORDED = ["95+4-1+1=", "76-5-7+1="]


def test_splits_are_disjoint_whatever_the_seeds():
    train = {p.problem for seed in range(5) for p in arithmetic.problems(1000, seed)}
    test = {p.problem for seed in range(5) for p in arithmetic.problems(200, seed, split="test")}
    assert len(train) > 4000
    assert len(test) > 900
    assert not train & test


def test_a_small_space_is_exhausted_exactly():
    """1+1 .. within [0, 3]: all two-term chains, found by trying them all."""
    every = {f"{a}{b:+d}=" for a in (1, 2, 3) for b in (-3, -2, -1, 1, 2, 3) if 0 <= a + b <= 3}
    shape = {"min_terms": 2, "max_terms": 2, "max_operand": 3, "max_value": 3}
    sizes = {}
    for split in arithmetic.SPLITS:
        mine = {text for text in every if arithmetic.split_of(text) == split}
        found = arithmetic.problems(len(mine), 0, split=split, **shape)
        assert {p.problem for p in found} == mine
        sizes[split] = len(mine)
    n = sizes["train"]
    message = f"arithmetic: {n + 1} different train problems wanted, {n} found"
    with pytest.raises(UserError, match=message):
        arithmetic.problems(n + 1, 0, **shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "one of train, test, not 'dev'"),
        ({"count": -1}, "not be negative: -1"),
        ({"min_terms": 1}, "need 2 <= min_terms"),
        ({"min_terms": 5}, "not 5 and 4"),
        ({"max_operand": 0}, "must be >= 1: 0, 99"),
        ({"max_value": 0}, "must be >= 1: 9, 0"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        arithmetic.problems(**{"count": 3, "seed": 0, **arguments})


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_its_promises(name):
    """What the program relies on for any task in the registry."""
    task = TASKS[name]
    tokenizer = SentencePieceTokenizer.train(task.alphabet)
    train = task.problems(100, 3, split="train")
    test = task.problems(100, 3, split="test")
    assert not {p.problem for p in train} & {p.problem for p in test}
    for problem in train + test:
        solution = task.solution(problem)
        rest = re.sub("|".join(map(re.escape, PIECES)), "", solution) + problem.problem
        assert set(rest) <= set(task.alphabet)
        for text in (problem.problem, solution):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert grade(solution, problem.answer).outcome == "correct"
        assert grade(solution, problem.answer).reward == 1.0
        wrong = solution.replace(f"boxed{{{problem.answer}}}", f"boxed{{{problem.answer}1}}")
        assert grade(wrong, problem.answer).reward == 0.0
