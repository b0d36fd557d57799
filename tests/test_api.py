"""The commands as functions: what they take in Python, what they return, what they refuse."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from local_hub import LocalHub, tiny_model

import kdrl_jax
from kdrl_jax import UserError, own_functions
from kdrl_jax.training.rows import write_rows

ROOT = Path(__file__).resolve().parent.parent
ROWS = [{"question": f"What is {i} + {i}?", "solution": str(2 * i), "n": i} for i in range(10)]
SMALL = {
    "steps": 2,
    "data.fields": {"problem": "question", "answer": "solution"},
    "data.prompt_buckets": (128,),
    "data.max_prompt_tokens": 128,
    "data.eval_fraction": 0.2,
    "rollout": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4},
    "eval.every": 2,
    "eval.samples": 1,
    "reward.workers": 1,
    "student.dtype": "float32",
    "mesh.devices": "0:1",
    "logprob_chunk": 16,
    "health.teacher_effect": 0.0,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a model of the hub, rows and functions of this process; and what these saw."""
    home, patch, seen = tmp_path_factory.mktemp("home"), pytest.MonkeyPatch(), []
    with LocalHub() as hub:
        hub.here(patch, home / "cache")
        hub.add_model("own/student", tiny_model(home / "student", kind="qwen3"))
        patch.chdir(home)

        def few(completions, answers, lengths):
            seen.append((completions, answers))
            return [-length for length in lengths]

        arguments = {
            "student": "own/student",
            "data": ROWS,
            "reward": [(few, 0.5)],
            "prompt": lambda problem: f"Q: {problem}\nA:",
            "changes": SMALL,
            "log": "quiet",
        }
        result = kdrl_jax.train("mine", "runs/api", **arguments)
        yield home, result, seen, arguments
        patch.undo()


def test_names_are_functions_and_modules_alike():
    import kdrl_jax.train as module
    from kdrl_jax import train

    assert train is module is kdrl_jax.train
    assert list(inspect.signature(train).parameters)[:3] == ["config", "workdir", "student"]
    assert callable(train.main)
    for name in kdrl_jax.__all__:
        assert callable(getattr(kdrl_jax, name)), name
        assert getattr(importlib.import_module("kdrl_jax.api"), name)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        kdrl_jax.trian  # noqa: B018


