"""What a run trains on: data set or task, filters, prompts, and the report of all that."""

import json

import pytest

from kdrl_jax.config import ROOT, load_config
from kdrl_jax.data import SentencePieceTokenizer
from kdrl_jax.training.display import Display
from kdrl_jax.training.problems import read_run_data
from kdrl_jax.types import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer.train("0123456789+-=, ")


def config(**keys):
    flat = {
        **{"data.prompt_style": "plain", "rollout.prompts_per_step": 2, "eval.problems": 3},
        **{"data.max_prompt_tokens": 12, "data.prompt_buckets": "(12,)"},
    }
    flat |= {key.replace("__", "."): value for key, value in keys.items()}
    overrides = [f"{key}={value}" for key, value in flat.items()]
    return load_config(ROOT / "configs" / "base.py", overrides)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_data_set_is_read_filtered_and_reported(tmp_path, tokenizer, capsys):
    rates = [0.0, 1.0, 0.5, 0.25, 0.75, 0.5]
    rows = [
        {"problem": "1+" * i + "1=", "answer": str(i + 1), "pass_rate": {"m": rate}}
        for i, rate in enumerate(rates)
    ]
    rows[3:3] = [{"problem": "2+2="}, rows[2]]
    path = write(tmp_path / "train.jsonl", rows)
    held_out = write(tmp_path / "test.jsonl", [{"problem": "7=", "answer": 7}] * 5)
    filters = ("dedupe", "pass_rate:model=m,min=0.25,max=0.75", "prompt_tokens:max=9")
    data = read_run_data(
        config(
            **{"data__path": path, "data__eval_path": held_out, "data__on_bad": "drop"},
            data__filters=filters,
        ),
        tokenizer,
        Display(),
    )
    assert [p.problem for p, _ in data.training] == ["1+1+1=", "1+1+1+1="]
    assert [tokenizer.decode(ids) for _, ids in data.training] == ["1+1+1=", "1+1+1+1="]
    assert [p.answer for p, _ in data.held_out] == ["7", "7", "7"]
    said = capsys.readouterr().out
    assert f"{path}: 7 problems, 1 bad rows left out" in said
    assert f"{path}:4: has no answer" in said
    assert "dedupe                                      1         6" in said
    assert "training problems: all 2 kept" in said
    report = json.loads(json.dumps(data.report))
    assert report["training"]["bad"] == 1
    assert report["held-out"]["kept"] == 5
    assert [step["left"] for step in report["filters"]["steps"]] == [6, 4, 2]
    assert report["training prompts"] == {"kept": 2, "total": 2, "max_tokens": 12}
    assert report["held-out prompts"]["total"] == 3


def test_bad_rows_refuse_a_run_unless_they_may_be_dropped(tmp_path, tokenizer):
    path = write(tmp_path / "train.jsonl", [{"problem": "1=", "answer": "1"}, {"problem": "2="}])
    with pytest.raises(UserError, match=r"train\.jsonl:2: has no answer"):
        read_run_data(config(data__path=path, eval__every=0), tokenizer, Display())


KD = {"objective": "kd_rkl", "data.prompt_style": "plain"}
OWN = {"reward.verdict_weight": 0.0, "reward.functions": "('m:f',)", "objective": "grpo"}


@pytest.mark.parametrize("how", [KD, OWN], ids=["kd_rkl", "own rewards"])
def test_rows_need_no_answer_where_no_verdict_is_read(tmp_path, tokenizer, capsys, how):
    rows = [{"problem": "1+1="}, {"problem": "2+2=", "answer": None}]
    rows += [{"problem": "3+3=", "answer": " "}, {"problem": "4+4=", "answer": 8}]
    path = write(tmp_path / "train.jsonl", rows)
    given = {"data__path": path, "eval__every": 0, **how}
    data = read_run_data(config(**given), tokenizer, Display())
    assert [p.answer for p, _ in data.training] == ["", "", "", "8"]
    assert f"{path}: 3 of 4 problems have no answer" in capsys.readouterr().out
    measured = config(**given | {"eval__every": 1, "data__eval_fraction": 0.5})
    with pytest.raises(UserError, match=r"eval_fraction: 0\.5, but held-out problems of"):
        read_run_data(measured, tokenizer, Display())


