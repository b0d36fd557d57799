"""Knights and Knaves: who tells the truth, told from what each inhabitant says.

Knights always tell the truth and knaves always lie; every inhabitant makes one statement, and
exactly one assignment of roles agrees with all of them. A statement is one claim ("X is a knight",
"X is a knave") or two joined by *and*, *or*, *if … then* or *if and only if*. It is the logic
setting of RLAD (arXiv 2602.22495) with puzzles in the manner of arXiv 2410.23123.

There are two styles of the same puzzles:

    prose       for language models: names and sentences; the answer is a list such as
                `Zoey is a knight, Oliver is a knave`, judged by `same_roles`.
    symbolic    for tiny models, one character a claim: capital A says that A is a knight, small a
                that A is a knave. The statements of A, B, C, … stand in this order, so that
                `b;A>c;A=C?` reads: A says B is a knave; B, that if A is a knight, C is a knave;
                C, that A is a knight if and only if C is one. The answer is written alike: `AbC`.

The symbolic worked solution tries the assignments in a fixed order and writes the truth values of
the statements (t, f) until one disagrees with its speaker's role:

    <think>ABCfABcfAbCtft</think>\\boxed{AbC}

Each character depends on few others, and the answer is right only if all of them are.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from kdrl_jax.tasks.splits import collect
from kdrl_jax.types import Problem

NAMES = (
    *("Zoey", "Oliver", "Mia", "Ethan", "Clara", "Hugo", "Ruth", "Felix", "Nora", "Jasper"),
    *("Lena", "Victor", "Iris", "Samuel", "Tessa", "Walter", "Paula", "Konrad", "Ada", "Boris"),
)
CLAUSES = "Answer with one clause for each of them, such as “Zoey is a …”, separated by commas."
"""How to answer a puzzle that does not say it itself."""
LETTERS = "ABCDEFGH"
MAX_SYMBOLIC = 5  # small f is a truth value
ALPHABET = LETTERS[:MAX_SYMBOLIC] + LETTERS[:MAX_SYMBOLIC].lower() + "&|>=;?tf"
CLAIM_SHARE = 0.4  # of the statements are a single claim
SAYS = (
    '{name} says: "{text}."',
    '{name} remarks, "{text}."',
    '"{text}," {name} declares.',
    'According to {name}, "{text}".',
    '{name} tells you: "{text}."',
)
MAX_LENGTH = 2000  # of an answer that is still read

OPERATIONS = {
    "&": lambda first, second: first and second,
    "|": lambda first, second: first or second,
    ">": lambda first, second: not first or second,
    "=": lambda first, second: first == second,
}
JOINED = {
    "&": "{} and {}",
    "|": "{} or {}",
    ">": "if {}, then {}",
    "=": "{} if and only if {}",
}

Claim = tuple[int, bool]
"""An inhabitant's number and whether he is said to be a knight."""

Roles = tuple[bool, ...]
"""Who is a knight."""


class Statement(NamedTuple):
    """One claim (operation "") or two joined by an operation."""

    operation: str
    claims: tuple[Claim, ...]


def holds(statement: Statement, roles: Roles) -> bool:
    """Whether a statement is true if these are the roles."""
    values = [roles[who] == knight for who, knight in statement.claims]
    return OPERATIONS[statement.operation](*values) if statement.operation else values[0]


def agree(statements: Sequence[Statement], roles: Roles) -> bool:
    """Whether every knight's statement is true and every knave's false."""
    return all(holds(s, roles) == role for s, role in zip(statements, roles, strict=True))


def assignments(people: int) -> list[Roles]:
    """All assignments of roles in the order in which solutions try them: all knights first."""
    return list(itertools.product((True, False), repeat=people))


def problems(
    count: int,
    seed: int,
    *,
    split: str = "train",
    min_people: int = 3,
    max_people: int = 3,
    operations: str = "&|>=",
) -> list[Problem]:
    """`count` different puzzles in prose, a function of the arguments alone.

    min_people, max_people: how many inhabitants a puzzle has, drawn uniformly, at most 8.
    operations: which ways of joining two claims occur: and (&), or (|), if (>), if and only if (=).

    `meta` holds the names and the puzzle in symbols, which decides on the split: no puzzle of one
    split returns in the other under other names. Raises ValueError for arguments out of range,
    UserError for more puzzles than there are.
    """
    _check(min_people, max_people, len(LETTERS), operations)
    rng = random.Random(f"knights and knaves {split} {seed}")

    def draw() -> tuple[str, Problem]:
        statements, roles = _puzzle(rng, rng.randint(min_people, max_people), operations)
        names = rng.sample(NAMES, len(roles))
        symbols = _symbols(statements)
        meta = {"names": names, "symbols": symbols}
        return symbols, Problem("", _prose(rng, statements, names), _answer(names, roles), meta)

    return collect("knights_knaves", count, seed, split, draw)


def symbolic_problems(
    count: int,
    seed: int,
    *,
    split: str = "train",
    min_people: int = 3,
    max_people: int = 3,
    operations: str = "&|>=",
) -> list[Problem]:
    """The same in symbols, at most 5 inhabitants; the puzzle text decides on the split."""
    _check(min_people, max_people, MAX_SYMBOLIC, operations)
    rng = random.Random(f"knights and knaves in symbols {split} {seed}")

    def draw() -> tuple[str, Problem]:
        statements, roles = _puzzle(rng, rng.randint(min_people, max_people), operations)
        text = _symbols(statements)
        return text, Problem("", text, _letters(roles))

    return collect("knights_knaves_symbolic", count, seed, split, draw)


