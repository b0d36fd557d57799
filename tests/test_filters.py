"""Filters of problems: what each keeps, how they are written, and what the report counts."""

import json
from pathlib import Path

import numpy as np
import pytest

from kdrl_jax.data import (
    STAGE2_FILTERS,
    ZERO_RL_STUDENT_FILTERS,
    ZERO_RL_TEACHER_FILTERS,
    apply_filters,
    load_problems,
    parse_filters,
)
from kdrl_jax.data.filters import gradable, normalise
from kdrl_jax.types import Problem, UserError

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
MODELS = [f"DeepSeek-R1-Distill-Qwen-{size}" for size in ("1.5B", "7B", "32B")]


def labelled_set(passed):
    """Problems with the pass counts [P, 3] of 16 attempts by the three models."""
    return [
        Problem(f"p/{i}", f"problem {i}", "1", {"pass_rate": dict(zip(MODELS, row, strict=True))})
        for i, row in enumerate((np.asarray(passed) / 16).tolist())
    ]


@pytest.fixture
def passed(rng):
    """400 problems; many solved by none, by all, or by the larger models alone."""
    passed = rng.integers(0, 17, (400, 3))
    passed[:120, 0] = 0
    passed[:40] = 0
    passed[120:180, 0] = rng.integers(14, 17, 60)
    return passed[rng.permutation(400)]


def ids(problems):
    return [int(p.id.removeprefix("p/")) for p in problems]


# --- The paper's recipes ------------------------------------------------------------------------


def test_stage2_is_that_of_numpy(passed):
    """Re-derived from counts of passes, as the paper words it."""
    problems = labelled_set(passed)
    tokens = {p.id: 900 + 2 * i for i, p in enumerate(problems)}
    kept, report = apply_filters(problems, STAGE2_FILTERS, lambda p: tokens[p.id])

    easy = passed[:, 0] >= 15  # pass@16 >= 15
    unsolvable = ~easy & (passed == 0).all(1)
    left = ~easy & ~unsolvable
    unsolved = left & (passed[:, 0] == 0)
    solved = left & (passed[:, 0] > 0)
    room = max(u for u in range(401) if u <= 0.1 * (u + solved.sum()) + 1e-9)
    assert 0 < room < unsolved.sum()
    steps = [left for _, _, left in report.counts()]
    assert steps[:3] == [(~easy).sum(), left.sum(), solved.sum() + room]
    # The last step alone knows prompts; they grow with the place in the set.
    short = np.arange(400) <= 62
    assert set(ids(kept)) >= set(np.flatnonzero(solved & short))
    assert set(ids(kept)) <= set(np.flatnonzero(left & short))
    assert ids(kept) == sorted(ids(kept))
    assert report.start == 400
    assert steps[3] == steps[4] == len(kept)
    [line] = report.warnings()  # 400 problems are not the paper's 61K
    assert line.startswith(f"{len(kept)} problems, but about 61,000 were expected here")


def test_zero_rl_recipes(passed):
    problems = labelled_set(passed)
    for filters, least in ((ZERO_RL_TEACHER_FILTERS, 4), (ZERO_RL_STUDENT_FILTERS, 8)):
        kept, _ = apply_filters(problems, filters)
        assert ids(kept) == np.flatnonzero(passed[:, 0] >= least).tolist()


@pytest.mark.parametrize(("count", "warned"), [(94, 1), (95, 0), (100, 0), (105, 0), (106, 1)])
def test_a_count_that_is_not_the_expected_one_is_reported(count, warned):
    """Beyond 5 %; nothing is dropped."""
    problems = labelled_set([[1, 0, 0]] * count)
    kept, report = apply_filters(problems, ["expected:n=100"])
    assert kept == problems
    assert len(report.warnings()) == warned
    with pytest.raises(UserError, match=r"data.filters\[0\]: 'expected': needs n="):
        parse_filters(["expected"])


@pytest.mark.parametrize(
    ("solved", "unsolved", "share", "stay"),
    [
        *[(9, 5, 0.1, 1), (8, 5, 0.1, 0), (90, 50, 0.1, 10), (18, 1, 0.1, 1), (7, 9, 0.3, 3)],
        *[(2, 9, 0.5, 2), (3, 4, 0.0, 0), (3, 4, 1.0, 4), (0, 4, 0.1, 0), (0, 0, 0.1, 0)],
    ],
)
def test_cap_is_a_share_of_what_is_left(solved, unsolved, share, stay):
    problems = labelled_set([[1, 0, 0]] * solved + [[0, 1, 1]] * unsolved)
    kept, _ = apply_filters(problems, [f"cap_unsolved:model={MODELS[0]},share={share}"])
    assert len(kept) == solved + stay
    assert ids(kept)[:solved] == list(range(solved))


