r"""Rewards: format, the last box, equivalences, and workers that hang, crash or do not start."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import HANG_S, wait_until
from hanging import only_hanging_is_timed

from kdrl_jax.rewards import Grader, grade, has_format, last_boxed
from kdrl_jax.rewards.math_answer import (
    MAX_DEPTH,
    clean,
    quick_verdict,
    too_deep,
    without_unit,
)
from kdrl_jax.rewards.text_answer import same_text
from kdrl_jax.types import OUTCOMES, Verdict

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


def response(answer: str) -> str:
    return f"<think>some thought</think>\nSo it is \\boxed{{{answer}}}."


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1, timeout_s=HANG_S, require_format=True) as shared:
        yield shared


# --- Format and the last box -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think>\\boxed{1}", True),
        ("\n <think>a\nb</think>\n\nHence $\\boxed{1}$. Done", True),
        ("a</think>\\boxed{1}", True),  # the template ended the prompt with <think>
        ("<think></think>\\boxed{}", True),
        ("\\boxed{1}", False),
        ("<think>\\boxed{1}</think>", False),
        ("<think>a</think>1", False),
        ("<think>a</think>\\boxed{1", False),
        ("<think>a \\boxed{1}", False),
        ("well <think>a</think>\\boxed{1}", False),
        ("<think>a<think>b</think>\\boxed{1}", False),
        ("<think>a</think>b</think>\\boxed{1}", False),
        ("<think>a</think><think>b</think>\\boxed{1}", False),
        ("<think>a</think>\\boxed{1}<think>", False),
        ("</think><think>\\boxed{1}", False),
        ("", False),
    ],
)
def test_has_format(text: str, expected: bool) -> None:
    assert has_format(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}} }", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{a \\\\{b}}", "a \\\\{b}"),
        ("\\boxed{1} \\boxed{2", None),
        ("\\boxed{x = \\boxed{5}}", "5"),
        ("\\boxed{1} \\fbox{2}", "2"),
        ("\\fbox{1} \\boxed {2}", "2"),
        ("\\boxed 7.", "7"),
        ("$\\boxed 7$", "7"),
        ("\\boxed{3} \\boxedminipage{4}", "3"),
        ("\\boxed{ }", ""),
        ("\\boxed(7)", None),
        ("\\boxed{7} \\boxed[8]", None),
        ("\\boxed", None),
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 300_000,
        "\\boxed{" + "{" * 2_000_000,
        "\\boxedx" * 300_000,
        "<think>" * 300_000,
        "</think>" * 300_000,
        "<think></think>\\boxed{" + "\\" * 2_000_001,
        "<think></think>\\boxed{" + "1 ^ \\, ~" * 200_000 + "}",
        "<think></think>\\boxed{\\text{" + "a " * 1_000_000 + "}}",
        "<think></think>\\boxed{" + "9" * 2_000_000 + "}",
    ],
    ids=range(9),
)
def test_huge_texts_take_linear_time(text: str) -> None:
    started = time.process_time()
    assert grade(text, "9" * 10).reward == 0
    assert time.process_time() - started < 3


# --- Equivalences ------------------------------------------------------------------------------

# fmt: off
SAME = [
    ("\\frac{1}{2}", "0.5"), ("\\frac{1}{2}", "\\dfrac12"), ("1/2", "\\tfrac{2}{4}"),
    ("-\\frac{12}{5}", "-2.4"), ("\\frac{1}{3}", "0.3333333"), ("1234", "1,234"),
    ("1234", "1{,}234"), ("1000000", "1\\,000\\,000"), ("025", "25"),
    ("1.24e-8", "1.24 \\times 10^{-8}"), ("1e11", "10^{11}"), ("2e-1", "-1+2e"),
    ("90", "90^\\circ"), ("10", "10 \\text{ cm}"), ("10", "$10$"), ("\\$10", "10"), ("50", "50\\%"),
    ("0.5", "50\\%"), ("5", "5 apples"), ("\\{1,2\\}", "\\{2,1\\}"), ("-2,1", "1,-2"),
    ("2,-2", "\\pm 2"), ("(1,2)", "( 1 , 2 )"), ("(15,-29)", "(15.0,-29)"), ("[1,2)", "[1.0, 2)"),
    ("(-\\infty,2)\\cup(3,\\infty)", "(3,\\infty)\\cup(-\\infty,2)"), ("x<3", "(-\\infty,3)"),
    ("x=5", "5"), ("5", "x=5"), ("(x+1)^2", "x^2+2x+1"), ("\\sqrt{8}", "2\\sqrt2"),
    ("6+9i", "9i+6"), ("1024", "2^{10}"), ("2516_8", "2516_{8}"), ("\\text{Evelyn}", "Evelyn"),
    ("Evelyn", "\\mathrm{evelyn}"), ("\\text{A}", "A"), ("A", "\\text{(A)}"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}"),
    (
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        "\\begin{pmatrix} 1 \\\\ \\frac{4}{2}\\end{pmatrix}",
    ),
    ("3\\pi", "3π"), ("-5", "−5"),
    ("\\begin{pmatrix}1\\\\(2)\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("(-\\infty,3)", "x<3"), ("5", "５"), ("5", "٥"), ("10", "10 \\text{ square units}"),
    ("\\alpha", "\\alpha+0"),
    ("5", "5 inches"), ("5.1", "\\approx 5.1"), 
    ("30^\\circ", "30 \\text{ degrees}"),
    ("5", "2+3=5"),
    ("\\frac{270}7\\text{ degrees}", "270/7"),
    ("5.4 \\text{ cents}", "5.4"), ("2516_8", "2516"), ("5 \\text{ km}", "5 \\text{ kilometers}"),
    ("5", "5_{10}"),
    ("2^{1000000}", "$2^{1000000}$."), ("\\{2^{1000000},x\\}", "\\{x,2^{1000000}\\}"),
]
# fmt: on

# fmt: off
DIFFERENT = [
    ("\\frac{1}{2}", "0.51"), ("\\frac{1}{3}", "0.333"), ("57", "58"),
    ("1 \\frac{1}{2}", "\\frac{11}{2}"), ("1.24e-8", "1.25e-8"), ("1.24e-8 x", "1.25e-8 x"),
    ("\\frac{1.24}{10^8}", "\\frac{1.25}{10^8}"), ("0", "1\\,000"), ("(1,2)", "(2,1)"),
    ("[1,2)", "(1,2]"), ("[1,2]", "(1,2)"), ("\\{1,2\\}", "\\{1,3\\}"), ("x<3", "(-\\infty,3]"),
    ("x=5", "y=5"), ("(x+1)^2", "x^2+2x+2"), ("2516_8", "2516_7"), ("2516_8", "2517_8"),
    ("\\text{Evelyn}", "Bob"), ("listen", "silent"), ("even", "odd"), ("A", "B"), ("5", "five"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}"),
    ("3", "3 + \\frac{1}{1000}"), ("5", "-5"),
]

# What a policy finds that is paid for matching, not for being right. Never "correct".
TRICKS = [
    ("1", "1,2,3,4"), ("1", "x=1 or x=2"), ("5", "5 or 7"), ("5", "5 \\text{ or } 7"),
    ("5", "not 5"),
    ("5", "\\neq 5"), ("5", "x \\neq 5"), ("5", "5 \\text{ is wrong}, 6"), ("5", "5 \\pm 1"),
    ("5", "\\pm 5"),
    ("5", "5 \\text{ but maybe } \\frac{7}{2}"), ("5", "6=5"), ("5", "7=6=5"), ("5", "x=5=6"),
    ("5", "x=x"),
    ("5", "\\square"), ("5", "\\text{answer}"), ("5", "answer"), ("5", "x"), ("5", "x<5"),
    ("5", "\\text{True}"),
    ("\\frac{1}{2}", "\\text{the value } \\frac{1}{2} \\text{ is false} &&&"),
    ("5", "\\frac{0}{0}"),
    ("\\frac{1}{2}", "\\begin{foo} \\frac{1}{3} \\frac{1}{2}"), ("3t", "3"), ("2h", "2"),
    ("5", "5 m n"),
    ("\\frac{1}{2}h", "\\frac12"), ("2d", "2"), ("5", "5 \\text{ hundred}"), ("5", "5 million"),
    ("5", "5k"),
    ("5 \\text{ km}", "5 \\text{ m}"), ("10^\\circ", "10 \\text{ radians}"),
    ("\\$5", "5 \\text{ cents}"),
    ("5 \\text{ cm}^2", "5 \\text{ cm}^3"), ("(1,2)", "\\{1,2\\}"), ("(1,2)", "[1,2]"),
    ("[1,2]", "\\{1,2\\}"),
    ("2516", "2516_8"), ("5", "5_3"), ("x", "x'"), ("f'(x)", "f(x)"), ("0", "nan"),
    ("0", "\\emptyset"),
    ("\\infty", "\\frac{1}{0}"), ("\\infty", "oo"), ("\\infty", "-\\infty"), ("5", "zoo"),
    ("5", "None"),
    ("\\sqrt{2}", "\\sqrt{2} \\approx 1"), ("\\sqrt{2}", "\\sqrt{2} \\ldots 1"), ("5", "5 \\sim 6"),
    ("0", "0 \\text{ is wrong, it is } 1"), ("0", "0 \\text{ but not } x"),
    ("5", "5 \\to 6"), ("5", "5 \\ldots 7"), ("5", "6 \\approx 5"), ("5", "5;6"), ("5", "5 6"),
    ("56", "5 6"),
    ("5", "answer: 5 6"), ("5", "final answer is 5"), ("5", "\\cancel{5} 6"), ("5", "\\lnot 5"),
    ("5", "⁵"),
    ("5", "Ⅴ"), ("5", "⑤"), ("5", "\\{5,6\\} \\cap \\{7\\}"), ("\\text{A}", "A,B"),
    ("A", "\\text{A or B}"),
    ("yes", "\\text{yes and no}"), ("x^2+y^2=1", "0=0"), ("x=1", "x=x"),
    ("5", "5 \\text{ or so, perhaps } 6"),
    ("5", "\\begin{cases} 5 \\\\ 6 \\end{cases}"), ("5", "5\\text{ (or }6)"), ("5", "(5,5)"),
    ("x", "y+0"),
]
# fmt: on


def test_equal_answers_are_correct(grader: Grader) -> None:
    gold, answers = zip(*SAME, strict=True)
    verdicts = grader.grade([response(a) for a in answers], gold)
    missed = [pair for pair, v in zip(SAME, verdicts, strict=True) if v != Verdict(1.0, "correct")]
    assert not missed


def test_different_answers_are_wrong(grader: Grader) -> None:
    gold, answers = zip(*DIFFERENT, strict=True)
    verdicts = grader.grade([response(a) for a in answers], gold)
    passed = [
        (pair, v.outcome)
        for pair, v in zip(DIFFERENT, verdicts, strict=True)
        if v != Verdict(0.0, "wrong")
    ]
    assert not passed


def test_tricks_are_not_paid(grader: Grader) -> None:
    gold, answers = zip(*TRICKS, strict=True)
    verdicts = grader.grade([response(a) for a in answers], gold)
    assert [t for t, v in zip(TRICKS, verdicts, strict=True) if v.reward] == []
    assert {v.outcome for v in verdicts} == {"wrong", "unparsable"}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("5 \\text{ cm}", "5"),
        ("5 \\mathrm{cm}^{2}", "5"),
        ("\\frac{1}{2} apples", "\\frac{1}{2}"),
        ("3.5 km", "3.5"),
        ("\\sqrt{2} \\text{ feet}", "\\sqrt{2}"),
        ("3t", "3t"),
        ("5 ab", "5 ab"),
        ("5 pi", "5 pi"),
        ("2x apples", "2x apples"),
        ("5 \\text{ thousand}", "5 \\text{ thousand}"),
        ("5 \\text{ or }", "5 \\text{ or }"),
        ("\\text{cm}", "\\text{cm}"),
        ("5 \\text{ a} \\text{ b}", "5 \\text{ a}"),
        ("", ""),
    ],
)
def test_units(text: str, left: str) -> None:
    assert without_unit(text) == left


def test_nesting() -> None:
    assert not too_deep("(" * MAX_DEPTH + "x" + ")" * MAX_DEPTH)
    assert too_deep("{[(" * MAX_DEPTH)
    assert not too_deep("()" * 1000)


def test_the_quick_verdict_leaves_algebra_alone() -> None:
    assert quick_verdict(clean("x+1"), clean("1+x")) is None
    assert quick_verdict(clean("ab"), clean("ba")) is None
    assert quick_verdict(clean("50"), clean("50\\%")) is None
    assert quick_verdict(clean("2e-1"), clean("0.2")) is None
    assert quick_verdict(clean("\\dfrac{1}{2}."), clean("$\\frac{1}{2}$")) is True
    assert quick_verdict(clean("\\frac{1}{0}"), clean("7")) is None


# --- Outcomes and order ------------------------------------------------------------------------


def test_outcomes_in_order(grader: Grader) -> None:
    cases = [
        (response("x+1"), "1+x", "correct"),
        ("\\boxed{7}", "7", "format"),
        (response("7"), "7", "correct"),
        ("<think>\\boxed{7}</think>\\boxed{8}", "7", "wrong"),
        (response("x+2"), "1+x", "wrong"),
        (response(""), "7", "unparsable"),
        (response("\\frac"), "x+1", "unparsable"),
        (response("9^{9^{9^{9}}}"), "7", "unparsable"),
        (response("(10^{10})!"), "7", "unparsable"),
        (response("x" * 5000), "x+1", "unparsable"),
        (response("x+2"), "\\frac", "wrong"),
    ]
    texts, gold, expected = zip(*cases, strict=True)
    verdicts = grader.grade(texts, gold)
    assert [v.outcome for v in verdicts] == list(expected)
    assert [v.reward for v in verdicts] == [float(e == "correct") for e in expected]
    assert set(expected) < set(OUTCOMES)


def test_accuracy_alone() -> None:
    assert grade("It is \\boxed{3}, no, \\boxed{7}", "7", require_format=False).reward == 1
    assert grade("It is \\boxed{7}, no, \\boxed{3}", "7", require_format=False).outcome == "wrong"
    assert grade("It is 7", "7", require_format=False) == Verdict(0.0, "unparsable")
    assert grade("It is \\boxed{7}", "7") == Verdict(0.0, "format")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="1 responses but 2 answers"):
        Grader().grade(["a"], ["1", "2"])
    with pytest.raises(ValueError, match="1 responses but 1 answers and 2 metas"):
        Grader().grade(["a"], ["1"], [{}, {}])
    with pytest.raises(ValueError, match="workers >= 1"):
        Grader(workers=0)
    with pytest.raises(ValueError, match="timeout_s > 0"):
        Grader(timeout_s=0)


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("True", "true", True),
        ("True", "\\text{True}.", True),
        ("TO THIS WORK", "to  this\nwork", True),
        ("off", "of", False),
        ("['a', 'b']", "['a', 'b']", True),
        ("['a', 'b']", "['b', 'a']", False),
        ("0 0 2", "0 0 2", True),
        ("0 0 2", "0 02", False),
        ("1 2\n3 4", "1 2\n3 4", True),
        ("7", "7.0", True),
        ("7", "$7$", True),
        ("1000", "1,000", True),
        ("-3.50", "-3.5", True),
        ("100000", "1e5", False),  # base_conversion means hexadecimal digits
        ("7", "x = 7", False),
        ("7", "7/1", False),
        ("7", "", False),
        ("7", "9" * 5000, False),
        ("٧", "7", True),
    ],
)
def test_answers_as_text(gold: str, answer: str, equal: bool) -> None:
    assert same_text(answer, gold) is equal


def test_a_verifier_in_this_process() -> None:
    seen = []

    def verify(answer: str, gold: str, meta: dict) -> bool:
        seen.append((answer, gold, meta))
        return answer == gold + meta.get("more", "")

    with Grader(workers=1, verify=verify) as grader:
        texts = [response("ab"), response("ab"), "\\boxed{a}", response("")]
        verdicts = grader.grade(texts, ["a"] * 4, [{"more": "b"}, {"more": "c"}, {}, {}])
        assert [v.outcome for v in verdicts] == ["correct", "wrong", "format", "unparsable"]
        assert seen == [("ab", "a", {"more": "b"}), ("ab", "a", {"more": "c"})]
        assert grader.grade([response("a")], ["a"])[0].reward == 1
        assert not grader._pool
    with Grader(require_format=False, verify=verify) as grader:
        assert grader.grade(["\\boxed{a}"], ["a"])[0].reward == 1
        assert grader.grade(["a"], ["a"])[0].outcome == "unparsable"


# --- Workers -----------------------------------------------------------------------------------

EVIL = """
import glob, json, os, sys, time
print(json.dumps("hello"), flush=True)
for line in sys.stdin:
    gold, answer = json.loads(line)
    if answer.startswith("hang"):
        time.sleep(1000)
    if answer.startswith("die"):
        os.kill(os.getpid(), 11)
    if answer.startswith("once") and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os._exit(1)
    if answer.startswith("slow"):
        time.sleep(0.3)
    if answer.startswith("meet"):  # when four are here they go on
        open(sys.argv[1] + answer, "w").close()
        while len(glob.glob(glob.escape(sys.argv[1]) + "meet*")) < 4:
            time.sleep(0.01)
    print(json.dumps("correct"), flush=True)
