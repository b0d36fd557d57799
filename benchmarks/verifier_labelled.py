r"""Labelled pairs of answers: gold answers, rewritings that mean the same, and near misses.

Every rule is certain by construction: `1{,}234` is 1234 and `\frac{b}{a}` is not `\frac{a}{b}`.
What is a matter of taste (5 % for 5, a unit that the gold answer lacks) is not here.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

FILES = ("aime24", "aime25", "amc23", "math500", "minerva_math", "olympiadbench", "gsm8k_test")

_INTEGER = re.compile(r"-?(?:0|[1-9]\d{0,17})")
_FRACTION = re.compile(r"(-?)\\frac\{(\d+)\}\{(\d+)\}")
_LIST = re.compile(r"\(?([^()\[\]{}=<>\\]|\\frac\{\d+\}\{\d+\}|\\sqrt\{\d+\})+\)?")
_INTERVAL = re.compile(r"([(\[])([^,()\[\]{}]+),([^,()\[\]{}]+)([)\]])")
_WORD = re.compile(r"\\text\{([A-Za-z]{4,})\}")
_BASED = re.compile(r"([1-9]\d*)_\{?(\d)\}?")
_PLAIN = re.compile(
    r"(?:[\w+\-*/^(){} .]|\\(?:frac|sqrt|pi|cdot|left|right|sin|cos|alpha|theta)\b)+"
)
_LETTER = re.compile(r"(?<![A-Za-z\\])[a-zA-Z](?![A-Za-z])")


class Case(NamedTuple):
    """A pair, what was done to make it, and whether the two are equal."""

    category: str
    gold: str
    answer: str
    equal: bool


def golds(data: Path, per_file: int, seed: int) -> list[str]:
    """Different gold answers of the seven files, at most `per_file` of each, drawn by `seed`."""
    found: dict[str, None] = {}
    for name in FILES:
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        answers = sorted({json.loads(line)["answer"] for line in lines})
        random.Random(f"{seed} {name}").shuffle(answers)
        found.update(dict.fromkeys(answers[:per_file]))
    return list(found)


def cases(gold: str) -> list[Case]:
    """All labelled pairs of one gold answer."""
    made = [Case("itself", gold, gold, True)]
    made += [Case(f"= {name}", gold, text, True) for name, text in rewritings(gold)]
    made += [Case(f"≠ {name}", gold, text, False) for name, text in near_misses(gold)]
    return made


def rewritings(gold: str) -> Iterator[tuple[str, str]]:
    """(rule, text) of answers that mean what `gold` means."""
    yield "dollars and spaces", f" ${gold}$ "
    yield "displaystyle", f"\\displaystyle {gold}"
    if _INTEGER.fullmatch(gold):
        n = int(gold)
        yield "decimal", f"{n}.0"
        yield "text wrapper", f"\\text{{{n}}}"
        yield "x = …", f"x = {n}"
        yield "sum", f"{n - 1} + 1"
        yield "scaled fraction", f"\\dfrac{{{6 * n}}}{{6}}"
        yield "difference in brackets", f"\\left({n + 12} - 12\\right)"
        if abs(n) >= 1000:
            yield "thousands", f"{n:,}"
            yield "thousands in LaTeX", f"{n:,}".replace(",", "{,}")
            yield "thousands by thin spaces", f"{n:,}".replace(",", "\\,")
        if n and n % 2 == 0:
            yield "factored", f"2 \\cdot {n // 2}" if n > 0 else f"-2 \\cdot {-n // 2}"
    elif m := _FRACTION.fullmatch(gold):
        sign, a, b = m[1], int(m[2]), int(m[3])
        yield "dfrac", f"{sign}\\dfrac{{{a}}}{{{b}}}"
        yield "slash", f"{sign}{a}/{b}"
        yield "scaled fraction", f"{sign}\\frac{{{3 * a}}}{{{3 * b}}}"
        yield "as a quotient", f"{sign}{a} \\div {b}"
        if sign:
            yield "sign within", f"\\frac{{-{a}}}{{{b}}}"
        if re.fullmatch(r"1?0*", str(10**12 * a % b)) and (10**12 * a) % b == 0:
            exact = f"{Fraction(a, b).numerator / Fraction(a, b).denominator:.12f}".rstrip("0")
            if Fraction(exact) == Fraction(a, b):
                yield "exact decimal", f"{sign}{exact}"
    elif parts := _parts(gold):
        yield "spaces", gold.replace(",", " ,  ")
        if gold.startswith("("):
            yield "left and right", f"\\left({gold[1:-1]}\\right)"
        else:
            yield "other order", ", ".join(reversed(parts))
            yield "as a set", "\\{" + ", ".join(parts) + "\\}"
            yield "and", ", ".join(parts[:-1]) + f" \\text{{ and }} {parts[-1]}"
    elif m := _INTERVAL.fullmatch(gold):
        yield "left and right", f"\\left{m[1]}{m[2]} , {m[3]}\\right{m[4]}"
    elif m := _WORD.fullmatch(gold):
        yield "bare word", m[1]
        yield "mathrm", f"\\mathrm{{{m[1]}}}"
        yield "lower case", f"\\text{{{m[1].lower()}}}"
    elif m := _BASED.fullmatch(gold):
        yield "braces of the base", f"{m[1]}_{{{m[2]}}}"
        yield "spaces", f"{m[1]} _ {m[2]}"
    elif _algebra(gold):
        yield "brackets", f"\\left({gold}\\right)"
        yield "plus 0", f"{gold} + 0"
        yield "times 1", f"1 \\cdot ({gold})"
        yield "twice the half", f"\\frac{{2({gold})}}{{2}}"


def near_misses(gold: str) -> Iterator[tuple[str, str]]:
    """(rule, text) of answers that look like `gold` and differ from it."""
    if _INTEGER.fullmatch(gold):
        n = int(gold)
        yield "off by one", str(n + 1)
        yield "times ten" if n else "one", str(10 * n or 1)
        yield "half more", f"{n}.5"
        yield "a digit changed", f"{gold[:-1]}{(int(gold[-1]) + 3) % 10}"
        yield "two values", f"{n} \\text{{ or }} {n + 1}"
        yield "a list", f"{n - 1}, {n}, {n + 1}"
        yield "plus-minus", f"{n} \\pm 1"
        yield "inequality", f"x < {n}"
        yield "unequal", f"\\neq {n}"
        yield "false equation", f"{n + 1} = {n}"
        yield "doubted", f"{n} \\text{{ is wrong, it is }} {n + 1}"
        yield "unit times variable", f"{n + 2}h"
        if n:
            yield "sign", str(-n)
            yield "thousandfold", f"{n} \\text{{ thousand}}"
            yield "times a variable", f"{n}t"
        if abs(n) > 1:
            yield "reciprocal", f"\\frac{{1}}{{{n}}}"
        if len(gold) > 1 and gold[-1] != gold[-2] and gold[-2:].isdigit():
            yield "digits swapped", f"{gold[:-2]}{gold[-1]}{gold[-2]}"
        if n >= 8 and set(gold) <= set("01234567"):
            yield "base added", f"{n}_8"
    elif m := _FRACTION.fullmatch(gold):
        sign, a, b = m[1], int(m[2]), int(m[3])
        if a != b:
            yield "upside down", f"{sign}\\frac{{{b}}}{{{a}}}" if a else "1"
        yield "numerator", f"{sign}\\frac{{{a + 1}}}{{{b}}}"
        yield "denominator", f"{sign}\\frac{{{a}}}{{{b + 1}}}" if a else "2"
        if a:
            yield "sign", gold.removeprefix("-") if sign else f"-{gold}"
        if 0 < a < b:
            yield "mixed number", f"1\\frac{{{a}}}{{{b}}}"
        if Fraction(f"{a / b:.2f}") != Fraction(a, b):
            yield "rounded", f"{sign}{a / b:.2f}"
        yield "two values", f"{gold} \\text{{ or }} {sign}\\frac{{{a + 1}}}{{{b}}}"
        yield "doubted", f"{gold} \\text{{ but maybe }} \\frac{{{a + 1}}}{{{b}}}"
    elif parts := _parts(gold):
        left, right = (gold[0], gold[-1]) if gold.startswith("(") else ("", "")
        yield "one dropped", ", ".join(parts[:-1])
        yield "one added", left + ", ".join([*parts, "987654"]) + right
        yield "one changed", left + ", ".join([*parts[:-1], f"{parts[-1]}+1"]) + right
        if left and parts[0] != parts[1]:
            yield "swapped", left + ", ".join([parts[1], parts[0], *parts[2:]]) + right
            yield "a set for a tuple", "\\{" + ", ".join(parts) + "\\}"
            yield "closed for open", f"[{', '.join(parts)}]"
    elif m := _INTERVAL.fullmatch(gold):
        flip = {"(": "[", "[": "(", ")": "]", "]": ")"}
        if "infty" not in m[2]:
            yield "left end", f"{flip[m[1]]}{m[2]},{m[3]}{m[4]}"
        if "infty" not in m[3]:
            yield "right end", f"{m[1]}{m[2]},{m[3]}{flip[m[4]]}"
            yield "longer", f"{m[1]}{m[2]},{m[3]}+1{m[4]}"
    elif m := _WORD.fullmatch(gold):
        yield "another word", "\\text{elsewhere}"
        yield (
            "letters in another order",
            f"\\text{{{m[1][::-1]}}}" if m[1] != m[1][::-1] else "zzzz",
        )
        yield "negated", f"\\text{{not {m[1]}}}"
        yield "two values", f"\\text{{{m[1]} or elsewhere}}"
    elif m := _BASED.fullmatch(gold):
        yield "another base", f"{m[1]}_{{{int(m[2]) + 1}}}"
        yield "a digit more", f"{m[1]}1_{m[2]}"
    elif _algebra(gold):
        yield "plus 1", f"{gold} + 1"
        yield "twice", f"2({gold})"
        yield "sign", f"-({gold})"
        yield "two values", f"{gold} \\text{{ or }} {gold} + 1"
        yield "doubted", f"{gold} \\text{{ is false, it is }} 1"
        if letter := _LETTER.search(gold):
            i = letter.start()
            yield "another variable", f"{gold[:i]}Q{gold[i + 1 :]}"


def _parts(gold: str) -> list[str]:
    """Elements of a list or tuple of plain numbers; [] if it is none, or of doubtful meaning."""
    if "," not in gold or not _LIST.fullmatch(gold) or re.search(r"\d,\d{3}(?!\d)", gold):
        return []
    if gold.startswith("(") != gold.endswith(")") or gold.count("(") > 1:
        return []
    parts = [part.strip() for part in gold.strip("()").split(",")]
    number = re.compile(r"-?(?:\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\}|\d*\\sqrt\{\d+\})")
    return parts if len(set(parts)) == len(parts) and all(map(number.fullmatch, parts)) else []


def _algebra(gold: str) -> bool:
    """A plain expression that is not 0 and has brackets in pairs."""
    pairs = all(gold.count(a) == gold.count(b) for a, b in ("()", "{}"))
    digits_or_letters = re.search(r"[A-Za-z]|\\(?:sqrt|pi)|\^", gold)
    digits_or_letters = digits_or_letters and not re.search(r"\de-?\d", gold)  # 2e-8
    words = re.search(r"(?<!\\)\b[A-Za-z]{3,}", gold)
    return bool(_PLAIN.fullmatch(gold) and pairs and digits_or_letters and not words)
