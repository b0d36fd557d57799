"""Benchmarks and their figures, against enumeration, published values and hand counts."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from math import comb
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from kdrl_jax.config import ROOT
from kdrl_jax.evaluation import benchmarks as registry
from kdrl_jax.evaluation.benchmarks import (
    BENCHMARKS,
    find_benchmarks,
    load_benchmark,
    refused_golds,
)
from kdrl_jax.evaluation.metrics import (
    avg_at_k,
    bootstrap_interval,
    maj_at_k,
    pass_at_k,
    repetition_rate,
)
from kdrl_jax.evaluation.paper_tables import AVERAGE, SIX, TABLES, fitting
from kdrl_jax.evaluation.tables import markdown, summarise
from kdrl_jax.models import ModelConfig
from kdrl_jax.rewards import Grader
from kdrl_jax.rollout.repetition import TAIL, repeated_share, repeats
from kdrl_jax.tasks.registry import task_verifier
from kdrl_jax.training.evaluation import group_of
from kdrl_jax.types import Problem, UserError

DATA = ROOT.parent / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the evaluation sets are not at {DATA}")
SHAPE = {
    **{"vocab_size": 64, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1},
    **{"head_dim": 8, "mlp_size": 32, "qkv_bias": True, "qk_norm": False, "model_type": "qwen2"},
}
ROWS = {
    **{"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500},
    **{"minerva_math": 272, "olympiadbench": 675, "gsm8k": 1319},
}


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1, timeout_s=20.0, require_format=False) as shared:
        yield shared


def rewards_of(right: int, samples: int) -> np.ndarray:
    return np.array([[1.0] * right + [0.0] * (samples - right)])


def test_avg_at_k_is_a_mean_for_each_problem():
    rewards = np.array([[1, 0, 0, 1], [0, 0, 0, 1]], np.float32)
    np.testing.assert_array_equal(avg_at_k(rewards), [0.5, 0.25])


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        row = rewards_of(right, samples)
        subsets = list(itertools.combinations(row[0], k))
        assert pass_at_k(row, k)[0] == pytest.approx(np.mean([max(s) for s in subsets]), abs=1e-12)


def test_pass_at_k_is_exact_where_binomials_overflow():
    rows = np.concatenate([rewards_of(c, 2000) for c in (0, 1, 3, 999, 1000, 1001, 2000)])
    found = pass_at_k(rows, 1000)
    for value, c in zip(found, rows.sum(1).astype(int), strict=True):
        exact = 1 - Fraction(comb(2000 - c, 1000), comb(2000, 1000))
        assert value == pytest.approx(float(exact), rel=1e-12, abs=1e-15)


def test_pass_at_k_is_unbiased():
    """Its mean over draws of n samples is the chance that k samples hold a right one."""
    share, n, k = 0.2, 6, 3
    mean = sum(
        stats.binom.pmf(c, n, share) * pass_at_k(rewards_of(c, n), k)[0] for c in range(n + 1)
    )
    assert mean == pytest.approx(1 - (1 - share) ** k)


def test_pass_at_k_with_one_sample_is_avg():
    rewards = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    np.testing.assert_allclose(pass_at_k(rewards, 1), avg_at_k(rewards))


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_refuses_more_than_there_are(k):
    with pytest.raises(ValueError, match="from 1 to the 3 samples"):
        pass_at_k(np.zeros((2, 3)), k)
    with pytest.raises(ValueError, match="0 or 1"):
        pass_at_k(np.array([[0.5]]), 1)


@pytest.mark.parametrize(
    ("answers", "rewards", "expected"),
    [
        (["5", "7", "7"], [1, 0, 0], 0),
        (["5", "7", "5"], [1, 0, 1], 1),
        (["7", "5"], [0, 1], 0),  # a tie: the first one voted for
        (["5", "7"], [1, 0], 1),
        # Spellings of one answer vote together, against two of another.
        ([r"\frac{1}{2}", "0.5", "3", "3", r"\dfrac12", r"$\frac{1}{2}$"], [1, 1, 0, 0, 1, 1], 1),
        ([r"\text{ East }", "east", "west", "east."], [1, 1, 0, 1], 1),
        (["x", "y", None, None, "", "y"], [1, 0, 0, 0, 0, 0], 0),
        ([None, None, "5"], [0, 0, 1], 1),  # those without an answer do not vote
        ([None, ""], [0, 0], 0),
        (["5", "5"], [0, 1], 1),  # the first was graded in too little time
    ],
)
def test_maj_at_k(answers, rewards, expected):
    assert maj_at_k([answers], np.array([rewards], np.float64)).tolist() == [expected]


def test_maj_at_k_of_one_sample_is_its_reward():
    rewards = np.array([[1.0], [0.0], [0.0]])
    np.testing.assert_array_equal(maj_at_k([["5"], ["6"], [None]], rewards), [1, 0, 0])


def test_repeated_share_counts_n_grams_of_the_tail():
    assert repeated_share([]) == repeated_share([1, 2, 3]) == 0
    assert repeated_share(range(500)) == 0
    # 1 2 1 2 1 2 has three 4-grams, of which 1212 comes twice.
    assert repeated_share([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)
    # A period of p in a tail of L tokens leaves p different ones among L − 3.
    for period in (1, 7, 100):
        loop = list(range(period)) * 2000
        assert repeated_share(loop) == pytest.approx(1 - period / (TAIL - 3))
    # What is before the tail does not count.
    assert repeated_share([5] * 3000 + list(range(TAIL))) == 0


def test_repeats_finds_loops_and_near_loops_only(rng):
    text = rng.integers(0, 1000, 5000).tolist()
    assert not repeats(text)
    assert not repeats(text + text[-100:])
    assert repeats(text + text[-100:] * 6)
    assert repeats(text + list(range(TAIL // 2 - 10)) * 3)
    # "Step 17: add 3 to 5." with another number each time.
    counter = [token for i in range(100) for token in (1, 2000 + i, 3, 4, 5, 6, 7, 8, 9, 10)]
    assert repeats(text + counter)
    # A response shorter than the tail: half of it is said again.
    assert repeats(list(range(20)) * 3)
    assert not repeats([*range(60), *range(20)])


def test_repetition_rate_is_of_the_cut_responses():
    cut, repeating = [True, False, True, True], [True, False, False, False]
    assert repetition_rate(cut, repeating) == pytest.approx(1 / 3)
    assert np.isnan(repetition_rate([False, False], [False, False]))


def test_bootstrap_interval_agrees_with_scipy(rng):
    values = rng.integers(0, 5, 40) / 4
    ours = bootstrap_interval(values, seed=3)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(9)
    ).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.015)
    assert ours == bootstrap_interval(values, seed=3)
    assert ours != bootstrap_interval(values, seed=4)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says(rng):
    draws = (rng.random((200, 60)) < 0.3).astype(np.float64)
    bounds = np.array([bootstrap_interval(d, level=0.8, resamples=400) for d in draws])
    covered = ((bounds[:, 0] <= 0.3) & (bounds[:, 1] >= 0.3)).mean()
    assert 0.7 < covered < 0.9


def test_bootstrap_interval_of_equal_values_is_a_point():
    assert bootstrap_interval(np.ones(7)) == (1.0, 1.0)
    assert bootstrap_interval(np.zeros(1)) == (0.0, 0.0)


def test_bootstrap_does_not_depend_on_how_it_is_cut_up(monkeypatch):
    values = np.arange(12.0)
    whole = bootstrap_interval(values, resamples=100)
    monkeypatch.setattr("kdrl_jax.evaluation.metrics._DRAWN_AT_ONCE", 30)
    assert bootstrap_interval(values, resamples=100) == whole


# --- Benchmarks --------------------------------------------------------------------------------


def test_paper_figures_agree_with_their_averages():
    """A slip in a copied figure would show: averages are over the columns of a table."""
    seen = set()
    for table in TABLES:
        for name, row in table.rows.items():
            if set(SIX) <= row.keys():
                given, whole, near = [row[c] for c in SIX], row[AVERAGE], 0.0501
            elif "knights_knaves" in row:  # shares of two digits
                parts = [x for c, x in row.items() if c.startswith("knights_knaves/")]
                assert len(parts) == 7
                given, whole, near = parts, row["knights_knaves"], 1.0
            else:
                continue
            seen.add(table.source)
            assert whole == pytest.approx(np.mean(given), abs=near), (table.source, name)
    assert seen == {"KDRL, table 1", "RLAD, table 1"}


def test_a_model_is_set_beside_its_own_tables():
    def found(style: str, **shape):
        model = ModelConfig(**{**SHAPE, **shape})
        return [(table.source, table.tokens) for table in fitting(model, style)]

    small = {"hidden_size": 1536, "num_layers": 28}
    assert found("kdrl", **small) == [("KDRL, table 1", 32_768), ("RLAD, table 3", 8192)]
    assert found("zero_rl", **small) == []
    assert found("zero_rl", hidden_size=2048, num_layers=36) == [("KDRL, table 2", 8192)]
    assert found("zero_rl", hidden_size=3584, num_layers=28) == [("KDRL, table 4", 8192)]
    assert found("kdrl", hidden_size=3584, num_layers=28) == []
    puzzles = found("chat", hidden_size=1024, num_layers=28)
    assert puzzles == [("RLAD, table 1", 8192), ("RLAD, table 1", 2048)]
    assert found("kdrl", hidden_size=576, num_layers=30) == []


def test_benchmarks_ask_as_often_as_the_paper():
    assert {name: b.samples for name, b in BENCHMARKS.items()} == {
        **dict.fromkeys(("aime24", "aime25", "amc23"), 16),
        **dict.fromkeys(("math500", "minerva_math", "olympiadbench", "gsm8k"), 1),
        "knights_knaves": 1,
    }


def test_hub_sources_are_pinned():
    for benchmark in BENCHMARKS.values():
        assert len(benchmark.revision) == 40
        assert benchmark.source(None).endswith(f"&revision={benchmark.revision}")
    [other] = find_benchmarks(["gsm8k@abc"])
    assert other.source(None) == "hf://openai/gsm8k?split=test&config=main&revision=abc"
    assert other.source(Path("x")) == "x/gsm8k_test.jsonl"
    assert BENCHMARKS["gsm8k"].revision != "abc"


def test_unknown_benchmarks_are_refused_with_the_nearest():
    with pytest.raises(UserError) as refusal:
        find_benchmarks(["aime-24", "math5000", "gsm8k", "gsm8k", "amc23@"])
    text = str(refusal.value)
    assert len(refusal.value.problems) == 4
    assert "nearest is aime24" in text
    assert "nearest is math500" in text
    assert "gsm8k is given twice" in text
    assert "'amc23@' has no revision" in text


def test_hub_rows_are_read_by_their_own_columns(monkeypatch):
    """GSM8K's answers end in '#### number'; OlympiadBench's are lists."""
    asked = []

    def read(source, fields, *, on_bad):
        asked.append((source, fields))
        report = type("Report", (), {"bad": 2, "listed": ("row 3: 'answer' is empty",)})
        return [Problem("1", "?", "2 + 2 = 4.\n#### 1,234")], report

    monkeypatch.setattr(registry, "read_problems", read)
    loaded = load_benchmark(BENCHMARKS["gsm8k"])
    assert loaded.problems[0].answer == "1234"
    assert (loaded.bad, loaded.listed) == (2, ("row 3: 'answer' is empty",))
    load_benchmark(BENCHMARKS["olympiadbench"])
    assert asked[0][1] == {"id": "id", "problem": "question", "answer": "answer"}
    assert asked[1][1]["answer"] == "final_answer.0"