"""


def evil_grader(tmp_path: Path, workers: int, timeout_s: float, script: str = EVIL) -> Grader:
    """A grader whose workers call every answer correct, or misbehave as the answer says."""
    (tmp_path / "evil.py").write_text(script)
    grader = Grader(workers=workers, timeout_s=timeout_s)
    grader._supervisor.command = [sys.executable, str(tmp_path / "evil.py"), str(tmp_path / "flag")]
    return grader


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_hanging_and_dying_workers_are_replaced(tmp_path: Path, monkeypatch) -> None:
    answers = ["a+1", "hang+1", "die+1", "b+1", "once+1", "hang+1", "c+1", "hang+2", "d+1"]
    only_hanging_is_timed(monkeypatch, "hang")
    with evil_grader(tmp_path, workers=2, timeout_s=0.5) as grader:
        verdicts = grader.grade([response(a) for a in answers], ["x"] * len(answers))
        again = grader.grade([response("e+1")], ["x"])
        counts = grader.take_counts()
        pids = [worker.process.pid for worker in grader._pool]
    expected = ["correct", "timeout", "unparsable", "correct", "correct"]
    expected += ["timeout", "correct", "timeout", "correct"]
    assert [v.outcome for v in verdicts] == expected
    assert again == [Verdict(1.0, "correct")]
    assert counts.timeouts == 2  # of three, two ask the same
    assert counts.seconds_max >= 0.5
    assert pids
    assert not any(map(exists, pids)), "close() left a process, or a zombie"


def test_workers_start_when_needed_and_work_at_the_same_time(tmp_path: Path) -> None:
    with evil_grader(tmp_path, workers=4, timeout_s=HANG_S) as grader:
        grader.grade([response("7"), response("8"), "x"], ["7", "7", "7"])
        assert not grader._pool
        grader.grade([response("slow+0")], ["x"])
        assert len(grader._pool) == 1
        warm = [response(f"slow+{i}") for i in range(1, 5)]
        grader.grade(warm, ["x"] * 4)
        assert len(grader._pool) == 4
        # None of these four would end before the others have begun.
        met = grader.grade([response(f"meet+{i}") for i in range(4)], ["x"] * 4)
        assert [v.outcome for v in met] == ["correct"] * 4
        grader.take_counts()
        grader.grade(warm * 8, ["x"] * 32)
        assert grader.take_counts().asked == 0  # known from before


def test_an_interrupted_call_leaves_no_stale_reply(tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    with evil_grader(tmp_path, workers=1, timeout_s=HANG_S) as grader:
        grader.grade([response("a+1")], ["x"])
        with monkeypatch.context() as patch:
            patch.setattr(grader._supervisor, "_collect", interrupt)
            with pytest.raises(KeyboardInterrupt):
                grader.grade([response("slow+1")], ["x"])
        assert not grader._pool
        assert grader.grade([response("b+1")], ["x"])[0].reward == 1


def test_workers_outlive_the_signal_that_asks_to_save() -> None:
    """Slurm sends SIGTERM to all processes of a job; the step is still to be finished."""
    with Grader(workers=1) as grader:
        assert grader.grade([response("x+1")], ["1+x"])[0].outcome == "correct"
        pid = grader._pool[0].process.pid
        os.kill(pid, signal.SIGTERM)
        assert grader.grade([response("y+1")], ["1+y"])[0].outcome == "correct"
        assert grader._pool[0].process.pid == pid


def test_workers_that_never_start_are_an_error_and_not_a_hang(tmp_path: Path) -> None:
    script = "raise ImportError('no math_verify here')"
    with (
        evil_grader(tmp_path, workers=2, timeout_s=1.0, script=script) as grader,
        pytest.raises(RuntimeError, match="no math_verify here"),
    ):
        grader.grade([response("a+1")], ["x"])
    assert not grader._pool


def test_grading_beside_other_work(grader: Grader) -> None:
    """In the order of the calls, with what they raise, and equal to `grade`."""
    texts = [response("2"), response("x+1"), response("3")]
    jobs = [grader.submit([text], ["1+x"]) for text in texts]
    assert [job.result()[0].outcome for job in jobs] == ["wrong", "correct", "wrong"]
    with pytest.raises(ValueError, match="1 responses but 2 answers"):
        grader.submit(["a"], ["b", "c"]).result()
    with Grader(workers=1) as other:
        other.submit([response("x+1")], ["1+x"])
    assert other._background is None


def test_real_workers_are_killed_in_time(monkeypatch) -> None:
    only_hanging_is_timed(monkeypatch, "binom{1")
    hangs = "\\binom{10000000}{5000000}"  # math-verify evaluates it while it parses
    with Grader(workers=1, timeout_s=1.0) as grader:
        grader.grade([response("x+1")], ["1+x"])
        first = grader._pool[0].process.pid
        verdicts = grader.grade([response(hangs), response("y+1")], ["7", "1+y"])
        assert [v.outcome for v in verdicts] == ["timeout", "correct"]
        assert not exists(first)


def test_workers_hold_neither_jax_nor_gmpy(tmp_path: Path, monkeypatch) -> None:
    for name in ("gmpy2", "flint"):  # as if installed; SymPy and mpmath would import them
        (tmp_path / f"{name}.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with Grader(workers=1, timeout_s=HANG_S) as grader:
        assert grader.grade([response("1+z")], ["z+1"])[0].reward == 1
        hello = grader._pool[0].hello
    assert hello["ground_types"] == "python"
    assert {"sympy", "mpmath", "math_verify"} <= set(hello["modules"])
    unwanted = {"jax", "jaxlib", "numpy", "gmpy2", "flint", "torch", "kdrl_jax"}
    assert not unwanted & set(hello["modules"])


def test_a_busy_worker_ends_after_its_parent_is_killed() -> None:
    code = r"""
