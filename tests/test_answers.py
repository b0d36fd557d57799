r"""The form of an answer: boxed, the last number, the whole text, or what a task reads."""

from __future__ import annotations

import random
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_jax.config import ROOT, flatten, load_config
from kdrl_jax.rewards import FORMS, Grader, grade, has_format
from kdrl_jax.rewards.format import as_response, final_answer
from kdrl_jax.rewards.number_answer import last_number
from kdrl_jax.tasks.registry import task_form, task_verifier
from kdrl_jax.training.own_code import unweighted_verdicts
from kdrl_jax.training.problems import make_grader
from kdrl_jax.training.validation import compare_for_resume, validate
from kdrl_jax.types import UserError

# --- The last number ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 3 = 5", "5"),
        ("The answer is 72.", "72"),
        ("so 1,234 people", "1234"),
        ("1,234,567.50 in all", "1234567.50"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("1{,}000 or 1\\,000\\,000", "1000000"),
        ("1\u202f000", "1000"),
        ("it is -5", "-5"),
        ("it is \u22125.", "-5"),
        ("x=-0.5", "-0.5"),
        ("+7", "7"),
        ("10-5", "5"),
        ("pages 3\u20135", "5"),
        ("f(2)-3", "3"),
        ("three quarters, 3/4", "3/4"),
        ("-3 / 4", "-3/4"),
        ("\\frac{3}{4}", "3/4"),
        ("-\\dfrac{3}{4}$", "-3/4"),
        ("\\frac{-3}{4}", "-3/4"),
        ("\\tfrac12", "1/2"),
        ("50%", "50%"),
        ("12.5 \\%.", "12.5%"),
        ("$5", "5"),
        ("a loss of -$1,250.75!", "-1250.75"),
        ("$-5$", "-5"),
        ("\\$40", "40"),
        ("\u20ac3", "3"),
        (".5", ".5"),
        ("5.", "5"),
        ("1.2.3", "1.2"),
        ("1.5e-3 m", "1.5e-3"),
        ("2 \\times 10^{6}", "2e6"),
        ("3\u00d710^-4", "3e-4"),
        ("10^6", "10^{6}"),
        ("5 cm^2", "5"),
        ("7 and x^{2}, x_1, x_{12}, H2O", "7"),
        ("7 x^-2", "7"),
        ("**42**", "42"),
        ("_42_", "42"),
        ("\\boxed{42}", "42"),
        ("\u7b54\u6848\u662f5\u3002", "5"),
        ("\uff11\uff12", "12"),
        ("no number", None),
        ("", None),
        ("-$ . , / %", None),
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == expected


NUMBERS = st.builds(
    lambda value, style: (value, style),
    st.fractions(min_value=-(10**7), max_value=10**7, max_denominator=1000),
    st.sampled_from(["fraction", "frac", "decimal", "grouped", "money", "percent"]),
)


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(NUMBERS, st.sampled_from(["So it is {}.", "x = {}", "({})", "**{}**", "{}", "{} apples"]))
def test_what_is_written_is_what_is_read(number, frame):
    value, style = number
    if style in ("decimal", "grouped", "money", "percent"):
        value = Fraction(round(value * 100), 100)
    sign, size = "-" if value < 0 else "", abs(value)
    written = {
        "fraction": f"{value.numerator}/{value.denominator}",
        "frac": f"{sign}\\frac{{{size.numerator}}}{{{size.denominator}}}",
        "decimal": f"{sign}{float(size):.2f}",
        "grouped": f"{sign}{float(size):,.2f}",
        "money": f"{sign}${float(size):,.2f}",
        "percent": f"{sign}{float(size):.2f}%",
    }[style]
    found = last_number("12 is first. " + frame.format(written))
    assert found is not None
    assert Fraction(found.removesuffix("%")) == value
    assert found.endswith("%") == (style == "percent")


@pytest.mark.parametrize(
    "text",
    [
        *("9" * 2_000_000, "1," * 1_000_000, "1,111" * 400_000, "1/" * 1_000_000),
        *("-" * 2_000_000, "\\frac{" + "1" * 2_000_000, "\\frac{1" * 300_000, "1^{" * 700_000),
        *(" " * 2_000_000, ".1" * 1_000_000, "1 \\times 10^{" * 150_000, "$-" * 1_000_000),
        *("1,111," * 300_000 + "1111", "<think>" * 300_000, "</think>" * 300_000),
    ],
    ids=range(15),
)
@pytest.mark.parametrize("form", ["last_number", "text"])
def test_huge_texts_take_linear_time(text, form):
    """CPU seconds, of which another process takes none; what is quadratic would take hours."""
    started = time.process_time()
    for required in (True, False):
        assert grade(f"<think></think>{text}", "7" * 10, require_format=required, form=form)
        assert grade(text, "7" * 10, require_format=required, form=form).reward == 0
    assert time.process_time() - started < 20


# --- Where it stands ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "required", "free"),
    [
        ("<think>4</think> It is 5.", "5", "5"),
        ("4</think>5", "5", "5"),
        ("It is 5.", None, "5"),
        ("<think>4</think>so", None, None),
        ("<think>4", None, None),
        ("<think>4</think>5<think>6", None, None),
        ("<think>4</think>5</think>6", None, "6"),
        ("2 <think>4</think>5", None, "5"),
        ("", None, None),
    ],
)
def test_where_the_last_number_stands(text, required, free):
    for require_format, expected in ((True, required), (False, free)):
        found = final_answer(text, require_format=require_format, form="last_number")
        assert found == expected
    assert has_format(text, "last_number") == (required is not None)


