"""Composable filters of problems, each a counted step.

    data.filters = ("dedupe", "pass_rate:model=DeepSeek-R1-Distill-Qwen-1.5B,max=0.875")

A filter is written `name` or `name:key=value,key=value`; values that are lists are separated by
`|`. They run in order, each on what the one before left. They are functions of the problems alone,
without random state; only `answer_parses` has a time limit. Pass rates are those of
`meta['pass_rate']`, see `kdrl_jax.data.schemas`; `python -m kdrl_jax.difficulty` measures them for
one's own data.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import inspect
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from kdrl_jax.data.problems import load_problems
from kdrl_jax.data.schemas import PASS_RATE
from kdrl_jax.rewards import Grader
from kdrl_jax.rewards.math_answer import MAX_LENGTH, clean, quick_verdict
from kdrl_jax.types import Problem, UserError

PromptLength = Callable[[Problem], int]

_R1 = "DeepSeek-R1-Distill-Qwen-"
# arXiv 2506.02208, data of stage 2: no problem that the 1.5B model solves 15 or 16 times of 16,
# none that all three models fail, at most a tenth that the 1.5B model fails, no long prompt.
STAGE2_FILTERS = (
    f"pass_rate:model={_R1}1.5B,max=0.875",
    f"solved_by_any:models={_R1}1.5B|{_R1}7B|{_R1}32B",
    f"cap_unsolved:model={_R1}1.5B,share=0.1",
    "prompt_tokens:max=1024",
    "expected:n=61000",
)
# The same paper, zero-RL: the teacher's data and the student's, which is easier.
ZERO_RL_TEACHER_FILTERS = (f"pass_rate:model={_R1}1.5B,min=0.25", "expected:n=58000")
ZERO_RL_STUDENT_FILTERS = (f"pass_rate:model={_R1}1.5B,min=0.5", "expected:n=46000")
# Stage 1 takes DeepScaleR's problems as they are.
STAGE1_FILTERS = ("expected:n=40000",)
EXPECTED_SHARE = 0.05
"""A count that is further than this share from the expected one is reported."""


# --- What there is ------------------------------------------------------------------------------


def pass_rate(
    problems: list[Problem], *, model: str, min: float = 0.0, max: float = 1.0
) -> list[Problem]:
    """Those that `model` solves in a share of attempts from `min` to `max`, both included."""
    rates = _rates(problems, model)
    return [p for p, rate in zip(problems, rates, strict=True) if min <= rate <= max]


def solved_by_any(problems: list[Problem], *, models: tuple[str, ...]) -> list[Problem]:
    """Those that at least one of the models solved at least once."""
    rates = [_rates(problems, model) for model in models]
    return [p for p, *found in zip(problems, *rates, strict=True) if any(found)]


def cap_unsolved(problems: list[Problem], *, model: str, share: float) -> list[Problem]:
    """At most `share` of what is left are problems that `model` never solved.

    Which of them stay is decided by a digest of their texts, whatever their order.
    """
    rates = _rates(problems, model)
    unsolved = [p for p, rate in zip(problems, rates, strict=True) if rate == 0]
    part = Fraction(str(share))  # not the float below it: 0.1 of 10 is 1
    solved = len(problems) - len(unsolved)
    room = len(unsolved) if part >= 1 else int(solved * part / (1 - part))
    stay = {id(p) for p in sorted(unsolved, key=lambda p: _digest(p.problem))[:room]}
    return [p for p, rate in zip(problems, rates, strict=True) if rate > 0 or id(p) in stay]


def labelled(problems: list[Problem], *, models: tuple[str, ...]) -> list[Problem]:
    """Those that have a pass rate of each of the models."""
    kept = [p for p in problems if all(_rate(p, model) is not None for model in models)]
    if not kept and problems:
        raise _unlabelled(problems, next(m for m in models if _rate(problems[0], m) is None))
    return kept


def prompt_tokens(
    problems: list[Problem], *, max: int, prompt_length: PromptLength
) -> list[Problem]:
    """Those whose prompt, in the run's prompt style and chat template, has at most `max` tokens."""
    return [p for p in problems if prompt_length(p) <= max]