def test_cap_does_not_depend_on_the_order(rng):
    problems = labelled_set([[i % 2, 0, 1] for i in range(100)])
    spec = [f"cap_unsolved:model={MODELS[0]},share=0.2"]
    kept, _ = apply_filters(problems, spec)
    shuffled = [problems[i] for i in rng.permutation(100)]
    other, _ = apply_filters(shuffled, spec)
    assert set(ids(kept)) == set(ids(other))
    chosen = [i for i in ids(kept) if i % 2 == 0]
    assert len(chosen) == 12
    assert chosen != list(range(0, 24, 2))  # not merely the first ones


# --- Each filter --------------------------------------------------------------------------------


def test_pass_rates_have_closed_bounds():
    problems = labelled_set([[n, 0, 0] for n in range(17)])
    model = f"model={MODELS[0]}"
    assert ids(apply_filters(problems, [f"pass_rate:{model}"])[0]) == list(range(17))
    assert ids(apply_filters(problems, [f"pass_rate:{model},min=0.25"])[0]) == list(range(4, 17))
    spec = f"pass_rate:max=0.9375,min=0.0625,{model}"
    assert ids(apply_filters(problems, [spec])[0]) == list(range(1, 16))


def test_solved_by_any():
    problems = labelled_set([[0, 0, 0], [0, 0, 1], [0, 2, 0], [3, 0, 0]])
    assert ids(apply_filters(problems, [f"solved_by_any:models={'|'.join(MODELS)}"])[0]) == [
        1,
        2,
        3,
    ]
    assert ids(apply_filters(problems, [f"solved_by_any:models={MODELS[1]}"])[0]) == [2]


def test_rows_without_labels_name_the_command():
    bare = [Problem("a/1", "q", "1"), Problem("a/2", "r", "1", {"pass_rate": 0.5})]
    with pytest.raises(UserError) as caught:
        apply_filters(bare, ["pass_rate:model=m,min=0.5"])
    assert str(caught.value) == (
        "data.filters: 2 of 2 problems, a/1 the first, have no pass rate of 'm' (nor any); "
        "measure it with python -m kdrl_jax.difficulty"
    )
    some = [Problem("b/1", "q", "1", {"pass_rate": {"m": 0.0, "n": 1.0}}), *bare]
    for spec in ("solved_by_any:models=m|n", "cap_unsolved:model=n,share=0.5"):
        with pytest.raises(UserError, match=r"2 of 3 problems, a/1 .* or begin with labelled:"):
            apply_filters(some, [spec])
    with pytest.raises(UserError, match=r"no pass rate of 'o' \(there are m, n\); measure it"):
        apply_filters(some, ["labelled:models=m|o"])
    kept, report = apply_filters(some, ["labelled:models=m|n", "pass_rate:model=n,min=1"])
    assert kept == some[:1]
    assert next(report.counts()) == ("labelled:models=m|n", 2, 1)


def test_prompt_tokens_need_a_tokenizer():
    problems = [Problem(str(n), "x" * n, "1") for n in (3, 5, 4, 6)]
    kept, _ = apply_filters(problems, ["prompt_tokens:max=4"], lambda p: len(p.problem))
    assert [p.id for p in kept] == ["3", "4"]
    with pytest.raises(ValueError, match="prompt_tokens:max=4: needs prompt_length"):
        apply_filters(problems, ["prompt_tokens:max=4"])


def test_texts_that_are_the_same():
    same = [
        "Find  $\\dfrac{1}{2}+x$ .",
        "find \\(\\frac{1}{2} + x\\)",
        "Find $\\displaystyle\\left \\tfrac{1}{2}\\,+\\;x\\right$!",
        "Ｆind $\\frac{1}{2}+x$?",
    ]
    assert len({normalise(text) for text in same}) == 1
    different = ["2+3=", "2-3=", "2*3=", "23=", "x^2", "x2", "x_2", "\\leftarrow x", "\\arrow x"]
    assert len({normalise(text) for text in different}) == len(different)


def test_dedupe_and_exclude(tmp_path):
    texts = ["What is 1+1?", "What is 2+2?", "what is  $1+1$", "What is 3+3?"]
    problems = [Problem(f"p/{i}", text, "1") for i, text in enumerate(texts)]
    assert ids(apply_filters(problems, ["dedupe"])[0]) == [0, 1, 3]
    for name, text in (("a", "what is 3+3"), ("b", "WHAT IS 2+2?")):
        row = json.dumps({"problem": text, "answer": "6"})
        (tmp_path / f"{name}.jsonl").write_text(row)
    files = f"{tmp_path / 'a.jsonl'}|{tmp_path / 'b.jsonl'}"
    assert ids(apply_filters(problems, [f"exclude:files={files}"])[0]) == [0, 2]
    assert ids(apply_filters(problems, [f"exclude:files={tmp_path}", "limit:n=1"])[0]) == [0]
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        apply_filters(problems, [f"exclude:files={tmp_path / 'none.jsonl'}"])


