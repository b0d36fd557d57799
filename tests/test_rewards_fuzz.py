r"""Any text at all: nothing raises, and what must hold of every answer holds."""

import random
import string
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdrl_jax.rewards import Grader, grade, has_format, last_boxed
from kdrl_jax.rewards.format import final_answer
from kdrl_jax.rewards.math_answer import clean, quick_verdict, same_unit, too_deep, without_unit
from kdrl_jax.rewards.text_answer import same_text
from kdrl_jax.types import OUTCOMES

settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")

ANY = st.text(st.characters(), max_size=200)  # with NUL and lone surrogates
PIECES = [
    "\\boxed{", "\\fbox{", "\\boxed ", "<think>", "</think>", "{", "}", "(", ")", "[", "]",
    "\\{", "\\}",
    "\\frac{1}{2}", "\\frac12", "\\sqrt{", "\\text{", "\\left(", "\\right)", "^", "_", "\\",
    "$", "%", "!",
    ",", ";", "=", "<", "\\pm ", "\\infty", "9", "12", "0.5", "1,234", "-", "+", "/", "x",
    "y", "e5", " ",
    "\n", "\x00", "\ud800", "５", "٣", "⁵", "½", "π", "°", "\\circ", "cm", " apples", " or ",
    "\\neq ", "'",
    "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "__import__('os')", "\\binom{5}{2}",
    "_8", "\\prime",
]  # fmt: skip
LATEX = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
TEXTS = st.one_of(ANY, LATEX)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1, timeout_s=2.0) as shared:
        yield shared


@settings(max_examples=600)
@given(TEXTS, TEXTS)
def test_nothing_here_raises(text: str, other: str) -> None:
    assert has_format(text) in (True, False)
    for required in (True, False):
        assert isinstance(final_answer(text, require_format=required), str | None)
    assert isinstance(last_boxed(text), str | None)
    gold, answer = clean(text), clean(other)
    assert quick_verdict(gold, answer) in (True, False, None)
    assert gold.startswith(without_unit(gold))
    assert isinstance(too_deep(gold), bool)
    assert same_unit(text, other) is same_unit(other, text)
    assert same_text(text, other) is same_text(other, text)


@settings(max_examples=600)
@given(TEXTS, TEXTS)
def test_the_quick_verdict_is_symmetric_and_reflexive(text: str, other: str) -> None:
    gold, answer = clean(text), clean(other)
    both = {quick_verdict(gold, answer), quick_verdict(answer, gold)}
    assert not {True, False} <= both, "one way equal, the other way not"
    assert quick_verdict(gold, gold) is bool(gold)


@settings(max_examples=150)
@given(st.lists(TEXTS, min_size=1, max_size=4), TEXTS)
def test_grading_never_raises(grader: Grader, texts: list[str], gold: str) -> None:
    responses = [f"<think></think>\\boxed{{{text}}}" for text in texts] + texts
    verdicts = grader.grade(responses, [gold] * len(responses))
    assert len(verdicts) == len(responses)
    for verdict in verdicts:
        assert verdict.outcome in OUTCOMES
        assert verdict.reward == (verdict.outcome == "correct")


@settings(max_examples=300)
@given(st.integers(-(10**9), 10**9), TEXTS.filter(lambda t: "boxed" not in t and "fbox" not in t))
def test_a_wrong_box_after_a_right_one_is_wrong(n: int, between: str) -> None:
    text = f"\\boxed{{{n}}}{between}\\boxed{{{n + 1}}}"
    assert grade(text, str(n), require_format=False).outcome == "wrong"
    assert grade(f"<think></think>{text}", str(n)).reward == 0


@settings(max_examples=300)
@given(st.integers(-(10**9), 10**9), st.randoms(use_true_random=False))
def test_wrapping_changes_nothing(n: int, rng: random.Random) -> None:
    right, wrong = str(n), str(n + 1)
    for _ in range(rng.randint(1, 6)):
        wrap = rng.choice(
            ["${}$", " {} ", "\\left {} \\right", "{}.", "\\displaystyle {}", "\\boxed{{{}}}"]
        )
        right, wrong = wrap.format(right), wrap.format(wrong)
    assert quick_verdict(str(n), clean(right)) is True
    assert quick_verdict(str(n), clean(wrong)) is False


@settings(max_examples=300)
@given(st.integers(0, 10**12), st.sampled_from(["０", "٠", "०", "๐", "𝟎"]))
def test_a_decimal_digit_of_any_script_is_that_digit(n: int, zero: str) -> None:
    written = "".join(chr(ord(zero) + int(digit)) for digit in str(n))
    assert quick_verdict(str(n), clean(written)) is True
    assert quick_verdict(str(n + 1), clean(written)) is False


@settings(max_examples=300)
@given(st.text(string.ascii_letters + string.digits + " .,", min_size=1, max_size=60))
def test_only_a_closed_box_after_the_reasoning_is_an_answer(text: str) -> None:
    for response in (
        text,
        f"<think>\\boxed{{{text}}}</think>{text}",
        f"<think></think>\\boxed{{{text}",
        f"<think></think>\\boxed{{{text}}} \\boxed{{{{{text}}}",
    ):
        assert not has_format(response)
        assert grade(response, text).outcome == "format"
