r"""Answers as strings: cleaning, and verdicts that need no computer algebra.

`quick_verdict` decides most pairs of a training run: equal strings, words and plain numbers. It
is exact where it decides and returns None elsewhere; math-verify has the last word on those
(`pool`). Nothing here evaluates text, and every step is linear in its length.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from kdrl_jax.rewards.format import last_boxed

MAX_LENGTH = 2000
"""Longer answers are compared as strings only."""

ABSOLUTE, RELATIVE = Fraction(1, 10**6), Fraction(1, 10**5)
"""How far a decimal may be from the number it stands for; both bounds hold."""

_SYMBOLS = {
    "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "\\div ", "π": "\\pi ",
    "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "∪": "\\cup ", "∩": "\\cap ", "°": "^\\circ ",
    "\u00a0": " ", "\u202f": " ",
}  # fmt: skip
_REWRITES = [
    (re.compile(pattern), new)  # (?<!\\): the second half of a row's end, \\, is no command
    for pattern, new in (
        (r"(?<!\\)(?:\$|\\[()\[\]])", ""),  # math delimiters
        (r"(?<!\\)\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"(?<!\\)\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle)(?![A-Za-z])", ""),
        (r"(?<=\d)(?:,\\!|\{,\}|\\[,;: !]|~)(?=\d{3}(?!\d))", ","),  # thousands
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;: ]|~|(?<!\\)\\q?quad(?![A-Za-z])", " "),
        (r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![A-Za-z]))", ""),
        (r"(?<!\\)\\(?:degree|approx|simeq)(?![A-Za-z])", ""),
        (r"\s+", " "),
    )
]
_SPACE = re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) ")
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"
)
_WORD = re.compile(r"[^\W\d_]+(?:[ '.-]+[^\W\d_]+)*")
_BASED = re.compile(r"(-?\w+)\s*_\s*\{?\s*(\d+)\s*\}?")
_UNIT = re.compile(r" ?\\(?:text|textrm|mathrm|mbox)\{ ?([A-Za-z/. ]+)\}(?:\^(?:\d|\{-?\d\}))?$")
_MULTIPLIERS = re.compile(r"hundred|thousand|illion|dozen|percent|half|pair|and|or", re.IGNORECASE)

_DECIMAL = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?"
_NUMBER = re.compile(
    rf"(?P<decimal>{_DECIMAL})"
    r"(?: ?(?P<e>[eE]|\\times ?10 ?\^|\\cdot ?10 ?\^) ?"
    r"(?P<power>\{ ?[+-]?\d{1,3} ?\}|[+-]?\d{1,3}))?"
)
_FRACTION = re.compile(
    r"(?P<sign>[+-]?) ?(?:"
    r"\\frac ?(?:\{ ?(?P<n>-?\d+) ?\}|(?P<n1>\d)) ?(?:\{ ?(?P<d>-?\d+) ?\}|(?P<d1>\d))"
    r"|(?P<n2>\d+) ?/ ?(?P<d2>\d+))"
)


def clean(text: str) -> str:
    """`text` in one spelling: no math delimiters, sizes, thin spaces, degree signs or final stop.

    Only the notation changes; meaning is kept. A box around the whole is opened.
    """
    if "\\boxed" in text or "\\fbox" in text:
        text = last_boxed(text) or text
    for symbol, latex in _SYMBOLS.items():
        text = text.replace(symbol, latex)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text.strip().rstrip(".;:").rstrip()


def quick_verdict(gold: str, answer: str) -> bool | None:
    """Whether two cleaned answers are the same, or None where that needs computer algebra."""
    if not gold or not answer:
        return False
    if _squeeze(gold) == _squeeze(answer):
        return True
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return False
    if (words := _words(gold, answer)) is not None:
        return words[0] == words[1]
    bases = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if bases[0] and bases[1] and bases[0][2] != bases[1][2]:  # math-verify drops a base
        return False
    g, a = _number(gold), _number(answer)
    if g is None or a is None:
        return None
    apart, size = abs(g.value - a.value), max(abs(g.value), abs(a.value))
    if g.decimal or a.decimal:
        return apart <= min(ABSOLUTE, RELATIVE * size)
    return apart == 0


def _squeeze(text: str) -> str:
    """Without the spaces that mean nothing: all but those between two letters or digits."""
    return _SPACE.sub("", text)


def _words(gold: str, answer: str) -> tuple[str, str] | None:
    r"""Both as words in one case, such as `\text{Evelyn}` and `Evelyn`; None if either is not.

    math-verify would take bare letters as factors, equal in any order. Fewer than four letters
    may well be that, unless the other answer is marked as text.
    """
    marked = _TEXT.fullmatch(gold), _TEXT.fullmatch(answer)
    found = [(m[1] if m else text).strip() for m, text in zip(marked, (gold, answer), strict=True)]
    if not all(map(_WORD.fullmatch, found)):
        return None
    if not any(marked) and min(map(len, found)) < 4:
        return None
    return found[0].casefold(), found[1].casefold()


class _Number(NamedTuple):
    value: Fraction
    decimal: bool  # written with a decimal point or a power of ten


def _number(text: str) -> _Number | None:
    """A plain number, with or without a unit; None for anything else.

    `2e-1` is left to others: it may be 2·e − 1.
    """
    unit = _UNIT.search(text)
    if unit and not _MULTIPLIERS.search(unit[1]):
        text = text[: unit.start()]
    text = text.removeprefix("\\$").strip()
    if len(text) > 100:
        return None
    if m := _FRACTION.fullmatch(text):
        top, bottom = int(m["n"] or m["n1"] or m["n2"]), int(m["d"] or m["d1"] or m["d2"])
        if bottom == 0:
            return None
        return _Number(Fraction(top, bottom) * (-1 if m["sign"] == "-" else 1), False)
    m = _NUMBER.fullmatch(text)
    if m is None or not any(c.isdigit() for c in m["decimal"]):
        return None
    value, decimal = Fraction(m["decimal"].replace(",", "").rstrip(".")), "." in m["decimal"]
    if m["e"] is None:
        return _Number(value, decimal)
    power = m["power"].strip("{} ")
    if m["e"] in "eE" and not decimal and power[0] in "+-" and len(power) == 2:
        return None
    return _Number(value * Fraction(10) ** int(power), True)
