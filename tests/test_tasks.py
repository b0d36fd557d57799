"""Tasks: arithmetic by an independent evaluator, the registry, a task of one's own."""

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import HANG_S
from hanging import only_hanging_is_timed

from kdrl_jax.data import SentencePieceTokenizer
from kdrl_jax.rewards import Grader
from kdrl_jax.tasks import TASKS, arithmetic, get_task, task_args, task_problems, task_verifier
from kdrl_jax.tasks.splits import SPLITS, split_of
from kdrl_jax.types import UserError, Verdict

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
    for split in SPLITS:
        mine = {text for text in every if split_of(text) == split}
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
    train = task_problems(name, 100, 3)
    test = task_problems(name, 100, 3, split="test")
    assert not {p.problem for p in train} & {p.problem for p in test}
    assert all(p.answer and p.id.startswith(f"{name}/") for p in train + test)
    assert (task.solution is None) == (task.alphabet is None)
    boxed = "<think></think>\\boxed{{{}}}"
    with Grader(workers=1, verify=task_verifier(name)) as grader:

        def rewards(responses, problems):
            verdicts = grader.grade(responses, [p.answer for p in problems])
            assert not grader._pool, "a built-in task must not need a process"
            return {v.reward for v in verdicts}

        assert rewards([boxed.format(p.answer) for p in test], test) == {1.0}
        assert rewards([boxed.format(p.answer + "1") for p in test], test) == {0.0}
        pairs = [(p, q) for p, q in itertools.pairwise(test) if p.answer != q.answer]
        assert len(pairs) > 50
        assert rewards([boxed.format(p.answer) for p, _ in pairs], [q for _, q in pairs]) == {0.0}
        if task.solution:
            worked = [task.solution(p) for p in test]
            assert rewards(worked, test) == {1.0}
            tokenizer = SentencePieceTokenizer.train(task.alphabet)
            for problem, solution in zip(test, worked, strict=True):
                rest = re.sub("|".join(map(re.escape, PIECES)), "", solution) + problem.problem
                assert set(rest) <= set(task.alphabet)
                for text in (problem.problem, solution):
                    assert tokenizer.decode(tokenizer.encode(text)) == text


# --- The registry ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arithmetics", "no task 'arithmetics'; the nearest is 'arithmetic'"),
        ("knight", "the nearest is 'knights_knaves'"),
        ("no_such_module:TASK", "importing no_such_module failed, ModuleNotFoundError"),
        ("json:dumps", "'json:dumps' is a function; make it a kdrl_jax.tasks.Task"),
        ("json:TASK", "json has no attribute 'TASK'; there are no tasks"),
        ("kdrl_jax.tasks.registry:", "has no attribute ''"),
    ],
)
def test_unknown_tasks(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        get_task(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{max_terms: 5}", "data.task_args: '{max_terms: 5}' is not JSON"),
        ("[5]", r"must be a JSON object: '{\"name\": value}'"),
        ('{"terms": 5}', "no argument 'terms'; the task has min_terms, max_terms, max_operand"),
        ('{"count": 5}', "no argument 'count'"),
        ('{"max_terms": 3}', 'arithmetic refuses {"max_terms": 3}: need 2 <= min_terms'),
        ('{"max_terms": "x"}', "arithmetic refuses"),
        ('{"max_operand": 1, "max_value": 1}', "different train problems wanted"),
    ],
)
def test_task_args_that_cannot_be(text, message):
    with pytest.raises(UserError, match=re.escape(message.replace("\\", ""))):
        task_problems("arithmetic", 100, 0, args=text)


def test_task_args():
    assert task_args("") == task_args("", TASKS["arithmetic"]) == {}
    args = '{"min_terms": 2, "max_terms": 2}'
    assert task_args(args, TASKS["arithmetic"]) == {"min_terms": 2, "max_terms": 2}
    found = task_problems("arithmetic", 10, 0, args=args)
    assert {p.problem.count("+") + p.problem.count("-") for p in found} == {1}
    with pytest.raises(UserError) as caught:
        task_args('{"a": 1, "b": 2}', TASKS["arithmetic"])
    assert len(caught.value.problems) == 2


# --- A task of one's own -----------------------------------------------------------------------