def dedupe(problems: list[Problem]) -> list[Problem]:
    """The first of those with the same text, see `normalise`."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(normalise(problem.problem), problem)
    return list(first.values())


def exclude(problems: list[Problem], *, files: tuple[str, ...]) -> list[Problem]:
    """Those whose text is not that of a problem in the given data sets: held-out benchmarks."""
    held_out = {normalise(p.problem) for file in files for p in load_problems(file)}
    return [p for p in problems if normalise(p.problem) not in held_out]


def answer_parses(problems: list[Problem]) -> list[Problem]:
    """Those whose answer can be graded, see `gradable`."""
    good = gradable([p.answer for p in problems])
    return [p for p, kept in zip(problems, good, strict=True) if kept]


def limit(problems: list[Problem], *, n: int) -> list[Problem]:
    """The first `n`."""
    return problems[:n]


def expected(problems: list[Problem], *, n: int) -> list[Problem]:
    """All of them. A run warns where they are not about `n`: see `FilterReport.warnings`."""
    return problems


FILTERS: dict[str, Callable[..., list[Problem]]] = {
    f.__name__: f
    for f in (
        pass_rate,
        solved_by_any,
        cap_unsolved,
        labelled,
        prompt_tokens,
        dedupe,
        exclude,
        answer_parses,
        limit,
        expected,
    )
}


# --- Texts and answers --------------------------------------------------------------------------

_NOISE = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad)(?![a-z])|\\[,;:! ]|\\[()\[\]]|[\s$]|[.?!:]+$"
)
_FRACTION = re.compile(r"\\[dtc]frac(?![a-z])")


def normalise(text: str) -> str:
    """One spelling of a problem: no case, white space, math delimiters, sizes or final stop.

    Signs and digits stay, so `2+3=` and `2-3=` remain two problems.
    """
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    return _NOISE.sub("", _FRACTION.sub(r"\\frac", text))


def gradable(answers: Sequence[str], *, workers: int = 4, timeout_s: float = 10.0) -> list[bool]:
    r"""Whether each gold answer is one that a response can match and a grader can read.

    A box with the answer itself must be graded right (balanced braces, something in it), and it
    must be a number, a word or something that math-verify reads as an expression.
    """
    boxed = [f"\\boxed{{{answer}}}" for answer in answers]
    # Against a word and a number that no data set has: what is decided at all was readable.
    word, number = "\\text{not an answer}", "0.90817263544536271809"
    cleaned = [clean(answer) for answer in answers]
    unsure = [
        i for i, answer in enumerate(cleaned) if answer and quick_verdict(word, answer) is None
    ]
    with Grader(workers, timeout_s, require_format=False) as grader:
        same = grader.grade(boxed, answers)
        read = grader.grade([boxed[i] for i in unsure], [number] * len(unsure))
    good = [
        verdict.reward == 1 and len(answer) <= MAX_LENGTH
        for verdict, answer in zip(same, cleaned, strict=True)
    ]
    for i, verdict in zip(unsure, read, strict=True):
        good[i] &= verdict.outcome in ("correct", "wrong")
    return good


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# --- Pass rates ---------------------------------------------------------------------------------


def _rate(problem: Problem, model: str) -> float | None:
    rates = problem.meta.get(PASS_RATE)
    return rates.get(model) if isinstance(rates, dict) else None


def _rates(problems: list[Problem], model: str) -> list[float]:
    rates = [_rate(p, model) for p in problems]
    found = [rate for rate in rates if rate is not None]
    if len(found) < len(problems):
        raise _unlabelled(problems, model)
    return found


def _unlabelled(problems: list[Problem], model: str) -> UserError:
    lacking = [p.id for p in problems if _rate(p, model) is None]
    rates = [p.meta.get(PASS_RATE) for p in problems]
    known = sorted({name for r in rates if isinstance(r, dict) for name in r} - {model})
    return UserError(
        f"data.filters: {len(lacking)} of {len(problems)} problems, {lacking[0]} the first, have "
        f"no pass rate of {model!r} ({'there are ' + ', '.join(known) if known else 'nor any'}); "
        "measure it with python -m kdrl_jax.difficulty"
        + (f", or begin with labelled:models={model}" if len(lacking) < len(problems) else "")
    )


# --- Applying them ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FilterReport:
    """How many problems each step dropped; `str()` of it is a small table."""

    start: int
    steps: tuple[tuple[str, int], ...]
    """(spec, how many it left) of each step, in order."""

    def counts(self) -> Iterator[tuple[str, int, int]]:
        """(spec, dropped, left) of each step."""
        before = self.start
        for spec, left in self.steps:
            yield spec, before - left, left
            before = left

    def __str__(self) -> str:
        width = max([len("filter"), *(len(spec) for spec, _ in self.steps)])
        lines = [f"{'filter':{width}}  {'dropped':>8}  {'left':>8}"]
        lines.append(f"{'':{width}}  {'':>8}  {self.start:>8}")
        lines += [
            f"{spec:{width}}  {dropped:>8}  {left:>8}" for spec, dropped, left in self.counts()
        ]
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """Returns a line for each step `expected` that found another number of problems."""
        lines = []
        for spec, _, left in self.counts():
            name, _, rest = spec.partition(":")
            if FILTERS[name] is expected:
                n = _arguments(expected, rest)[0]["n"]
                if abs(left - n) > EXPECTED_SHARE * n:
                    lines.append(
                        f"{left:,} problems, but about {n:,} were expected here "
                        "(data.filters); these are other data, or the filters work otherwise"
                    )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The report for a JSON file."""
        steps = [{"filter": s, "dropped": d, "left": n} for s, d, n in self.counts()]
        return {"start": self.start, "steps": steps}


