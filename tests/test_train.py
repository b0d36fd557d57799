"""The commands as a user runs them: a whole run, its files, resuming, converting, bad input."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import HANG_S, wait_until
from draws import assert_drawn, recorded
from orbax.checkpoint._src.path import atomicity
from run_draws import ALL, steps_in_common

from kdrl_jax import convert, report, train
from kdrl_jax.cli import run_entry
from kdrl_jax.config import load_config as load_run_config
from kdrl_jax.data import load_tokenizer
from kdrl_jax.models import load_config, load_hf
from kdrl_jax.sharding import make_mesh, param_shardings
from kdrl_jax.tasks.registry import task_problems
from kdrl_jax.training.learner import Learner
from kdrl_jax.training.metrics import CLOCKED, MetricsWriter, read_metrics, sparkline
from kdrl_jax.training.run_weights import abstract_params, restore_params
from kdrl_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "steps": 6,
    "data.size": 64,
    "teacher.shape.hidden_size": 24,
    "teacher.shape.num_layers": 2,
    "teacher.shape.num_heads": 2,
    "teacher.shape.num_kv_heads": 2,
    "teacher.shape.head_dim": 16,
    "teacher.shape.mlp_size": 32,
    "teacher.sft.steps": 3,
    "teacher.sft.problems": 64,
    "teacher.sft.batch_size": 8,
    "student.shape.hidden_size": 16,
    "student.shape.num_layers": 2,
    "student.shape.num_heads": 2,
    "student.shape.num_kv_heads": 2,
    "student.shape.head_dim": 8,
    "student.shape.mlp_size": 16,
    "student.sft.steps": 2,
    "student.sft.problems": 64,
    "student.sft.batch_size": 8,
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 10,
    "micro_batch": 8,
    "optimizer.schedule": "constant",
    "reward.workers": 1,
    "eval.every": 3,
    "eval.problems": 6,
    "eval.batch": 4,
    "checkpoint.every": 2,
    "samples.every": 2,
    "samples.count": 5,
}


def command(workdir, cache, **changes):
    settings = TINY | {"cache_dir": str(cache)} | changes
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={ROOT / 'configs' / 'demo.py'}", f"--workdir={workdir}", *flags]


def run(workdir, cache, **changes):
    train.main(command(workdir, cache, **changes))
    return rows(workdir)


def rows(workdir):
    """The metrics that equal runs must have in common."""
    found = read_metrics(Path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in found]


def evaluations(workdir):
    return [row for row in rows(workdir) if "eval/accuracy" in row]


def samples(workdir):
    return {p.name: p.read_text() for p in sorted((Path(workdir) / "samples").iterdir())}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run from beginning to end."""
    with jax.numpy_rank_promotion("raise"):
        workdir = tmp_path_factory.mktemp("whole") / "run"
        run(workdir, cache)
    return workdir


# --- a run ----------------------------------------------------------------------------------


def test_what_a_run_leaves(whole, cache):
    metrics = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4, 5, 6]
    promised = {
        *("loss", "beta", "reward/mean", "kl/teacher", "entropy/mean", "length/mean"),
        *("length/truncated_frac", "mismatch/kl", "time/rollout_s", "tokens_per_s/rollout"),
        *("tokens_per_s/update", "tokens_per_s/total", "perf/mfu_update", "perf/mfu_score"),
        *("perf/decode_roofline", "perf/slot_use", "share/rollout", "share/score"),
        *("share/update", "kl/distilled"),
    }
    for row in metrics[1:]:
        assert promised <= row.keys()
        assert all(np.isfinite(v) for v in row.values()), row
        assert abs(row["mismatch/kl"]) < 1e-4  # the sampler and the trainer are one policy
    assert [r["step"] for r in metrics if "eval/accuracy" in r] == [0, 3, 6]
    assert sorted(samples(whole)) == [f"step_{i:06d}.jsonl" for i in (1, 2, 4, 6)]
    sample = json.loads(samples(whole)["step_000002.jsonl"].splitlines()[0])
    assert {"problem", "answer", "completion", "reward", "outcome", "length"} <= sample.keys()
    assert sample["prompt"] == sample["problem"]  # of the style "plain"
    for line in samples(whole)["step_000006.jsonl"].splitlines():
        sample = json.loads(line)
        assert "".join(sample["tokens"]) == sample["completion"]
        lists = [sample[k] for k in ("tokens", "log_probs", "teacher_log_probs")]
        assert [len(x) for x in lists] == [sample["length"]] * 3
        assert all(x <= 0 for x in sample["log_probs"] + sample["teacher_log_probs"])
        assert sample["trained"]
        assert sample["distilled"]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["finished"]
    assert summary["steps"] == 6
    assert json.loads((whole / "config.json").read_text())["rollout"]["group_size"] == 4
    assert list((whole / "tensorboard").iterdir())
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert len([p for p in cache.iterdir() if p.name.startswith("teacher-")]) == 1