@real_data
@pytest.mark.parametrize("name", ROWS)
def test_gold_answers_score_100_percent(name, grader):
    loaded = load_benchmark(BENCHMARKS[name], DATA)
    assert len(loaded.problems) == ROWS[name]
    assert loaded.bad == 0
    assert refused_golds(loaded.problems, grader) == {}


@real_data
def test_gold_answers_are_found_in_other_words(grader):
    """Beyond equal strings: what a model may well write for the same answer."""
    by_id = {
        p.id: p
        for name in ("minerva_math", "olympiadbench", "math500")
        for p in load_benchmark(BENCHMARKS[name], DATA).problems
    }
    said = {
        "minerva/5": r"\arcsin\left(\frac{10}{13}\right)",  # np.arcsin(10/13)
        "minerva/38": r"-\frac{1}{3}",  # -1./3
        "minerva/49": "-1.5",  # -3./2
        "olympiadbench/1782": "n^2 - n - 1",  # m_{\max }=n^{2}-n-1
        "olympiadbench/1760": "90^\\circ, 90^\\circ",
        "olympiadbench/1664": r"84 \text{ and } 69",
        "olympiadbench/1964": r"[2, \infty)",
        "test/precalculus/807.json": r"(3, \pi/2)",
    }
    verdicts = grader.grade(
        [rf"\boxed{{{text}}}" for text in said.values()], [by_id[i].answer for i in said]
    )
    assert {i: v.outcome for i, v in zip(said, verdicts, strict=True)} == dict.fromkeys(
        said, "correct"
    )


