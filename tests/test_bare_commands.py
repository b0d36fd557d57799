"""`python -m kdrl_jax.train --config=configs/NAME.py` of every shipped config, with nothing
else but overrides that make it small, against a hub that serves tiny models under the real names.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import HANG_S, xla_flags
from local_hub import LocalHub

pytest.importorskip("datasets", reason="the extra `data` is not installed")
from published import model_names, publish

from configs import sources

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    *("steps=2", "rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.max_new_tokens=4"),
    *("micro_batch=4", "mini_batches=1", "data.max_prompt_tokens=400", "logprob_chunk=16"),
    *("data.prompt_buckets=(400,)", "eval.problems=2", "eval.samples=1", "eval.batch=2"),
    *("eval.max_new_tokens=6",),
    *("checkpoint.every=1", "checkpoint.keep=1", "reward.workers=1", "data.size=8"),
    *("student.dtype=float32", "teacher.dtype=float32"),
)
COMMANDS = {
    "stage1": (),
    "stage2": (),
    "stage2:response_mask": (),
    "sft": (),
    "grpo": (),
    "kd_rkl": (),
    "zero_rl_teacher": (),
    "zero_rl": (),
    "rlad": ('data.task_args={"min_people": 2, "max_people": 2}',),  # in few tokens
    "rlad:math": ("rollout.refill=0",),
    "smollm2_math": ("teacher.sft.steps=1", "teacher.sft.batch_size=2", "teacher.sft.problems=4"),
}
SEVERAL = """
import json, sys, traceback
from kdrl_jax import train
for argv in json.loads(sys.argv[1]):
    try:
        train.main(argv)
        print(json.dumps({"ended": 0}), flush=True)
    except BaseException as error:
        traceback.print_exc()
        print(json.dumps({"ended": repr(error)}), flush=True)
"""


def arguments(name: str) -> list[str]:
    file, _, variant = name.partition(":")
    config = f"configs/{file}.py" + (f":{variant}" if variant else "")
    return [f"--config={config}", *(f"--config.{x}" for x in (*SMALL, *COMMANDS[name]))]


def environment(hub: LocalHub, cache: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    flags = {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)}
    return kept | hub.environment(cache) | flags


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LocalHub() as hub:
        publish(hub, tmp_path_factory.mktemp("models"))
        yield hub


@pytest.fixture(scope="module")
def ran(hub, tmp_path_factory):
    """The folder in which all commands ran, one after another, and what each printed."""
    home = tmp_path_factory.mktemp("home")
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps([arguments(name) for name in COMMANDS])],
        cwd=home,
        env=environment(hub, home / "cache"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_S,
    )
    printed: list[list[str]] = [[]]
    for line in done.stdout.splitlines():
        printed[-1].append(line)
        if line.startswith('{"ended"'):
            printed.append([])
    return home, dict(zip(COMMANDS, printed, strict=False))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bare_command_trains(ran, name):
    home, printed = ran
    lines = printed.get(name, [])
    if name == "sft":  # whose tiny teacher has no right answer: said, after it was asked
        assert any(" 0 right answers to " in line for line in lines), "\n".join(lines)
        assert "exceeds the 0 right answers of the teacher" in lines[-1]
        return
    assert lines[-1:] == ['{"ended": 0}'], "\n".join(lines)
    run = home / "runs" / name.replace(":", "-")
    first = next(line for line in lines if not line.startswith("--config: "))
    assert first == f"run: {run.relative_to(home)}"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"]
    assert summary["steps"] == 2
    if name != "smollm2_math":
        assert "eval/accuracy/last" in summary


def test_models_are_those_that_the_config_names(ran):
    home, printed = ran
    [start] = json.loads((home / "runs/kd_rkl/provenance.json").read_text())
    # stage1 has run before it in the same folder, and is what its student begins with.
    assert start["models"]["student"]["path"] == "runs/stage1"
    assert start["models"]["teacher"]["path"].startswith(sources.SKYWORK_MATH_7B + "@")
    assert any(line.startswith("student.path: runs/stage1, of ") for line in printed["kd_rkl"])
    [start] = json.loads((home / "runs/rlad/provenance.json").read_text())
    assert start["models"]["student"]["path"] == sources.QWEN3_0_6B
    assert start["models"]["teacher"]["path"] == sources.QWEN3_8B
    # A run's folder names the models as the config does.
    config = json.loads((home / "runs/rlad/config.json").read_text())
    assert config["student"]["path"] == sources.QWEN3_0_6B


def test_nothing_but_weights_config_and_tokenizer_was_asked_for(ran, hub):
    files = {
        Path(path.partition("?")[0]).name for _, path, _ in hub.requests if "/resolve/" in path
    }
    assert "config.json" in files
    assert not {"pytorch_model.bin", "modeling_own.py"} & files


def test_configs_pin_their_models():
    unpinned = [name for name in model_names() if "@" not in name]
    assert unpinned == [sources.SKYWORK_MATH_7B, sources.SKYWORK_32B]  # see configs/sources.py
    for name in set(model_names()) - set(unpinned):
        assert len(name.partition("@")[2]) == 40


def test_stage2_from_the_hub_then_offline(hub, tmp_path):
    """Fetch, two steps with evaluation; then the same command goes on with the cache alone."""
    command = [sys.executable, "-m", "kdrl_jax.train", *arguments("stage2")]
    env = environment(hub, tmp_path / "cache")
    begun = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=HANG_S
    )
    assert begun.returncode == 0, begun.stderr
    assert f"student.path: {sources.DEEPSCALER_1_5B}, of 'runs/stage1 or" in begun.stdout
    assert "downloading agentica-org/DeepScaleR-1.5B-Preview" in begun.stdout
    asked = len(hub.requests)
    more = [*command, "--config.steps=3", "--config.offline=true"]
    # Nothing listens there: whoever asks is refused.
    alone = env | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    again = subprocess.run(
        more, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=HANG_S
    )
    assert again.returncode == 0, again.stderr
    assert "continuing after step 2 of 3" in again.stdout
    assert len(hub.requests) == asked
    assert json.loads((tmp_path / "runs/stage2/summary.json").read_text())["steps"] == 3
    starts = json.loads((tmp_path / "runs/stage2/provenance.json").read_text())
    assert len({json.dumps(start["models"]) for start in starts}) == 1


def test_stage2_without_a_network(tmp_path):
    """Exit code 2 and a line for each model, with the remedy and without a traceback."""
    with LocalHub() as gone:
        env = environment(gone, tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "kdrl_jax.train", *arguments("stage2")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == ["student.path", "teacher.path"]
    for line, name in zip(errors, (sources.DEEPSCALER_1_5B, sources.SKYWORK_MATH_7B), strict=True):
        assert name in line
        assert "check the network" in line
    assert not (tmp_path / "runs" / "stage2" / "config.json").exists()
