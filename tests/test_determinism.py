"""The same seed gives the same run in other processes: every number, sample and weight."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from commands import xla_flags
from test_train import TINY, command, rows, samples

from kdrl_jax import convert
from kdrl_jax.config import ROOT

GRPO = {"objective": "grpo", "student.sft.steps": 1, "teacher.sft.steps": 0}
# The entropy has a gradient where all rewards are 0.
RUN = TINY | GRPO | {"steps": 2, "eval.every": 2, "entropy_coef": 0.01}


def test_a_seed_names_a_run_whatever_the_hash_seed_and_the_cores(tmp_path):
    found = {}
    cores = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    one_core = cores if shutil.which("taskset") else []
    for name, seed, prefix in (("1", 0, []), ("2", 0, one_core), ("3", 1, [])):
        # The first two share nothing; the third may have the first one's programs.
        argv = command(tmp_path / name, tmp_path / f"cache{prefix}", **RUN, seed=seed)
        variables = {"PYTHONHASHSEED": name, "XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "kdrl_jax.train", *argv],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        convert.main(["--to=hf", str(tmp_path / name), str(tmp_path / f"hf{name}")])
        sums = (tmp_path / f"hf{name}" / "SHA256SUMS").read_text()
        found[name] = (rows(tmp_path / name), samples(tmp_path / name), sums)
    assert found["1"] == found["2"]
    for same, other in zip(found["1"], found["3"], strict=True):
        assert same != other
