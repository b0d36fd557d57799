"""A micro-batch that is left open: the most rows that fit, decided once and kept."""

import json

import jax
import pytest
from test_memory import config_of, one_device, shape
from test_train import command, rows

from kdrl_jax import plan, train
from kdrl_jax.sharding import make_mesh
from kdrl_jax.training.memory import GIB
from kdrl_jax.training.memory_check import LEARNING, MemoryCheck
from kdrl_jax.training.meshes import Meshes
from kdrl_jax.training.micro_batch import UNKNOWN_LIMIT, settle_micro_batch
from kdrl_jax.training.validation import validate

LONG = {"rollout.prompts_per_step": 32, "rollout.group_size": 12, "rollout.max_new_tokens": 4096}
BOTH = {"student": shape(), "teacher": shape()}


def settle(limit, mesh=None, **changes):
    mesh = mesh or one_device()
    config = config_of(micro_batch=0, **LONG | changes)
    meshes = Meshes(mesh, mesh, mesh)
    return settle_micro_batch(config, validate(config), BOTH, meshes, limit=limit)


def fits(rows_at_once, limit, mesh=None, **changes):
    """Whether the plan for a config with so many rows stays below `limit`."""
    mesh = mesh or one_device()
    config = config_of(micro_batch=rows_at_once, **LONG | changes)
    check = MemoryCheck(config, validate(config), BOTH, Meshes(mesh, mesh, mesh), limit=limit)
    return all(check.plan.need(phase) <= limit for phase in LEARNING)


@pytest.mark.parametrize("limit", [4, 8, 16, 64, 1024])
def test_the_most_that_fit(limit):
    sizes, line = settle(limit * GIB)
    divisors = [n for n in range(1, 385) if 384 % n == 0]
    assert sizes.micro_batch == max(n for n in divisors if 4 * n <= 384 and fits(n, limit * GIB))
    assert sizes.micro_batches * sizes.micro_batch == 384
    assert (
        line == f"micro_batch: {sizes.micro_batch} of an update's 384 rows at once, the most "
        "that fits, in 4 passes or more"
    )


def test_limits_matter():
    assert settle(4 * GIB)[0].micro_batch < settle(16 * GIB)[0].micro_batch
    assert settle(1024 * GIB)[0].micro_batch == 96  # short responses share rows


def test_what_the_meshes_can_split():
    """8 ways, and of 3 x 12 rows none but 36's divisors; the teacher's mesh counts as well."""
    mesh = make_mesh(2, 4, 1)
    sizes, _ = settle(1024 * GIB, mesh, mini_batches=2)
    assert (sizes.micro_batch, sizes.micro_batches) == (48, 4)
    sizes, _ = settle(8 * GIB, mesh)
    assert sizes.micro_batch % 8 == 0
    assert fits(sizes.micro_batch, 8 * GIB, mesh)
    config = config_of(micro_batch=0, **LONG)
    here = Meshes(one_device(), mesh, one_device())
    job = (config, validate(config), BOTH, here)
    assert settle_micro_batch(*job, limit=GIB)[0].micro_batch == 8


def test_the_least_where_nothing_fits():
    """The memory plan then says what would."""
    assert settle(1.0)[0].micro_batch == 1


def test_nobody_knows_the_limit(monkeypatch):
    monkeypatch.setattr("kdrl_jax.training.memory_check.device_limit", lambda gib: None)
    assert settle(None)[0].micro_batch == UNKNOWN_LIMIT


def test_given_rows_stay():
    config = config_of()
    sizes = validate(config)
    mesh = one_device()
    same, line = settle_micro_batch(config, sizes, BOTH, Meshes(mesh, mesh, mesh))
    assert same is sizes
    assert line == ""
    assert (sizes.micro_batch, sizes.micro_batches) == (16, 2)


def starts(workdir):
    return json.loads((workdir / "provenance.json").read_text())


def test_a_run_decides_and_keeps_it(tmp_path, capsys):
    """The rows of `micro_batch=0` are said, recorded, kept on resuming; the metrics are those of
    the same number given."""
    cache, run = tmp_path / "cache", tmp_path / "run"
    least = {"steps": 2, "eval.every": 0, "health.teacher_every": 0}
    train.main(command(tmp_path / "given", cache, micro_batch=8, **least))
    capsys.readouterr()
    train.main(command(run, cache, micro_batch=0, **least))
    # 8 devices share the rows: fewer than 8 cannot be.
    line = "micro_batch: 8 of an update's 16 rows at once, the most that fits, in 4 passes or more"
    assert line in capsys.readouterr().out
    assert rows(run) == rows(tmp_path / "given")
    facts = {"devices": f"8 x {jax.devices()[0].device_kind}", "micro_batch": 8}
    assert starts(run)[-1].items() >= facts.items()
    assert json.loads((run / "config.json").read_text())["micro_batch"] == 0

    file = run / "provenance.json"  # as if the plan had been another
    file.write_text(file.read_text().replace('"micro_batch": 8', '"micro_batch": 16'))
    train.main(command(run, cache, micro_batch=0, **least | {"steps": 3}))
    assert "micro_batch: 16 of an update's 16 rows at once, as the run began" in (
        capsys.readouterr().out
    )
    assert starts(run)[-1]["micro_batch"] == 16
    file.write_text(file.read_text().replace('"devices": "8 x', '"devices": "9 x'))
    train.main(command(run, cache, micro_batch=0, **least | {"steps": 4}))
    assert line in capsys.readouterr().out
    assert starts(run)[-1].items() >= facts.items()


def test_prompt_lengths_that_are_left_open(tmp_path):
    """A run with `data.prompt_buckets=` is that with the same lengths given."""
    cache, least = tmp_path / "cache", {"steps": 1, "health.teacher_every": 0}
    train.main(command(tmp_path / "a", cache, **least, **{"data.prompt_buckets": ""}))
    train.main(command(tmp_path / "b", cache, **least, **{"data.prompt_buckets": "16"}))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_plan_decides_too(capsys, tmp_path):
    file = tmp_path / "plan.json"
    given = ["--config=configs/demo.py", "--topology=h100:1", "--compile=none"]
    open_ = ["--config.micro_batch=0", "--config.data.prompt_buckets=", f"--output={file}"]
    plan.main([*given, *open_])
    assert "note: micro_batch: 64 of an update's 256 rows at once" in capsys.readouterr().out
    assert json.loads(file.read_text())["micro_batch"] == 64
    plan.main([*given, *open_, "--config.memory_gib=0.03"])
    found = json.loads(file.read_text())
    assert found["micro_batch"] < 64
    assert max(found["estimated_need"][phase] for phase in LEARNING) <= 0.03 * GIB