def test_the_text_behind_the_reasoning():
    text = "<think>maybe\nLyon</think>\n\n Paris, France. \n"
    for required in (True, False):
        found = final_answer(text, require_format=required, form="text")
        assert found == "Paris, France."
    assert final_answer(" Paris\n", require_format=False, form="text") == "Paris"
    assert final_answer(" Paris\n", require_format=True, form="text") is None
    assert final_answer("<think>a</think> \n", require_format=True, form="text") is None
    assert has_format(text, "text")
    assert not has_format(text)


# --- Verdicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "gold", "form", "outcome"),
    [
        ("He has 3 and gets 4, so 7.", "7", "last_number", "correct"),
        ("He has 3 and gets 4, so 8.", "7", "last_number", "wrong"),
        ("7", "7 apples", "last_number", "correct"),
        ("in all $1,234.00", "1234", "last_number", "correct"),
        ("1/2 of it", "0.5", "last_number", "correct"),
        ("-\\frac{1}{2}", "-0.5", "last_number", "correct"),
        ("half: 50%", "\\frac{1}{2}", "last_number", "correct"),
        ("5e-3", "0.005", "last_number", "correct"),
        ("10^6", "1000000", "last_number", "correct"),
        ("seven", "7", "last_number", "unparsable"),
        ("\\boxed{7}", "7", "last_number", "correct"),
        ("7", "7", "boxed", "unparsable"),
        ("Paris", "paris", "text", "correct"),
        ("Paris.", "Paris", "text", "correct"),
        ("Lyon", "Paris", "text", "wrong"),
        ("New  York", "new york", "text", "correct"),
        ("7.0", "7", "text", "correct"),
        ("0.5", "\\frac{1}{2}", "text", "correct"),
        ("x+1", "1+x", "text", "correct"),
        ("(1, 2)", "(1,2)", "text", "correct"),
        ("5 apples", "5", "text", "correct"),
        ("The answer is 5", "5", "text", "wrong"),
        # Letters are factors to mathematics, and 0 times words is 0.
        ("The answer is not 0", "0", "text", "wrong"),
        ("Not 0", "0", "text", "wrong"),
        ("\\text{no } 0", "0", "text", "wrong"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2.0\\end{bmatrix}", "text",
         "correct"),
        ("  ", "5", "text", "unparsable"),
    ],
)  # fmt: skip
def test_verdicts(response, gold, form, outcome):
    assert grade(response, gold, require_format=False, form=form).outcome == outcome
    thought = f"<think>0 1 \\boxed{{2}}</think>{response}"
    lacking = "format" if outcome == "unparsable" else outcome
    assert grade(thought, gold, form=form).outcome == lacking
    assert grade(response, gold, form=form).outcome == "format"


