"""Every form a data set may have, in the schemas of the hub's own files, and rows left out."""

import json
import sys
from pathlib import Path

import pytest

from kdrl_jax.data import load_problems, read_problems
from kdrl_jax.data.schemas import gold_answers
from kdrl_jax.types import Problem, UserError

pyarrow = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")
from pyarrow import parquet  # noqa: E402

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
R1 = "DeepSeek-R1-Distill-Qwen-"

# The columns of Skywork/Skywork-OR1-RL-Data as its card's `dataset_info` has them.
SKYWORK = pyarrow.schema(
    [
        ("data_source", pyarrow.string()),
        (
            "prompt",
            pyarrow.list_(
                pyarrow.struct([("content", pyarrow.string()), ("role", pyarrow.string())])
            ),
        ),
        ("ability", pyarrow.string()),
        (
            "reward_model",
            pyarrow.struct([("ground_truth", pyarrow.string()), ("style", pyarrow.string())]),
        ),
        (
            "extra_info",
            pyarrow.struct(
                [
                    ("index", pyarrow.int64()),
                    (
                        "model_difficulty",
                        pyarrow.struct([(R1 + s, pyarrow.int64()) for s in ("1.5B", "32B", "7B")]),
                    ),
                ]
            ),
        ),
    ]
)


def skywork_row(problem, truth, failed=(0, 0, 0), **changes):
    """failed: of 16, by the 1.5B, 7B and 32B model."""
    difficulty = dict(zip((R1 + "1.5B", R1 + "7B", R1 + "32B"), failed, strict=True))
    return {
        "data_source": "train-math-deepscaler",
        "prompt": [{"content": problem, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": 7, "model_difficulty": difficulty},
    } | changes


SKYWORK_ROWS = [
    skywork_row("What is $\\frac{1}{4}+\\frac14$?", '["\\\\frac{1}{2}"]', (12, 2, 0)),
    skywork_row("Solve $x^2=1$.", '["1", "-1"]', (16, 16, None)),
    skywork_row("Which x?", "[1,2)", (0, 1, 16)),
]
SKYWORK_FOUND = [
    ("What is $\\frac{1}{4}+\\frac14$?", "\\frac{1}{2}", (0.25, 0.875, 1.0)),
    ("Solve $x^2=1$.", "1", (0.0, 0.0, None)),
    ("Which x?", "[1,2)", (1.0, 0.9375, 0.0)),
]


def write_skywork(path, rows=SKYWORK_ROWS):
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=SKYWORK), path)
    return path


def found_in(problems):
    sizes = ("1.5B", "7B", "32B")
    return [
        (p.problem, p.answer, tuple(p.meta["pass_rate"].get(R1 + s) for s in sizes))
        for p in problems
    ]


# --- Schemas ------------------------------------------------------------------------------------


def test_skywork_rows_as_the_hub_has_them(tmp_path):
    problems, report = read_problems(write_skywork(tmp_path / "math-00000-of-00001.parquet"))
    assert found_in(problems) == SKYWORK_FOUND
    assert [p.id for p in problems] == [f"math-00000-of-00001/{i}" for i in (1, 2, 3)]
    assert problems[0].meta["data_source"] == "train-math-deepscaler"
    assert problems[1].meta["answers"] == ["1", "-1"]
    assert "answers" not in problems[0].meta
    assert dict(report.notes) == {
        "rows with several answers, of which the first is the gold one": 1
    }


def test_what_a_ground_truth_may_be():
    assert gold_answers('["34"]') == ["34"]
    assert gold_answers('["[1, 2]", "x"]') == ["[1, 2]", "x"]
    for plain in ("34", "[1, 2]", "{1, 2}", "[1,2)", '"quoted"', "", None, "{", '["torn'):
        assert gold_answers(plain) == [plain]
    assert gold_answers('{"inputs": [1]}') == [{"inputs": [1]}]  # a program's tests: no answer
    assert gold_answers("[]") == []


def test_instructions_and_system_messages_are_counted(tmp_path):
    suffix = " Let's think step by step and output the final answer within \\boxed{}."
    system = {"content": "Be brief.", "role": "system"}
    rows = [
        skywork_row("1+1?" + suffix, '["2"]'),
        skywork_row(
            "", '["3"]', prompt=[system, {"content": "1+2?\nPlease reason step by step, and put "
            "your final answer within \\boxed{}.\n", "role": "user"}],
        ),
        skywork_row("Say \"output the final answer within \\boxed{}.\" twice", '["4"]'),
    ]  # fmt: skip
    problems, report = read_problems(write_skywork(tmp_path / "a.parquet", rows))
    assert [p.problem for p in problems] == [
        "1+1?",
        "1+2?",
        'Say "output the final answer within \\boxed{}." twice',
    ]
    assert dict(report.notes) == {
        "instructions removed from the end of a problem": 2,
        "system messages left out": 1,
    }
    assert "2 instructions removed" in str(report)


