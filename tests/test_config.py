"""Configs: every shipped file is valid, and every mistake is named before anything starts."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from kdrl_jax import config as config_module
from kdrl_jax.cli import split_overrides
from kdrl_jax.config import (
    ROOT,
    apply_overrides,
    flatten,
    load_config,
    split_variant,
    to_json,
    update_config,
)
from kdrl_jax.tasks.registry import get_task
from kdrl_jax.training.validation import compare_for_resume, validate
from kdrl_jax.types import UserError


def shipped() -> list[str]:
    """Every config file and variant that comes with the project."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem not in ("__init__", "shapes", "sources"):
            variants = getattr(importlib.import_module(f"configs.{path.stem}"), "VARIANTS", {})
            found += [f"{path.stem}.py", *(f"{path.stem}.py:{name}" for name in variants)]
    return found


SHIPPED = shipped()
BASE = load_config(ROOT / "configs" / "base.py")
# The fewest changes that make the defaults a run: the base names no model and no data.
RUNNABLE = apply_overrides(BASE, ["data.task=arithmetic", "teacher.sft.steps=1"])


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        validate(apply_overrides(RUNNABLE, overrides))
    return error.value.problems


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_have_every_key_and_sane_values(name: str, tmp_path: Path) -> None:
    config = load_config(f"{ROOT}/configs/{name}")
    assert flatten(config).keys() == flatten(BASE).keys()
    file, folder = tmp_path / "data.jsonl", str(tmp_path)
    file.write_text("{}\n")
    given = []  # what its docstring asks the user to give
    if not config.data.task:
        given = [f"data.path={file}"]
        if not config.data.eval_fraction:
            given.append(f"data.eval_path={file}")
    if not config.data.task or get_task(config.data.task).alphabet is None:
        given += [f"student.path={folder}", f"teacher.path={folder}"]
    config = apply_overrides(config, given)
    validate(config)


def test_a_variant_is_named_after_the_file(tmp_path: Path) -> None:
    assert split_variant("configs/stage2.py:k3") == (Path("configs/stage2.py"), "k3")
    assert split_variant("configs/stage2.py") == (Path("configs/stage2.py"), "")
    assert split_variant("stage2:k3,constant") == (Path("stage2"), "k3,constant")
    assert load_config(ROOT / "configs" / "stage2.py:k3").kd_estimator == "k3"
    both = load_config(ROOT / "configs/stage2.py:k3,constant")
    assert (both.kd_estimator, both.beta.schedule) == ("k3", "constant")
    with pytest.raises(UserError, match=r"no variant 'k4' in .*stage2.py; there are constant, "):
        load_config(ROOT / "configs" / "stage2.py:k4")
    with pytest.raises(UserError, match=r"no variant 'a' in .*demo.py; the file has none"):
        load_config(ROOT / "configs" / "demo.py:a")
    (tmp_path / "mine.py").write_text(
        "from configs.base import get_config\nVARIANTS = {'a': {'beta.inti': 1.0}}\n"
    )
    with pytest.raises(UserError, match="inti"):
        load_config(tmp_path / "mine.py:a")


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


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("reward.functions=my_rewards:brevity*0.2", ("my_rewards:brevity*0.2",)),
        ("reward.functions=a:b*2, c:d", ("a:b*2", "c:d")),
        ('reward.functions=("a:b", "c:d")', ("a:b", "c:d")),
        ('reward.functions=("a:b")', ("a:b",)),
        ("data.filters=answer_parses", ("answer_parses",)),
        ("data.filters=", ()),
        (
            "data.filters=dedupe,pass_rate:model=M,max=0.5,limit:n=3",
            ("dedupe", "pass_rate:model=M,max=0.5", "limit:n=3"),
        ),
        ("student.lora.targets=q_proj,v_proj", ("q_proj", "v_proj")),
        ("health.stop=all", ("all",)),
        ("data.prompt_buckets=64", (64,)),
        ("beta.phases=((0, 1.0), (5, 0))", ((0, 1.0), (5, 0))),
    ],
)
def test_several_values_are_one_text(override: str, value: tuple) -> None:
    assert flatten(apply_overrides(BASE, [override]))[override.partition("=")[0]] == value


@pytest.mark.parametrize("text", ['("a:b"', "[a", "'a:b"])
def test_a_broken_tuple_is_no_text(text: str) -> None:
    with pytest.raises(UserError, match=r"must be tuple, like \('a', 'b'\)"):
        apply_overrides(BASE, [f"reward.functions={text}"])
    with pytest.raises(UserError, match=r"must be tuple, like \(256, 512, 1024"):
        apply_overrides(BASE, ["data.prompt_buckets=a,b"])


