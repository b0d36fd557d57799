"""Knights and Knaves: every puzzle has one solution by solvers that share no code with it."""

import itertools
import re
from collections import Counter

import pytest

from kdrl_jax.data import SentencePieceTokenizer
from kdrl_jax.tasks import knights_knaves, split_of
from kdrl_jax.tasks.knights_knaves import same_letters, same_roles
from kdrl_jax.types import Problem

# --- Solvers -----------------------------------------------------------------------------------


def all_roles(names):
    for roles in itertools.product((True, False), repeat=len(names)):
        yield dict(zip(names, roles, strict=True))


def true_in_symbols(statement, roles):
    """Python's own operators: on booleans `<=` is implication."""
    code = re.sub("[a-h]", lambda m: f"(not {m[0].upper()})", statement)
    return bool(eval(code.replace("=", "==").replace(">", "<="), {}, dict(roles)))


def true_in_prose(text, roles):
    if m := re.fullmatch(r"(.+) if and only if (.+)", text):
        return true_in_prose(m[1], roles) == true_in_prose(m[2], roles)
    if m := re.fullmatch(r"If (.+), then (.+)", text):
        return true_in_prose(m[2], roles) if true_in_prose(m[1], roles) else True
    if m := re.fullmatch(r"(.+) (and|or) (.+)", text):
        return {"and": all, "or": any}[m[2]]([true_in_prose(m[i], roles) for i in (1, 3)])
    m = re.fullmatch(r"(\w+) is (not )?a (knight|knave)", text)
    assert m, text
    return (roles[m[1]] == (m[3] == "knight")) != bool(m[2])


def read_prose(text):
    """The names in order and what each says."""
    number, names = re.search(r"You meet (\d) inhabitants: ([\w, ]+)\.", text).groups()
    names = re.split(r", | and ", names)
    assert len(names) == len(set(names)) == int(number)
    said = re.findall(
        r'(?:(\w+) (?:says:|remarks,|tells you:) |According to (\w+), )?"([^"]+?)[.,]?"'
        r"(?: (\w+) declares)?",
        text.partition("You meet")[2].partition("Who is")[0],
    )
    statements = {
        "".join((before, according, after)): what for before, according, what, after in said
    }
    assert list(statements) == names
    return names, statements


# --- Puzzles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_symbolic_puzzles_and_their_solutions(split):
    lengths = set()
    for problem in knights_knaves.symbolic_problems(
        200, 5, split=split, min_people=2, max_people=5
    ):
        statements = problem.problem.removesuffix("?").split(";")
        names = "ABCDE"[: len(statements)]
        lengths.add(len(names))
        agreeing, tried = [], ""
        for roles in all_roles(names):
            letters = "".join(n if roles[n] else n.lower() for n in names)
            values = [true_in_symbols(s, roles) for s in statements]
            wrong = [v != roles[n] for v, n in zip(values, names, strict=True)]
            shown = values[: wrong.index(True) + 1] if any(wrong) else values
            if not agreeing:
                tried += letters + "".join("ft"[v] for v in shown)
            if not any(wrong):
                agreeing.append(letters)
        assert agreeing == [problem.answer]
        worked = knights_knaves.symbolic_solution(problem)
        assert worked == f"<think>{tried}</think>\\boxed{{{problem.answer}}}"
    assert lengths == {2, 3, 4, 5}


@pytest.mark.parametrize("split", ["train", "test"])
def test_prose_puzzles_have_one_solution(split):
    found = knights_knaves.problems(150, 5, split=split, min_people=2, max_people=8)
    kinds = Counter()
    for problem in found:
        names, statements = read_prose(problem.problem)
        agreeing = [
            roles
            for roles in all_roles(names)
            if all(true_in_prose(what, roles) == roles[who] for who, what in statements.items())
        ]
        assert len(agreeing) == 1
        right = ", ".join(f"{n} is a {'knight' if r else 'knave'}" for n, r in agreeing[0].items())
        assert problem.answer == right
        assert problem.meta["names"] == names
        symbols = problem.meta["symbols"].removesuffix("?").split(";")
        for roles in itertools.islice(all_roles(names), 16):
            letters = dict(zip("ABCDEFGH", roles.values(), strict=False))
            for what, symbol in zip(statements.values(), symbols, strict=True):
                assert true_in_prose(what, roles) == true_in_symbols(symbol, letters)
        kinds.update(w for w in (" and ", " or ", "If ", " if and only if ", " not ")
                     for what in statements.values() if w in what)  # fmt: skip
        assert split_of(problem.meta["symbols"]) == split
    assert min(kinds.values()) > 50
    assert {len(p.meta["names"]) for p in found} == set(range(2, 9))


