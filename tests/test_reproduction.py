"""The reproduction: grids, the runner, statistics, claims and the report."""

from __future__ import annotations

import dataclasses
import html.parser
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from kdrl_jax import reproduce
from kdrl_jax.config import load_config, to_json
from kdrl_jax.reproduction import figures, prepare, results, runner
from kdrl_jax.reproduction.claims import (
    CLAIMS,
    PUBLISHED,
    Difference,
    combine,
    judge,
    judge_claims,
)
from kdrl_jax.reproduction.grid import Cell, Grid, load_grid
from kdrl_jax.reproduction.methods import METHODS
from kdrl_jax.reproduction.report import write_report
from kdrl_jax.reproduction.results import CellResult
from kdrl_jax.reproduction.runner import Job
from kdrl_jax.reproduction.statistics import Interval, at_time, bootstrap, paired
from kdrl_jax.reproduction.study import Study
from kdrl_jax.reproduction.tables import change, number
from kdrl_jax.training.display import Display
from kdrl_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent
DIVERGED = "stopped by health: nonfinite at step 3: loss or gradient is not finite"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory with the configs and an empty `runs/smollm2`."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs" / "smollm2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "smollm2_gpu"])
def test_every_cell_of_a_grid_can_run(elsewhere, name):
    grid = load_grid(f"configs/reproduce/{name}.py")  # checks each cell's config
    assert len(grid.seeds) >= 5
    assert len(grid.tasks) == 2
    expected = len(grid.seeds) * (len(grid.methods) * 2 + len(grid.ablations))
    assert len({cell.name for cell in grid.cells}) == len(grid.cells) == expected
    needed = {m for c in CLAIMS for d in c.differences for m in (d.left, d.right)}
    assert needed <= {*grid.methods, *grid.ablations}
    assert {m for column in PUBLISHED.values() for m in column} <= {*grid.methods, "start"}
    first = [cell for cell in grid.cells if cell.seed == grid.seeds[0]]
    assert tuple(first) == grid.cells[: len(first)]  # seed by seed


def test_cells_differ_by_their_method_alone(elsewhere):
    grid = load_grid("configs/reproduce/cpu.py")
    configs = {cell.name: cell.load() for cell in grid.cells if cell.task == "arithmetic"}
    shared = ("steps", "student", "rollout", "optimizer", "eval", "data", "micro_batch")
    for name, config in configs.items():
        seed = name.rpartition("/")[2]
        assert config.seed == int(seed)
        for key in shared:
            if key == "optimizer" and "/sft/" in name:  # a fifth, as 2e-7 is of 1e-6 in the paper
                rate = configs[f"arithmetic/kdrl/{seed}"].optimizer.learning_rate
                assert config.optimizer.learning_rate == pytest.approx(rate / 5)
                continue
            assert config[key] == configs[f"arithmetic/kdrl/{seed}"][key], (name, key)
    starts = {configs[f"arithmetic/kdrl/{seed}"].student.sft.seed for seed in grid.seeds}
    assert len(starts) == len(grid.seeds)
    teachers = {name: config.teacher.sft.steps for name, config in configs.items()}
    weak = {name for name, steps in teachers.items() if steps < max(teachers.values())}
    assert {name.split("/")[1] for name in weak} == {"weak_kdrl", "weak_kd_rkl"}


def test_the_arms_are_the_papers(elsewhere):
    """Appendices A.3 and B.2, and the framework's bound on k3."""
    cells = {cell.name: cell.load() for cell in load_grid("configs/reproduce/cpu.py").cells}
    sft, k3, topk = (
        cells[f"arithmetic/{name}/0"] for name in ("sft", "estimator_k3", "estimator_topk")
    )
    assert (sft.rollout.group_size, sft.sft_problems) == (8, 140 * 16)
    assert (sft.aggregation, sft.reward.require_format) == ("seq-mean-token-mean", False)
    assert sft.rollout.prompts_per_step * sft.rollout.group_size == 128
    assert (k3.kd_estimator, k3.k3_clamp) == ("k3", 10.0)
    assert (topk.kd_estimator, topk.kd_topk.support) == ("topk", "floor")