def test_values_of_python() -> None:
    """By key, by groups, and in the clothes that people have them in."""
    rates = np.float32(0.5), np.int64(8)
    changes = {
        "rollout": {"group_size": 8.0, "server": {"url": "http://a"}},
        "rollout.temperature": 1,
        "rollout.top_p": rates[0],
        "eval.batch": rates[1],
        "data.filters": ["dedupe"],
        "reward.functions": "a:b*2",
        "beta.phases": [[0, 1.0], [5, 0.0]],
        "student.path": Path("a/b"),
        "debug": True,
    }
    config = update_config(BASE, changes)
    assert (config.rollout.group_size, config.rollout.server.url) == (8, "http://a")
    assert type(config.rollout.group_size) is type(config.eval.batch) is int
    assert type(config.rollout.temperature) is type(config.rollout.top_p) is float
    assert config.data.filters == ("dedupe",)
    assert config.reward.functions == ("a:b*2",)
    assert config.beta.phases == ((0, 1.0), (5, 0.0))
    assert config.student.path == "a/b"
    assert config.debug is True
    assert BASE.rollout.group_size == 16, "the original must not change"
    assert update_config(BASE, {"rollout": config.rollout}).rollout == config.rollout
    assert load_config(ROOT / "configs" / "base.py", changes) == config


def test_all_that_is_wrong_from_python_is_named_at_once() -> None:
    changes = {
        "rollout": {"group_size": "8", "grup_size": 8},
        "steps": True,
        "reward.require_format": 1,
        "student.path": None,
        "data.prompt_buckets": {"a"},
        "optimizer.learning_rate": float,
        "mesh": 3,
        "num_generations": 8,
    }
    with pytest.raises(UserError) as error:
        update_config(BASE, changes)
    lines = error.value.problems
    assert [line.partition(":")[0] for line in lines] == [
        *("rollout.group_size", "rollout.grup_size", "steps", "reward.require_format"),
        *("student.path", "data.prompt_buckets", "optimizer.learning_rate", "mesh"),
        "num_generations",
    ]
    assert lines[0] == "rollout.group_size: '8' must be int, like 16"
    assert lines[1] == "rollout.grup_size: no such key; the nearest is rollout.group_size"
    assert "set one of mesh.context, mesh.data" in lines[7]
    assert lines[8].endswith("here it is rollout.group_size; write rollout.group_size=8")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('c.rollout.group_size = "8"', "rollout.group_size: '8' must be int, like 16"),
        ('c["rollout"]["group_size"] = "8"', "rollout.group_size: '8' must be int, like 16"),
        ('c.rollout.update(group_size="8")', "rollout.group_size: '8' must be int, like 16"),
        ('c.data.filters = "dedupe"', "data.filters: 'dedupe' must be tuple, like ('a', 'b')"),
        ("c.rollout.grup_size = 8", "rollout.grup_size: no such key; the nearest is rollout.gr"),
        ("c.update(dict(rollout=dict(grup_size=8)))", "rollout.grup_size: no such key; the near"),
        ("c.steps = c.rollout.grup_size", "rollout.grup_size: no such key; the nearest is rollo"),
        ("c.rollout.num_generations = 8", "here it is rollout.group_size; write rollout.group_"),
        ("c.rollout = 8", "rollout: is a group of keys; set one of rollout.carry, "),
        ("c.steps = 1 // 0", "ZeroDivisionError: "),
        ("c.steps = (", "SyntaxError: "),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = "from configs.base import get_config as base\n\ndef get_config():\n    c = base()\n"
    file.write_text(f"{text}    {line}\n    return c\n")
    with pytest.raises(UserError) as error:
        load_config(file)
    (problem,) = error.value.problems
    assert problem.startswith(f"--config: {file}:5: ")
    assert said in problem
    assert "ConfigDict" not in problem