def test_nothing_compiles_in_steady_state(whole):
    """After the first step and the first checkpoint, evaluations included."""
    counts = [r["time/compilations"] for r in read_metrics(whole / "metrics.jsonl")[1:]]
    assert counts[0] > 0
    assert len(set(counts[2:])) == 1, counts


def test_rewards_of_weight_0_change_nothing(whole, cache, tmp_path, monkeypatch):
    """A run that keeps rewards and verdicts apart is, where they agree, the run that does not."""
    (tmp_path / "idle_rewards.py").write_text("def idle(lengths): return [3.0] * len(lengths)\n")
    monkeypatch.syspath_prepend(tmp_path)
    functions = {"reward.functions": '("idle_rewards:idle*0",)'}
    found = run(tmp_path / "run", cache, steps=3, **functions)
    own = {"reward/idle": 3.0, "reward/idle_failed_frac": 0.0}
    for row, plain in zip(found, rows(whole), strict=False):
        if row["step"]:
            assert own.items() <= row.items()
        extra = {*own, "reward/equal_frac"}
        assert {k: v for k, v in row.items() if k not in extra} == plain


def test_the_same_command_again_changes_nothing(whole, cache, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    run(whole, cache)
    assert (whole / "metrics.jsonl").read_bytes() == before
    assert "continuing after step 6 of 6" in capsys.readouterr().out


def test_killed_and_continued_equals_uninterrupted(whole, cache, tmp_path):
    """SIGKILL at whatever the run does once step 3 is logged; the same devices as `whole`."""
    workdir = tmp_path / "killed"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "kdrl_jax.train", *command(workdir, cache, steps=500)]
    process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)

    def logged():
        assert process.poll() is None, "the run ended by itself"
        return len(read_metrics(workdir / "metrics.jsonl")) >= 4

    try:
        wait_until(logged, "step 3 of a run")
    finally:
        process.kill()
        process.wait()
    last = rows(workdir)[-1]["step"]
    for path in (workdir / "checkpoints").iterdir():  # it may have got further than 6
        if path.name.isdigit() and int(path.name) > 4:
            shutil.rmtree(path)
    assert last >= 3
    again = run(workdir, cache)
    assert again == rows(whole)
    assert {k: v for k, v in samples(workdir).items() if k in samples(whole)} == samples(whole)


@pytest.mark.parametrize(
    ("steps", "every", "count", "due"),
    [
        (6, 2, 5, [1, 2, 4, 6]),
        (5, 2, 5, [1, 2, 4, 5]),
        (3, 10, 16, [1, 3]),
        (1, 10, 16, [1]),
        (3, 0, 16, []),
        (3, 1, 0, []),
    ],
)
def test_the_first_and_the_last_step_write_samples(steps, every, count, due):
    overrides = [f"steps={steps}", f"samples.every={every}", f"samples.count={count}"]
    book = SimpleNamespace(config=load_run_config(ROOT / "configs" / "base.py", overrides))
    wanted = {step: train.Run.samples_due(book, step) for step in range(1, steps + 1)}
    assert {step: n for step, n in wanted.items() if n} == dict.fromkeys(due, count)