def test_bad_skywork_rows(tmp_path):
    turns = [{"content": "a", "role": "user"}, {"content": "b", "role": "assistant"}]
    rows = [
        skywork_row("fine", '["1"]'),
        skywork_row("code", '{"inputs": ["1"], "outputs": ["2"]}', ability="code"),
        skywork_row("none", "[]"),
        skywork_row("", "1", prompt=turns),
        skywork_row("q", "1", failed=(17, 0, 0)),
        skywork_row("no text", None),
    ]
    path = write_skywork(tmp_path / "set.parquet", rows)
    with pytest.raises(UserError) as caught:
        load_problems(path)
    assert [line.removeprefix(f"{path}:").split(";")[0] for line in caught.value.problems] == [
        "2: 'answer' is an object, not text or a number",
        "3: 'answer' is empty",
        "4: 'prompt' has 2 turns with text, not one question",
        f"5: difficulty of '{R1}1.5B' is 17, not from 0 to 16",
        "6: 'answer' is empty",
    ]


def test_deepscaler_is_a_json_array_some_of_whose_rows_have_no_answer(tmp_path):
    rows = [
        {"problem": f"{i}+1?", "answer": str(i + 1), "solution": "so"}
        if i % 3
        else {"problem": f"{i}+1?", "answer": ("", None, float("nan"))[i % 9 // 3], "solution": ""}
        for i in range(40)
    ]
    path = tmp_path / "deepscaler.json"
    path.write_text("\ufeff" + json.dumps(rows, indent=2))
    with pytest.raises(UserError) as caught:
        load_problems(path)
    assert len(caught.value.problems) == 11
    assert caught.value.problems[-1] == f"{path}: 4 more bad rows"
    problems, report = read_problems(path, on_bad="drop")
    assert len(problems) == report.kept == 26
    assert problems[0] == Problem("deepscaler/2", "1+1?", "2", {"solution": "so"})
    assert report.bad == 14
    assert len(report.listed) == 10
    assert report.listed[0].startswith(f"{path}:1: 'answer' is empty")
    assert str(report).splitlines()[0] == f"{path}: 26 problems, 14 bad rows left out"
    assert str(report).splitlines()[-1] == "  and 4 more"
    assert json.loads(json.dumps(report.to_dict()))["bad"] == 14
    with pytest.raises(UserError, match=r"data\.on_bad: 'skip' must be 'raise' or 'drop'"):
        read_problems(path, on_bad="skip")


def test_json_files_that_are_no_array(tmp_path):
    path = tmp_path / "set.json"
    path.write_text('{"problem": "q", "answer": "4"}\n{"problem": "r", "answer": "5"}\n')
    assert [p.answer for p in load_problems(path)] == ["4", "5"]
    path.write_text('[{"problem": "q", "answer": "4"}, 3]')
    with pytest.raises(UserError, match=r"set\.json:2: is a number, not an object"):
        load_problems(path)
    path.write_text('[{"problem": "q", "answer": "4"},')
    with pytest.raises(UserError, match=r"set\.json: is not a JSON array \(.*mend the file"):
        load_problems(path)


def test_names_reach_into_lists_and_strings_of_json(tmp_path):
    row = {"turns": [{"text": "q"}], "info": '{"gold": ["4", "5"], "n": 1}', "plain": "not json"}
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(row))
    fields = {"id": "info.n", "problem": "turns.0.text", "answer": "info.gold.1"}
    assert load_problems(path, fields) == [Problem("1", "q", "5", row)]
    for missing in ("info.gold.2", "info.gold.x", "plain.a", "turns.-1.text", "none.0"):
        with pytest.raises(UserError, match="has no answer"):
            load_problems(path, fields | {"answer": missing})


def test_measured_pass_rates_go_with_those_of_the_hub(tmp_path):
    (row,) = [json.loads(json.dumps(skywork_row("q", '["1"]', (4, 4, 4))))]
    row |= {"pass_rate": {"mine": 0.5, R1 + "7B": 0.125, "null": None}}
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(row))
    (problem,) = load_problems(path)
    assert problem.meta["pass_rate"] == {
        "mine": 0.5,
        R1 + "7B": 0.125,
        R1 + "1.5B": 0.75,
        R1 + "32B": 0.75,
    }
    path.write_text(json.dumps({"problem": "q", "answer": "1", "pass_rate": 0.5}))
    assert load_problems(path)[0].meta == {"pass_rate": 0.5}  # another's column of that name
    path.write_text(json.dumps({"problem": "q", "answer": "1", "pass_rate": {"m": 1.5}}))
    with pytest.raises(UserError, match=r"difficulty of 'm' is 1\.5, not from 0 to 1"):
        load_problems(path)


