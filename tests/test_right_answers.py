"""Rejection sampling on a fixed set: what is kept, epochs, interruptions, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from easy_task import verify
from test_train import TINY, command, rows

from kdrl_jax import train
from kdrl_jax.data import load_tokenizer
from kdrl_jax.training.right_answers import FILE, FixedSet, Once, RightAnswer, RightAnswers
from kdrl_jax.types import FINISH_EOS, FINISH_LENGTH, Problem, UserError

SFT = TINY | {
    **{"objective": "sft", "sft_problems": 10, "steps": 4, "checkpoint.every": 2, "epochs": 2},
    **{"aggregation": "seq-mean-token-mean", "entropy_coef": 0.0, "eval.every": 0},
    **{"data.task": "easy_task:EASY", "student.sft.task": "arithmetic"},
    **{"teacher.sft.task": "arithmetic", "reward.answer": "task", "reward.require_format": False},
}


def run(workdir: Path, cache: Path, **changes) -> list[dict]:
    train.main(command(workdir, cache, **SFT | changes))
    return rows(workdir)


def kept(workdir: Path) -> tuple[list[int], list[list]]:
    """The problems in the file, in order, and the right answers that count."""
    header, *lines = map(json.loads, (workdir / FILE).read_text().splitlines())
    assert list(header) == ["made_of"]
    problems, right = [], []
    for line in lines:
        new = [p for p in line["problems"] if p not in problems]
        problems += new
        right += [one for one in line["right"] if one[0] in new]
    return problems, right


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, run(workdir, cache)


def test_right_answers_are_kept_and_nothing_else(whole):
    workdir, found = whole
    problems, right = kept(workdir)
    assert len(problems) == 12  # ten, in whole batches of four
    assert len({p for p, _, _ in right}) > 3
    tokenizer = load_tokenizer(workdir / "model")
    for _, tokens, ended in right:
        assert ended == (tokens[-1] in tokenizer.stop_ids)
        assert verify(tokenizer.decode(tokens[:-1] if ended else tokens), "", {})
    assert 16 <= len(right) < 12 * 4
    assert [row["sft/answers"] for row in found] == [len(right)] * 4
    np.testing.assert_allclose([row["sft/epoch"] for row in found], np.arange(4) * 16 / len(right))
    assert [row["reward/mean"] for row in found] == [1.0] * 4  # a whole batch of right ones
    assert not {"mismatch/kl", "kl/teacher"} & found[0].keys()  # neither sampler nor teacher
    assert found[-1]["log_probs/mean"] > found[0]["log_probs/mean"]


def test_a_step_takes_its_answers_once_an_epoch(whole):
    workdir, _ = whole
    _, right = kept(workdir)
    drawn = []
    for path in sorted((workdir / "samples").iterdir()):
        drawn += [json.loads(line)["completion"] for line in path.read_text().splitlines()]
    tokenizer = load_tokenizer(workdir / "model")
    assert set(drawn) <= {tokenizer.decode(t[:-1] if ended else t) for _, t, ended in right}


def test_an_interrupted_run_neither_asks_again_nor_differs(whole, cache, tmp_path, capsys):
    workdir, found = whole
    part = tmp_path / "run"
    assert run(part, cache, steps=2) == found[:2]
    assert "teacher: from" in "".join(capsys.readouterr())
    before = (part / FILE).read_bytes()
    assert before == (workdir / FILE).read_bytes()
    assert run(part, cache) == found
    assert (part / FILE).read_bytes() == before
    assert "teacher: from" not in "".join(capsys.readouterr())  # which has nothing more to do


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_a_file_that_a_kill_has_torn_is_completed(whole, cache, tmp_path, lines):
    workdir, _ = whole
    whole_file = (workdir / FILE).read_bytes()
    cut = sum(len(line) for line in whole_file.splitlines(keepends=True)[: lines + 1])
    part = tmp_path / "run"
    part.mkdir()
    (part / FILE).write_bytes(whole_file[: cut + 7])
    run(part, cache, steps=1)
    assert (part / FILE).read_bytes() == whole_file


def test_answers_to_other_problems_are_refused(whole, cache, tmp_path):
    part = tmp_path / "run"
    part.mkdir()
    (part / FILE).write_bytes((whole[0] / FILE).read_bytes())
    refused = r"right_answers.jsonl: holds answers to other problems, of another teacher"
    for key, value in {"data.seed": 5, "teacher.sft.steps": 2, "rollout.temperature": 0.7}.items():
        with pytest.raises(UserError, match=refused):
            run(part, cache, **{key: value})


@pytest.mark.parametrize(("num", "per_step"), [(5, 2), (6, 2), (3, 3), (7, 5)])
def test_the_teacher_is_asked_each_problem_once(num, per_step):
    """But for what fills the last batch up."""
    batches = Once(num, per_step, 4)
    asked = [int(i) for place in range(-(-num // per_step)) for i in batches[place]]
    assert sorted(asked[:num]) == list(range(num))
    assert len(asked) - num < per_step
    assert asked[num:] == asked[: len(asked) - num]
    assert [batches[0].tolist() != Once(50, 50, s)[0].tolist() for s in (1, 2)] == [True, True]


def encoded(count: int):
    return [(Problem(str(i), f"p{i}", "1"), [3] * (1 + i % 3)) for i in range(count)]


def fixed_set(answers, rows=4):
    options = {"seed": 1, "pad_id": 0, "buckets": (4,), "width": 6}
    return FixedSet(encoded(5), answers, rows=rows, **options)


def test_epochs_of_a_fixed_set():
    answers = [
        RightAnswer(i % 5, np.arange(1, 2 + i % 6, dtype=np.int32), ended=i % 2 == 0)
        for i in range(12)
    ]
    source, called = fixed_set(answers), []
    seen = []
    for position in range(6):
        found, after = source.collect({}, position, lambda: called.append(1))
        assert after == position + 1
        rollouts = found.rollouts
        assert rollouts.tokens.shape == (4, 1, 6)
        assert rollouts.prompt_tokens.shape == (4, 4)
        assert found.rewards.tolist() == [[1.0]] * 4
        for p, (problem, ids) in enumerate(found.asked):
            n = int(rollouts.lengths[p, 0])
            tokens = rollouts.tokens[p, 0]
            assert rollouts.prompt_tokens[p, -len(ids) :].tolist() == ids
            assert (tokens[n:] == 0).all()
            ended = rollouts.finish_reason[p, 0] == FINISH_EOS
            assert ended or rollouts.finish_reason[p, 0] == FINISH_LENGTH
            seen.append((int(problem.id), tuple(tokens[:n].tolist()), bool(ended)))
    all_of_them = sorted((a.problem, tuple(a.tokens.tolist()), a.ended) for a in answers)
    assert sorted(seen[:12]) == sorted(seen[12:]) == all_of_them
    assert seen[:12] != seen[12:]
    assert len(called) == 6
    again, _ = fixed_set(answers).collect({}, 4)
    np.testing.assert_array_equal(again.rollouts.tokens, source.collect({}, 4)[0].rollouts.tokens)


def test_too_few_right_answers_are_said():
    answers = [RightAnswer(0, np.ones(1, np.int32), ended=True)] * 3
    with pytest.raises(UserError, match="4 exceeds the 3 right answers of the teacher; lower them"):
        fixed_set(answers)


def test_all_problems_where_no_number_is_given(tmp_path):
    batches = Once(5, 2, 0)
    settings = {"problems": 5, "batches": batches}
    assert RightAnswers(tmp_path, "d", wanted=0, **settings).wanted == 5
    assert RightAnswers(tmp_path, "d", wanted=3, **settings).wanted == 3
    assert RightAnswers(tmp_path, "d", wanted=9, **settings).wanted == 5
