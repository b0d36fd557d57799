"""One run on one process or several: the same numbers, the same files, and no hang."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import HANG_S, finish, wait_until, xla_flags
from local_server import LocalServer
from run_draws import ALL, assert_drawn_by_a_run, samples_of, steps_in_common
from test_train import ROOT, TINY

from kdrl_jax import convert, processes
from kdrl_jax.data import load_tokenizer
from kdrl_jax.training.metrics import CLOCKED, read_metrics

COMMAND = [sys.executable, "-m", "kdrl_jax.train", f"--config={ROOT}/configs/demo.py"]
STEPS = 5
SETTINGS = TINY | {
    "steps": STEPS,
    "process_timeout_s": HANG_S,
    "seed": 1,
    # Good enough to be right now and then.
    "data.task_args": '{"min_terms": 2, "max_terms": 2, "max_operand": 3, "max_value": 20}',
    "student.shape.hidden_size": 32,
    "student.shape.mlp_size": 64,
    "student.sft.steps": 150,
    "student.sft.batch_size": 32,
    "student.sft.problems": 24,
    "data.size": 24,
    "teacher.sft.problems": 24,
    "rollout.max_new_tokens": 24,
    "optimizer.learning_rate": 1e-3,
    "rollout.prompts_per_step": 8,
    "micro_batch": 16,
    "eval.every": 5,
    "eval.problems": 8,
    "mesh.data": 1,
    "mesh.fsdp": -1,
    **ALL,
}


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(workdir, cache, count=1, devices=8, changes=({},), folders=(ROOT,)):
    """The command in `count` processes with `devices` devices each, found by hand.

    Args:
      changes, folders: of each process; the last ones of those that follow as well.
    """
    port, started = free_port(), []
    for index in range(count):
        settings = SETTINGS | {"cache_dir": str(cache)} | changes[min(index, len(changes) - 1)]
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        environment = os.environ | {
            "XLA_FLAGS": xla_flags(devices),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        if count > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
        started.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "kdrl_jax.train",
                    f"--config={ROOT / 'configs/demo.py'}",
                    f"--workdir={workdir}",
                    *flags,
                ],
                cwd=folders[min(index, len(folders) - 1)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def run(workdir, cache, *args, **changes):
    said, codes = finish(start(workdir, cache, *args, changes=(changes,)), f"the run in {workdir}")
    assert codes == [0] * len(codes), said
    return metrics(workdir)


def metrics(workdir):
    found = read_metrics(Path(workdir) / "metrics.jsonl")
    return {
        row["step"]: {k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in found
    }


def samples(workdir, steps):
    """What was said, to the byte; and the numbers of tokens, which may differ by rounding."""
    words, numbers = {}, {}
    for step, rows in samples_of(workdir).items():
        for i, row in enumerate(rows if step <= steps else []):
            told = [[row.pop("advantage")], row.pop("log_probs"), row.pop("teacher_log_probs")]
            numbers[step, i] = np.concatenate(told).astype(float)
            words[step, i] = row
    return words, numbers


def assert_same_run(workdir, expected, cache):
    """Up to the first draw within rounding of the boundary between two tokens, if there is one.

    All that either run drew lies where the weights of its step have it.
    """
    (start,) = cache.glob("student-*")
    assert_drawn_by_a_run(workdir, start)
    steps = steps_in_common(workdir, expected)
    assert_same(metrics(workdir), metrics(expected), range(steps + 1))
    (words, numbers), (other_words, other_numbers) = (
        samples(workdir, steps),
        samples(expected, steps),
    )
    assert words == other_words
    for place, values in other_numbers.items():  # written with four digits
        np.testing.assert_allclose(numbers[place], values, atol=1.5e-4, err_msg=str(place))


def assert_same(found, expected, steps):
    for step in steps:
        shared = found[step].keys() & expected[step].keys()
        # A run evaluates after its last step too.
        assert all(x.startswith("eval/") for x in found[step].keys() ^ expected[step].keys())
        for name in sorted(shared):
            value = expected[step][name]
            np.testing.assert_allclose(
                found[step][name], value, rtol=1e-5, atol=1e-5, err_msg=f"{name} at step {step}"
            )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """The run on one device, which also makes the models that all others start from."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run(workdir, cache, 1, 1)
    (start,) = cache.glob("student-*")
    assert_drawn_by_a_run(workdir, start)
    return workdir