def test_a_run_shows_its_first_prompt_and_warns_at_its_start(cache, tmp_path, monkeypatch, capsys):
    """Before anything is computed: the rest of the run is left out here."""
    monkeypatch.setattr(train, "check_roles", lambda *_: pytest.fail("far enough"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("my_zeros.py").write_text("def zeros(completions): return [0.0] * len(completions)\n")
    changes = {"reward.verdict_weight": 0.0, "kd_mask": "response"}
    changes["reward.functions"] = "('my_zeros:zeros',)"
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        run(tmp_path / "run", cache, **changes)
    said = capsys.readouterr().out
    problem = task_problems("arithmetic", 1, 1)[0].problem
    assert f"tokens, as the model gets it:\n  | {problem}\n" in said
    assert "warning: kd_mask='response' goes by the verifier's right and wrong" in said


def test_a_learning_curve_in_a_line():
    assert sparkline([0.0, 0.24, 0.5, 0.66, 0.999, 1.0]) == "▁▂▅▆██"
    assert sparkline([0.3]) == "▃"
    assert sparkline([]) == ""
    long = [i / 999 for i in range(1000)]
    assert sparkline(long, most=8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(long)) == 40


def told_after(stop_at, monkeypatch):
    """SIGTERM once step `stop_at` has been made."""
    original = train.Run.step_done

    def step_done(self, step, *rest):
        original(self, step, *rest)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Run, "step_done", step_done)


def test_sigterm_saves_and_the_run_continues(whole, cache, tmp_path, monkeypatch, capsys):
    told_after(3, monkeypatch)
    with pytest.raises(SystemExit, match="75"):  # the same command again, says that to launchers
        run(tmp_path / "run", cache)
    said = capsys.readouterr().out
    assert "stopped after step 3" in said
    accuracy = {row["step"]: row["eval/accuracy"] for row in evaluations(tmp_path / "run")}
    bars = sparkline(list(accuracy.values()))
    assert f"so far: {accuracy[0]:.1%} {bars} {accuracy[3]:.1%}\n" in said
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    monkeypatch.undo()
    assert run(tmp_path / "run", cache) == rows(whole)


def test_sigterm_before_the_first_step_ends_at_once(whole, cache, tmp_path, monkeypatch, capfd):
    """There is nothing to save: the first evaluation is made again."""

    def evaluate(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(HANG_S)
        raise AssertionError("goes on")

    monkeypatch.setattr(train, "evaluate", evaluate)
    with pytest.raises(SystemExit, match="75"):
        run(tmp_path / "run", cache)
    assert "stopped before a step was made; run the same command again" in capfd.readouterr().err
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    monkeypatch.undo()
    assert run(tmp_path / "run", cache) == rows(whole)


def test_a_slow_save_is_waited_for(cache, tmp_path, monkeypatch):
    finalize = atomicity.AtomicRenameTemporaryPath.finalize
    save, begun, told = train.Run.save, [], []

    def begin(self, step, *rest):
        begun.append(step)
        save(self, step, *rest)

    async def slow(self, *args, **kwargs):
        if begun and not told:  # not a warm-up's save
            told.append(begun[-1])
            os.kill(os.getpid(), signal.SIGTERM)  # while it is being written
        await asyncio.sleep(1)
        return await finalize(self, *args, **kwargs)

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", slow)
    monkeypatch.setattr(train.Run, "save", begin)
    with pytest.raises(SystemExit, match="75"):
        run(tmp_path / "run", cache, steps=20, **{"eval.every": 0})
    steps = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert max(steps) == rows(tmp_path / "run")[-1]["step"]  # whole, and of the last step
    assert restore_params_of(tmp_path / "run")


# --- storage that fails ---------------------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over(whole, cache, tmp_path, monkeypatch, capsys):
    told_after(5, monkeypatch)
    with pytest.raises(SystemExit, match="75"):
        run(tmp_path / "run", cache)
    monkeypatch.undo()
    for file in (tmp_path / "run" / "checkpoints" / "5" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-100])
    assert run(tmp_path / "run", cache) == rows(whole)
    assert samples(tmp_path / "run") == samples(whole)
    said = capsys.readouterr().out
    assert "5: damaged (" in said
    assert "falling back to the checkpoint of step 4\ncontinuing after step 4 of 6" in said
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        *("2", "4", "6", "damaged_5")
    ]


@pytest.mark.parametrize("where", ["metrics", "samples", "checkpoint"])
def test_a_full_disk_is_an_error_of_one_line(where, whole, cache, tmp_path, monkeypatch, capsys):
    """At step 6, after the checkpoints of 2 and 4; with room again the run goes on."""
    full = OSError(errno.ENOSPC, "No space left on device")
    owner, name = {
        "metrics": (MetricsWriter, "write"),
        "samples": (train.Run, "write_samples"),
        "checkpoint": (ocp.CheckpointManager, "save"),
    }[where]
    call = getattr(owner, name)

    def at_six(self, step, *args, **kwargs):
        if step == 6:
            raise full
        return call(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at_six)
        lines = refused(capsys, *command(tmp_path / "run", cache))
    assert "No space left on device; free space there and run the same command again" in lines[0]
    assert str(tmp_path / "run") in lines[0]
    assert lines[1].endswith("the newest whole checkpoint is step 4")
    assert run(tmp_path / "run", cache) == rows(whole)