def symbolic_solution(problem: Problem) -> str:
    """The worked response to a problem of `symbolic_problems`, without an end token."""
    statements = read_symbols(problem.problem)
    steps = ""
    for roles in assignments(len(statements)):
        steps += _letters(roles)
        for statement, role in zip(statements, roles, strict=True):
            value = holds(statement, roles)
            steps += "t" if value else "f"
            if value != role:
                break
        else:
            return f"<think>{steps}</think>\\boxed{{{_letters(roles)}}}"
    raise ValueError(f"{problem.problem}: has no solution")


def read_symbols(text: str) -> list[Statement]:
    """The statements of a puzzle in symbols, such as `b;A>c;A=C?`."""
    return [
        Statement(part[1:2], tuple((LETTERS.index(c.upper()), c.isupper()) for c in part[::2]))
        for part in text.removesuffix("?").split(";")
    ]


def same_letters(answer: str, gold: str, meta: dict[str, Any] | None = None) -> bool:
    """Whether `answer` has the letters of `gold`, in any order, with or without commas."""
    return sorted(re.sub(r"[\s,]", "", answer)) == sorted(gold)


_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox) ?\{([^{}]*)\}")
_NUMBERING = re.compile(r"(?<!\w)\(?\d\d?[.:)]")
_BETWEEN = re.compile(r"[,;.]| and ")
_CLAUSE = re.compile(r"(\w+)(?: is a|:) (knight|knave)", re.ASCII)


def same_roles(answer: str, gold: str, meta: dict[str, Any] | None = None) -> bool:
    r"""Whether `answer` gives everyone in `gold` the right role, once, and nobody else.

    Read are clauses `Zoey is a knight` or `Zoey: knight`, numbered or not, in any order and case,
    between commas, semicolons, full stops, line ends or "and", also in `\text{}`. Anything else
    makes the answer wrong.
    """
    said = _roles(answer)
    return said is not None and said == _roles(gold)


def _roles(text: str) -> dict[str, str] | None:
    if len(text) > MAX_LENGTH:
        return None
    text = _TEXT.sub(r"\1", text).casefold().replace("\n", ",")
    text = text.replace("\\\\", ",").replace("\\ ", " ")
    text = " ".join(_NUMBERING.sub(",", text).split())
    roles: dict[str, str] = {}
    for clause in filter(None, map(str.strip, _BETWEEN.split(text))):
        match = _CLAUSE.fullmatch(clause)
        if match is None or match[1] in roles:
            return None
        roles[match[1]] = match[2]
    return roles


def _check(min_people: int, max_people: int, most: int, operations: str) -> None:
    if not 2 <= min_people <= max_people <= most:
        raise ValueError(
            f"need 2 <= min_people <= max_people <= {most}, not {min_people} and {max_people}"
        )
    if not operations or set(operations) - set(OPERATIONS):
        raise ValueError(f"operations must be some of {''.join(OPERATIONS)}, not {operations!r}")


def _puzzle(rng: random.Random, people: int, operations: str) -> tuple[list[Statement], Roles]:
    """Roles, each assignment equally likely, and statements that no other roles agree with."""
    roles = rng.choice(assignments(people))
    while True:
        statements = [_statement(rng, speaker, roles, operations) for speaker in range(people)]
        if not any(other != roles and agree(statements, other) for other in assignments(people)):
            return statements, roles


def _statement(rng: random.Random, speaker: int, roles: Roles, operations: str) -> Statement:
    """What a speaker of this role can say: a claim about another, or two about different ones."""
    while True:
        if rng.random() < CLAIM_SHARE:
            others = [who for who in range(len(roles)) if who != speaker]
            statement = Statement("", ((rng.choice(others), rng.random() < 0.5),))
        else:
            first, second = rng.sample(range(len(roles)), 2)
            claims = ((first, rng.random() < 0.5), (second, rng.random() < 0.5))
            statement = Statement(rng.choice(operations), claims)
        if holds(statement, roles) == roles[speaker]:
            return statement


def _letters(roles: Sequence[bool]) -> str:
    return "".join(_letter((who, knight)) for who, knight in enumerate(roles))


def _letter(claim: Claim) -> str:
    who, knight = claim
    return LETTERS[who] if knight else LETTERS[who].lower()


def _symbols(statements: Sequence[Statement]) -> str:
    return ";".join(s.operation.join(map(_letter, s.claims)) for s in statements) + "?"


def _prose(rng: random.Random, statements: Sequence[Statement], names: Sequence[str]) -> str:
    said = []
    for name, statement in zip(names, statements, strict=True):
        claims = [_claim(rng, names[who], knight) for who, knight in statement.claims]
        text = JOINED[statement.operation].format(*claims) if statement.operation else claims[0]
        said.append(rng.choice(SAYS).format(name=name, text=text[0].upper() + text[1:]))
    return (
        "Everyone on an island is either a knight or a knave. Knights always tell the truth, and "
        f"knaves always lie. You meet {len(names)} inhabitants: {', '.join(names[:-1])} and "
        f"{names[-1]}. {' '.join(said)} Who is a knight and who is a knave? Answer with one clause "
        f'for each of them, such as "{names[0]} is a …", separated by commas.'
    )


def _claim(rng: random.Random, name: str, knight: bool) -> str:
    if rng.random() < 0.25:
        return f"{name} is not a {'knave' if knight else 'knight'}"
    return f"{name} is a {'knight' if knight else 'knave'}"


def _answer(names: Sequence[str], roles: Roles) -> str:
    pairs = zip(names, roles, strict=True)
    return ", ".join(f"{name} is a {'knight' if knight else 'knave'}" for name, knight in pairs)