def test_one_device_eight_devices_and_two_processes_are_one_run(alone, cache, tmp_path):
    expected = metrics(alone)
    assert sorted(expected) == list(range(STEPS + 1))
    assert expected[STEPS]["kl/teacher"] > 0
    layouts = {
        "eight devices": ((1, 8), {"mesh.fsdp": 4, "mesh.context": 2}),
        "two processes": ((2, 4), {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.data": 2}),
    }
    for name, (how, changes) in layouts.items():
        workdir = tmp_path / name
        assert sorted(run(workdir, cache, *how, **changes)) == sorted(expected)
        assert_same_run(workdir, alone, cache)


def test_a_run_goes_on_elsewhere(alone, cache, tmp_path):
    """From two processes of 4 devices to one, with another layout."""
    workdir = tmp_path / "run"
    run(workdir, cache, 2, 4, steps=2)
    assert sorted(run(workdir, cache, 1, 4, **{"mesh.tensor": 2})) == list(range(STEPS + 1))
    assert_same_run(workdir, alone, cache)


def test_processes_share_the_requests_to_a_server(alone, cache, tmp_path):
    convert.to_hf(alone, tmp_path / "hf")
    encode = load_tokenizer(alone / "model").encode
    with LocalServer(tmp_path / "hf", encode=encode) as server:
        changes = {"rollout.server.url": server.url, "rollout.server.model": "student"}
        changes |= {"steps": 2, "eval.every": 2, "tis_cap": 2.0}
        expected = run(tmp_path / "one", cache, 1, 4, **changes)
        asked = len(server.asked)
        found = run(tmp_path / "two", cache, 2, 2, **changes)
        assert len(server.asked) - asked <= asked + 16  # each process looks at the server first
    # The weights that draw step 1 are the same to the bit; those of step 2 but for rounding.
    steps = steps_in_common(tmp_path / "two", tmp_path / "one")
    assert steps >= 1
    assert_same(found, expected, range(steps + 1))
    assert abs(found[2]["mismatch/kl"]) < 1e-4
    assert abs(expected[2]["mismatch/kl"]) < 1e-4


def test_told_to_stop_all_save_and_stop(cache, alone, tmp_path):
    workdir = tmp_path / "run"
    started = start(workdir, cache, 2, 4, ({"steps": 500, "eval.every": 0},))
    wait_for_steps(workdir, started)
    started[1].send_signal(signal.SIGTERM)  # not the one that writes
    said, codes = finish(started, "both processes of a run that was told to stop")
    assert codes == [75, 75], said
    summary = json.loads((workdir / "summary.json").read_text())
    assert not summary["finished"]
    assert (workdir / "checkpoints" / str(summary["steps"])).is_dir()
    assert "nothing is lost, the same command goes on" in said[0]


def wait_for_steps(workdir, started):
    """Returns when two steps are logged."""

    def ready():
        ended = any(process.poll() is not None for process in started)
        assert not ended, finish(started, "processes of which one has ended")
        return len(read_metrics(workdir / "metrics.jsonl")) >= 2

    try:
        wait_until(ready, "two steps of two processes")
    except AssertionError as late:
        for process in started:
            process.kill()
        raise AssertionError(str(late), finish(started, "killed processes")) from None


def test_a_lost_process_ends_the_others_by_name(cache, alone, tmp_path):
    workdir = tmp_path / "run"
    # No save, in which the coordinator alone would notice and say it in its own words; and time for
    # a collective to notice before the coordinator ends everything.
    changes = ({"steps": 500, "process_timeout_s": 20.0, "eval.every": 0, "checkpoint.every": 500},)
    started = start(workdir, cache, 2, 2, changes)
    wait_for_steps(workdir, started)
    started[1].kill()
    said, codes = finish(started, "the process that is left")
    assert codes[0] not in (0, 2, 75)
    assert "another process of this run is lost" in said[0]
    assert "stopped sending heartbeats):\n1" in said[0].replace("\r", "")


def test_processes_that_disagree_do_not_start(cache, alone, tmp_path):
    workdir = tmp_path / "run"
    started = start(workdir, cache, 2, 2, ({}, {"seed": 2}))
    said, codes = finish(started, "two processes that disagree")
    assert codes == [2, 2]
    for text in said:
        assert "--config: process 1 = " in text
        assert "has another configuration than the rest" in text
    assert not workdir.exists()


@pytest.mark.parametrize("fault", ["missing", "other"])
def test_data_that_one_host_has_not_is_an_error_on_both(fault, cache, alone, tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    for host, folder in enumerate(folders):
        folder.mkdir()
        rows = [
            {"id": str(i), "problem": f"{i} + {host} =", "answer": str(i + host)} for i in range(16)
        ]
        if fault == "other" or host == 0:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "data.jsonl").write_text(text)
    own = {"data.path": "data.jsonl", "data.task": "", "data.task_args": "", "eval.every": 0}
    own |= {f"{role}.sft.task": "arithmetic" for role in ("student", "teacher")}
    model = {"student.path": str(alone), "student.sft.steps": 0}
    started = start(tmp_path / "run", cache, 2, 2, (own | model,), folders=folders)
    said, codes = finish(started, "two processes of which one lacks data")
    assert codes == [2, 2], said
    expected = {
        "missing": "data.path: no file data.jsonl (process 1 = ",
        "other": "has another set of training problems than the rest",
    }
    assert all(expected[fault] in text for text in said), said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES: not set, but JAX_PROCESS_ID is"),
        (
            {"JAX_PROCESS_ID": "x", "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1"},
            "JAX_PROCESS_ID: 'x' is no number",
        ),
        (
            {"JAX_PROCESS_ID": "2", "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1"},
            "JAX_PROCESS_ID: 2 must be below JAX_NUM_PROCESSES",
        ),
    ],
)
def test_half_a_description_by_hand_is_refused(given, said, monkeypatch):
    for name in processes.BY_HAND:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(processes.UserError, match=said):
        processes.start(10)


