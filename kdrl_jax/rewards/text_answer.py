"""Answers that are words, tables or numbers, and not mathematics: equal as text or as numbers."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from kdrl_jax.rewards.math_answer import MAX_LENGTH, clean

_MARKED = re.compile(r"\\(?:text|textbf|texttt|mathrm|mbox) ?\{([^{}]*)\}")
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,100})(?:\.\d{1,100})?", re.ASCII)

_LATEX = re.compile(r"\\(?:begin|end)\{[a-z]+\*?\}|\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{2}")


def has_words(text: str) -> bool:
    r"""Returns whether there are two letters in a row outside LaTeX commands, so that it is prose.

    The content of `\text{}` counts; `\frac`, `\begin{pmatrix}` and single letters do not.
    """
    return _WORD.search(_LATEX.sub(" ", text)) is not None


def same_text(answer: str, gold: str, meta: dict[str, Any] | None = None) -> bool:
    r"""Whether two answers are one text, or one number in decimal notation.

    Case, runs of white space, math delimiters, `\text{}` around the whole and a final stop do not
    matter. `7.0` is `7` and `1,000` is `1000`, but `x = 7` is not `7`. Linear in the length.
    """
    first, second = _normal(answer), _normal(gold)
    if first == second:
        return True
    if len(first) > MAX_LENGTH or not (_NUMBER.fullmatch(first) and _NUMBER.fullmatch(second)):
        return False
    return Fraction(first.replace(",", "")) == Fraction(second.replace(",", ""))


def _normal(text: str) -> str:
    text = clean(text)
    marked = _MARKED.fullmatch(text)
    return " ".join((marked[1] if marked else text).split()).casefold()