@pytest.mark.parametrize(
    "reads",
    [
        {"objective": "kdrl"},
        KD | {"kd_mask": "response"},
        KD | {"objective": "sft"},
        KD | {"beta.schedule": "adaptive"},
        OWN | {"reward.verdict_weight": 0.5},
        OWN | {"rollout.refill": 1},
        OWN | {"objective": "kdrl", "kd_mask": "group"},
    ],
)
def test_rows_need_an_answer_where_a_verdict_is_read(tmp_path, tokenizer, reads):
    path = write(tmp_path / "train.jsonl", [{"problem": "1+1="}, {"problem": "2+2="}])
    asked = config(data__path=path, eval__every=0, **reads)
    with pytest.raises(UserError, match="has no answer"):
        read_run_data(asked, tokenizer, Display())


def test_a_task_takes_arguments_and_filters(tokenizer):
    keys = {"data__task": "arithmetic", "data__size": 40, "eval__every": 5}
    args = json.dumps({"min_terms": 2, "max_terms": 3})
    data = read_run_data(
        config(**keys, data__task_args=args, data__filters=("limit:n=30",)), tokenizer, Display()
    )
    assert len(data.training) == 30
    assert {len(p.meta["terms"]) for p, _ in data.training} == {2, 3}
    assert len(data.held_out) == 3
    assert not {p.problem for p, _ in data.training} & {p.problem for p, _ in data.held_out}
    assert list(data.report) == ["filters", "training prompts", "held-out prompts"]
    without = read_run_data(config(**keys | {"eval__every": 0}), tokenizer, Display())
    assert without.held_out == []
    assert len(without.training) == 40


def test_too_little_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "train.jsonl", [{"problem": "1+1=", "answer": "2"}] * 3)
    for keys, message in (
        ({"data__filters": ("limit:n=1",)}, "prompts_per_step: 2 exceeds the 1 problems of"),
        ({"data__max_prompt_tokens": 2}, r"no training problems left after filtering \(0 of 3"),
        ({"data__filters": ("limit",)}, r"data\.filters\[0\]: 'limit': needs n="),
        ({"data__filters": ("pass_rate:model=m",)}, "measure it with python -m kdrl_jax.diff"),
    ):
        with pytest.raises(UserError, match=message):
            read_run_data(config(data__path=path, eval__every=0, **keys), tokenizer, Display())


def test_a_share_of_the_data_is_held_out(tmp_path, tokenizer, capsys):
    """Before the filters, which are for training alone; said and reported."""
    rows = [{"problem": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]
    path = write(tmp_path / "rows.jsonl", [*rows, rows[3]])
    keys = {"data__path": path, "data__eval_fraction": 0.2, "eval__problems": 100}
    data = read_run_data(config(**keys, data__filters="limit:n=5"), tokenizer, Display())
    held_out = {p.problem for p, _ in data.held_out}
    assert len(held_out) == 4
    assert len(data.training) == 5
    assert not held_out & {p.problem for p, _ in data.training}
    again = int(rows[3]["problem"] in held_out)
    assert f"{path}: 4 of 21 problems held out for evaluation" in capsys.readouterr().out
    report = json.loads(json.dumps(data.report))
    assert report["held-out"]["kept"] == 4
    assert report["held-out"]["repeated"] == again
    assert report["training"]["kept"] == 21
    assert report["filters"]["start"] == 17 - again
    without = read_run_data(config(**keys, eval__every=0), tokenizer, Display())
    assert without.held_out == []
    assert not held_out & {p.problem for p, _ in without.training}