def apply_filters(
    problems: Sequence[Problem], specs: Sequence[str], prompt_length: PromptLength | None = None
) -> tuple[list[Problem], FilterReport]:
    """What the filters leave, in order, and how many each of them dropped.

    Args:
      specs: see the module's docstring.
      prompt_length: tokens of a problem's prompt; needed by `prompt_tokens` alone.

    Raises:
      UserError: specs that are wrong, all at once; problems without the labels a filter needs.
      ValueError: `prompt_tokens` without a `prompt_length`.
    """
    kept, steps = list(problems), []
    for spec, step in zip(specs, parse_filters(specs), strict=True):
        if "prompt_length" in inspect.signature(step).parameters:
            if prompt_length is None:
                raise ValueError(f"{spec}: needs prompt_length")
            step = functools.partial(step, prompt_length=prompt_length)
        kept = step(kept)
        steps.append((spec, len(kept)))
    return kept, FilterReport(len(problems), tuple(steps))


def parse_filters(specs: Sequence[str]) -> list[Callable[..., list[Problem]]]:
    """The filters that specs name, with their arguments bound.

    Raises:
      UserError: a line for each unknown name or argument, with the nearest, for each missing
        argument and each value of the wrong type.
    """
    parsed: list[Callable[..., list[Problem]]] = []
    problems: list[str] = []
    for i, spec in enumerate(specs):
        key = f"data.filters[{i}]"
        if not isinstance(spec, str) or spec.partition(":")[0] not in FILTERS:
            near = _nearest(str(spec).partition(":")[0], FILTERS)
            problems.append(f"{key}: {spec!r} is no filter; the nearest is {near}")
            continue
        name, _, rest = spec.partition(":")
        arguments, wrong = _arguments(FILTERS[name], rest)
        problems += [f"{key}: {spec!r}: {what}" for what in wrong]
        parsed.append(functools.partial(FILTERS[name], **arguments))
    if problems:
        raise UserError(*problems)
    return parsed


def _arguments(function: Callable[..., Any], text: str) -> tuple[dict[str, Any], list[str]]:
    """The arguments in `key=value,key=value`, and what is wrong with them."""
    known = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.annotation in _TYPES
    }
    arguments: dict[str, Any] = {}
    wrong = []
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if key not in known:
            there = f"the nearest is {_nearest(key, known)}" if known else "it takes none"
            wrong.append(f"no argument {key!r}; {there}")
        elif not equals or not value:
            wrong.append(f"{key} has no value; write {key}=VALUE")
        else:
            read, kind = _TYPES[known[key].annotation]
            try:
                arguments[key] = read(value)
            except ValueError:
                wrong.append(f"{key}={value} must be {kind}")
    given = {item.partition("=")[0] for item in text.split(",")}
    wrong += [
        f"needs {name}=…, {_TYPES[known[name].annotation][1]}"
        for name in known
        if known[name].default is inspect.Parameter.empty and name not in given
    ]
    return arguments, wrong


def _nearest(name: str, choices: Any) -> str:
    return difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]


def _whole(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise ValueError
    return value


# How an argument reads, by its annotation, and what to say where it does not.
_TYPES: dict[str, tuple[Callable[[str], Any], str]] = {
    "str": (str, "a text"),
    "int": (_whole, "a whole number of at least 1"),
    "float": (_share, "a number from 0 to 1"),
    "tuple[str, ...]": (lambda text: tuple(text.split("|")), "texts separated by |"),
}