import signal
from kdrl_jax.rewards import Grader
from kdrl_jax.rewards.supervisor import Worker
begin = Worker.begin
Worker.begin = lambda self, task, timeout_s: begin(self, task, 1800.0)  # CPU time is what ends it
grader = Grader(workers=1, timeout_s=0.6)
grader.grade([r"<think></think>\boxed{x+1}"], ["1+x"])
print(grader._pool[0].process.pid, flush=True)
signal.setitimer(signal.ITIMER_REAL, 0.3)  # SIGALRM ends this process
grader.grade([r"<think></think>\boxed{\binom{10000000}{5000000}}"], ["1"])
"""
    argv = [sys.executable, "-c", code]
    run = subprocess.run(argv, stdout=subprocess.PIPE, cwd=ROOT, timeout=HANG_S)
    assert run.returncode == -signal.SIGALRM
    pid = int(run.stdout)
    wait_until(lambda: not exists(pid) or is_zombie(pid), "the worker to follow its parent")


def is_zombie(pid: int) -> bool:
    """Ended, but its adoptive parent has not asked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return not exists(pid)


# --- Real answers ------------------------------------------------------------------------------


def real_answers() -> list[str]:
    files = sorted(DATA.glob("*.jsonl"))
    if not files:
        pytest.skip(f"the evaluation sets are not at {DATA}")
    return [json.loads(line)["answer"] for path in files for line in path.open(encoding="utf-8")]


