"""A share of one's own problems, kept from training to measure a run on."""

import json

import pytest

from kdrl_jax.data import hold_out, load_problems, to_json_lines
from kdrl_jax.types import Problem, UserError

PROBLEMS = [Problem(str(i), f"What is {i} + 1?", str(i + 1), {"n": i}) for i in range(50)]


def texts(problems):
    return [problem.problem for problem in problems]


def test_the_share_is_disjoint_and_complete():
    training, held_out = hold_out(PROBLEMS, 0.2, 100, seed=3)
    assert len(held_out) == 10
    assert sorted(texts(training) + texts(held_out)) == sorted(texts(PROBLEMS))
    assert texts(held_out) == [x for x in texts(PROBLEMS) if x in set(texts(held_out))]


def test_it_depends_on_the_seed_and_the_texts_alone():
    _, chosen = hold_out(PROBLEMS, 0.2, 100, seed=3)
    _, again = hold_out(PROBLEMS[::-1], 0.2, 100, seed=3)
    assert set(texts(again)) == set(texts(chosen))
    _, other = hold_out(PROBLEMS, 0.2, 100, seed=4)
    assert set(texts(other)) != set(texts(chosen))


def test_no_text_is_on_both_sides():
    twice = [*PROBLEMS, *(Problem(f"b{i}", f"what is  {i} + 1 ?", "x") for i in range(50))]
    training, held_out = hold_out(twice, 0.2, 100, seed=0)
    numbers = {text.split()[2] for text in texts(held_out)}
    assert not numbers & {text.split()[2] for text in texts(training)}
    assert len(held_out) == len(numbers)


def test_at_least_one_at_most_as_many_as_are_measured():
    assert len(hold_out(PROBLEMS[:3], 0.1, 100, seed=0)[1]) == 1
    training, held_out = hold_out(PROBLEMS, 0.5, 7, seed=0)
    assert (len(training), len(held_out)) == (43, 7)
    with pytest.raises(UserError, match=r"data\.eval_fraction: 0\.5 of problems that all have one"):
        hold_out(PROBLEMS[:1] * 4, 0.5, 7, seed=0)


def test_the_file_that_a_run_keeps_is_data(tmp_path):
    file = tmp_path / "held_out.jsonl"
    file.write_text(to_json_lines(PROBLEMS[:2]))
    assert load_problems(file) == PROBLEMS[:2]
    assert json.loads(file.read_text().splitlines()[0])["n"] == 0