def test_importing_the_package_loads_no_jax():
    code = "import kdrl_jax, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_run(trained):
    home, result, seen, _ = trained
    assert result.workdir == Path("runs/api")
    assert (result.steps, result.finished) == (2, True)
    assert result.summary["steps"] == 2
    steps = [row["step"] for row in result.metrics]
    assert steps == [0, 1, 2]
    assert result.accuracy == result.metrics[-1]["eval/accuracy"]
    assert result.accuracy_before == result.metrics[0]["eval/accuracy"]
    # The function is the whole reward, with its weight.
    lengths = [row["length/mean"] for row in result.metrics[1:]]
    rewards = [row["reward/mean"] for row in result.metrics[1:]]
    np.testing.assert_allclose(rewards, [-0.5 * x for x in lengths], rtol=1e-6)
    assert {len(texts) for texts, _ in seen} == {2}
    assert {x for _, answers in seen for x in answers} <= {row["solution"] for row in ROWS}
    assert result.samples[0]["prompt"].startswith("Q: What is")
    assert hasattr(result.start, "is_dir")
    assert (result.config.steps, result.config.data.path) == (2, "runs/api/data/training.jsonl")
    assert (result.start / "config.json").is_file()
    provenance = json.loads((home / "runs/api/provenance.json").read_text())
    assert {"python:few", "python:function"} <= provenance[-1]["own_code"].keys()
    rows = (home / "runs/api/data/training.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == ROWS


def test_the_same_call_goes_on(trained):
    _, _, _, arguments = trained
    more = arguments | {"changes": SMALL | {"steps": 3}}
    assert kdrl_jax.train("mine", "runs/api", **more).steps == 3
    with pytest.raises(UserError, match=r"data\.path: other rows than runs/api/data/training"):
        kdrl_jax.train("mine", "runs/api", **more | {"data": ROWS[:9]})


def test_the_command_asks_for_the_function_again(trained, monkeypatch):
    config = json.loads(Path("runs/api/config.json").read_text())
    functions = ",".join(config["reward"]["functions"])
    monkeypatch.setattr(own_functions, "_known", {})  # as in another process
    argv = ["--config=mine", "--workdir=runs/api", f"--config.reward.functions={functions}"]
    with pytest.raises(UserError) as error:
        kdrl_jax.train.main(argv)
    said = "reward.functions: 'python:few' is a function that was given in Python; give it again"
    assert any(line.startswith(said) for line in error.value.problems)


def test_answers_conversation_and_export(trained, capsys):
    _, result, _, _ = trained
    found = kdrl_jax.generate(
        result.workdir,
        ["What is 1 + 1?", "What is 2 + 2?", "What is 3 + 3?"],
        samples=2,
        batch=2,
        max_new_tokens=3,
        prompt_style="chat",
    )
    assert [(x.prompt, x.sample) for x in found] == [(p, s) for p in range(3) for s in range(2)]
    assert all(1 <= len(x.tokens) <= 3 and len(x.log_probs) == len(x.tokens) for x in found)
    assert {x.finish_reason for x in found} <= {"stop", "length"}
    exported = kdrl_jax.export(result.workdir, "exported", log="quiet")
    assert (exported / "model.safetensors").is_file()
    greedy = {"temperature": 0.0, "max_new_tokens": 4, "prompt_style": "chat"}
    of_run, of_export = (
        kdrl_jax.generate(model, "What is 1 + 1?", **greedy)[0]
        for model in (result.workdir, exported)
    )
    assert of_run.tokens == of_export.tokens
    talk, pieces = kdrl_jax.chat(exported, **greedy), []
    said = talk.ask("What is 1 + 1?", on_text=pieces.append)
    assert said == "".join(pieces) == of_run.text
    assert talk.messages == [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": said},
    ]
    talk.reset()
    assert talk.messages == []
    capsys.readouterr()
    quiet = kdrl_jax.chat(exported, log="quiet", **greedy)
    assert quiet.ask("What is 1 + 1?", on_text=lambda piece: print(piece, end="")) == said
    assert capsys.readouterr().out == said


def test_evaluation_of_ones_own_rows(trained):
    _, result, _, _ = trained
    changes = {"data.prompt_style": "chat", "rollout.max_new_tokens": 4}
    arguments = {"data": ROWS[:4], "samples": 2, "changes": changes, "log": "quiet"}
    found = kdrl_jax.evaluate(result.workdir, **arguments)
    assert found.output == result.workdir / "evaluation"
    [(name, accuracy)] = found.accuracy.items()
    assert 0 <= accuracy <= 1
    rows = found.responses(name)
    assert len(rows) == 8
    assert accuracy == np.mean([row["reward"] for row in rows])
    assert name in found.table


def test_a_plan():
    found = kdrl_jax.plan("stage2", "v5p-32")
    assert found.fits
    assert not kdrl_jax.plan("stage2", "a100-40:1").fits
    assert found.machine.count == 16


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: kdrl_jax.train("mine", changes={"rollout.grup_size": 2}), "rollout.group_size"),
        (lambda: kdrl_jax.train("mine", changes={"steps": "many"}), "steps: 'many' must be int"),
        (lambda: kdrl_jax.train("mine", changes={"num_generations": 8}), "rollout.group_size"),
        (lambda: kdrl_jax.train("mine", num_generations=8), "here it is rollout.group_size"),
        (lambda: kdrl_jax.train("mine", stpes=8), "stpes: no argument of train"),
        (lambda: kdrl_jax.train("mine", "w", data=[1]), "data.path: row 0 is int"),
        (lambda: kdrl_jax.train("mine", "w", data={"a": 1}), "data.path: dict is no list of rows"),
        (lambda: kdrl_jax.train("mine", "w", data=[]), "data.path: holds no rows"),
        (lambda: kdrl_jax.train("mine", reward=3), r"reward\.functions: 3 is no function"),
        (lambda: kdrl_jax.train("none"), "--config: no file none"),
        (lambda: kdrl_jax.train("mine", log="loud"), "log: 'loud' is none of"),
        (lambda: kdrl_jax.generate("nowhere", "a"), "model: no folder nowhere"),
        (lambda: kdrl_jax.generate("nowhere", "a", log="loud"), "log: 'loud' is none of"),
        (lambda: kdrl_jax.chat("nowhere", log="loud"), "log: 'loud' is none of"),
        (lambda: kdrl_jax.export("nowhere", "out", to="gguf"), "to: 'gguf' is none of"),
        (lambda: kdrl_jax.evaluate("nowhere", "out"), "benchmarks: empty, and no data"),
        (lambda: kdrl_jax.plan("stage2", "h100:x"), "--topology: 'h100:x'"),
    ],
)
def test_what_is_refused(call, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        call()


def test_settings_of_answers_are_checked_before_weights_are_loaded(trained):
    with pytest.raises(UserError) as error:
        kdrl_jax.generate("runs/api", "a", temperature=-1.0, samples=0, heat=3.0, dtype="int8")
    assert error.value.problems == [
        "heat: is no setting; there are max_new_tokens, temperature, top_p, top_k, min_p",
        "temperature: -1.0 must not be negative",
        "samples: 0 must be at least 1",
        "dtype: 'int8' is none of 'float32', 'bfloat16'",
    ]
    with pytest.raises(UserError, match=r"prompts\[1\]: int is no text"):
        kdrl_jax.generate("runs/api", ["a", 3], prompt_style="plain")


# --- Rows ---------------------------------------------------------------------------------------


def test_rows_of_other_kinds(tmp_path):
    datasets, rows = pytest.importorskip("datasets"), [{"problem": "1+1", "answer": "2"}]
    for name, given in (
        ("list", rows),
        ("generator", (row for row in rows)),
        ("dataset", datasets.Dataset.from_list(rows)),
        ("numpy", [{"problem": "1+1", "answer": np.str_("2")}]),
    ):
        path = write_rows(tmp_path / name, "data.path", given)
        assert [json.loads(line) for line in Path(path).read_text().splitlines()] == rows
    assert write_rows(tmp_path, "data.path", "a.jsonl") == "a.jsonl"
    assert write_rows(tmp_path, "data.path", Path("a.jsonl")) == "a.jsonl"
    path = write_rows(
        tmp_path, "data.path", [{"n": np.int64(3), "when": np.datetime64("2026-01-01")}]
    )
    assert json.loads(Path(path).read_text())["n"] == 3


def test_a_table_of_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame([{"problem": "1+1", "answer": 2}])
    path = write_rows(tmp_path, "data.path", table)
    assert json.loads(Path(path).read_text()) == {"problem": "1+1", "answer": 2}