def test_a_real_full_disk(whole, cache, tmp_path, capsys):
    """A file system of 400 KiB, on which a checkpoint or two find room."""
    (tmp_path / "run").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k,mode=755", "none", str(tmp_path / "run")]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        lines = refused(capsys, *command(tmp_path / "run", cache))
        assert "No space left on device; free space there" in lines[0]
        there = str(tmp_path / "run")
        subprocess.run(["mount", "-o", "remount,size=20m", there], check=True)
        assert run(tmp_path / "run", cache) == rows(whole)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "run")], check=True)


def test_a_failure_while_closing_does_not_hide_the_first(cache, tmp_path, monkeypatch):
    def fail(self, *_):
        raise RuntimeError("closing")

    def step_done(self, *_):
        raise ValueError("the first")

    monkeypatch.setattr(train.Run, "step_done", step_done)
    monkeypatch.setattr("kdrl_jax.training.run.CheckpointStore.close", fail)
    with pytest.raises(ValueError, match="the first"):
        run(tmp_path / "run", cache, **{"eval.every": 0})
    monkeypatch.setattr(train.Run, "step_done", lambda *_: None)
    with pytest.raises(RuntimeError, match="closing"):
        run(tmp_path / "run", cache, steps=1, **{"eval.every": 0})


def test_a_damaged_warm_up_is_made_again(whole, cache, tmp_path, capsys):
    for kept in cache.glob("student-*"):
        shutil.copytree(kept, tmp_path / "cache" / kept.name)
    for file in (tmp_path / "cache").rglob("checkpoints/0/params/d/*"):
        file.write_bytes(b"")
    found = run(tmp_path / "run", tmp_path / "cache", steps=1)
    assert "damaged" in capsys.readouterr().out
    assert [row["loss"] for row in found if "loss" in row] == [rows(whole)[1]["loss"]]


# --- other ways to continue -----------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Four steps of which every sample is kept."""
    folder = tmp_path_factory.mktemp("watched")
    with jax.numpy_rank_promotion("raise"):
        run(folder / "run", folder, steps=4, **ALL)
    return folder / "run"


@pytest.mark.parametrize("layout", ["split", "apart"])
def test_continuing_on_another_mesh(layout, watched, tmp_path):
    """Another layout, or devices of their own for student, rollouts and teacher.

    The same run up to the first draw within rounding of a boundary, if there is one.
    """
    cache = watched.parent
    run(tmp_path / "run", cache, steps=2, **ALL)
    split = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "micro_batch": 4}
    split |= {"teacher_mesh.data": 1, "teacher_mesh.fsdp": 4}
    apart = {"mesh.devices": "0:4", "mesh.fsdp": 2, "mesh.context": 2, "micro_batch": 4}
    apart |= {"rollout_mesh.devices": "4:6", "rollout_mesh.fsdp": 1}
    apart |= {"teacher_mesh.devices": "6:8", "teacher_mesh.context": 1}
    changes = split if layout == "split" else apart
    with recorded() as calls:
        found = run(tmp_path / "run", cache, steps=4, **ALL, **changes)
    model = train.Decoder(load_config(tmp_path / "run" / "model"))
    size = load_tokenizer(tmp_path / "run" / "model").size
    assert len(calls) > 2  # with evaluations
    for call in calls:
        assert_drawn(model, call, size)
    steps = steps_in_common(tmp_path / "run", watched)
    assert steps >= 2, "the same devices drew otherwise"
    for row, wanted in list(zip(found, rows(watched), strict=True))[: steps + 1]:
        # Either run also evaluates after what was its last step.
        shared = row.keys() & wanted.keys()
        assert all(name.startswith("eval/") for name in row.keys() ^ wanted.keys())
        for name in shared:
            np.testing.assert_allclose(row[name], wanted[name], rtol=2e-3, atol=2e-4, err_msg=name)
    assert found[-1]["step"] == 4


