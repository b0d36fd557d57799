"""Configs: every shipped file is valid, and every mistake is named before anything starts."""

import json
from pathlib import Path

import pytest

from kdrl_jax.cli import split_overrides
from kdrl_jax.config import (
    ROOT,
    apply_overrides,
    compare_for_resume,
    flatten,
    load_config,
    to_json,
    validate,
)
from kdrl_jax.types import UserError

SHIPPED = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
BASE = load_config(ROOT / "configs" / "base.py")
# The fewest changes that make the defaults a run: the base names no model and no data.
RUNNABLE = apply_overrides(BASE, ["data.task=arithmetic", "teacher.sft.steps=1"])


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        validate(apply_overrides(RUNNABLE, overrides))
    return error.value.problems


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_have_every_key_and_sane_values(name: str, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / f"{name}.py")
    assert flatten(config).keys() == flatten(BASE).keys()
    file, folder = tmp_path / "data.jsonl", str(tmp_path)
    file.write_text("{}\n")
    if not config.data.task:  # what its docstring asks the user to give
        config = apply_overrides(
            config,
            [
                f"data.path={file}",
                f"data.eval_path={file}",
                f"student.path={folder}",
                f"teacher.path={folder}",
            ],
        )
    validate(config)


def test_settings_of_the_paper() -> None:
    """Section 4 and appendix B of arXiv 2506.02208."""
    stage2 = load_config(ROOT / "configs" / "stage2.py")
    assert (stage2.rollout.prompts_per_step, stage2.rollout.group_size) == (64, 16)
    assert (stage2.rollout.max_new_tokens, stage2.rollout.temperature) == (20_480, 0.6)
    assert (stage2.beta.init, stage2.beta.min, stage2.beta.delta) == (5e-3, 1e-3, 5e-5)
    assert (stage2.optimizer.learning_rate, stage2.entropy_coef) == (1e-6, 1e-3)
    assert (stage2.steps, stage2.kd_estimator, stage2.aggregation) == (
        280,
        "k2",
        "group-token-mean",
    )
    zero = load_config(ROOT / "configs" / "zero_rl.py")
    assert (zero.beta.init, zero.beta.min, zero.beta.delta, zero.steps) == (2e-1, 2e-3, 8e-4, 480)
    assert (zero.rollout.temperature, zero.rollout.max_new_tokens) == (1.0, 8192)
    assert not zero.reward.require_format
    teacher = load_config(ROOT / "configs" / "zero_rl_teacher.py")
    assert (teacher.objective, teacher.steps) == ("grpo", 300)
    stage1 = load_config(ROOT / "configs" / "stage1.py")
    assert (stage1.objective, stage1.steps, stage1.rollout.max_new_tokens) == ("grpo", 500, 8192)


def test_overrides_take_the_type_of_the_default() -> None:
    config = apply_overrides(
        BASE,
        [
            "optimizer.learning_rate=1",
            "steps=1e3",
            "data.prompt_buckets=64,128",
            "reward.require_format=False",
            "student.path=3",
            "logprob_temperature=0.7",
        ],
    )
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.steps == 1000
    assert config.data.prompt_buckets == (64, 128)
    assert config.reward.require_format is False
    assert config.student.path == "3"
    config.student.path = ""
    config.data.task, config.teacher.sft.steps = "arithmetic", 1
    config.data.prompt_buckets = (1024,)
    assert validate(config).logprob_temperature == 0.7
    assert BASE.steps == 280, "overriding must not change the original"


def test_all_bad_overrides_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        apply_overrides(BASE, ["optimzer.learning_rat=1", "seed=a", "steps=1.5", "beta.init"])
    lines = error.value.problems
    assert len(lines) == 4
    assert "optimzer.learning_rat: no such key; the nearest is optimizer.learning_rate" in lines[0]
    assert "seed=a: must be int" in lines[1]
    assert "steps=1.5: must be int" in lines[2]
    assert "beta.init: no value" in lines[3]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["beta.init=-1"], ["beta.init: -1.0 must not be negative"]),
        (["rollout.group_size=1", "micro_batch=1"], ["rollout.group_size: 1", "zero advantages"]),
        (["objective=krdl"], ["objective: 'krdl'", "nearest is 'kdrl'"]),
        (["teacher.sft.steps=0"], ["teacher.path: empty"]),
        (["data.task="], ["data.task: ''", "exactly one"]),
        (["data.path=nowhere.jsonl"], ["exactly one", "no file nowhere.jsonl"]),
        (["student.path=nowhere"], ["student.path: no folder nowhere"]),
        (["micro_batch=100"], ["micro_batch: 100 does not divide"]),
        (["beta.init=1e-4"], ["beta.min: 0.001 is above beta.init=0.0001"]),
        (["data.prompt_buckets=64"], ["data.prompt_buckets: the largest, 64"]),
        (["data.prompt_buckets=(64,32)"], ["must be increasing"]),
        (["logprob_temperature=warm"], ["logprob_temperature: 'warm'"]),
        (["rollout.temperature=0"], ["rollout.temperature: 0.0 must be positive"]),
        (["rollout.top_p=1.5"], ["rollout.top_p: 1.5 must be at most 1"]),
        (["checkpoint.every=0"], ["checkpoint.every: 0 must be at least 1"]),
    ],
)
def test_impossible_values_are_named(overrides: list[str], said: list[str]) -> None:
    text = "\n".join(problems_of(*overrides))
    for part in said:
        assert part in text


def test_all_problems_at_once() -> None:
    lines = problems_of("beta.init=-1", "objective=krdl", "steps=0", "kd_mask=all")
    assert len([line for line in lines if line.startswith(("beta.init", "steps"))]) == 2
    assert len([line for line in lines if line.startswith(("objective", "kd_mask"))]) == 2


def test_group_of_one_is_fine_without_rewards() -> None:
    validate(apply_overrides(RUNNABLE, ["objective=kd_rkl", "rollout.group_size=1"]))


def test_unknown_missing_and_mistyped_keys_of_a_file(tmp_path: Path) -> None:
    config = RUNNABLE.copy_and_resolve_references()
    config.rollout.unlock()
    config.rollout.temprature = 0.6
    del config.rollout["top_k"]
    with config.ignore_type():
        config.steps = "many"
    with pytest.raises(UserError) as error:
        validate(config)
    text = str(error.value)
    assert "rollout.temprature: no such key; the nearest is rollout.temperature" in text
    assert "rollout.top_k: missing" in text
    assert "steps: 'many' must be int" in text


def test_missing_config_file_names_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"no file .*stage3.py; there are .*stage2.py"):
        load_config(ROOT / "configs" / "stage3.py")


def test_resume_refuses_another_config_but_lets_a_run_grow() -> None:
    saved = json.loads(to_json(RUNNABLE))
    where = Path("run/config.json")
    compare_for_resume(saved, RUNNABLE, where)
    compare_for_resume(saved, apply_overrides(RUNNABLE, ["steps=999", "mesh.data=2"]), where)
    with pytest.raises(UserError, match=r"beta.init=0.005, now 0.1; .*another --workdir"):
        compare_for_resume(saved, apply_overrides(RUNNABLE, ["beta.init=0.1"]), where)


def test_overrides_are_split_from_other_arguments() -> None:
    given = ["--config=a.py", "--config.x.y=1", "--workdir=d", "--config.z", "2"]
    assert split_overrides(given) == (["x.y=1", "z=2"], ["--config=a.py", "--workdir=d"])