@real_data
def test_several_answers_may_come_in_any_order(grader):
    """But for one that is a sentence, and one whose two numbers read as one: 8,221."""
    problems = load_benchmark(BENCHMARKS["olympiadbench"], DATA).problems
    several = [(p, parts) for p in problems if len(parts := top_level(p.answer)) > 1]
    responses = [rf"\boxed{{{','.join(reversed(parts))}}}" for _, parts in several]
    verdicts = grader.grade(responses, [p.answer for p, _ in several])
    missed = {p.id for (p, _), v in zip(several, verdicts, strict=True) if not v.reward}
    assert len(several) > 80
    assert missed == {"olympiadbench/1965", "olympiadbench/2349"}


def top_level(text: str) -> list[str]:
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def test_a_gold_answer_that_cannot_be_graded_is_named(grader):
    refused = refused_golds([Problem("a", "?", "5"), Problem("b", "?", "}{")], grader)
    assert list(refused) == [1]
    assert refused[1].startswith("b: the gold answer '}{' grades as ")


# --- Figures -----------------------------------------------------------------------------------


def row(reward: float, extracted: str | None, finish: str = "stop", repeats: bool = False):
    outcome = "correct" if reward else "wrong"
    return {
        **{"reward": reward, "extracted": extracted, "finish_reason": finish},
        **{"repeats": repeats, "length": 10 if finish == "stop" else 30, "outcome": outcome},
    }