def test_annealing_has_the_papers_proportions():
    """The constant 2e-3 of 280 steps becomes 5e-3 → 1e-3 by 5e-5 a step (section 4)."""
    base = ConfigDict({"steps": 280, "beta": {"init": 2e-3}})
    changes = METHODS["kdrl_annealing"].changes(base)
    assert changes["beta.init"] == pytest.approx(5e-3)
    assert changes["beta.min"] == pytest.approx(1e-3)
    assert changes["beta.delta"] == pytest.approx(5e-5)
    halves = METHODS["distil_then_rl"].changes(base)
    assert halves["beta.phases"] == ((0, 2e-3), (140, 0.0))
    assert halves["policy_phases"] == ((0, 0.0), (140, 1.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("g.methods = ('kdlr',)", "methods: no method 'kdlr'; the nearest is 'kdrl'"),
        ("g.ablation_task = 'chess'", "ablation_task: 'chess' is none of arithmetic"),
        ("g.seeds = (0, 0)", "names something twice"),
        ("g.seeds = ()", "seeds: empty"),
        ("g.budget_minutes = 0", "budget_minutes: 0 must be at least 1"),
        ("g.worker = 3", "worker: no such key; the nearest is workers"),
        ("g.tasks.arithmetic = 'configs/none.py'", "no file configs/none.py"),
        ("g.tasks.arithmetic = 'configs/demo.py'", "no variant 'weak_teacher'"),
        ("g.tasks.arithmetic = 'configs/reproduce/bad.py'", "arithmetic/kdrl: micro_batch: 100"),
    ],
)
def test_bad_grids(tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "reproduce").mkdir(parents=True)
    for name in ("demo.py", "reproduce/arithmetic.py"):
        (tmp_path / "configs" / name).symlink_to(ROOT / "configs" / name)
    bad = "from configs.reproduce.arithmetic import VARIANTS, get_config as base\n"
    bad += "def get_config():\n    c = base()\n    c.micro_batch = 100\n    return c\n"
    (tmp_path / "configs" / "reproduce" / "bad.py").write_text(bad)
    text = "from configs.reproduce.cpu import get_config as cpu\n"
    text += "def get_config():\n    g = cpu()\n"
    text += "    del g.tasks['knights_knaves']\n    g.seeds = (0,)\n"
    path = tmp_path / "grid.py"
    path.write_text(f"{text}    {change}\n    return g\n")
    with pytest.raises(UserError) as caught:
        load_grid(path)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


# --- the runner ----------------------------------------------------------------------------------

FAKE = """
import json, os, signal, sys, time
from pathlib import Path
folder, kind = Path(sys.argv[1]), sys.argv[2]
with (folder.parent / "calls.txt").open("a") as calls:
    calls.write(folder.name + "\\n")
print("cores", sorted(os.sched_getaffinity(0)))
if kind == "slow":
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(0)))
    (folder / "begun").touch()
    time.sleep(3600)
if kind == "fail":
    sys.exit("error: first line\\nerror: out of luck")
if kind == "diverge":
    sys.exit(sys.argv[3])
(folder / "summary.json").write_text(json.dumps({"finished": kind == "end", "seconds": 1.0}))
"""


def small_grid(**changes) -> Grid:
    found = {
        "path": Path("grid.py"),
        "title": "A grid",
        "tasks": {"arithmetic": "configs/reproduce/arithmetic.py"},
        "seeds": (0, 1, 2),
        "methods": ("grpo", "kdrl"),
        "ablations": (),
        "ablation_task": "arithmetic",
        "workers": 2,
        "pin": True,
        "platform": "cpu",
        "budget_minutes": 1,
        "cells": (),
    }
    return Grid(**{**found, **changes})


def cell_of(seed: int, method: str = "grpo", **overrides) -> Cell:
    changes = {"seed": seed, "objective": method, **overrides}
    path = str(ROOT / "configs" / "reproduce" / "arithmetic.py")
    return Cell("arithmetic", method, seed, path, tuple(f"{k}={v}" for k, v in changes.items()))


