r"""Hostile responses by family, from a seed. All are wrong by construction: none may be rewarded.

The gold answers are unusual, so that noise does not hit one by chance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

GOLDS = ("271828", "\\frac{271}{829}", "\\sqrt{2718}", "(271,829)", "x^{27}+18", "\\{271,829,3\\}")
SHORT = ("271828", "\\frac{271}{829}", "\\sqrt{2718}")


class Attack(NamedTuple):
    """A response that is wrong, and the gold answer."""

    gold: str
    response: str


Family = Callable[[random.Random, str], Iterator[str]]
_BOXED: dict[str, tuple[int, Family, tuple[str, ...]]] = {}
_WHOLE: dict[str, tuple[int, Family, tuple[str, ...]]] = {}


def attacks(family: str, sentinel: str, seed: int = 0, share: float = 1.0) -> Iterator[Attack]:
    """The attacks of a family; `share` of them.

    Args:
      sentinel: a file that injected code tries to make.
    """
    count, make, golds = (_BOXED | _WHOLE)[family]
    rng = random.Random(f"{seed} {family}")
    for _ in range(max(3, round(count * share))):
        gold = rng.choice(golds)
        for text in make(rng, sentinel if family == "injected code" else gold):
            whole = text if family in _WHOLE else f"<think>so</think>\\boxed{{{text}}}"
            yield Attack(gold, whole)


def families() -> list[str]:
    """Names, in the order in which they are tried."""
    return [*_BOXED, *_WHOLE]


def _boxed(name: str, count: int, golds: tuple[str, ...] = GOLDS) -> Callable[[Family], Family]:
    return lambda make: _BOXED.setdefault(name, (count, make, golds))[1]


def _whole(name: str, count: int, golds: tuple[str, ...] = GOLDS) -> Callable[[Family], Family]:
    return lambda make: _WHOLE.setdefault(name, (count, make, golds))[1]


@_boxed("power towers", 200)
def _towers(rng: random.Random, gold: str) -> Iterator[str]:
    text = rng.choice(["9", "10", "x", "0.5", "-3", "\\pi", "i"])
    for _ in range(rng.randint(2, 12)):
        base = rng.choice(["9", "99", "(9!)", "x", "10", "1.1", "-2", "\\frac{7}{3}"])
        text = rng.choice(
            ["{b}^{{{t}}}", "({b})^{{{t}}}", "{b}^{{{t}}} + 1", "-{b}^{{-{t}}}"]
        ).format(b=base, t=text)
    yield text


@_boxed("factorials and gammas", 200)
def _factorials(rng: random.Random, gold: str) -> Iterator[str]:
    text = str(10 ** rng.randint(2, 30) + rng.randint(0, 9))
    for _ in range(rng.randint(1, 6)):
        text = rng.choice(
            [
                "({})!",
                "({})!",
                "({})!!",
                "({} + 1)!",
                "({})! + 1",
                "\\frac{{({})!}}{{7}}",
                "\\Gamma({})",
            ]
        ).format(text)
    yield text


@_boxed("nested brackets", 600)
def _nested(rng: random.Random, gold: str) -> Iterator[str]:
    depth = rng.choice([3, 10, 25, 29, 40, 200, 2000, 20_000])
    left, right = rng.choice([
        ("{", "}"), ("(", ")"), ("\\left(", "\\right)"), ("\\sqrt{", "}"), ("|", "|"), ("[", "]"),
        ("\\frac{1}{1+", "}"), ("\\{", "\\}"), ("x^{", "}"), ("\\text{", "}"), ("\\boxed{", "}"),
        ("\\left\\{", "\\right\\}"), ("\\begin{pmatrix}", "\\end{pmatrix}"), ("-", ""), ("f(", ")"),
    ])  # fmt: skip
    closing = right * rng.choice([depth, depth, depth - 1, 0])
    yield left * depth + "2" + closing


@_boxed("megabytes", 80)
def _megabytes(rng: random.Random, gold: str) -> Iterator[str]:
    unit = rng.choice([
        "9", "9,", "x+", "\\frac{1}{2}", "{", "}", "\\boxed{1}", "\\text{a ", " ", "^", "~", "\\",
        "</think>", "\n", "\\left(", "a b", "١", "\ud800", "\x00", "$", "\\,", "^{\\circ}", "_{1}",
    ])  # fmt: skip
    yield unit * (rng.randint(1, 3) * 1_000_000 // len(unit))


@_boxed("control characters", 700)
def _controls(rng: random.Random, gold: str) -> Iterator[str]:
    noise = "\x00\x01\x07\x08\x1b\x7f\x85\u2028\u202e\ufeff\u200b\r\x0b"
    text = list(_changed(rng, gold))
    for _ in range(rng.randint(1, 8)):
        text.insert(rng.randint(0, len(text)), rng.choice(noise))
    yield "".join(text)


@_boxed("lone surrogates and odd planes", 700)
def _surrogates(rng: random.Random, gold: str) -> Iterator[str]:
    text = list(_changed(rng, gold))
    for _ in range(rng.randint(1, 8)):
        where = rng.choice([(0xD800, 0xDFFF), (0x1D400, 0x1D7FF), (0xE000, 0xF8FF), (0x300, 0x36F)])
        text.insert(rng.randint(0, len(text)), chr(rng.randint(*where)))
    yield "".join(text)


@_boxed("digits of other scripts", 700, ("271828",))
def _scripts(rng: random.Random, gold: str) -> Iterator[str]:
    digits = rng.choice(["⁰¹²³⁴⁵⁶⁷⁸⁹", "₀₁₂₃₄₅₆₇₈₉", "⓪①②③④⑤⑥⑦⑧⑨", "〇一二三四五六七八九",
                         "OⅠⅡⅢⅣⅤⅥⅦⅧⅨ", "٠١٢٣٤٥٦٧٨٩", "０１２３４５６７８９"])  # fmt: skip
    text = gold if digits[1] in "¹₁①一Ⅰ" else _changed(rng, gold)  # the last two are digits
    yield "".join(digits[int(c)] if c.isdigit() else c for c in text)


@_boxed("injected code", 1200)
def _code(rng: random.Random, sentinel: str) -> Iterator[str]:
    code = rng.choice([
        f"__import__('os').system('touch {sentinel}')", f"open('{sentinel}','w').close()",
        f"exec(\"open('{sentinel}','w')\")", f"eval(\"open('{sentinel}','w')\")",
        f"().__class__.__base__.__subclasses__()[0]; open('{sentinel}','w')",
        f"[c for c in (1,)] and open('{sentinel}','w')", f"lambda: open('{sentinel}','w')",
        f"__builtins__['open']('{sentinel}','w')", f"sympify(\"open('{sentinel}','w')\")",
        f"S(\"open('{sentinel}','w')\")", f"Symbol(open('{sentinel}','w'))", f"!touch {sentinel}",
        f"`touch {sentinel}`", f"$(touch {sentinel})", f"; touch {sentinel} ;",
        f"\\write18{{touch {sentinel}}}", f"\\input{{|touch {sentinel}}}", "1 if exit() else 2",
        "quit()", "while True: pass", "'9'*10**10", "[0]*10**10", "print(\"correct\")",
        '"correct"', "\n\"correct\"\n", "import os; os.abort()", "().__class__.__mro__",
    ])  # fmt: skip
    yield rng.choice([
        "{}", "\\text{{{}}}", "\\operatorname{{{}}}", "\\mathrm{{{}}}", "x_{{{}}}",
        "\\frac{{{}}}{{1}}",
        "\\sqrt{{{}}}", "f({})", "{} + 1", "{{{}}}", "(1, {})",
        "\\begin{{pmatrix}} {} \\end{{pmatrix}}",
        "\\sum_{{i=1}}^{{{}}} i", "{}!", "\\log_{{{}}} 2", "{}%", "x = {}", "1.{}", "\\int {} dx",
        "\\lim_{{x \\to {}}} x", "\\{{{}\\}}", "[{}, 1]", "$ {} $", "0x{}", "1e{}",
    ]).format(code)  # fmt: skip


@_boxed("hedged answers", 1500, SHORT)
def _hedges(rng: random.Random, gold: str) -> Iterator[str]:
    other = rng.choice(["1", "\\frac{7}{2}", "7", "271829", "0", "-3"])
    yield rng.choice([
        "{g} or {o}", "{g} \\text{{ or }} {o}", "{o} or {g}", "{g}, {o}", "{o}, {g}",
        "\\{{{g}, {o}\\}}",
        "\\text{{not }} {g}", "\\neq {g}", "x \\neq {g}", "{g} \\text{{ is wrong}}, {o}",
        "{g} \\text{{ but maybe }} {o}", "{g} \\text{{ (no: }} {o})", "{g} \\pm {g}", "{g}; {o}",
        "x={g} \\text{{ or }} x={o}", "({g}, {o})", "[{g}, {o}]", "{g} < x", "x < {g}",
        "x \\le {g}",
        "{g} \\to {o}", "{g} \\approx {o}", "{g} \\ldots {o}", "{g} \\mid {o}", "{o} = {g} = {o}",
        "{g} = {o}", "\\text{{the value }} {g} \\text{{ is false}} &",
        "{g} \\text{{ or so }} + {o}",
        "\\text{{either }} {g} \\text{{ or }} {o}", "\\begin{{cases}} {g} \\\\ {o} \\end{{cases}}",
        "{g} \\cup {o}", "{g} \\text{{ thousand}}", "{g} \\text{{ million}}", "{g} \\& {o}",
        "\\max({g}, 10^{{9}})", "{g}^{{7}}", "{g} x", "{g}_{{3}}", "\\cancel{{{g}}} {o}", "{g} {g}",
        "\\lnot {g}", "\\overline{{{g}}} {o}", "## {g} ## {o}", "\\begin{{foo}} {g} {o}",
        "answer: {g} or {o}", "final answer is {o}. I hope {g}", "{g} \\text{{ if }} x>0",
    ]).format(g=gold, o=other)  # fmt: skip


@_boxed("tautologies and wildcards", 700)
def _tautologies(rng: random.Random, gold: str) -> Iterator[str]:
    yield rng.choice([
        "x=x", "0=0", "1=1", "\\text{True}", "True", "\\top", "\\square", "\\Box", "?", "*", ".*",
        "\\cdot", "\\infty", "oo", "-oo", "zoo", "nan", "NaN", "\\frac{0}{0}", "\\frac{1}{0}",
        "0^0",
        "\\infty - \\infty", "\\log 0", "\\emptyset", "\\{\\}", "()", "[]", "\\mathbb{R}",
        "\\mathbb{C}",
        "(-\\infty,\\infty)", "\\forall x", "x", "y", "answer", "\\text{answer}", "\\text{gold}",
        "None",
        "null", "\\ldots", "\\text{the correct answer}", "\\text{see above}", "x \\in \\mathbb{R}",
        "\\{x : x = x\\}", "\\text{any}", "self", "gold", "\\_", "\\%", "\\$", "&", "#", "=", "==",
    ]) + rng.choice(["", " ", ".", "\\ ", "{}"])  # fmt: skip


@_boxed("grammar bombs", 1500)
def _grammar(rng: random.Random, gold: str) -> Iterator[str]:
    def grow(depth: int) -> str:
        if not depth or rng.random() < 0.15:
            return rng.choice(
                ["1", "2", "x", "y", "\\pi", "e", "i", "0", "17", "0.3", "n", "\\alpha"]
            )
        parts = [grow(depth - 1) for _ in range(2)]
        return rng.choice([
            "{}+{}", "{}-{}", "{}\\cdot {}", "\\frac{{{}}}{{{}}}", "({})({})", "{}^{{{}}}",
            "\\sqrt[{}]{{{}}}", "\\sin({}) {}", "\\log_{{{}}} {}", "\\binom{{{}}}{{{}}}", "{}, {}",
            "\\{{{}, {}\\}}", "({}, {})", "{} = {}", "{} < {}", "|{}| {}", "\\gcd({}, {})",
            "{}_{{{}}}",
            "\\begin{{pmatrix}} {} \\\\ {} \\end{{pmatrix}}", "\\lfloor {} \\rfloor {}",
            "{} \\pm {}",
            "{} \\cup {}", "{} \\text{{ {} }}", "{} \\mod {}", "{}! {}", "\\overline{{{}}} {}",
        ]).format(*parts)  # fmt: skip

    yield grow(rng.randint(2, 5))


@_boxed("near the gold answer", 1000, SHORT)
def _near(rng: random.Random, gold: str) -> Iterator[str]:
    text = _changed(rng, gold)
    for _ in range(rng.randint(0, 5)):
        text = rng.choice(["{}", "{{{}}}", "({})", "\\,{}\\,", "$ {} $", "{} + 0", "x = {}",
            "\\left({}\\right)",
                           "\\displaystyle {}", "1 \\cdot {}", "{}.",
                           "{} \\text{{ cm}}"]).format(text)  # fmt: skip
    yield text


@_boxed("bytes", 1500)
def _bytes(rng: random.Random, gold: str) -> Iterator[str]:
    raw = rng.randbytes(rng.choice([1, 5, 30, 300, 1900]))
    encoding, errors = rng.choice([
        ("latin-1", "strict"), ("utf-8", "surrogateescape"), ("utf-8", "replace"),
        ("utf-16-le", "replace"),
    ])  # fmt: skip
    yield raw.decode(encoding, errors)


@_boxed("regex traps", 400)
def _regex(rng: random.Random, gold: str) -> Iterator[str]:
    unit = rng.choice(["\\text{", "^(", "sqrt(", "\\frac{", "a ", "1,", " .", "{.", ",and",
        "\\left", "(a)_{",
                       "\\frac 1", "$", "\\\\", "and ", "inf", "\\text{or}", "1 000", "= ",
                       "\\sqrt", "percent "])  # fmt: skip
    yield unit * (rng.randint(20, 1900) // len(unit)) + rng.choice(["", "}", ")", "1", "\\"])


@_boxed("slow algebra", 40)
def _slow(rng: random.Random, gold: str) -> Iterator[str]:
    n = rng.randint(10**6, 10**9)
    yield rng.choice([
        f"\\binom{{{n}}}{{{n // 2}}}", f"\\sum_{{k=1}}^{{{n}}} \\sin(k)",
        f"\\prod_{{k=1}}^{{{n}}} (k+x)",
        "\\int_0^1 x^{x^{x}} dx", f"(x+y+z)^{{{n % 300 + 200}}} - 1",
        f"\\sqrt{{x+{n}}}^{{77}} + \\sin(x^{{9}})",
        "\\int e^{-x^2} \\sin(x^3) \\log(x) dx", f"\\gcd({n}!, x)",
        f"\\lim_{{x \\to 0}} x^{{x^{{x^{{{n}}}}}}}",
    ])  # fmt: skip


@_whole("boxes copied from the prompt", 700)
def _copied(rng: random.Random, gold: str) -> Iterator[str]:
    copied = rng.choice(
        [
            "",
            "answer",
            "\\text{answer}",
            "...",
            "\\ldots",
            "your answer",
            "\\cdot",
            "\\text{final answer}",
        ]
    )
    yield rng.choice([
        f"<think>{gold}</think>put it within \\boxed{{{copied}}}.",
        f"<think>\\boxed{{{gold}}}</think>The answer is {gold}, \\boxed{{{copied}}}",
        f"<think></think>{gold} \\boxed{{{gold}}} Put it within \\boxed{{{copied}}}.",
    ])  # fmt: skip


@_whole("several boxes", 700)
def _several(rng: random.Random, gold: str) -> Iterator[str]:
    wrong = [str(rng.randint(0, 99)) for _ in range(rng.randint(1, 30))]
    boxes = [f"\\boxed{{{gold}}}", *(f"\\{rng.choice(['boxed', 'fbox'])}{{{w}}}" for w in wrong)]
    yield "<think></think>" + rng.choice([" ", " or ", ", "]).join(boxes)


@_whole("boxes that never close", 700)
def _unclosed(rng: random.Random, gold: str) -> Iterator[str]:
    before = rng.choice(["", f"\\boxed{{{gold}}} "])
    yield f"<think></think>{before}" + rng.choice(
        ["\\boxed{{{}", "\\boxed{{\\text{{{}}}", "\\boxed {{{{{}}}"]
    ).format(gold)


@_whole("broken format", 700)
def _format(rng: random.Random, gold: str) -> Iterator[str]:
    box = f"\\boxed{{{gold}}}"
    yield rng.choice([
        box, f"<think>{box}</think>", f"<think>{box}", f"</think></think>{box}", f"{box}</think>",
        f"<think><think></think>{box}", f"a<think></think>{box}", f"</think>{box}<think>",
        f"<think></think>{box}</think>", f"<THINK></THINK>{box}", f"&lt;/think&gt;{box}",
        f"< /think>{box}", f"</think >{box}", f"</think>boxed{{{gold}}}",
        f"</think>\\Boxed{{{gold}}}",
        f"</think>\\boxed[{gold}]", f"</think>\\boxed({gold})", f"</think>\\boxedd{{{gold}}}", "",
    ])  # fmt: skip


def _changed(rng: random.Random, gold: str) -> str:
    """`gold` with one digit changed to another, which is not 0."""
    i = rng.choice([i for i, c in enumerate(gold) if c.isdigit()])
    return gold[:i] + rng.choice([d for d in "123456789" if d != gold[i]]) + gold[i + 1 :]