def test_there_are_many_puzzles_and_no_answer_is_favoured():
    found = knights_knaves.symbolic_problems(20_000, 0)
    assert len({p.problem for p in found}) == len({p.id for p in found}) == 20_000
    answers = Counter(p.answer for p in found)
    assert len(answers) == 8
    assert all(0.1 < n / len(found) < 0.15 for n in answers.values())
    assert all(
        p.problem[0] != "a" or p.problem[1] != ";" for p in found
    )  # nobody is a liar by own words
    tokenizer = SentencePieceTokenizer.train(knights_knaves.ALPHABET)
    assert max(len(tokenizer.encode(p.problem)) for p in found) == 12
    longest = max(found[:3000], key=lambda p: len(knights_knaves.symbolic_solution(p)))
    assert len(tokenizer.encode(knights_knaves.symbolic_solution(longest))) < 56


@pytest.mark.parametrize("make", [knights_knaves.problems, knights_knaves.symbolic_problems])
def test_puzzles_are_a_function_of_the_arguments_and_splits_are_apart(make):
    found = make(100, 1)
    assert found == make(100, 1)
    assert found[:30] == make(30, 1)
    assert [p.problem for p in found] != [p.problem for p in make(100, 2)]
    train = {logic(p) for seed in range(3) for p in make(500, seed)}
    test = {logic(p) for seed in range(3) for p in make(200, seed, split="test")}
    assert len(train) > 1200
    assert len(test) > 450
    assert not train & test
    for people in ((1, 3), (4, 3), (2, 9)):
        with pytest.raises(ValueError, match="need 2 <= min_people <= max_people <= "):
            make(1, 0, min_people=people[0], max_people=people[1])
    for operations in ("", "&x"):
        with pytest.raises(ValueError, match=r"operations must be some of &\|>=, not '"):
            make(1, 0, operations=operations)
    easy = "".join(map(logic, make(100, 0, operations="&|")))
    assert {"&", "|"} <= set(easy)
    assert not {">", "="} & set(easy)


def logic(problem):
    return problem.meta.get("symbols", problem.problem)


def test_the_documented_example():
    example = Problem("", "b;A>c;A=C?", "AbC")
    worked = knights_knaves.symbolic_solution(example)
    assert worked == "<think>ABCfABcfAbCtft</think>\\boxed{AbC}"
    assert f"`{example.problem}`" in knights_knaves.__doc__
    assert worked in knights_knaves.__doc__
    with pytest.raises(ValueError, match="has no solution"):
        knights_knaves.symbolic_solution(Problem("", "b;A=c;A&B?", ""))


def test_recorded():
    """Other Python versions must draw the same ones."""
    assert [p.problem for p in knights_knaves.symbolic_problems(3, 1)] == RECORDED
    prose = knights_knaves.problems(1, 1)[0]
    assert (prose.answer, prose.meta["symbols"]) == RECORDED_PROSE


RECORDED = ["b;b&a;A&B?", "A&b;c;C>a?", "B|C;c;c=B?"]
RECORDED_PROSE = ("Tessa is a knave, Walter is a knave, Oliver is a knave", "B&a;A=c;a=B?")

# --- Answers -----------------------------------------------------------------------------------

GOLD = "Zoey is a knight, Oliver is a knave, Mia is a knight"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (GOLD, True),
        ("mia is a KNIGHT, Zoey is a knight and oliver is a knave.", True),
        ("Zoey is a knight, Oliver is a knave, and Mia is a knight", True),
        ("\\text{Zoey is a knight, Oliver is a knave, Mia is a knight}", True),
        ("\\text{Zoey is a knight}, \\text{Oliver is a knave}, \\text{ Mia is a knight}", True),
        ("(1) Zoey is a knight (2) Oliver is a knave (3) Mia is a knight", True),
        ("1. Zoey is a knight\n2. Oliver is a knave\n3. Mia is a knight", True),
        ("Zoey: knight; Oliver: knave; Mia: knight", True),
        ("Zoey is a knight \\\\ Oliver is a knave \\\\ Mia is a knight", True),
        ("Zoey is a knight, Oliver is a knave", False),
        ("Zoey is a knight, Oliver is a knight, Mia is a knight", False),
        (GOLD + ", Mia is a knave", False),
        (GOLD + ", Mia is a knight", False),
        (GOLD + ", Hugo is a knight", False),
        (GOLD + ", or the other way round", False),
        ("Zoey is a knight or a knave, Oliver is a knave, Mia is a knight", False),
        ("Zoey is not a knight, Oliver is a knave, Mia is a knight", False),
        ("Zoey and Mia are knights, Oliver is a knave", False),
        ("knight, knave, knight", False),
        ("", False),
        (GOLD + "," * 3000, False),
    ],
)
def test_roles_are_read_from_the_answer(answer, right):
    assert same_roles(answer, GOLD, {}) is right


def test_letters_are_compared_without_their_order():
    assert same_letters("AbC", "AbC")
    assert same_letters("C, A, b", "AbC")
    for wrong in ("Abc", "Ab", "AbCC", "AbC?", "ABbC", ""):
        assert not same_letters(wrong, "AbC")
