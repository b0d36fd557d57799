r"""Answers as strings: cleaning, and verdicts that need no computer algebra.

`quick_verdict` decides most pairs of a training run: equal strings, words and plain numbers. It
is exact where it decides and returns None elsewhere; math-verify has the last word on those
(`pool`). Nothing here evaluates text, and every step is linear in its length. A decimal digit of
any script is that digit (fullwidth or Arabic-Indic 5 is 5); superscripts, circled digits and Roman
numerals are not digits.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from kdrl_jax.rewards.format import last_boxed

MAX_LENGTH = 2000
"""Longer answers are compared as strings only."""

MAX_DEPTH = 15
"""Answers with deeper brackets are not read."""

MAX_UNIT = 80
"""Where a unit is looked for: the last characters of an answer."""

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
        (r"(?<!\\)\\degree(?![A-Za-z])", ""),
        (r"^\s*\\(?:approx|simeq)(?![A-Za-z])", ""),
        (r"\s+", " "),
    )
]
_SPACE = re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) ")
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"
)
_WORD = re.compile(r"[^\W\d_]+(?:[ '.-]+[^\W\d_]+)*")
_BASED = re.compile(r"(-?\w+)\s*_\s*\{?\s*(\d+)\s*\}?")
_PRIME = re.compile(r"(?<=[A-Za-z)}])'|\\prime(?![A-Za-z])")
_LOOSE = re.compile(r"\\(?:approx|simeq|sim|[lcv]?dots)(?![A-Za-z])")
_TEXTS = re.compile(r"\\(?:text|textrm|mathrm|mbox) ?\{([^{}]*)\}")
_DOUBT = (
    r"not|never|nor|is|isn|are|was|be|but|if|wrong|false|incorrect|either|neither|maybe|perhaps"
    r"|except|unless"
)
_DOUBTED = re.compile(rf"\b(?:{_DOUBT})\b", re.IGNORECASE)
_OPEN, _CLOSE = frozenset("([{"), frozenset(")]}")

_UNIT = re.compile(
    r" ?\\(?:text|textrm|mathrm|mbox) ?\{ ?(?P<marked>[A-Za-z/. ]+)\}(?:\^(?:\d|\{-?\d\}))?$"
    r"|(?<=[\d})]) ?(?P<bare>[A-Za-z]{2,}(?: [A-Za-z]{2,}){0,3})$"
)
_NO_UNIT = re.compile(  # words that change what is said, and functions
    rf"(?:{_DOUBT}|hundred|thousand|\w*illion|dozens?|percent\w*|half|halves|pairs?|and|or|no|true"
    r"|correct|both|about|around|approximately|approx|than|least|most|more|less|plus|minus|times"
    r"|mod|sin|cos|tan|sinh|cosh|tanh|log|exp|sqrt|frac|infinity|undefined|any|all|some)",
    re.IGNORECASE,
)
_SHORT_UNITS = re.compile(
    r"[mcnk]m|ft|yd|mi|[mk]g|lbs?|oz|m[ls]|min|sec|hrs?|day|[mk]ph|deg|rad|men|cal|mol",
    re.IGNORECASE,
)
_KINDS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre",
        "km kilometer kilometre", "inch in inche", "foot ft feet", "yard yd", "mile mi",
        "mg milligram", "g gram", "kg kilogram", "pound lb", "second sec s", "minute min",
        "hour hr h", "day", "week", "month", "year yr", "cent", "dollar", "degree deg",
        "radian rad",
    )
    for name in names.split()
}  # fmt: skip
_DEGREES = re.compile(r"(?:°|\\circ ?\}?|\\degree)[ $.]*$")

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
    if not text.isascii():
        for symbol, latex in _SYMBOLS.items():
            text = text.replace(symbol, latex)
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text.strip().rstrip(".;: ")


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
    g, a = _number(gold), _number(answer)
    bases = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if bases[0] and bases[1] and bases[0][2] != bases[1][2]:  # math-verify drops a base
        return False
    if g and bases[1] and bases[1][2] != "10":
        return False
    if _LOOSE.search(answer) and not _LOOSE.search(gold):  # it reads the left side, or a product
        return False
    if _doubts(answer) and not _doubts(gold):  # words are factors to it, and 0 times words is 0
        return False
    if len(_PRIME.findall(gold)) != len(_PRIME.findall(answer)):  # and primes
        return False
    if {_brackets(gold), _brackets(answer)} == {"(", "\\{"}:  # it lets a set pass for a tuple
        return False
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


def _doubts(text: str) -> bool:
    """Whether words within it say more than which value is meant."""
    return any(_DOUBTED.search(said) for said in _TEXTS.findall(text))


def _brackets(text: str) -> str | None:
    """How a list that is one tuple or one set begins."""
    for left, right in (("(", ")"), ("\\{", "\\}")):
        if text.startswith(left) and text.endswith(right) and "," in text:
            return left if text.count(left) == text.count(right) == 1 else None
    return None


def too_deep(text: str) -> bool:
    """Whether brackets are nested beyond what the grammar reads in reasonable time."""
    depth = 0
    for c in text:
        depth += (c in _OPEN) - (c in _CLOSE)
        if depth > MAX_DEPTH:
            return True
    return False


def without_unit(text: str) -> str:
    r"""A cleaned answer without the unit at its end: `\text{...}`, or words after a plain number.

    Words that change what is said stay (`5 \text{ hundred}`, `5 \text{ or less}`), and so do
    letters that may be variables (`3t`, `5 ab`).
    """
    return text[: unit.start()].rstrip() if (unit := _unit(text)) else text


def same_unit(gold: str, answer: str) -> bool:
    """False if both answers, as they were written, name units that are known to differ."""
    kinds = [_kind(text) for text in (gold, answer)]
    return None in kinds or kinds[0] == kinds[1]


def _unit(text: str) -> re.Match[str] | None:
    unit = _UNIT.search(text, max(0, len(text) - MAX_UNIT))
    if not unit or not text[: unit.start()].strip():
        return None
    words = re.findall(r"[A-Za-z]+", unit["marked"] or unit["bare"])
    if len(words) > 4 or any(map(_NO_UNIT.fullmatch, words)):
        return None
    if unit["bare"]:
        rest = text[: unit.start()].removeprefix("\\$").strip()
        plain = _FRACTION.fullmatch(rest) or _NUMBER.fullmatch(rest)
        if not plain or any(len(w) < 4 and not _SHORT_UNITS.fullmatch(w) for w in words[:1]):
            return None
        if f"\\{words[0]}" in text or words[0] in ("theta", "alpha", "beta", "gamma", "lambda"):
            return None
    return unit


def _kind(text: str) -> str | None:
    """The unit of an answer as written, if it is a well-known one."""
    if text.strip(" $").startswith("\\$"):
        return "dollar"
    text = text[-MAX_UNIT:]
    if _DEGREES.search(text):
        return "degree"
    unit = _unit(clean(text))
    if not unit:
        return None
    power = unit[0].partition("^")[2]
    name = (unit["marked"] or unit["bare"]).strip(" .").lower()
    kind = _KINDS.get(name) or _KINDS.get(name.removesuffix("s"))
    return kind and kind + power.strip("{}")


class _Number(NamedTuple):
    value: Fraction
    decimal: bool  # written with a decimal point or a power of ten


def _number(text: str) -> _Number | None:
    """A plain number, with or without a unit; None for anything else.

    `2e-1` is left to others: it may be 2·e − 1.
    """
    text = without_unit(text).removeprefix("\\$").strip()
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
