"""Names of other trainers are answered with ours, on the command line and in Python."""

import sys

import pytest

from kdrl_jax import plan, train
from kdrl_jax.cli import Parser, run_entry
from kdrl_jax.config import CONFIGS, apply_overrides, flatten, load_config, update_config
from kdrl_jax.foreign_names import NAMES, answer, here
from kdrl_jax.training.validation import CHOICES
from kdrl_jax.types import UserError

BASE = load_config(CONFIGS / "base.py")
KEYS = flatten(BASE)
GROUP = "num_generations: here it is rollout.group_size; write --config.rollout.group_size=8"


def test_every_target_exists_and_no_name_is_a_key() -> None:
    assert not NAMES.keys() & KEYS.keys()
    for name, meaning in NAMES.items():
        assert meaning.keys or meaning.note, name
        for key in meaning.keys:
            assert key in KEYS, (name, key)


def test_every_key_in_a_note_exists() -> None:
    groups = {key.partition(".")[0] for key in KEYS if "." in key}
    named = 0
    for name, meaning in NAMES.items():
        for word in meaning.note.replace(",", " ").replace(";", " ").split():
            key = word.partition("=")[0].rstrip(":.)")
            if key.partition(".")[0] in groups and "." in key and not key.endswith("*"):
                assert key in KEYS, (name, word)
                named += 1
    assert named > 10


def test_values_of_ours_are_of_the_right_kind() -> None:
    """What an answer says to write can be written."""
    for name, meaning in NAMES.items():
        for theirs, ours in meaning.values.items():
            assert len(ours) == len(meaning.keys), name
            line = answer(name, theirs)
            assert "VALUE" not in line
            apply_overrides(BASE, [f"{k}={v}" for k, v in zip(meaning.keys, ours, strict=True)])
            for key, value in zip(meaning.keys, ours, strict=True):
                assert value in CHOICES.get(key, (value,)), (name, value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_generations", 8, "here it is rollout.group_size; write rollout.group_size=8"),
        ("max_completion_length", 256, "write rollout.max_new_tokens=256"),
        ("epsilon", 0.2, "here they are clip_eps_low and clip_eps_high; write clip_eps_low=0.2 c"),
        ("kl_coef", 0.04, "the teacher is beta.init); write reference_coef=0.04"),
        ("kl_loss_coef", 0.04, "write reference_coef=0.04"),
        ("beta", 0.04, "write reference_coef=0.04"),
        ("loss_type", "dr_grpo", "write aggregation=seq-mean-token-sum-norm"),
        ("loss_type", "unheard", "write aggregation=VALUE"),
        ("scale_rewards", False, "write advantage.scale=none"),
        ("scale_rewards", "batch", "write advantage.scale=batch"),
        ("dataset_name", "openai/gsm8k", "write data.path=hf://openai/gsm8k"),
        ("train_dataset", [{"question": "x" * 200}], "write data.path=VALUE"),
        ("reward_funcs", [len], "write reward.functions=module:len"),
        ("reward_funcs", "my:fn", "write reward.functions=my:fn"),
        ("lora_target_modules", ["q_proj", "v_proj"], "student.lora.targets=q_proj,v_proj"),
        ("actor_rollout_ref.rollout.n", 5, "write rollout.group_size=5"),
        ("actor_rollout_ref.actor.optim.lr", "1e-6", "write optimizer.learning_rate=1e-6"),
        ("actor_rollout_ref.model.path", "Q", "write student.path=Q"),
        ("data.train_batch_size", 64, "(in problems); write rollout.prompts_per_step=64"),
        ("data.max_response_length", 64, "write rollout.max_new_tokens=64"),
        ("algorithm.adv_estimator", "rloo", "objective=grpo advantage.baseline=leave_one_out"),
        ("trainer.total_epochs", 3, "no such key; a run's length is steps"),
        ("per_device_train_batch_size", 4, "no such key; the rows of an update are rollout.p"),
        ("gradient_accumulation_steps", 4, "no such key; the passes of an update follow: "),
        ("output_dir", "x", "no such key; the folder is --workdir"),
        ("use_vllm", True, "rollout.server.url"),
    ],
)
def test_answers(name: str, value, said: str) -> None:
    line = answer(name, value)
    assert line.startswith(f"{name}: ")
    assert said in line
    with pytest.raises(UserError) as error:
        update_config(BASE, {name: value})
    assert error.value.problems == [line]


def test_our_own_misspelt_keys_are_no_foreign_names() -> None:
    for name in ("rollout.grup_size", "optimzer.learning_rat", "micro_bach", "stpes"):
        assert here(name) is None
        assert answer(name, 1) == ""


@pytest.mark.parametrize(
    "given",
    [
        ["--config.num_generations=8"],
        ["--config.num_generations", "8"],
        ["--num_generations=8"],
        ["--num_generations", "8"],
        ["--num-generations=8"],
        ["num_generations=8"],
    ],
)
@pytest.mark.parametrize(
    ("main", "more"), [(train.main, []), (plan.main, ["--topology=v5p-8"])], ids=["train", "plan"]
)
def test_on_the_command_line(given: list[str], main, more: list[str]) -> None:
    with pytest.raises(UserError) as error:
        main([f"--config={CONFIGS / 'stage2.py'}", *more, *given])
    assert error.value.problems.count(GROUP) == 1


def test_all_at_once_with_what_else_is_wrong() -> None:
    with pytest.raises(UserError) as error:
        train.main(
            [
                *(f"--config={CONFIGS / 'stage2.py'}", "--max_steps=5", "--config.sed=1"),
                *("--rollout.group_size=8", "--group_size", "8", "--config.steps=0"),
            ]
        )
    lines = error.value.problems
    assert lines[:4] == [
        "max_steps: here it is steps; write --config.steps=5",
        "--rollout.group_size: is a key; write --config.rollout.group_size=8",
        "--group_size: is a key; write --config.rollout.group_size=8",
        "--config.sed: no such key; the nearest is seed",
    ]
    assert "steps: 0 must be at least 1" in lines
    with pytest.raises(UserError, match="are required: --config") as error:
        train.main(["--num_generations=8"])
    assert error.value.problems[0] == GROUP


def test_a_commands_own_options_come_first(capsys) -> None:
    parser = Parser("")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--prompt")
    found = parser.read(["--temperature", "0.5", "--prompt", "temperature=1"])
    assert (found.temperature, found.prompt) == (0.5, "temperature=1")
    with pytest.raises(SystemExit):
        parser.read(["--nosuch=1"])
    assert "unrecognized arguments: --nosuch=1" in capsys.readouterr().err


def test_help_shows_the_keys_that_are_used_most(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--workdir DIR" in text
    assert text.count("\n  ") >= 10
    for key in ("student.path = ''", "rollout.group_size = 16", "steps = 280"):
        assert f"  {key}\n" in text
    assert "samples per prompt" in text  # what configs/base.py says of it
    assert "optimizer.b1" not in text
    assert "--help=all" in text

    monkeypatch.setattr(sys, "argv", ["train.py", "--help=all"])
    run_entry(train.main)
    text = capsys.readouterr().out
    for key, value in KEYS.items():
        assert f"  {key} = {value!r}\n" in text
    assert "--log {text" in text