TUTORIAL = Path(__file__).resolve().parent.parent / "docs" / "tutorial.md"
(OWN_TASK,) = re.findall(
    r"```python\n# my_words\.py\n(import random\n.*?)```",
    TUTORIAL.read_text(encoding="utf-8"),
    re.DOTALL,
)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory whose modules can be imported, and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_task_of_ones_own(workplace):
    assert len([line for line in OWN_TASK.splitlines() if line.strip()]) <= 20
    (workplace / "my_words.py").write_text(OWN_TASK)
    name = "my_words:REVERSE"
    task = get_task(name)
    train = task_problems(name, 200, 0)
    test = task_problems(name, 50, 0, split="test", args='{"length": 6}')
    assert {len(p.answer) for p in test} == {6}
    assert not {p.problem for p in train} & {
        p.problem for p in task_problems(name, 50, 0, split="test")
    }
    with pytest.raises(UserError, match="no argument 'size'; the task has length"):
        task_problems(name, 5, 0, args='{"size": 6}')
    worked = [task.solution(p) for p in train[:8]]
    golds = [p.answer for p in train[:8]]
    with Grader(workers=1, timeout_s=HANG_S, verify=task_verifier(name)) as grader:
        assert grader.grade(worked, golds) == [Verdict(1.0, "correct")] * 8
        spaced = f"<think></think>\\boxed{{{' '.join(golds[0])}}}"
        texts = [spaced, worked[1], "\\boxed{a}", "<think></think>\\boxed{}"]
        outcomes = [v.outcome for v in grader.grade(texts, golds[:1] * 4)]
        assert outcomes == ["correct", "wrong", "format", "unparsable"]
        assert len(grader._pool) == 1, "the user's code must run in a worker"


EVIL = """
import sys, time

def verify(answer, gold, meta):
    print("noise")
    if answer == "hang":
        time.sleep(1000)
    if answer == "exit":
        sys.exit()
    if answer == "input":
        return not sys.stdin.read()
    return int(answer) < meta["limit"]
"""


def test_a_verifier_that_misbehaves_harms_nothing(workplace, monkeypatch):
    only_hanging_is_timed(monkeypatch, "hang")
    (workplace / "folder").mkdir()
    (workplace / "folder" / "my_evil.py").write_text(EVIL)
    sys.path.append(str(workplace / "folder"))
    answers = ["3", "5", "hang", "word", "exit", "input", "4", "nan"]
    responses = [f"<think></think>\\boxed{{{a}}}" for a in answers]
    with Grader(workers=2, timeout_s=1.0, verify="my_evil:verify") as grader:
        with pytest.warns(RuntimeWarning, match=r"my_evil:verify raised ValueError: inval"):
            verdicts = grader.grade(responses, ["7"] * 8, [{"limit": 5}] * 8)
        expected = ["correct", "wrong", "timeout", "unparsable", "unparsable", "correct", "correct"]
        assert [v.outcome for v in verdicts] == [*expected, "unparsable"]
        # The same answer to a problem with another meta is another question.
        assert grader.grade(responses[:1], ["7"], [{"limit": 3}])[0].outcome == "wrong"
        with pytest.raises(UserError, match=r"meta of a problem is not JSON: .*set"):
            grader.grade(responses[:1], ["7"], [{"limit": {3}}])
    with (
        Grader(workers=1, verify="my_evil:nobody") as grader,
        pytest.raises(RuntimeError, match=r"import my_evil:nobody\? It wrote:[^~]*nobody"),
    ):
        grader.grade(responses[:1], ["7"])


BAD_TASK = """
from kdrl_jax.tasks import Problem, Task

def problems(count, seed, *, split="train", kind):
    if kind == "raise":
        raise ValueError("kind raises")
    bad = Problem("", "x", 7)
    return {"tuple": (), "few": [], "text": ["x"] * count, "number": [bad] * count}[kind]

BAD = Task(problems)
"""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tuple", r"my_bad:BAD: problems\(\) must return a list of 3 problems"),
        ("few", "must return a list of 3 problems"),
        ("text", "'x' is no Problem with a text"),
        ("number", "the answer 7 must be a string"),
        ("raise", "my_bad:BAD refuses .*: kind raises"),
    ],
)
def test_a_task_that_makes_no_problems(workplace, kind, message):
    (workplace / "my_bad.py").write_text(BAD_TASK)
    with pytest.raises(UserError, match=message):
        task_problems("my_bad:BAD", 3, 0, args=json.dumps({"kind": kind}))


def test_a_module_that_fails_to_import(workplace):
    (workplace / "my_broken.py").write_text("1 / 0")
    with pytest.raises(UserError, match="importing my_broken failed, ZeroDivisionError"):
        get_task("my_broken:TASK")
