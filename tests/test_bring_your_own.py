"""The snippets of docs/bring_your_own.md and of README's section: short, and run as they stand.

What they need is made here, small: two models of one tokenizer and a few problems. Commands run in
this process, those of training with settings that make them small.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import jax
import model_cases as cases
import pyarrow
import pyarrow.parquet
import pytest
from tokenizer_cases import write_hf

from kdrl_jax.rewards.number_answer import last_number
from kdrl_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "bring_your_own.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
SECTIONS["README"] = README.partition("### Bring your own")[2].partition("\n## ")[0]
MODEL = {
    **{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu"},
    **{"vocab_size": 448, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-6},
    **{"max_position_embeddings": 512, "rope_theta": 1e4, "tie_word_embeddings": True},
}
SMALL = {
    **{"steps": 1, "student.dtype": "float32", "mesh.devices": "0:1", "mesh.fsdp": 1},
    **{"rollout.prompts_per_step": 2, "rollout.group_size": 4, "rollout.max_new_tokens": 8},
    **{
        "eval.max_new_tokens": 8,
        "micro_batch": 8,
        "data.max_prompt_tokens": 256,
        "data.prompt_buckets": "(256,)",
    },
    **{"reward.workers": 1, "reward.timeout_s": 60.0, "eval.problems": 2, "eval.batch": 2},
    **{"samples.every": 1, "health.teacher_every": 0},
}


def blocks(kind: str, section: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", SECTIONS[section], re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with what the snippets name."""
    folder = tmp_path_factory.mktemp("own")
    for seed, name in enumerate(("my_student", "my_teacher")):
        cases.write_folder(folder / name, MODEL, cases.random_tensors(MODEL, seed))
        write_hf(folder / name)
    rows = [{"problem": f"What is {i}+3?", "answer": f"{i + 3}"} for i in range(6)]
    (folder / "my_problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    other = [{"question": r["problem"], "reference": {"gold": r["answer"]}} for r in rows]
    other[5]["reference"]["gold"] = None
    (folder / "my_test.jsonl").write_text("\n".join(map(json.dumps, other[:3])))
    table = pyarrow.Table.from_pylist([*other, other[0]])
    pyarrow.parquet.write_table(table, folder / "my_problems.parquet")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return place


def run(section: str, folder: Path, **changes) -> None:
    """Write the section's Python files and run its commands."""
    for text in blocks("python", section):
        (folder / re.match(r"# (\w+\.py)\n", text)[1]).write_text(text)
    (commands,) = blocks("bash", section)
    for line in commands.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[:2] == ["python", "-m"]
        settings = SMALL | {"cache_dir": str(folder / "cache")} | changes
        small = [f"--config.{key}={value}" for key, value in settings.items()]
        arguments = words[3:] + (small if words[2] == "kdrl_jax.train" else [])
        with jax.numpy_rank_promotion("raise"):
            importlib.import_module(words[2]).main(arguments)


def last(workdir: Path) -> dict[str, float]:
    return read_metrics(workdir / "metrics.jsonl")[-1]


def test_the_snippets_are_short_and_say_what_they_need():
    names = ["Data", "Prompt style", "Reward", "Answer", "Model", "Teacher", "README"]
    assert list(SECTIONS) == names
    for section in SECTIONS:
        for text in [*blocks("bash", section), *blocks("python", section)]:
            assert len(text.strip().splitlines()) <= 15
        assert all(text.startswith("# needs ") for text in blocks("bash", section))


def test_data_of_ones_own(here, capsys):
    run("Data", here, **{"eval.every": 1})
    said = capsys.readouterr().out
    assert "my_problems.parquet: 6 problems, 1 bad rows left out" in said
    report = json.loads((here / "runs" / "data" / "data.json").read_text())
    assert report["training"]["bad"] == 1
    assert report["filters"]["steps"][0]["left"] == 5
    assert "eval/accuracy" in last(here / "runs" / "data")


def test_a_prompt_style_of_ones_own(here, capsys):
    run("Prompt style", here)
    said = capsys.readouterr().out
    shown = re.search(r"the first prompt .* as the model gets it:\n((?:  \| .*\n)+)", said)[1]
    assert "  | <|im_start|>system\n  | You are a patient tutor.<|im_end|>\n" in shown
    (file,) = (here / "runs" / "prompt" / "samples").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        assert row["prompt"].startswith("<|im_start|>system\nYou are a patient tutor.<|im_end|>\n")
        assert f"user\n{row['problem']}\nThink, then answer" in row["prompt"]


def test_rewards_of_ones_own(here):
    run("Reward", here)
    row = last(here / "runs" / "reward")
    samples = next((here / "runs" / "reward" / "samples").iterdir()).read_text().splitlines()
    rows = [json.loads(line) for line in samples]
    for sample in rows:
        brevity, hedging = sample["reward/brevity"], sample["reward/hedging"]
        assert brevity == pytest.approx(1 - sample["length"] / 4000)
        right = sample["outcome"] == "correct"
        assert sample["reward"] == pytest.approx(right + 0.2 * brevity + 0.1 * hedging)
    mean = sum(sample["reward"] for sample in rows) / len(rows)
    assert row["reward/mean"] == pytest.approx(mean)
    (start,) = json.loads((here / "runs" / "reward" / "provenance.json").read_text())
    digest = hashlib.sha256((here / "my_rewards.py").read_bytes()).hexdigest()
    assert start["own_code"] == {"my_rewards": digest}
    assert row["reward/brevity_failed_frac"] == row["reward/hedging_failed_frac"] == 0


def test_answers_without_a_box(here):
    """The verdicts of a run are those of the last numbers, which here every response has."""
    run("Answer", here, **{"rollout.max_new_tokens": 24})
    (file,) = (here / "runs" / "answer" / "samples").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    numbers = [last_number(row["completion"]) for row in rows]
    for row, number in zip(rows, numbers, strict=True):
        if number is None:
            assert row["outcome"] == "unparsable"
        elif number.isdecimal() and "<think>" not in row["completion"]:
            right = int(number) == int(row["answer"])
            assert row["outcome"] == ("correct" if right else "wrong")
    assert {row["outcome"] for row in rows} >= {"wrong"}


def test_what_readme_shows(here):
    run("README", here)
    row = last(here / "runs" / "own")
    assert 0.9 < row["reward/brevity"] < 1
    assert row["reward/mean"] == pytest.approx(
        row["reward/correct_frac"] + 0.2 * row["reward/brevity"]
    )
    assert row["kl/teacher"] != 0


def test_a_model_of_ones_own_before_and_after(here, capsys):
    run("Model", here)
    assert (here / "runs" / "model" / "checkpoints" / "1").is_dir()
    assert "runs/model (step 1): float32" in capsys.readouterr().err


def test_a_teacher_of_ones_own(here, capsys):
    run("Teacher", here)
    said = capsys.readouterr().out
    assert "--- my_student" in said
    assert "½ℓ²" in said
    assert last(here / "runs" / "teacher")["kl/teacher"] > 0