def fake(kinds):
    """A job for each cell that does what `kinds` says for its seed, and writes its config."""

    def job_of(cell, output):
        folder = cell.folder(output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(to_json(cell.load()))
        command = (sys.executable, "-c", FAKE, str(folder), kinds[cell.seed], DIVERGED)
        return Job(cell.name, command, folder / "log.txt")

    return job_of


def go(cells, output, kinds, **changes):
    missing = runner.missing_cells(cells, output)
    settings = {"preparation": (), "done": len(cells) - len(missing), "workers": 2}
    settings |= {"display": Display(quiet=True), "job_of": fake(kinds), **changes}
    runner.run_cells(small_grid(), missing, output, **settings)
    return [cell.seed for cell in missing]


def test_cells_are_run_once_and_failures_recorded(tmp_path):
    cells = [cell_of(seed) for seed in range(4)]
    kinds = {0: "end", 1: "fail", 2: "diverge", 3: "stop"}
    assert go(cells, tmp_path, kinds) == [0, 1, 2, 3]
    failed = json.loads((cells[1].folder(tmp_path) / runner.FAILURE).read_text())
    assert failed["code"] == 1
    assert failed["message"] == "error: out of luck"
    assert failed["tail"][-2:] == ["error: first line", "error: out of luck"]
    assert not failed["diverged"]
    diverged = json.loads((cells[2].folder(tmp_path) / runner.FAILURE).read_text())
    assert diverged["diverged"]
    assert diverged["message"] == DIVERGED
    # Finished and diverged are results; a failure and a run that was stopped are not.
    assert go(cells, tmp_path, {**kinds, 1: "end", 3: "end"}) == [1, 3]
    assert not (cells[1].folder(tmp_path) / runner.FAILURE).exists()
    assert go(cells, tmp_path, kinds) == []
    calls = (cells[0].folder(tmp_path).parent / "calls.txt").read_text().split()
    assert sorted(calls) == ["0", "1", "1", "2", "3", "3"]


def test_divergence_is_told_by_what_training_says():
    source = (ROOT / "kdrl_jax" / "training" / "run.py").read_text()
    assert 'f"stopped by health: {self._health.stop}"' in source
    assert runner.DIVERGED.search(DIVERGED)


def test_another_config_in_the_folder_is_refused(tmp_path):
    go([cell_of(0)], tmp_path, {0: "end"})
    changed = cell_of(0, **{"optimizer.learning_rate": 1e-4})
    with pytest.raises(UserError, match=r"learning_rate=.*now 0.0001.*another --output"):
        runner.missing_cells([changed], tmp_path)
    longer = cell_of(0, steps=1000)  # may go on where it ended
    assert runner.missing_cells([longer], tmp_path) == [longer]


def test_a_failed_preparation_ends_the_grid(tmp_path):
    job = Job("arithmetic/teacher", (sys.executable, "-c", "exit('error: no')"), tmp_path / "x.txt")
    with pytest.raises(UserError, match="arithmetic/teacher: exit 1; error: no"):
        go([cell_of(0)], tmp_path, {0: "end"}, preparation=[job])
    assert not (cell_of(0).folder(tmp_path) / "log.txt").exists()


def test_ctrl_c_lets_runs_save_and_starts_no_more(tmp_path):
    cells = [cell_of(seed) for seed in range(3)]
    folders = [cell.folder(tmp_path) for cell in cells]

    def interrupt():
        while not all((folder / "begun").exists() for folder in folders[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        go(cells, tmp_path, dict.fromkeys(range(3), "slow"))
    assert all((folder / "saved").exists() for folder in folders[:2])
    assert not (folders[2] / "begun").exists()
    assert runner.missing_cells(cells, tmp_path) == cells


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not pin")
def test_each_worker_has_its_own_cores(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    shares = runner.core_shares(2)
    assert set().union(*shares) == set(cores)
    if len(cores) > 1:
        assert not shares[0] & shares[1]
    assert all(runner.core_shares(3 * len(cores)))
    go([cell_of(0)], tmp_path, {0: "end"})
    log = (cell_of(0).folder(tmp_path) / "log.txt").read_text()
    assert f"cores {sorted(shares[0])}" in log


def test_what_is_prepared(elsewhere):
    grid = load_grid("configs/reproduce/cpu.py")
    cells = [cell for cell in grid.cells if cell.seed < 2]
    students = {"student 0", "student 1"}
    assert set(prepare.needs(cells, "arithmetic")) == {"teacher", "weak_teacher"} | students
    assert set(prepare.needs(cells, "knights_knaves")) == {"teacher"} | students
    alone = [cell for cell in cells if cell.method == "grpo" and cell.seed == 1]
    assert set(prepare.needs(alone, "arithmetic")) == {"student 1"}
    jobs = prepare.prepare_jobs(grid, alone, Path("out"), "grpo/1")
    assert [job.name for job in jobs] == ["arithmetic", "knights_knaves"]
    assert "--only=grpo/1" in jobs[0].command


# --- statistics ----------------------------------------------------------------------------------


def test_interval_against_enumeration_with_scipys_quantiles():
    from scipy import stats

    values = [0.1, 0.5, 0.4, 0.9, 0.25]
    means = [sum(pick) / 5 for pick in itertools.product(values, repeat=5)]
    level = stats.norm.cdf(-math.sqrt(5 / 4) * stats.t.ppf(0.975, 4))
    found = bootstrap(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(np.quantile(means, level))
    assert found.high == pytest.approx(np.quantile(means, 1 - level))
    assert found.n == 5


def test_interval_covers():
    """Of 300 samples of five normal values about 95 % of the intervals hold the true mean."""
    draws = np.random.default_rng(1).normal(size=(300, 5))
    held = [found.low <= 0 <= found.high for found in map(bootstrap, draws.tolist())]
    assert 0.92 <= np.mean(held) <= 1.0


def test_interval_of_few_and_of_many():
    assert bootstrap([]).n == 0
    assert math.isnan(bootstrap([]).mean)
    one = bootstrap([0.5, math.nan])
    assert (one.mean, one.n) == (0.5, 1)
    assert math.isnan(one.low)
    values = np.random.default_rng(2).normal(size=40)
    many = bootstrap(values.tolist())
    half = 2.02 * values.std(ddof=1) / math.sqrt(40)  # t_{0.975, 39}
    assert many.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert many.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert many == bootstrap(values.tolist())


def test_pairs_remove_what_seeds_share():
    left = {seed: 10.0 * seed + 1.0 for seed in range(5)}
    right = {seed: 10.0 * seed for seed in range(1, 7)}
    found = paired(left, right)
    assert (found.mean, found.low, found.high, found.n) == (1.0, 1.0, 1.0, 4)


def test_between_evaluations():
    times, values = (0.0, 2.0, 4.0), (0.1, 0.5, 0.6)
    assert at_time(times, values, 1.0) == pytest.approx(0.3)
    assert at_time(times, values, 4.0) == pytest.approx(0.6)
    assert math.isnan(at_time(times, values, 4.5))
    assert at_time(times, (0.1, math.nan, 0.6), 2.0) == pytest.approx(0.35)


# --- results -------------------------------------------------------------------------------------


def write_run(folder, seconds, accuracies, every, finished=True, **series):
    """A run's folder with a step for each of `seconds` and an evaluation every so many."""
    folder.mkdir(parents=True)
    evaluation = iter(accuracies)
    rows = [{"step": 0, "eval/accuracy": next(evaluation), "time/eval_s": 9.0}]
    for i, time_s in enumerate(seconds):
        row = {"step": i + 1, "time/rollout_s": 0.25 * time_s, "time/score_s": 0.25 * time_s}
        row |= {"time/update_s": 0.5 * time_s, "time/checkpoint_s": 5.0}
        row |= {name: values[i] for name, values in series.items()}
        if (i + 1) % every == 0:
            row |= {"eval/accuracy": next(evaluation), "time/eval_s": 9.0}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"finished": finished, "seconds": 33.0}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_cells_curve_by_step_and_by_time(tmp_path):
    cells = [cell_of(0), cell_of(1), cell_of(2)]
    kl = {"kl/teacher": [4.0, 2.0, 1.0, 0.0]}
    write_run(cells[0].folder(tmp_path), [8.0, 1.0, 1.0, 2.0], [0.1, 0.2, 0.4], 2, **kl)
    write_run(cells[1].folder(tmp_path), [9.0, 1.0, 3.0, 2.0], [0.2, 0.3, 0.5], 2)
    write_run(cells[2].folder(tmp_path), [7.0, 1.0], [0.3, 0.4], 2, finished=False)
    first, second, third = results.read_results(cells, tmp_path)
    # Steps of 8, 9 and 7 s compiled: they count as the runs' medians 1.5, 2.5 and 4 (the last
    # has two steps of 7 and 1 s: no outlier). Medians over seeds: 2.5, 1, 2, 2.
    assert first.times == pytest.approx((0.0, 3.5, 7.5))
    assert second.times == first.times
    assert third.times == pytest.approx((0.0, 3.5))
    assert first.steps == (0, 2, 4)
    assert first.series["eval/accuracy"] == (0.1, 0.2, 0.4)
    assert first.series["kl/teacher"][1:] == (3.0, 0.5)
    assert math.isnan(first.series["kl/teacher"][0])
    assert "kl/teacher" not in second.series
    assert [r.status for r in (first, second, third)] == ["finished", "finished", "unfinished"]
    back = results.from_json(json.loads(json.dumps(results.to_json([first, third]))))
    assert repr(back) == repr([first, third])  # NaN is not equal to itself


def curve(method, seed, accuracy, pace=1.0, status="finished", task="arithmetic", **series):
    """A result with evaluations at steps 0, 10, … and `pace` seconds a step."""
    steps = tuple(range(0, 10 * len(accuracy), 10))
    times = tuple(pace * step for step in steps)
    found = {"eval/accuracy": tuple(accuracy), **{k: tuple(v) for k, v in series.items()}}
    return CellResult(task, method, seed, status, "", 1.0, steps, times, found)


def test_comparisons_at_equal_steps_and_at_equal_time():
    pairs = [(0.2, 0.4), (0.1, 0.5)]  # GRPO's and KDRL's last accuracy; KDRL takes twice as long
    cells = [curve("grpo", s, (0.0, 0.05, g)) for s, (g, _) in enumerate(pairs)]
    cells += [curve("kdrl", s, (0.0, 0.1, k), pace=2.0) for s, (_, k) in enumerate(pairs)]
    study = Study(cells)
    assert study.difference("arithmetic", "accuracy", "kdrl", "grpo").mean == pytest.approx(0.3)
    assert study.common_time("arithmetic", ["kdrl", "grpo"]) == 20.0
    at_equal_time = study.difference("arithmetic", "accuracy_at_time", "kdrl", "grpo")
    assert at_equal_time.mean == pytest.approx(((0.1 - 0.2) + (0.1 - 0.1)) / 2)
    assert study.start("arithmetic") == {0: 0.0, 1: 0.0}


def test_a_diverged_run_counts_with_its_last_evaluation():
    cells = [
        curve("kdrl", 0, (0.2, 0.4, 0.6)),
        curve("kdrl", 1, (0.2, 0.3), status="diverged"),
        curve("kdrl", 2, (0.9, 0.9), status="failed"),
        curve("kdrl", 3, (), status="diverged"),
    ]
    study = Study(cells)
    assert study.values("arithmetic", "kdrl", "accuracy") == {0: 0.6, 1: 0.3}
    assert study.common_time("arithmetic", ["kdrl"]) == 20.0
    assert study.at("arithmetic", "kdrl", 20.0) == pytest.approx({0: 0.6, 1: 0.3})
    x, mean, _, _ = study.curve("arithmetic", "kdrl", "eval/accuracy", "step")
    np.testing.assert_allclose(x, (0, 10, 20))
    np.testing.assert_allclose(mean, (0.2, 0.35, 0.45))


def test_accuracy_over_length():
    """x is the mean length at the same evaluation; what has no length has no point."""
    cells = [curve("kdrl", seed, (0.2, 0.4, 0.6)) for seed in (0, 1)]
    for cell, lengths in zip(cells, ((30, 40, 60), (50, 60, 80)), strict=True):
        cell.series["eval/length"] = lengths
    x, mean, _, _ = Study(cells).curve("arithmetic", "kdrl", "eval/accuracy", "length")
    np.testing.assert_allclose(x, (40, 50, 70))
    np.testing.assert_allclose(mean, (0.2, 0.4, 0.6))
    without = Study([curve("grpo", 0, (0.2, 0.4))])
    assert not len(without.curve("arithmetic", "grpo", "eval/accuracy", "length")[0])


def test_lost_accuracy():
    study = Study([curve("kdrl", 0, (0.2, 0.7, 0.4)), curve("grpo", 0, (0.2, 0.1, 0.3))])
    assert study.values("arithmetic", "kdrl", "drop") == pytest.approx({0: 0.3})
    assert study.values("arithmetic", "grpo", "drop") == pytest.approx({0: 0.0})


# --- claims --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "less", "margin", "verdict"),
    [
        (0.01, 0.05, False, 0.0, "held"),
        (-0.01, 0.05, False, 0.0, "undecided"),
        (-0.05, -0.01, False, 0.0, "did not hold"),
        (0.0, 0.05, False, 0.0, "undecided"),
        (-0.05, -0.01, True, 0.0, "held"),
        (0.01, 0.05, True, 0.0, "did not hold"),
        (-0.01, 0.05, True, 0.0, "undecided"),
        (-0.01, 0.05, False, 0.02, "held"),
        (-0.05, -0.03, False, 0.02, "did not hold"),
        (-0.05, -0.01, False, 0.02, "undecided"),
        (math.nan, math.nan, False, 0.0, "undecided"),
    ],
)
def test_the_rule(low, high, less, margin, verdict):
    difference = Difference("accuracy", "kdrl", "grpo", less, margin)
    assert judge(Interval((low + high) / 2, low, high, 5), difference) == verdict


def test_a_claim_of_several_differences():
    assert combine(["held", "held"]) == "held"
    assert combine(["held", "undecided"]) == "undecided"
    assert combine(["undecided", "did not hold", "held"]) == "did not hold"


def test_claims_are_judged_where_their_methods_ran():
    last = {"kdrl": 0.8, "grpo": 0.5, "sft": 0.7, "kd_rkl": 0.6, "trrd": 0.81}
    cells = [
        curve(m, seed, (0.1, a + (0.02 * (-1) ** seed if m == "trrd" else 0.0)), task=task)
        for task, names in {"arithmetic": last, "logic": ("kdrl", "grpo")}.items()
        for m, a in last.items()
        if m in names
        for seed in range(5)
    ]
    found = {
        (j.claim.id, j.task): j.verdict for j in judge_claims(Study(cells), ["arithmetic", "logic"])
    }
    assert found["joint-over-grpo", "arithmetic"] == found["joint-over-grpo", "logic"] == "held"
    assert found["distillation-over-sft", "arithmetic"] == "did not hold"
    assert found["rlad-over-kdrl", "arithmetic"] == "undecided"
    assert ("rlad-over-kdrl", "logic") not in found
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)


# --- the report ----------------------------------------------------------------------------------


def test_names_are_spread_without_overlap():
    values = sorted(np.random.default_rng(3).uniform(size=9).tolist())
    places = figures.spread(values, 0.05, 0.0, 1.0)
    assert min(np.diff(places)) >= 0.05 - 1e-6
    assert places[0] >= -1e-9
    assert places[-1] <= 1 + 1e-9
    assert figures.spread([0.1, 0.9], 0.05, 0.0, 1.0) == [0.1, 0.9]


def test_numbers():
    assert number(-1.25) == "−1.2"
    assert number(-0.01) == "0.0"
    assert number(0.04, signed=True) == "0.0"
    assert number(math.nan) == "·"
    assert change(Interval(0.05, 0.01, 0.09, 5)).kind == "better"
    assert change(Interval(0.05, 0.01, 0.09, 5), less=True).kind == "worse"
    assert change(Interval(0.05, -0.01, 0.09, 5)).kind == ""


class Page(html.parser.HTMLParser):
    """Checks that tags close in order; collects ids and what the page refers to."""

    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag, attrs):
        self._note(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def _note(self, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        names = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.links += [found[name] for name in names if name in found]


def test_report_of_a_whole_grid(elsewhere, tmp_path):
    grid = load_grid("configs/reproduce/cpu.py")
    rng = np.random.default_rng(0)
    cells = []
    for cell in grid.cells:
        accuracy = np.sort(rng.uniform(0.2, 0.9, 4))
        series = {"eval/length": rng.uniform(20, 30, 4), "eval/truncated_frac": rng.uniform(size=4)}
        series |= {"entropy/mean": [math.nan, 0.3, 0.2, 0.1], "beta": [math.nan, 0.1, 0.1, 0.1]}
        found = curve(cell.method, cell.seed, accuracy, task=cell.task, **series)
        cells.append(found)
    cells[3] = dataclasses.replace(cells[3], status="diverged", message="<b>nan</b> & more")
    setup = {"facts": {"Machine": "a <machine>"}, "teachers": {"arithmetic": {"teacher": 0.98}}}
    written = write_report(grid, cells, setup, tmp_path / "report")
    assert {path.name for path in written} == {
        *("report.html", "results.json", "curves.png", "ablations.png"),
        *(f"dynamics_{task}.png" for task in grid.tasks),
    }
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    tables = ["main", "ablations", "failures", "seeds"]
    tables += [f"{kind}_{t}" for kind in ("differences", "time", "dynamics") for t in grid.tasks]
    assert {f"table-{name}" for name in tables} <= set(page.ids)
    assert {f"claim-{claim.id}" for claim in CLAIMS} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    assert "prefers-color-scheme: dark" in text
    assert "&lt;b&gt;nan&lt;/b&gt; &amp; more" in text  # nothing that a run says becomes markup
    assert all(METHODS[name].label in text for name in grid.methods)
    assert text.count('class="judged') == sum(len(c["claim"]) > 0 for c in _verdicts(tmp_path))
    size = (tmp_path / "report" / "results.json").stat().st_size
    assert size < 1_000_000
    document = json.loads((tmp_path / "report" / "results.json").read_text())
    assert len(results.from_json(document["cells"])) == len(grid.cells)


def _verdicts(folder):
    return json.loads((folder / "report" / "results.json").read_text())["verdicts"]


def test_report_of_a_grid_that_has_only_begun(elsewhere, tmp_path):
    grid = load_grid("configs/reproduce/cpu.py")
    cells = [curve("grpo", 0, (0.1, 0.2)), curve("kdrl", 0, (), status="failed")]
    write_report(grid, cells, {"facts": {}, "teachers": {}}, tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    Page(text)
    assert f"{len(grid.cells) - 2} cells have not been started" in text


# --- from the command line -----------------------------------------------------------------------

TINY = """
from configs.reproduce.arithmetic import get_config as arithmetic

SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "head_dim": 16, "mlp_size": 16}


def get_config():
    c = arithmetic()
    c.steps = 3
    c.cache_dir = "runs/cache"
    c.data.size = 64
    for role in (c.student, c.teacher):
        role.shape.update(SHAPE)
        role.sft.update(steps=0, problems=32, batch_size=8)
    c.teacher.sft.steps = 2
    c.rollout.update(prompts_per_step=4, group_size=2)
    c.micro_batch = 8
    c.eval.update(every=2, problems=8, batch=8)
    return c
"""
TWO_CELLS = """
from configs.reproduce.cpu import get_config as cpu


def get_config():
    g = cpu()
    g.tasks = type(g.tasks)({"tiny": "tiny.py"})
    g.seeds = (0,)
    g.methods, g.ablations, g.ablation_task = ("kd_rkl", "kdrl"), (), ""
    return g
"""


def test_two_cells_from_the_command_line(elsewhere, capsys, monkeypatch):
    (elsewhere / "tiny.py").write_text(TINY)
    (elsewhere / "grid.py").write_text(TWO_CELLS)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # The second cell finds what the first has compiled, however fast that was.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    reproduce.main(["--grid=grid.py", "--output=out", "--workers=1"])
    said = capsys.readouterr().out
    assert "preparation 1/1  tiny" in said
    for method in ("kd_rkl", "kdrl"):
        rows = (elsewhere / "out" / "cells" / "tiny" / method / "0" / "metrics.jsonl").read_text()
        assert [json.loads(row)["step"] for row in rows.splitlines()] == [0, 1, 2, 3]
        log = (elsewhere / "out" / "cells" / "tiny" / method / "0" / "log.txt").read_text()
        assert "supervised training" not in log  # it was made before
        assert "1 x cpu" in log
    document = json.loads((elsewhere / "out" / "results.json").read_text())
    assert [cell["status"] for cell in document["cells"]] == ["finished", "finished"]
    assert 0 <= document["teachers"]["tiny"]["teacher"] <= 1
    assert document["facts"]["Command"].endswith("--grid=grid.py --output=out --workers=1")
    begun = (elsewhere / "out" / "record.json").read_text()
    reproduce.main(["--grid=grid.py", "--output=out"])  # nothing is left to do
    assert (elsewhere / "out" / "record.json").read_text() == begun


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--only=chess"],
            "--only: 'chess' is found in no cell; they are named like tiny/kd_rkl/0",
        ),
        (["--only=("], "is no regular expression"),
        (["--workers=0"], "--workers: 0 must be at least 1"),
        (["--report_only"], "holds no results"),
    ],
)
def test_bad_flags(elsewhere, flags, said):
    (elsewhere / "tiny.py").write_text(TINY)
    (elsewhere / "grid.py").write_text(TWO_CELLS)
    with pytest.raises(UserError) as caught:
        reproduce.main(["--grid=grid.py", "--output=out", *flags])
    assert said in caught.value.problems[0]


def test_base_configs_are_of_this_project():
    for path in sorted((ROOT / "configs" / "reproduce").glob("*.py")):
        if "smollm2" not in path.name and path.stem not in ("__init__", "cpu"):
            assert load_config(path).steps >= 50