@pytest.mark.parametrize("form", FORMS)
def test_a_gold_answer_is_its_own_response(form):
    rng = random.Random(form)
    for _ in range(20):
        gold = rng.choice(["{}", "-{}", "{}.5", "{}/7", "{}%"]).format(rng.randint(0, 10**6))
        response = as_response(gold, form)
        assert has_format(response, form)
        assert grade(response, gold, form=form).outcome == "correct"


# --- What a task of one's own reads ------------------------------------------------------------

OWN = r"""
import os, sys, time
from kdrl_jax.tasks import Problem, Task

def answer(completion):
    print("noise")
    found = completion.partition("ANSWER:")[2].strip()
    if found == "hang": time.sleep(1000)
    if found == "exit": os._exit(3)
    if found == "raise": raise ValueError("no such thing")
    if found == "number": return 5
    if found == "long": return "a" * 100_000
    return found or None

def verify(answer, gold, meta):
    return answer == gold + meta.get("more", "")

def problems(count, seed, *, split="train"):
    return [Problem(str(i), f"{i}?", str(i)) for i in range(count)]

MATHS = Task(problems, answer=answer)
OWN = Task(problems, answer=answer, verify=verify)
SILENT = Task(problems)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_answers.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_answers", None)


@pytest.mark.parametrize("required", [True, False])
def test_a_task_says_what_the_answer_is(own, required):
    """Its function runs where it can be killed; what it does there costs its own response alone."""
    said = ["0.5", "7", "hang", "exit", "raise", "number", "long", ""]
    responses = [f"<think>ANSWER?</think>It is so. ANSWER: {x}" for x in said]
    responses += ["ANSWER: 0.5", "<think></think>0.5"]
    with Grader(2, 5.0, required, form=task_form("own_answers:MATHS")) as grader:
        with pytest.warns(RuntimeWarning, match="own_answers:MATHS.answer raised"):
            verdicts = grader.grade(responses, ["\\frac{1}{2}"] * len(responses))
        counts = grader.take_counts()
        assert grader.answers(responses[:2]) == ["0.5", "7"]
        assert [v.reward for v in grader.grade_golds(["\\frac{1}{2}", "x"])] == [1, 1]
    lacking = "format" if required else "unparsable"
    assert [v.outcome for v in verdicts] == [
        *("correct", "wrong", "timeout", "unparsable", "unparsable", "unparsable", "unparsable"),
        *(lacking, "format" if required else "correct", lacking),
    ]
    assert (counts.timeouts, counts.crashes) == (1, 2)
    assert counts.seconds_max >= 5.0


def test_a_tasks_own_verifier_gets_what_its_own_function_finds(own):
    name = "own_answers:OWN"
    with Grader(1, 20.0, True, task_verifier(name), task_form(name)) as grader:
        texts = [
            "<think></think>ANSWER: ab",
            "<think></think>ANSWER: a",
            "<think></think>\\boxed{a}",
        ]
        verdicts = grader.grade(texts, ["a"] * 3, [{"more": "b"}] * 3)
        assert [v.outcome for v in verdicts] == ["correct", "wrong", "format"]


@pytest.mark.parametrize(
    ("form", "text"), [("last_number", "So 1,000."), ("text", "1000"), ("boxed", "\\boxed{1000}")]
)
def test_a_verifier_gets_the_answer_in_every_form(form, text):
    seen = []

    def verify(answer, gold, meta):
        return not seen.append(answer)

    with Grader(require_format=False, verify=verify, form=form) as grader:
        assert grader.grade([text, "<think>no"], ["7"] * 2)[0].reward == 1
    assert seen == ["1000"]


def test_a_function_in_this_process():
    with Grader(require_format=False, form=lambda text: text[3:] or None) as grader:
        outcomes = [v.outcome for v in grader.grade(["is 7", "is 8", "is"], ["7"] * 3)]
        assert outcomes == ["correct", "wrong", "unparsable"]
    with pytest.raises(ValueError, match="form 'box' is none of boxed, last_number, text"):
        Grader(form="box")


@pytest.mark.parametrize("form", FORMS)
def test_many_at_once_are_graded_as_one_by_one(form):
    texts = ["<think>1</think>2/4", "<think>1</think>\\boxed{0.5}", "0.50", "<think>0.5", ""]
    for required in (True, False):
        with Grader(1, 20.0, required, form=form) as grader:
            verdicts = grader.grade(texts, ["\\frac12"] * len(texts))
        alone = [grade(t, "\\frac12", require_format=required, form=form) for t in texts]
        assert verdicts == alone
        assert any(v.reward for v in verdicts)


# --- In a config -------------------------------------------------------------------------------


def demo(*overrides: str):
    return load_config(ROOT / "configs" / "demo.py", overrides)


def test_the_default_is_a_box():
    assert load_config(ROOT / "configs" / "base.py").reward.answer == "boxed"
    with make_grader(demo(), "") as grader:
        assert grader.form == "boxed"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["reward.answer=number"],
            "reward.answer: 'number' is none of 'boxed', 'last_number', 'te",
        ),
        (
            ["reward.answer=task"],
            "reward.answer: 'task', but 'arithmetic' has no function `answer`",
        ),
        (
            ["reward.answer=task", "data.task=own_answers:SILENT"],
            "reward.answer: 'task', but 'own_answers:SILENT' has no function `answer`; give it one",
        ),
        (["reward.answer=task", "data.task="], "reward.answer: 'task' needs data.task"),
    ],
)
def test_a_form_that_cannot_be_is_refused(own, overrides, message):
    with pytest.raises(UserError) as refusal:
        validate(demo(*overrides))
    assert [p for p in refusal.value.problems if p.startswith(message)], refusal.value.problems
    assert sum("reward.answer" in p for p in refusal.value.problems) == 1


def test_a_graders_form_is_the_configs(own):
    config = demo("reward.answer=task", "data.task=own_answers:OWN", "student.path=x")
    with make_grader(config, config.data.task) as grader:
        assert (grader.form, grader.verify) == ("own_answers:OWN.answer", "own_answers:OWN.verify")
    with make_grader(config, "") as grader:  # of a benchmark: mathematics in the task's words
        assert (grader.form, grader.verify) == ("own_answers:OWN.answer", None)
    with make_grader(demo("reward.answer=text"), "arithmetic") as grader:
        assert grader.form == "text"


def test_the_form_shapes_the_result():
    with pytest.raises(UserError, match=r"made with reward\.answer='boxed', now 'text'"):
        compare_for_resume(demo().to_dict(), demo("reward.answer=text"), Path("config.json"))


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ([], []),
        (["kd_mask=response"], ["kd_mask"]),
        (["kd_mask=group", "rollout.refill=2"], ["kd_mask", "rollout.refill"]),
        (["objective=grpo", "kd_mask=response", "rollout.refill=1"], ["rollout.refill"]),
        (["objective=kd_rkl", "kd_mask=response"], []),
    ],
)
def test_a_verdict_without_weight_that_decides_is_warned_of(overrides, keys):
    flat = flatten(demo(*overrides))
    assert unweighted_verdicts(flat) == []
    lines = unweighted_verdicts(flat | {"reward.verdict_weight": 0.0})
    assert [line.partition("=")[0] for line in lines] == [f"warning: {key}" for key in keys]
    assert all("reward.verdict_weight=0" in line for line in lines)