HAND_MADE = [
    *(row(1, "5"), row(1, "5.0"), row(0, "7"), row(0, None, "length", True)),
    *(row(0, "1"), row(0, "2"), row(0, "2"), row(1, "3", "length")),
]


def test_figures_of_a_benchmark_by_hand():
    found = summarise(HAND_MADE, 4, 3, ["x: the gold answer '}{' grades as wrong"])
    assert found["problems"] == 2
    assert found["avg"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert found["pass"]["1"] == pytest.approx(found["avg"])
    assert found["pass"]["2"] == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6)) / 2)
    assert found["pass"]["4"] == 1
    assert found["maj"] == pytest.approx(1 / 2)  # 5 of the first, 2 of the second
    assert found["length"] == pytest.approx((6 * 10 + 2 * 30) / 8)
    assert found["clip_ratio"] == pytest.approx(2 / 8)
    assert found["repetition_rate"] == pytest.approx(1 / 2)
    assert found["outcomes"]["correct"] == 3
    low, high = found["avg_interval"]
    assert low == pytest.approx(0.25)
    assert high == pytest.approx(0.5)


def test_the_table_stands_beside_the_paper():
    figures = summarise(HAND_MADE, 4, 3, ["x: the gold answer '}{' grades as wrong"])
    none_cut = summarise(HAND_MADE[:3], 1, 0, [])
    results = {
        "checkpoint": "runs/a",
        "benchmarks": {"aime24": figures, "gsm8k": none_cut},
        "settings": {"temperature": 0.6},
    }
    other = {"checkpoint": "runs/b", "benchmarks": {"gsm8k": none_cut}}
    text = markdown(results, [other], [TABLES[0]])
    cells = {
        parts[1]: parts[2:-1]
        for line in text.splitlines()
        if line.startswith("|") and (parts := [cell.strip() for cell in line.split("|")])
    }
    assert cells["**runs/a**"] == ["37.5 [25.0, 50.0]", "66.7 [0.0, 100.0]"]
    assert cells["**runs/b**"] == ["–", "66.7 [0.0, 100.0]"]
    assert cells["KDRL, table 1 (32,768 tokens): KDRL-Annealing"] == ["42.9", "–"]
    assert cells["AIME24"][0] == "2"
    expected = "37.5 [25.0, 50.0]|100.0|50.0|87.5|15|25.0|50.0|3"
    assert cells["AIME24"][2:] == expected.split("|")
    assert cells["GSM8K"][7:9] == ["0.0", "–"]
    assert "| --: |" in text  # a column of one digit
    assert "not of equal terms" not in text  # how many tokens there were is not known
    assert "No table of KDRL or RLAD" in markdown(results)
    short = results | {"settings": {"max_new_tokens": 8192}}
    assert "may have 8,192 tokens, so the rows are not" in markdown(short, [], [TABLES[0]])
    own = {**results, "benchmarks": {"mine": none_cut}}
    assert "KDRL" not in markdown(own, [], [TABLES[0]])
    assert "- x: the gold answer '}{' grades as wrong\n- and 2 more" in text
    six = {**results, "benchmarks": dict.fromkeys(SIX, figures)}
    assert "| average" in markdown(six)
    assert "57.2 |" in markdown(six, [], [TABLES[0]])
    zero_rl = next(table for table in TABLES if table.source == "KDRL, table 2")
    lines = [x for x in markdown(six, [], [zero_rl]).splitlines() if "KDRL-Annealing" in x]
    assert [x.split("|")[-2].strip() for x in lines] == ["32.5"]  # its average alone is known


