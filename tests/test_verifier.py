"""The campaign against the verifier: its labels are certain, and it reports what it should."""

import importlib
import json
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from kdrl_jax.rewards import Grader, has_format

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
verifier, hostile, labelled = (
    importlib.import_module(f"verifier{name}") for name in ("", "_hostile", "_labelled")
)
DATA = Path(__file__).parents[2] / "shared" / "data"


def value(text: str) -> Fraction | None:
    """What a plain numeric answer is worth, read by rules of this test's own."""
    text = (
        text.strip(" $").replace("\\displaystyle", "").replace("\\left", "").replace("\\right", "")
    )
    text = re.sub(r"\\text\{(-?\d+)\}", r"\1", text).replace("x =", "").strip()
    text = re.sub(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3})", "", text)
    text = re.sub(r"\\d?frac\{(-?\d+)\}\{(-?\d+)\}", r"(\1)/(\2)", text)
    text = text.replace("\\cdot", "*").replace("\\div", "/")
    text = re.sub(r"(?<=\d)(?=\()", "+", text)  # a mixed number
    if not re.fullmatch(r"[-+*/(). \d]+", text):
        return None
    return eval(re.sub(r"\d+(?:\.\d+)?", r"Fraction('\g<0>')", text))  # digits and operators alone


@pytest.mark.parametrize(
    "gold", ["7", "-12", "0", "1234", "-56000", "271", "\\frac{3}{8}", "-\\frac{5}{7}"]
)
def test_labels_of_numbers_are_certain(gold: str) -> None:
    cases = labelled.cases(gold)
    checked = [case for case in cases if value(case.answer) is not None]
    for case in checked:
        assert (value(case.answer) == value(gold)) is case.equal, case
    assert sum(case.equal for case in checked) >= 5
    assert sum(not case.equal for case in checked) >= 4
    assert len(cases) == len(set(cases)) > 12


def test_labels_of_other_answers() -> None:
    made = {gold: {c.category: c.answer for c in labelled.cases(gold)} for gold in (
        "(1,2)", "3,5,7", "[0,1)", "\\text{Evelyn}", "2516_8", "x+1")}  # fmt: skip
    assert made["(1,2)"]["≠ swapped"] == "(2, 1)"
    assert made["3,5,7"]["= other order"] == "7, 5, 3"
    assert made["3,5,7"]["≠ one dropped"] == "3, 5"
    assert made["[0,1)"]["≠ left end"] == "(0,1)"
    assert made["\\text{Evelyn}"]["= bare word"] == "Evelyn"
    assert made["2516_8"]["≠ another base"] == "2516_{9}"
    assert made["x+1"]["≠ another variable"] == "Q+1"
    for ambiguous in ("2e-8", "1,234", "\\angle A=90", "f(x)=2x"):
        categories = {c.category for c in labelled.cases(ambiguous)}
        assert categories == {"itself", "= dollars and spaces", "= displaystyle"}


def test_attacks_are_repeatable_many_and_wrong() -> None:
    assert len(hostile.families()) >= 15
    counts = {**hostile._BOXED, **hostile._WHOLE}
    assert sum(count for count, _, _ in counts.values()) >= 10_000
    for name in hostile.families():
        first = list(hostile.attacks(name, "/nowhere", share=0.001))
        assert first == list(hostile.attacks(name, "/nowhere", share=0.001))
        assert all(attack.gold in hostile.GOLDS for attack in first)
    for attack in hostile.attacks("boxes that never close", "", share=0.1):
        assert not has_format(attack.response)
    for attack in hostile.attacks("near the gold answer", "", share=0.1):
        assert attack.gold not in attack.response


def test_families_against_the_grader(tmp_path: Path) -> None:
    with Grader(workers=1, timeout_s=verifier.TIMEOUT_S) as grader:
        grader.grade(["<think></think>\\boxed{x+1}"], ["1+x"])
        for name in ("hedged answers", "bytes", "broken format", "injected code", "several boxes"):
            row = verifier.try_family(grader, name, tmp_path / "made", seed=1, share=0.02)
            assert row["tried"] >= 10
            assert row["tried"] == sum(row[outcome] for outcome in verifier.OUTCOMES)
            assert not row["false_accepts"]
    assert not list(tmp_path.iterdir())


def test_what_counts_as_a_failure() -> None:
    row = {"family": "f", "slowest_s": 3.1, "host_s": 0.1, "false_accepts": []}
    found = {"hostile": {"families": [row], "code_ran": False}}
    assert verifier.failures(found) == []
    for change in ({"slowest_s": 9.0}, {"host_s": 9.0}, {"false_accepts": [["7", "8"]]}):
        found["hostile"]["families"] = [{**row, **change}]
        assert len(verifier.failures(found)) == 1
    assert len(verifier.failures({"hostile": {"families": [row], "code_ran": True}})) == 1


def test_error_rates_beside_math_verify(tmp_path: Path) -> None:
    golds = ("7", "12", "\\frac{3}{8}", "(1,2)", "x+1", "3,5", "72")
    for name, gold in zip(labelled.FILES, golds, strict=True):
        line = json.dumps({"answer": gold}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(line, encoding="utf-8")
    found = verifier.error_rates(tmp_path, per_file=5, workers=1, seed=0)
    rates = found["categories"]
    assert found["golds"] == 7
    assert verifier.total(rates, True, "ours")[0] == 0
    assert verifier.total(rates, False, "ours")[0] == 0
    assert verifier.total(rates, False, "math_verify")[0] > 0  # `\neq 7`, `8 = 7`, `7t`
    assert verifier.total(rates, True, "format_only")[0] == 0
    wrong, pairs = verifier.total(rates, False, "format_only")
    assert wrong == pairs > 20
    table = verifier.markdown({"hostile": {"families": [dict.fromkeys(
        ("family", "tried", *verifier.OUTCOMES, "asked", "crashes", "restarts", "slowest_s"), 1)]},
        "labelled": found})  # fmt: skip
    assert f"| **false accepts** | {pairs} | 0 (0.00 %) |" in table


def test_golds_of_the_benchmarks() -> None:
    if not DATA.is_dir():
        pytest.skip(f"the evaluation sets are not at {DATA}")
    golds = labelled.golds(DATA, per_file=10, seed=0)
    assert len(golds) == len(set(golds)) > 60
    assert golds == labelled.golds(DATA, per_file=10, seed=0)