@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({"objective": "grpo"}, {"policy/clip_frac"}),
        # Needs no groups.
        (
            {"objective": "kd_rkl", "rollout.group_size": 1, "rollout.prompts_per_step": 8},
            {"kl/teacher"},
        ),
        ({"objective": "reward_shaping", "reference_coef": 0.1}, {"kl/teacher", "kl/reference"}),
        (
            {"objective": "trrd", "mini_batches": 2, "trrd.clamp_gradient": "straight_through"},
            {"kl/teacher", "trrd/clamped_frac"},
        ),
        ({"kd_estimator": "full", "tis_cap": 2.0}, {"kl/teacher", "tis/weight_mean"}),
        (
            {"kd_estimator": "topk", "kd_topk.k": 5, "kd_topk.support": "student"},
            {"kl/teacher"},
        ),
        ({"kd_estimator": "topk", "kd_topk.k": 5}, {"kl/teacher"}),
        ({"kd_estimator": "k3", "k3_clamp": 10.0}, {"kl/teacher"}),
    ],
    ids=lambda x: x.get("objective", x.get("kd_estimator")) if isinstance(x, dict) else "",
)
def test_other_objectives(cache, tmp_path, changes, measured):
    row = run(tmp_path / "run", cache, steps=1, **{"eval.every": 0}, **changes)[-1]
    assert measured <= row.keys()
    assert ("kl/teacher" in row) == ("kl/teacher" in measured)
    assert "mismatch/kl" in row
    assert np.isfinite(row["loss"])


def test_a_finished_run_is_teacher_or_student_in_either_format(whole, cache, tmp_path):
    """One side from the run's folder, the other from its export: they must be one policy."""
    exported = tmp_path / "exported"
    convert.main(["--to=hf", str(whole), str(exported)])
    changes = {"eval.every": 0, "teacher.sft.steps": 0, "student.sft.steps": 0}
    for i, (student, teacher) in enumerate([(whole, exported), (exported, whole)]):
        paths = {"student.path": student, "teacher.path": teacher}
        row = run(tmp_path / f"run{i}", cache, steps=1, **changes, **paths)[-1]
        assert abs(row["kl/teacher_k2"]) < 1e-8
        assert row["loss/kd"] < 1e-6


def test_schedules_refill_and_several_updates_resume_exactly(cache, tmp_path):
    """β from the history of KL and reward, a data position that runs ahead of the step."""
    changes = {"beta.schedule": "adaptive", "beta.delta": 0.2, "rollout.refill": 2}
    changes |= {"mini_batches": 2, "epochs": 2, "eval.every": 0, "checkpoint.every": 2}
    whole = run(tmp_path / "whole", cache, steps=4, **changes)
    run(tmp_path / "parts", cache, steps=2, **changes)
    assert run(tmp_path / "parts", cache, steps=4, **changes) == whole
    assert len({row["beta"] for row in whole}) > 1
    assert [row["rollout/batches"] for row in whole] == [3.0] * 4  # no group is ever solved
    meta = json.loads((tmp_path / "whole" / "checkpoints" / "4" / "meta" / "metadata").read_text())
    assert meta["data_position"] == 12