def test_types_in_a_variant_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs.base import get_config\n"
        "VARIANTS = {'a': {'steps': '5', 'data.filters': ['dedupe'], 'sed': 1}}\n"
    )
    with pytest.raises(UserError) as error:
        load_config(f"{file}:a")
    assert error.value.problems == [
        f"--config: {file}: variant 'a': steps: '5' must be int, like 280",
        f"--config: {file}: variant 'a': sed: no such key; the nearest is seed",
    ]


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
        (["beta.init=-1"], ["beta.init: -1.0 is not 0 or more"]),
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
        (["micro_batch=-1"], ["micro_batch: -1 must not be negative"]),
        (["logprob_temperature=warm"], ["logprob_temperature: 'warm'"]),
        (["rollout.temperature=0"], ["rollout.temperature: 0.0 must be positive"]),
        (["rollout.top_p=1.5"], ["rollout.top_p: 1.5 must be at most 1"]),
        (["checkpoint.every=0"], ["checkpoint.every: 0 must be at least 1"]),
        (["kd_estimator=k1_loss"], ["kd_estimator: 'k1_loss' is none of", "'k1'"]),
        (["objective=trrd", "teacher.sft.steps=0"], ["teacher.path: empty", "'trrd' needs a"]),
        (["objective=trrd", "kd_estimator=full"], ["kd_estimator: 'full' has no effect"]),
        (["trrd.alpha=1.5"], ["trrd.alpha: 1.5 must be at most 1"]),
        (["beta.schedule=adaptive", "beta.min=1.0"], ["beta.min: 1.0 is above beta.init=0.005"]),
        (["beta.schedule=phases"], ["beta.phases: ()"]),
        (["policy_phases=((5,1.0),)"], ["policy_phases: the first phase is from step 5"]),
        (["mini_batches=3"], ["mini_batches: 3 does not divide rollout.prompts_per_step=64"]),
        (["mini_batches=64"], ["micro_batch: 64 does not divide the 1 x 16 rollouts"]),
        (["tis_cap=2.0", "rollout.top_p=0.9"], ["tis_cap: 2.0 with rollout.top_p=0.9"]),
        (["tis_cap=2.0", "logprob_temperature=1.0"], ["tis_cap: 2.0 compares with the sampler"]),
        (
            ["objective=reward_shaping", "logprob_temperature=1.0"],
            ["objective: 'reward_shaping' compares with the sampler"],
        ),
        (["objective=kd_rkl", "rollout.refill=2"], ["rollout.refill: 2, but objective='kd_rkl'"]),
        (["reward.overlong_buffer=30000"], ["reward.overlong_buffer: 30000 exceeds"]),
        (["data.task=arithmatic"], ["data.task", "arithmatic", "arithmetic"]),
        (["data.task_args={1"], ["data.task_args"]),
        (["data.eval_fraction=1"], ["data.eval_fraction: 1.0 must be at least 0 and below 1"]),
        (["data.eval_fraction=-0.1"], ["data.eval_fraction: -0.1 must be at least 0"]),
        (["data.eval_fraction=0.1"], ["but data.task='arithmetic' has a test split of its own"]),
        (
            ["data.eval_fraction=0.1", "data.task=", "data.path=a", "data.eval_path=b"],
            ["data.eval_fraction: 0.1, but data.eval_path='b' has held-out problems; set one of"],
        ),
        (["data.task=", "data.path=a"], ["data.eval_path: empty", "data.eval_fraction=0.1"]),
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
    with pytest.raises(UserError, match=r"no file stage3; there are .*\bstage2\b"):
        load_config("stage3")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("demo", "data.task", "arithmetic"),
        ("stage2:k3", "kd_estimator", "k3"),
        ("stage2.py:k3,group_mask", "kd_mask", "group"),
        ("configs/stage2.py:k3", "kd_estimator", "k3"),
        ("reproduce/arithmetic:weak_teacher", "teacher.sft.steps", 180),
    ],
)
def test_the_projects_own_configs_serve_in_any_folder(
    name: str, key: str, value, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    config_module._say_once.cache_clear()
    assert flatten(load_config(name))[key] == value
    assert load_config(name) == load_config(name)  # and is not said again
    said = capsys.readouterr().err.splitlines()
    file = split_variant(name)[0]
    assert len(said) == bool(file.suffix)  # a name alone means nothing else
    for line in said:
        assert line.startswith(f"--config: no file {file} here; {ROOT / 'configs'}")


def test_a_file_in_the_folder_comes_first(tmp_path: Path, monkeypatch, capsys) -> None:
    """Also one that imports the project's own by the same name."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.py").write_text(
        "from configs.base import get_config as base\n\n\n"
        "def get_config():\n    c = base()\n    c.steps = 7\n    return c\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/demo.py").steps == 7
    assert load_config("demo").steps == 300
    assert "configs/demo.py here" not in capsys.readouterr().err


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