def test_real_answers_equal_themselves_and_not_their_neighbours(grader: Grader) -> None:
    gold = real_answers()
    verdicts = grader.grade([f"<think>x</think>\\boxed{{{a}}}" for a in gold], gold)
    assert Counter(v.outcome for v in verdicts) == {"correct": len(gold)}

    pairs = list(zip(gold, gold[1:] + gold[:1], strict=True))
    pairs = [(a, b) for a, b in pairs if clean(a) != clean(b)]
    pairs = [p for p in pairs if quick_verdict(*map(clean, p)) is not None] + [
        p for p in pairs if quick_verdict(*map(clean, p)) is None
    ][::12]
    outcomes = Counter(
        v.outcome for v in grader.grade([response(b) for _, b in pairs], [a for a, _ in pairs])
    )
    assert len(pairs) > 2000
    assert outcomes["correct"] <= len(pairs) / 1000
    assert outcomes["timeout"] <= 2


def test_math_verify_reads_real_answers(grader: Grader) -> None:
    """The same without the fast path: what math-verify itself makes of an answer and itself."""
    gold = sorted({clean(a) for a in real_answers()})
    sample = [a for a in gold if a and not re.fullmatch(r"[-\d.,]+", a)][::12]
    outcomes = Counter(grader._verify([(a, a) for a in sample]).values())
    assert len(sample) > 50
    assert outcomes["correct"] >= 0.97 * len(sample)