def test_accuracy_by_part_stands_beside_the_paper():
    rows = [row(r, "x") | {"group": g} for r, g in ((1, "2"), (0, "2"), (1, "3"), (1, "10"))]
    figures = summarise(rows, 1, 0, [])
    assert figures["by"] == {"2": 0.5, "3": 1.0, "10": 1.0}
    results = {"checkpoint": "a", "benchmarks": {"knights_knaves": figures}, "settings": {}}
    papers = [table for table in TABLES if "knights_knaves" in table.rows.get("RLAD", {})][:1]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in markdown(results, [], papers).splitlines()
        if line.startswith("|")
    ]
    assert ["Knights and Knaves by part", "2", "3", "10"] in lines
    assert ["**a**", "50.0", "100.0", "100.0"] in lines
    assert ["RLAD, table 1 (8,192 tokens): RLAD", "100.0", "99.0", "–"] in lines
    assert ["RLAD, table 1 (8,192 tokens): RLAD", "94.0"] in lines


def test_puzzles_are_judged_by_roles(tmp_path):
    """The hub's rows: another order of clauses is right, a role that is missing is not."""
    benchmark = BENCHMARKS["knights_knaves"]
    quiz = "A very special island is inhabited only by knights and knaves. Who is what?"
    answer = "Zoey is a knave, and Oliver is a knight."
    line = {"problem": quiz, "answer": answer, "names": ["Zoey", "Oliver"]}
    (tmp_path / "knights_knaves.jsonl").write_text(json.dumps(line))
    [problem] = load_benchmark(benchmark, tmp_path).problems
    assert problem.problem == f"{quiz} {benchmark.instruction}"
    assert group_of(problem, benchmark.by) == "2"
    with Grader(workers=1, require_format=False, verify=task_verifier(benchmark.task)) as judge:
        assert refused_golds([problem], judge) == {}
        said = [
            "Oliver is a knight, Zoey is a knave",
            "Zoey is a knave",
            answer.replace("a kni", "a kna"),
        ]
        boxed = [f"\\boxed{{{text}}}" for text in said]
        verdicts = judge.grade(boxed, [problem.answer] * 3)
    assert [v.reward for v in verdicts] == [1.0, 0.0, 0.0]
