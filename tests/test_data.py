"""Problem files, padding and the order of batches."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from kdrl_jax.data import PromptBatches, load_problems, pad_prompts
from kdrl_jax.types import Problem, UserError

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


# --- Padding -----------------------------------------------------------------------------------


def test_padding_is_that_of_numpy(rng):
    for buckets, width in (((4, 8, 16), 8), ((16, 8), 8), ((7,), 7), ((16,), 16)):
        rows = [rng.integers(1, 99, n).tolist() for n in (7, 1, 3, 6)]
        prompts = pad_prompts(rows, buckets, pad_id=100)
        expected = np.stack([np.pad(r, (width - len(r), 0), constant_values=100) for r in rows])
        np.testing.assert_array_equal(prompts.tokens, expected)
        np.testing.assert_array_equal(prompts.lengths, [7, 1, 3, 6])
        assert prompts.tokens.dtype == prompts.lengths.dtype == np.int32


def test_padding_never_cuts():
    with pytest.raises(UserError) as caught:
        pad_prompts([[1] * 9, [1]], (4, 8), 0)
    assert str(caught.value) == (
        "data.prompt_buckets: (4, 8) has no room for a prompt of 9 tokens; "
        "add a longer one or lower data.max_prompt_tokens"
    )
    for rows in ([], [[1], []]):
        with pytest.raises(ValueError, match="every prompt must have a token"):
            pad_prompts(rows, (4,), 0)


# --- Problem files -----------------------------------------------------------------------------


def write_lines(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("\n".join(lines).encode())
    return path


def test_json_lines(tmp_path):
    path = write_lines(
        tmp_path / "set.jsonl",
        "\ufeff" + json.dumps({"id": "x/1", "problem": " 1+1? ", "answer": " 2 ", "level": 3}),
        "",
        {"problem": "a\u2028b", "answer": 7, "tags": ["é"]},
        {"id": 12, "problem": "c", "answer": 0},
        {"id": None, "problem": "d", "answer": -2.5},
    )
    assert (
        load_problems(path)
        == load_problems(str(path))
        == [
            Problem("x/1", " 1+1? ", "2", {"level": 3}),
            Problem("set/3", "a\u2028b", "7", {"tags": ["é"]}),
            Problem("12", "c", "0"),
            Problem("set/5", "d", "-2.5"),
        ]
    )


def test_columns_of_other_names(tmp_path):
    row = {
        "question": "q",
        "answer": "long text",
        "reward_model": {"ground_truth": "4"},
        "a.b": "dotted",
        "uid": "u",
    }
    path = write_lines(tmp_path / "set.jsonl", row)
    fields = {"id": "uid", "problem": "question", "answer": "reward_model.ground_truth"}
    (problem,) = load_problems(path, fields)
    assert (problem.id, problem.problem, problem.answer) == ("u", "q", "4")
    assert set(problem.meta) == {"answer", "reward_model", "a.b"}
    (problem,) = load_problems(path, fields | {"id": "", "answer": "a.b"})
    assert (problem.id, problem.answer) == ("set/1", "dotted")


def test_fields_may_come_from_a_config(tmp_path):
    from ml_collections import ConfigDict

    path = write_lines(tmp_path / "set.jsonl", {"problem": "q", "final": "4"})
    fields = ConfigDict({"id": "id", "problem": "problem", "answer": "final"})
    assert load_problems(path, fields) == [Problem("set/1", "q", "4")]


def test_bad_rows_are_listed_all_at_once(tmp_path):
    path = tmp_path / "set.jsonl"
    write_lines(
        path,
        {"problem": "fine", "answer": "1"},
        {"problem": "q", "solution": "4"},
        {"problem": "q", "answer": "  "},
        {"problem": "", "answer": "1"},
        '{"problem": "q", "answer": 1',
        [1],
        {"problem": "q", "answer": ["1", "2"]},
        {"problem": "q", "answer": True},
        '{"problem": "q", "answer": NaN}',
        {"problem": "q", "answer": None},
    )
    with path.open("ab") as file:
        file.write(b'\n{"problem": "caf\xe9", "answer": "1"}')
    remedy = "fill it in, or name another column with data.fields"
    with pytest.raises(UserError) as caught:
        load_problems(path)
    assert [line.removeprefix(f"{path}:") for line in caught.value.problems] == [
        f"2: has no answer: no 'answer' among problem, solution; {remedy}.answer",
        f"3: 'answer' is empty; {remedy}.answer",
        f"4: 'problem' is empty; {remedy}.problem",
        "5: is not JSON (Expecting ',' delimiter at column 29); write one JSON object a line",
        "6: is an array, not an object; write one JSON object a line",
        f"7: 'answer' is an array, not text or a number; {remedy}.answer",
        f"8: 'answer' is a boolean, not text or a number; {remedy}.answer",
        "9: is not JSON (NaN is no JSON number); write one JSON object a line",
        f"10: 'answer' is empty; {remedy}.answer",
        "11: is not UTF-8; save the file as UTF-8",
    ]


def test_a_wholly_wrong_file_gives_a_short_error(tmp_path):
    path = write_lines(tmp_path / "set.jsonl", *[{"question": "q"}] * 1000)
    with pytest.raises(UserError) as caught:
        load_problems(path)
    assert len(caught.value.problems) == 11
    assert caught.value.problems[0].startswith(f"{path}:1: has no problem: no 'problem' among")
    assert caught.value.problems[-1] == f"{path}: 990 more bad rows"


def test_files_without_problems(tmp_path):
    for name, text in (
        ("absent.jsonl", "no such file; give a data set file"),
        ("folder", "is a folder; give a data set file"),
        ("empty.jsonl", "holds no problems; give a file with one JSON object a line"),
        ("blank.jsonl", "holds no problems; give a file with one JSON object a line"),
    ):
        path = tmp_path / name
        if name == "folder":
            path.mkdir()
        elif name != "absent.jsonl":
            path.write_text("" if name == "empty.jsonl" else "\n  \n")
        with pytest.raises(UserError) as caught:
            load_problems(path)
        assert caught.value.problems == [f"{path}: {text}"]


def test_parquet_reads_like_json_lines(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"id": "a", "problem": "q", "reward": {"truth": "4"}, "level": 1},
        {"id": None, "problem": "r", "reward": {"truth": "5"}, "level": None},
    ]
    path = tmp_path / "set.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    fields = {"id": "id", "problem": "problem", "answer": "reward.truth"}
    assert load_problems(path, fields) == load_problems(
        write_lines(tmp_path / "set.jsonl", *rows), fields
    )
    with pytest.raises(UserError, match=r"set\.parquet:1: has no answer"):
        load_problems(path)
    holes = [{"problem": "q", "answer": 1.5}, {"problem": "r", "answer": float("nan")}]
    parquet.write_table(pyarrow.Table.from_pylist(holes), path)
    with pytest.raises(UserError, match=r"set\.parquet:2: 'answer' is empty"):
        load_problems(path)
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"set\.parquet: unreadable Parquet"):
        load_problems(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "set.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError) as caught:
        load_problems(tmp_path / "set.parquet")
    assert str(caught.value) == (
        f"{tmp_path / 'set.parquet'}: reading Parquet needs pyarrow; pip install 'kdrl_jax[data]'"
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(("name", "rows"), [("train_math_500", 500), ("math500", 500)])
def test_real_problem_sets(name, rows):
    found = load_problems(SHARED / f"{name}.jsonl")
    assert len(found) == len({p.id for p in found}) == rows
    assert all("subject" in p.meta for p in found)


# --- The order of batches ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "per_step"),
    [(1, 1), (5, 1), (6, 3), (7, 3), (10, 4), (8, 7), (9, 9), (33, 16), (50, 7)],
)
def test_epochs_are_permutations_and_steps_repeat_nothing(num, per_step):
    batches = PromptBatches(num, per_step, seed=3)
    steps = [batches[i] for i in range(4 * num)]
    for step in steps:
        assert step.shape == (per_step,)
        assert len(set(step.tolist())) == per_step
    epochs = np.concatenate(steps)[: num * (4 * num * per_step // num)].reshape(-1, num)
    np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(num), epochs.shape))
    if num > 5:
        assert any((a != b).any() for a, b in pairwise(epochs))


@pytest.mark.parametrize(("num", "per_step"), [(10, 4), (8, 7), (1000, 64)])
def test_any_step_can_be_asked_for_at_any_time(num, per_step, rng):
    straight = PromptBatches(num, per_step, seed=5)
    expected = [straight[i].copy() for i in range(60)]
    other = PromptBatches(num, per_step, seed=5)
    for i in rng.permutation(60):
        np.testing.assert_array_equal(other[int(i)], expected[i])
        np.testing.assert_array_equal(PromptBatches(num, per_step, seed=5)[int(i)], expected[i])
    other[3][:] = -1  # what a caller does with its batch is its own affair
    np.testing.assert_array_equal(other[3], expected[3])


def test_order_depends_on_the_seed_and_is_recorded():
    first = [PromptBatches(1000, 8, seed=s)[0].tolist() for s in (0, 1, 2, -1)]
    assert len({tuple(b) for b in first}) == 4
    # Recorded: a run continues in the same order under other versions of NumPy and Python.
    assert [PromptBatches(10, 4, 0)[i].tolist() for i in range(5)] == ORDER


ORDER = [[3, 2, 1, 8], [6, 0, 7, 4], [5, 9, 7, 4], [1, 5, 9, 8], [6, 2, 0, 3]]


def test_shuffles_are_uniform():
    """All 24 orders of four problems, over epochs and over seeds; chi-square at 1e-4."""
    by_epoch = PromptBatches(4, 4, seed=0)
    orders = [
        [by_epoch[e] for e in range(1200)],
        [PromptBatches(4, 4, seed=s)[0] for s in range(1200)],
    ]
    for found in orders:
        _, counts = np.unique(np.array(found) @ [64, 16, 4, 1], return_counts=True)
        assert len(counts) == 24
        assert stats.chisquare(counts).pvalue > 1e-4


def test_batches_that_cannot_be():
    for num, per_step in ((3, 4), (3, 0), (0, 1)):
        with pytest.raises(ValueError, match=rf"per_step must be in 1\.\.{num}: {per_step}"):
            PromptBatches(num, per_step, 0)
    with pytest.raises(IndexError, match="step must not be negative: -1"):
        PromptBatches(3, 1, 0)[-1]