def test_partial_rollouts_go_on_and_resume_exactly(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("kdrl_jax.rollout.engine.CHUNK", 2)  # tokens between two looks
    changes = {"rollout.carry": 3, "eval.every": 0, "student.sft.steps": 0}
    changes |= {"rollout.temperature": 1.3}
    found = run(tmp_path / "whole", cache, steps=4, **changes)
    stale = [row["rollout/stale_frac"] for row in found]
    assert stale[0] == 0
    assert max(stale) > 0
    assert all(0 <= row["rollout/carried_frac"] <= 1 for row in found)
    assert all(np.isfinite(row["loss"]) for row in found)
    assert all(row["policy/ratio_mean"] != 1.0 for row in found if row["rollout/stale_frac"])
    run(tmp_path / "parts", cache, steps=2, **changes)
    assert run(tmp_path / "parts", cache, steps=4, **changes) == found
    assert samples(tmp_path / "parts") == samples(tmp_path / "whole")


def test_distil_then_reinforce(cache, tmp_path):
    """Two phases of one run; the teacher is not asked in the second."""
    changes = {"beta.schedule": "phases", "beta.phases": "((0,0.5),(1,0.0))", "eval.every": 0}
    changes |= {"policy_phases": "((0,0.0),(1,1.0))"}
    first, second = run(tmp_path / "run", cache, steps=2, **changes)
    assert (first["beta"], second["beta"]) == (0.5, 0.0)
    assert first["loss/policy"] == 0
    assert first["loss/kd"] > 0
    assert "kl/teacher" in first
    assert "kl/teacher" not in second
    assert second["loss/kd"] == 0


def test_report_draws_a_picture_and_a_page(whole, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    report.main([str(whole), f"--output={tmp_path / 'page' / 'report.html'}"])
    assert sorted(p.name for p in (tmp_path / "page").iterdir()) == ["curves.png", "report.html"]
    report.main([str(whole), f"--output={tmp_path / 'a' / 'curves.png'}"])
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_start_does_not_bind_the_folder(cache, tmp_path, capsys, monkeypatch):
    """Weights that cannot be read, then another config: no checkpoint, nothing to protect."""

    def build_role(*_):
        raise UserError("student.path: truncated")

    monkeypatch.setattr(train, "build_role", build_role)
    refused(capsys, *command(tmp_path / "run", cache, seed=5))
    assert (tmp_path / "run" / "config.json").exists()
    monkeypatch.undo()
    assert run(tmp_path / "run", cache, steps=1)[-1]["step"] == 1


def test_an_unsupported_model(whole, cache, tmp_path, capsys):
    bad = tmp_path / "bad"
    shutil.copytree(whole / "model", bad)
    (bad / "config.json").write_text('{"model_type": "mamba"}')
    lines = refused(capsys, *command(tmp_path / "run", cache, **{"student.path": bad}))
    assert "mamba" in lines[0]
    assert str(bad) in lines[0]


def test_divergence_is_skipped_and_stops_with_a_whole_checkpoint(cache, tmp_path, capsys):
    """No update of such a rate is finite: none is made, and the third one ends the run."""
    changes = {"optimizer.learning_rate": 1e38, "optimizer.warmup_steps": 0, "eval.every": 0}
    with pytest.raises(SystemExit, match="3"):
        run(tmp_path / "run", cache, **changes)
    found = rows(tmp_path / "run")
    assert [row["update/skipped"] for row in found] == [1.0] * len(found)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    said = capsys.readouterr().out
    assert "health: nonfinite at step 1: " in said
    assert "stopped by health: nonfinite at step 3: " in said
    assert "lower optimizer.learning_rate" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stopped_by"].startswith("nonfinite at step 3")
    assert summary["health"]["nonfinite"]["first_step"] == 1
    kept = restore_params_of(tmp_path / "run")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))
    with pytest.raises(SystemExit, match="3"):  # given again it has as many tries again
        run(tmp_path / "run", cache, **changes, steps=20)
    # The sixth is settled by its checkpoint, the third while the fourth was drawn.
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_teacher_that_fails_once_costs_a_step(cache, tmp_path, monkeypatch):
    original, calls = Learner.score, []

    def score(self, *args):
        scores = original(self, *args)
        calls.append(args)
        if len(calls) != 2:
            return scores
        nothing = jnp.log(scores.teacher_log_probs)  # NaN, for they are negative
        return dataclasses.replace(scores, teacher_log_probs=nothing)

    monkeypatch.setattr(Learner, "score", score)
    found = run(tmp_path / "run", cache, steps=4, **{"eval.every": 0})
    assert [row["update/skipped"] for row in found] == [0, 1, 0, 0]
    assert [row["health/alerts"] for row in found] == [0, 1, 0, 0]
    assert found[1]["health/nonfinite"] == 1
    assert np.isnan(found[1]["loss"])
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text.splitlines()[1])["loss"] is None
    assert all(np.isfinite(row["loss"]) for row in (found[0], *found[2:]))


def test_a_watch_that_is_named_stops_once_and_resumes_exactly(cache, tmp_path, capsys):
    """A student that is never right gives no signal."""
    changes = {"health.window": 2, "eval.every": 0, "steps": 5}
    wanted = run(tmp_path / "whole", cache, **changes)
    assert {"health/no_signal"} <= wanted[-1].keys()
    capsys.readouterr()
    stopping = changes | {"health.stop": "('no_signal',)"}
    with pytest.raises(SystemExit, match="3"):
        run(tmp_path / "run", cache, **stopping)
    said = capsys.readouterr().out
    assert "stopped by health: no_signal at step 2: " in said
    assert "choose other problems" in said
    assert run(tmp_path / "run", cache, **stopping) == wanted


def restore_params_of(workdir):
    model = train.Decoder(load_config(workdir / "model"))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return restore_params(workdir, abstract_params(model, param_shardings(mesh, shapes)))