# --- Places -------------------------------------------------------------------------------------


def test_all_places_give_the_same_problems(tmp_path, monkeypatch):
    folder = tmp_path / "parts"
    write_skywork(folder / "math-00000-of-00002.parquet", SKYWORK_ROWS[:2])
    write_skywork(folder / "math-00001-of-00002.parquet", SKYWORK_ROWS[2:])
    table = datasets.Dataset.from_parquet(str(folder / "*.parquet"), cache_dir=str(tmp_path / "c"))
    table.save_to_disk(str(tmp_path / "saved"))
    lines = tmp_path / "lines"
    lines.mkdir()
    (lines / "all.jsonl").write_text("\n".join(map(json.dumps, SKYWORK_ROWS)))
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return table

    def snapshot_download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    places = {
        folder: ["math-00000-of-00002/1", "math-00000-of-00002/2", "math-00001-of-00002/1"],
        f"{folder}/math-*-of-00002.parquet": None,
        tmp_path / "saved": ["saved/1", "saved/2", "saved/3"],
        lines: ["all/1", "all/2", "all/3"],
        "hf://Skywork/Skywork-OR1-RL-Data?split=math&revision=abc": [
            f"Skywork-OR1-RL-Data/{i}" for i in (1, 2, 3)
        ],
        "hf://Skywork/Skywork-OR1-RL-Data?file=parts/math-*.parquet": [
            "math-00000-of-00002/1",
            "math-00000-of-00002/2",
            "math-00001-of-00002/1",
        ],
        "hf://openai/gsm8k?config=main": None,
    }
    for place, ids in places.items():
        problems = load_problems(place)
        assert found_in(problems) == SKYWORK_FOUND, place
        assert ids in (None, [p.id for p in problems])
    name = "Skywork/Skywork-OR1-RL-Data"
    files = {"repo_type": "dataset", "allow_patterns": ["parts/math-*.parquet"]}
    assert asked == [
        ((name, None), {"split": "math", "revision": "abc"}),
        ((name,), {"revision": None, **files}),
        (("openai/gsm8k", "main"), {"split": "train", "revision": None}),
    ]


def test_the_hub_out_of_reach_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for option in ("split=train", "file=*.jsonl"):
        with pytest.raises(UserError) as caught:
            load_problems(f"hf://nobody/no-such-data-set?{option}")
        (line,) = caught.value.problems
        assert line.startswith(f"hf://nobody/no-such-data-set?{option}: the hub gave nothing (HF_H")
        assert "\n" not in line


def test_addresses_that_cannot_be(tmp_path):
    with pytest.raises(UserError) as caught:
        load_problems("hf://gsm8k?spilt=train&revison=x")
    assert caught.value.problems == [
        "hf://gsm8k?spilt=train&revison=x: 'gsm8k' is no data set; "
        "write hf://owner/name?split=train",
        "hf://gsm8k?spilt=train&revison=x: no option 'revison'; the nearest is 'revision'",
        "hf://gsm8k?spilt=train&revison=x: no option 'spilt'; the nearest is 'split'",
    ]
    with pytest.raises(UserError, match="file says what is read; leave out split and config"):
        load_problems("hf://a/b?file=x.json&split=test")
    with pytest.raises(UserError, match=r"\*\.jsonl: matches no file"):
        load_problems(tmp_path / "*.jsonl")
    both = tmp_path / "both"
    write_skywork(both / "a.parquet")
    (both / "b.jsonl").write_text("{}")
    with pytest.raises(UserError, match="holds Parquet and JSONL files; name one kind"):
        load_problems(both)
    table = datasets.Dataset.from_list([{"problem": "q", "answer": "1"}])
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(UserError, match=r"holds several splits \(a, b\); give the folder of one"):
        load_problems(tmp_path / "dict")
    assert [p.id for p in load_problems(tmp_path / "dict" / "a")] == ["a/1"]
    (tmp_path / "dict" / "a" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"dict/a: unreadable data set"):
        load_problems(tmp_path / "dict" / "a")


def test_without_the_datasets_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf://a/b: reading it needs datasets; pip install 'kdrl"):
        load_problems("hf://a/b")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_several_real_files():
    problems = load_problems(SHARED / "aime2?.jsonl")
    assert len(problems) == 60
    assert problems[0].id.startswith("aime24/")