def test_what_processes_have_is_put_together(monkeypatch):
    """As if a second process had other and more lists."""
    others = iter([np.array([3, 4]), np.array([0, 4, 0]), np.array([7, 8, 9, 10])])
    monkeypatch.setattr(processes, "gather", lambda x: np.stack([x, next(others)]))
    assert processes.gather_rows([[1], [2, 3]]) == [[[1], [2, 3]], [[], [7, 8, 9, 10], []]]


def test_alone_there_is_nobody_to_ask():
    assert (processes.index(), processes.count(), processes.is_first()) == (0, 1, True)
    assert processes.gather_text("a\nb") == ["a\nb"]
    assert processes.gather_rows([[1, 2], [], [3]]) == [[[1, 2], [], [3]]]
    assert processes.gather_rows([]) == [[]]
    assert processes.any_of(True)
    assert not processes.any_of(False)
    processes.agree("here", {"this": "that"})
    with pytest.raises(processes.UserError, match=r"^wrong$"), processes.together():
        raise processes.UserError("wrong")


def test_others_do_not_wait_for_one_that_has_failed(monkeypatch):
    """Whatever it raised: they hear what and where, it raises the same."""
    told = []
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "hosts", lambda: ["0 on a", "1 on b"])
    monkeypatch.setattr(processes, "gather_text", lambda text: told.append(text) or ["", text])
    with pytest.raises(ZeroDivisionError), processes.together():
        raise ZeroDivisionError("of mine\nindeed")
    assert told == ["ZeroDivisionError: of mine\nindeed"]
    monkeypatch.setattr(processes, "gather_text", lambda text: [text, told[0]])
    with pytest.raises(processes.UserError) as caught, processes.together():
        pass
    assert caught.value.problems[0] == "ZeroDivisionError: of mine (process 1 on b)"
    with pytest.raises(jax.errors.JaxRuntimeError), processes.together():
        raise jax.errors.JaxRuntimeError("the network")  # which nobody can be told by
    assert len(told) == 1