def test_one_process_at_a_time(whole, cache, capsys):
    with (whole / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        lines = refused(capsys, *command(whole, cache))
    assert "in use by another process" in lines[0]


def test_other_problems_are_noticed(whole, cache, tmp_path, capsys):
    file = tmp_path / "problems.jsonl"
    row = '{{"problem": "{}+1=", "answer": "{}"}}\n'
    file.write_text("".join(row.format(i, i + 1) for i in range(1, 6)))
    changes = {
        "data.task": "",
        "data.path": file,
        "eval.every": 0,
        "teacher.sft.task": "arithmetic",
    }
    changes |= {"student.sft.task": "arithmetic", "student.path": whole, "student.sft.steps": 0}
    changes |= {"checkpoint.every": 1, "data.prompt_style": "plain"}
    run(tmp_path / "run", cache, **changes, steps=1)
    file.write_text("".join(row.format(i, i + 1) for i in range(2, 7)))
    lines = refused(capsys, *command(tmp_path / "run", cache, **changes, steps=2))
    assert f"{file}: not the problems that step 1" in lines[0]


# --- memory levers --------------------------------------------------------------------------


def test_waiting_in_host_memory_changes_no_number(whole, cache, tmp_path):
    changes = {"teacher.offload": True, "optimizer.offload": True, "steps": 3}
    found = run(tmp_path / "run", cache, **changes)
    assert found == rows(whole)[: len(found)]


def test_small_weights_change_little_and_say_how_much(whole, cache, tmp_path):
    plain = rows(whole)[1]
    changes = {"teacher.dtype": "int8", "rollout.dtype": "bfloat16", "steps": 1}
    found = run(tmp_path / "run", cache, **changes)[1]
    assert abs(plain["mismatch/kl"]) < 1e-6
    assert 1e-6 < abs(found["mismatch/kl"]) < 1e-3
    assert found["kl/teacher"] == pytest.approx(plain["kl/teacher"], rel=0.2)
    assert found["kl/teacher"] != plain["kl/teacher"]


# --- conversion -----------------------------------------------------------------------------


def test_export_and_return(whole, tmp_path):
    folder, back = tmp_path / "hf", tmp_path / "run"
    convert.main(["--to=hf", str(whole / "checkpoints"), str(folder)])
    convert.main(["--to=orbax", str(folder), str(back)])
    model, params = load_hf(folder)
    for source in (whole, back):
        found = restore_params(
            source, abstract_params(model, jax.tree.map(lambda x: x.sharding, params))
        )
        jax.tree.map(np.testing.assert_array_equal, found, params)
    ours, theirs = load_tokenizer(whole / "model"), load_tokenizer(folder)
    assert ours.vocab() == theirs.vocab()


def test_exported_model_in_transformers(whole, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "hf"
    convert.main(["--to=hf", str(whole / "checkpoints" / "4"), str(folder)])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, params = load_hf(folder)
    tokens = np.random.default_rng(0).integers(0, 20, (2, 12))
    positions = np.broadcast_to(np.arange(12), tokens.shape)
    hidden = model.apply(params, tokens, positions, np.ones_like(tokens))
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(model.logits(params, hidden)), logits, atol=1e-4)


def test_a_run_can_teach_another(whole, cache, tmp_path):
    """zero_rl's teacher is the folder of a run."""
    changes = {"teacher.path": whole, "teacher.sft.steps": 0, "steps": 1, "eval.every": 0}
    row = run(tmp_path / "run", cache, **changes)[-1]
    assert np.isfinite(row["kl/teacher"])


# --- bad input ------------------------------------------------------------------------------


def refused(capsys, *argv, main=train.main):
    """The lines a refused command prints; it must exit with 2."""
    with pytest.raises(SystemExit) as end:
        run_entry(lambda: main([str(a) for a in argv]))
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return [line for line in printed.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta.init": -1.0}, ["beta.init: -1.0 is not 0 or more"]),
        ({"rollout.group_size": 1}, ["rollout.group_size: 1 gives", "use 2 or more"]),
        ({"student.path": "no/such/folder"}, ["student.path: no folder no/such/folder"]),
        ({"data.max_prompt_tokens": 4}, ["arithmetic: no training problems left", "longer than 4"]),
        ({"rollout.prompts_per_step": 400}, ["rollout.prompts_per_step: 400 exceeds the 64"]),
        ({"micro_batch": 3}, ["micro_batch: 3 does not divide"]),
        ({"micro_batch": 4, "mesh.fsdp": 8}, ["micro_batch: 4 is not a multiple of mesh.data"]),
        (
            {"micro_batch": 0, "mesh.fsdp": 8, "rollout.prompts_per_step": 3},
            ["mesh.data x mesh.fsdp: 8 does not divide the 12 rollouts of an update", "; 6 does"],
        ),
        ({"mesh.fsdp": 3}, ["mesh.fsdp=3"]),
        ({"teacher.sft.batch_size": 0}, ["teacher.sft.batch_size: 0 must be at least 1"]),
        ({"data.prompt_buckets": "('a',)"}, ["data.prompt_buckets: ('a',) must be increasing"]),
        (
            {"betta.init": 1.0, "seed": "x", "micro_batch": -1, "kd_mask": "al"},
            [
                "betta.init: no such key; the nearest is beta.init",
                "seed=x: must be int",
                "micro_batch: -1 must not be negative",
                "kd_mask: 'al' is none of",
            ],
        ),
    ],
    ids=str,
)
def test_impossible_configs(cache, tmp_path, capsys, changes, said):
    workdir = tmp_path / "run"
    lines = refused(capsys, *command(workdir, cache, **changes))
    for text in said:
        assert any(text in line for line in lines), lines
    assert not (workdir / "metrics.jsonl").exists()


