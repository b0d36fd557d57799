"""configs/mine.py with a model, rows and a reward of one's own: as docs/first_run.md says it."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import model_cases as cases
import pytest
from test_bring_your_own import MODEL
from test_train import ROOT
from tokenizer_cases import write_hf

from kdrl_jax.data import load_problems
from kdrl_jax.training.metrics import read_metrics

PAGE = (ROOT / "docs" / "first_run.md").read_text(encoding="utf-8")
SMALL = {
    **{"steps": 2, "rollout.prompts_per_step": 4, "rollout.group_size": 2, "eval.every": 2},
    **{"rollout.max_new_tokens": 6, "data.max_prompt_tokens": 96, "reward.workers": 1},
    **{"reward.timeout_s": 60.0, "health.teacher_every": 0, "mesh.devices": "0:1"},
}


def fences(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The page's rows, reward and trainings, with tiny models in place of those of the hub."""
    folder = tmp_path_factory.mktemp("first")
    for seed, name in enumerate(("student", "teacher")):
        cases.write_folder(folder / name, MODEL, cases.random_tensors(MODEL, seed))
        write_hf(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path, "."])
        for text in fences("python"):
            if name := re.match(r"# (\w+\.py)\n", text):
                Path(name[1]).write_text(text)
        exec(Path("make_rows.py").read_text(), {})
        commands = [x for text in fences("bash") for x in text.replace("\\\n", " ").splitlines()]
        for words in map(shlex.split, commands):
            if words[:3] != ["python", "-m", "kdrl_jax.train"]:
                continue
            given = SMALL | {"student.path": "student", "cache_dir": "cache"}
            if any(word.startswith("--config.teacher.path=") for word in words):
                given["teacher.path"] = "teacher"
            small = [f"--config.{key}={value}" for key, value in given.items()]
            importlib.import_module("kdrl_jax.train").main([*words[3:], *small])
        sys.modules.pop("my_rewards", None)
    return folder / "runs"


def test_both_trainings_of_the_page_run(runs):
    for name in ("mine", "mine-kdrl"):
        summary = json.loads((runs / name / "summary.json").read_text())
        assert summary["finished"]
        measured = [
            r["step"] for r in read_metrics(runs / name / "metrics.jsonl") if "eval/accuracy" in r
        ]
        assert measured == [0, 2]
    metrics = read_metrics(runs / "mine" / "metrics.jsonl")[-1]
    assert 0 < metrics["reward/short"] <= 1
    assert metrics["beta"] == 0
    assert read_metrics(runs / "mine-kdrl" / "metrics.jsonl")[-1]["beta"] > 0


def test_a_tenth_of_the_rows_is_held_out_and_kept(runs):
    held_out = load_problems(runs / "mine" / "held_out.jsonl")
    assert len(held_out) == 3
    assert {p.id for p in held_out} < {f"rows/{number}" for number in range(1, 31)}
    assert held_out == load_problems(runs / "mine-kdrl" / "held_out.jsonl")
    report = json.loads((runs / "mine" / "data.json").read_text())
    assert report["held-out"]["kept"] == 3
    assert report["training prompts"]["total"] == 27


def test_what_is_left_open_is_decided_and_recorded(runs):
    saved = json.loads((runs / "mine" / "config.json").read_text())
    assert (saved["micro_batch"], saved["data"]["prompt_buckets"]) == (0, [])
    (start,) = json.loads((runs / "mine" / "provenance.json").read_text())
    assert start["micro_batch"] == 2