def test_answers_that_cannot_be_graded():
    good = [
        "1",
        "-\\frac{3}{4}",
        "x^2+1",
        "\\text{Evelyn}",
        "(1,2)",
        "0.5\\text{ cm}",
        "C",
        "[0,1)",
    ]
    bad = ["\\frac{1}{2", "", "$$", "See the solution above; there are 2 of them, & more"]
    bad += ["9" * 2001, "np.arcsin(10/13)"]
    assert gradable(good + bad, workers=1) == [True] * len(good) + [False] * len(bad)
    problems = [Problem(f"p/{i}", "q", answer) for i, answer in enumerate(["1", "{", "2"])]
    assert ids(apply_filters(problems, ["answer_parses"])[0]) == [0, 2]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_real_sets():
    train = load_problems(SHARED / "train_math_500.jsonl")
    held_out = f"{SHARED / 'math500.jsonl'}|{SHARED / 'aime2?.jsonl'}"
    kept, report = apply_filters(train, ["dedupe", f"exclude:files={held_out}"])
    assert [left for _, _, left in report.counts()] == [500, 500]  # SOURCES.md: no exact overlap
    math500 = load_problems(SHARED / "math500.jsonl")
    mixed, _ = apply_filters(math500 + kept, [f"exclude:files={held_out}"])
    assert mixed == kept
    assert all(gradable([p.answer for p in load_problems(SHARED / "aime24.jsonl")]))


# --- How they are written -----------------------------------------------------------------------


def test_wrong_filters_are_named_all_at_once():
    with pytest.raises(UserError) as caught:
        parse_filters(
            [
                "dedup",
                "limit",
                "limit:n=many",
                "limit:n=0",
                "limit:m=3",
                "pass_rate:model=m,mni=0.5,max=1.5",
                "pass_rate:model=,min",
                "dedupe:all=1",
                "prompt_tokens:max=9,prompt_length=3",
                "dedupe",
            ]
        )
    assert caught.value.problems == [
        "data.filters[0]: 'dedup' is no filter; the nearest is dedupe",
        "data.filters[1]: 'limit': needs n=…, a whole number of at least 1",
        "data.filters[2]: 'limit:n=many': n=many must be a whole number of at least 1",
        "data.filters[3]: 'limit:n=0': n=0 must be a whole number of at least 1",
        "data.filters[4]: 'limit:m=3': no argument 'm'; the nearest is n",
        "data.filters[4]: 'limit:m=3': needs n=…, a whole number of at least 1",
        "data.filters[5]: 'pass_rate:model=m,mni=0.5,max=1.5': no argument 'mni'; "
        "the nearest is min",
        "data.filters[5]: 'pass_rate:model=m,mni=0.5,max=1.5': max=1.5 must be a number "
        "from 0 to 1",
        "data.filters[6]: 'pass_rate:model=,min': model has no value; write model=VALUE",
        "data.filters[6]: 'pass_rate:model=,min': min has no value; write min=VALUE",
        "data.filters[7]: 'dedupe:all=1': no argument 'all'; it takes none",
        "data.filters[8]: 'prompt_tokens:max=9,prompt_length=3': no argument 'prompt_length'; "
        "the nearest is max",
    ]


def test_nothing_is_filtered_if_one_filter_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"^data\.filters\[1\]"):
        apply_filters([Problem("a", "q", "1")], [f"exclude:files={tmp_path}/no.jsonl", "unique"])


def test_report_is_a_table():
    problems = [Problem(str(i), f"q{i // 2}", "1") for i in range(10)]
    kept, report = apply_filters(problems, ["dedupe", "limit:n=3"])
    assert len(kept) == 3
    assert str(report).splitlines() == [
        "filter      dropped      left",
        "                           10",
        "dedupe            5         5",
        "limit:n=3         2         3",
    ]
    assert report.to_dict() == {
        "start": 10,
        "steps": [
            {"filter": "dedupe", "dropped": 5, "left": 5},
            {"filter": "limit:n=3", "dropped": 2, "left": 3},
        ],
    }
    kept, report = apply_filters([], ["dedupe", "limit:n=3"])
    assert kept == []
    assert report.steps == (("dedupe", 0), ("limit:n=3", 0))