def test_a_folder_that_is_a_file(cache, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    lines = refused(capsys, *command(tmp_path / "run", cache))
    assert "is a file" in lines[0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("c.steps = 'five'", "steps: 'five' must be int"),
        ("c.steps = = 5", "invalid syntax"),
        ("return None", "must return a ConfigDict"),
    ],
)
def test_a_broken_config_file(tmp_path, capsys, body, said):
    file = tmp_path / "mine.py"
    head = "from configs.demo import get_config as demo\ndef get_config():\n    c = demo()\n"
    file.write_text(f"{head}    {body}\n    return c\n")
    lines = refused(capsys, f"--config={file}")
    assert said in lines[0]
    assert str(file) in lines[0]


def test_a_checkpoint_of_another_config(whole, cache, capsys):
    before = {p: p.read_bytes() for p in whole.rglob("*.json*") if p.is_file()}
    changes = {"student.shape.hidden_size": 32, "rollout.temperature": 0.7}
    lines = refused(capsys, *command(whole, cache, **changes))
    assert len(lines) == 2
    assert any("student.shape.hidden_size=16, now 32" in line for line in lines)
    assert all("--workdir" in line for line in lines)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"problem": "1+1=", "answer": "2"}\n{"problem": "1+2="}\n', ":2: "),
        ('{"problem": "1+1=", "answer": "2"}\n{oops\n', ":2: "),
        ("", "problems.jsonl"),
    ],
    ids=["no answer", "not JSON", "empty"],
)
def test_bad_rows_are_named_by_line(whole, cache, tmp_path, capsys, text, said):
    file = tmp_path / "problems.jsonl"
    file.write_text(text)
    changes = {"data.task": "", "data.path": file, "eval.every": 0, "student.path": whole}
    changes |= {"student.sft.steps": 0, "teacher.path": whole, "teacher.sft.steps": 0}
    lines = refused(capsys, *command(tmp_path / "run", cache, **changes))
    assert len(lines) == 1
    assert said in lines[0]


def test_a_prompt_longer_than_the_window(whole, cache, tmp_path, capsys):
    changes = {"teacher.path": whole, "teacher.sft.steps": 0, "rollout.max_new_tokens": 300}
    lines = refused(capsys, *command(tmp_path / "run", cache, **changes))
    assert "data.max_prompt_tokens + rollout.max_new_tokens: 316 exceeds the teacher's" in lines[0]


def test_another_tokenizer(whole, cache, tmp_path, capsys):
    """A teacher whose ids mean other tokens: the first that differs is named."""
    from kdrl_jax.data import SentencePieceTokenizer

    other = tmp_path / "teacher"
    shutil.copytree(whole, other)
    SentencePieceTokenizer.train("0123456789+*=, ").save(other / "model")
    changes = {"teacher.path": other, "teacher.sft.steps": 0}
    lines = refused(capsys, *command(tmp_path / "run", cache, **changes))
    assert len(lines) == 1
    assert "id " in lines[0]
