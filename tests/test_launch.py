"""launch/ starts the program, carries it over preemptions and leaves the user's mistakes alone."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from commands import finish, wait_until
from launch_cases import RECORD, ROOT, Cluster, executable
from test_train import command

from kdrl_jax.cli import parse_config_args
from kdrl_jax.training.metrics import read_metrics
from kdrl_jax.training.validation import validate
from kdrl_jax.types import UserError

LAUNCH = ROOT / "launch"
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
SKYPILOT = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
TRAIN = ("--config=configs/demo.py", "--workdir=/shared/a run")


# --- Shell -------------------------------------------------------------------------------------


def shells(folder: Path) -> list[Path]:
    """Every shell script, those within YAML files written to `folder`."""
    found = list(SHELL)
    for part in ("setup", "run"):
        found.append(folder / f"skypilot_{part}.sh")
        found[-1].write_text("#!/usr/bin/env bash\n" + SKYPILOT[part])
    return found


def test_shell_parses(tmp_path):
    for file in shells(tmp_path):
        done = subprocess.run(["bash", "-n", file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck (test extra)")
def test_shellcheck(tmp_path):
    command = ["shellcheck", "--external-sources", "--shell=bash", *shells(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# --- Environment of a machine ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "extras"),
    [("slurm.sbatch", "cuda,data"), ("tpu_worker.sh setup", "tpu,data")],
)
def test_a_bare_machine_gets_an_environment(tmp_path, script, extras):
    cluster = Cluster(tmp_path)
    cluster.without_python()
    told = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(cluster.checkout), "KDRL_PLAN": "0"}
    code, output = cluster.run("bash", "-c", f"bash launch/{script}", **told)
    assert code == 0, output
    uv, pip, *_ = cluster.calls()
    assert uv == ["uv", "venv", "--quiet", "--seed", "--python", "3.12", ".venv"]
    assert pip[:3] == ["-m", "pip", "install"]
    assert pip[-2:] == ["--editable", f".[{extras}]"]


def test_the_newest_of_everything_has_an_environment_of_its_own(tmp_path):
    """Nothing of the usual one is changed, and all that the tests can use is there."""
    cluster = Cluster(tmp_path)
    (cluster.checkout / ".venv").rename(cluster.checkout / ".venv-newest")
    for program in (cluster.venv / "bin" / "python", cluster.bin / "ruff", cluster.bin / "mypy"):
        executable(program, f"#!{sys.executable}\n{RECORD}")
    code, output = cluster.run("bash", "launch/test.sh", "-k", "x", KDRL_NEWEST="1", KDRL_TORCH="2")
    assert code == 0, output
    assert not (cluster.checkout / ".venv").exists()
    install, versions, *checks = [call for call in cluster.calls() if "-c" not in call]
    assert install[1:4] == ["-m", "pip", "install"]
    options = ["--upgrade", "--upgrade-strategy", "eager"]
    assert install[-5:] == [*options, "--editable", ".[test,reasoning,tpu,parity]"]
    assert versions[1:4] == ["-m", "pip", "list"]
    assert [call[0] for call in checks] == ["ruff", "ruff", "mypy", "python"]
    assert checks[-1][1:3] == ["-m", "pytest"]
    assert checks[-1][-2:] == ["-k", "x"]


def test_the_newest_of_everything_needs_a_python_of_its_kind(tmp_path):
    cluster = Cluster(tmp_path)
    too_old = f"#!{sys.executable}\n{RECORD}\nsys.exit('3, 12' in ' '.join(sys.argv))\n"
    executable(cluster.bin / "python3.12", too_old)
    code, output = cluster.run("bash", "launch/test.sh", KDRL_NEWEST="1")
    assert code == 2
    assert output.startswith("error: the newest releases need Python 3.12 or newer: set PYTHON")
    assert not any("pip" in call for call in cluster.calls())


def test_ci_tries_the_newest_of_everything_weekly():
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    workflow = yaml.load(text, yaml.BaseLoader)  # in which `on` is no boolean
    assert len(workflow["on"]["schedule"][0]["cron"].split()) == 5
    job = workflow["jobs"]["newest"]
    tests = [step for step in job["steps"] if step.get("run") == "bash launch/test.sh"]
    assert [step["env"]["KDRL_NEWEST"] for step in tests] == ["1"]
    assert "schedule" in job["continue-on-error"]


# --- Demo --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 75], ids=["finished", "stopped"])
def test_the_demo_says_what_comes_next(tmp_path, monkeypatch, code):
    cluster = Cluster(tmp_path)
    ends = "sys.exit(int(os.environ['CODE']) if 'kdrl_jax.train' in sys.argv else 0)"
    executable(cluster.venv / "bin" / "python", f"#!{sys.executable}\n{RECORD}{ends}\n")
    ended, output = cluster.run("bash", "launch/demo.sh", "--config.steps=2", CODE=str(code))
    assert ended == code, output
    pip, train, *rest = [call[2:] for call in cluster.calls()]
    assert (pip[0], pip[-1]) == ("pip", ".[plot]")
    run = ["--config=configs/demo.py", "--workdir=runs/demo"]
    assert train == ["kdrl_jax.train", *run, "--config.steps=2"]
    assert rest == ([] if code else [["kdrl_jax.report", "runs/demo"]])
    printed = dict(re.findall(r"^  python -m (kdrl_jax\.\w+) (.*)$", output, re.MULTILINE))
    if code:
        assert not printed
        return
    config, workdir = parse_config_args(shlex.split(printed.pop("kdrl_jax.train")), "")
    assert (config.objective, workdir) == ("grpo", Path("runs/demo_grpo"))
    validate(config)
    monkeypatch.chdir(tmp_path)  # where there is no such run, which is all that may be wrong
    assert set(printed) == {"kdrl_jax.report", "kdrl_jax.convert"}
    for module, arguments in printed.items():
        with pytest.raises(UserError, match=r"^runs/demo: "):
            importlib.import_module(module).main(shlex.split(arguments))


# --- TPU VMs -----------------------------------------------------------------------------------

POD = ("bash", "launch/tpu_pod.sh", "pod", "--zone=z", "--project=p")
NEW = (*POD, "--type=v6e-8", "--runtime=v2-alpha-tpuv6e", "--spot", "--delete")


def pod(cluster: Cluster) -> tuple[str, ...]:
    """Workers get the environment of the stand-in instead of an install."""
    return (*NEW, f"--setup=ln -sfn {cluster.venv} kdrl_jax/.venv", "--", *TRAIN)


def verbs(calls: list[list[str]]) -> list[str]:
    """'create', 'scp', 'run', …; looking does not count."""
    found = []
    for call in calls:
        command = next((a for a in call if a.startswith("--command=")), "")
        names = re.findall(r"tpu_worker\.sh (\w+)|(tar|ln) ", command)
        found.append(next(filter(None, names[0]), "") if names else call[4])
    return [verb for verb in found if verb != "describe"]


INSTALL = ["scp", "tar", "ln", "setup"]


def test_pod_is_made_again_after_a_preemption(tmp_path):
    cluster = Cluster(tmp_path)
    code, output = cluster.run(*pod(cluster), KDRL_PLAN="lost 75 0")
    assert code == 0, output
    again = ["delete", "create", *INSTALL, "run"]  # the slice is gone
    assert verbs(cluster.calls()) == ["create", *INSTALL, "run", *again, "run", "delete"]
    assert len(cluster.starts()) == 6
    assert all(start["argv"] == list(TRAIN) for start in cluster.starts())
    assert "worker0 lost step 1" in output  # the log is shown
    assert not (cluster.fake / "tpu").exists()


def test_pod_is_left_alone_while_gcloud_cannot_tell(tmp_path):
    cluster = Cluster(tmp_path)
    code, output = cluster.run(*pod(cluster), KDRL_PLAN="blip 0")
    assert code == 0, output
    assert verbs(cluster.calls()) == ["create", *INSTALL, "run", "run", "delete"]
    (cluster.fake / "blip").write_text(".")
    code, output = cluster.run(*pod(cluster), KDRL_PLAN="0")
    assert code == 1
    assert "UNAVAILABLE" in output
    assert verbs(cluster.calls())[-1] == "delete"  # of the first run, and nothing since


def test_dry_run_of_a_pod_prints_what_is_run(tmp_path):
    cluster = Cluster(tmp_path)
    command = [*pod(cluster)[: -len(TRAIN) - 1], "--dry-run", "--", *TRAIN]
    code, output = cluster.run(*command)
    assert code == 0, output
    assert not cluster.calls()
    printed = [shlex.split(line) for line in output.splitlines()]
    assert cluster.run(*pod(cluster), KDRL_PLAN="0")[0] == 0
    done = [call for call in cluster.calls() if call[4] != "describe"]
    scp = verbs(done).index("scp")  # its file is temporary
    for line in (printed[scp], done[scp]):
        line[5] = Path(line[5]).name
    assert printed == done


def test_pod_stops_at_the_users_mistake(tmp_path):
    cluster = Cluster(tmp_path)
    code, output = cluster.run(*pod(cluster), KDRL_PLAN="2")
    assert code == 2, output
    assert verbs(cluster.calls()) == ["create", *INSTALL, "run", "delete"]


def test_pod_gives_up_on_a_crash_that_comes_again(tmp_path):
    cluster = Cluster(tmp_path)
    code, output = cluster.run(*pod(cluster), KDRL_PLAN="1 1 1")
    assert code == 1
    assert verbs(cluster.calls()).count("run") == 3
    assert "three crashes" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_stopping_a_pod_saves_first(tmp_path, number):
    cluster = Cluster(tmp_path)
    process = cluster.popen(*pod(cluster), KDRL_PLAN="term")
    wait_until(lambda: len(cluster.starts()) == 2, "both workers to start")
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:  # a terminal signals all its processes
        os.killpg(process.pid, number)
    (output,), _ = finish([process], "the launcher that was told to stop")
    assert process.returncode == 75, output
    assert verbs(cluster.calls())[-3:] == ["run", "stop", "delete"]


def test_a_lost_connection_attaches_again(tmp_path):
    cluster = Cluster(tmp_path)
    home = cluster.fake / "worker0"
    (home / "kdrl_jax").mkdir(parents=True)
    shutil.copytree(LAUNCH, home / "kdrl_jax" / "launch")
    (home / "kdrl_jax" / ".venv").symlink_to(cluster.venv)
    worker = ("bash", str(home / "kdrl_jax" / "launch" / "tpu_worker.sh"))
    here = {"HOME": str(home), "KDRL_PLAN": "term 0"}
    first = cluster.popen(*worker, "run", *TRAIN, **here)
    wait_until(lambda: len(cluster.starts()) == 1, "the worker to start")
    first.kill()
    second = cluster.popen(*worker, "run", *TRAIN, **here)
    time.sleep(0.5)
    assert second.poll() is None
    assert cluster.run(*worker, "stop", **here)[0] == 0
    (output,), _ = finish([second], "the second connection")
    assert "worker0 term step 1" in output  # from the start of the log
    assert "kdrl-exit 75" in output
    assert second.returncode == 75
    assert len(cluster.starts()) == 1
    assert cluster.run(*worker, "run", *TRAIN, **here)[0] == 0  # a new start, not the old code


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("pod", "--", "--config=x"), "--zone"),
        (("pod", "--zone=z", "--sport", "--", "--config=x"), "--sport"),
        (("pod", "--zone=z", "--type=v6e-8", "--", "--config=x"), "--runtime"),
        (("pod", "--zone=z"), "kdrl_jax.train"),
        (("absent", "--zone=z", "--", "--config=x"), "absent"),
    ],
)
def test_pod_refuses(tmp_path, arguments, names):
    cluster = Cluster(tmp_path)
    code, output = cluster.run("bash", "launch/tpu_pod.sh", *arguments)
    assert code == 2
    assert re.search(rf"error: .*{names}", output), output
    assert not [verb for verb in verbs(cluster.calls()) if verb]


# --- Slurm -------------------------------------------------------------------------------------


def new_job() -> str:
    """A job's number that no other has: JAX makes the coordinator's port of it."""
    for job in random.sample(range(4096), 100):
        with contextlib.closing(socket.socket()) as there:
            if there.connect_ex(("127.0.0.1", 65536 - 4096 + job)):
                return str(4096 + job)
    raise RuntimeError("no free port")


def slurm(cluster: Cluster, *arguments: str, **env: str) -> list[int]:
    """Exit codes of a job and of its restarts, as Slurm would make them."""
    codes: list[int] = []
    number = cluster.job = new_job()
    while len(codes) < 5:
        job = {
            "SLURM_JOB_ID": number,
            "SLURM_SUBMIT_DIR": str(cluster.checkout),
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_RESTART_COUNT": str(len(codes)),
        }
        requeued = cluster.calls().count(["scontrol", "requeue", number])
        code, output = cluster.run("bash", "launch/slurm.sbatch", *arguments, **job, **env)
        print(output)
        codes.append(code)
        if cluster.calls().count(["scontrol", "requeue", number]) == requeued:
            break
    return codes


@pytest.mark.parametrize(
    ("plan", "codes"),
    [
        ("75 0", [75, 0]),
        ("0", [0]),
        ("2", [2]),  # the user's mistake
        ("3", [3]),  # stopped by a watch
        ("1", [1]),  # a crash at once
    ],
)
def test_slurm_requeues_what_was_saved(tmp_path, plan, codes):
    cluster = Cluster(tmp_path)
    assert slurm(cluster, *TRAIN, KDRL_PLAN=plan) == codes
    step = ["--kill-on-bad-exit=0", "--wait=300", "--cpus-per-task=3"]
    once = [["srun", *step, "python", "-m", "kdrl_jax.train", *TRAIN]]
    requeue = [["scontrol", "requeue", cluster.job]]
    assert cluster.calls() == (once + requeue) * (len(codes) - 1) + once


def test_slurm_requeues_a_crash_after_long_work(tmp_path):
    cluster = Cluster(tmp_path)
    assert slurm(cluster, *TRAIN, KDRL_PLAN="1 2", KDRL_CRASH_SECONDS="0") == [1, 2]


def test_slurm_warning_saves_and_continues(tmp_path):
    cluster = Cluster(tmp_path)
    (cluster.fake / "signal").touch()
    assert slurm(cluster, *TRAIN, KDRL_PLAN="term 0") == [75, 0]


def test_slurm_leaves_a_cancelled_job(tmp_path):
    cluster = Cluster(tmp_path)
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(cluster.checkout), "KDRL_PLAN": "term"}
    process = cluster.popen("bash", "launch/slurm.sbatch", *TRAIN, **job)
    wait_until(lambda: len(cluster.starts()) == 2, "both workers to start")
    process.send_signal(signal.SIGTERM)  # scancel signals the script and all tasks
    for start in cluster.starts():
        os.kill(start["pid"], signal.SIGTERM)
    (output,), _ = finish([process], "the job that was cancelled")
    assert process.returncode == 75, output
    assert cluster.calls()[-1][0] == "srun"


def test_slurm_of_the_program_itself_refuses_once(tmp_path):
    cluster = Cluster(tmp_path, real_trainer=True)
    arguments = ("--config=configs/demo.py", f"--workdir={tmp_path / 'run'}", "--config.stepz=1")
    assert slurm(cluster, *arguments) == [2]
    assert len(cluster.calls()) == 1


def test_slurm_carries_the_program_itself_over_a_preemption(tmp_path):
    """Two tasks train together; one is warned, both save, and the job goes on."""
    cluster, workdir = Cluster(tmp_path, real_trainer=True), tmp_path / "run"

    def warn():
        written = workdir / "metrics.jsonl"
        wait_until(
            lambda: written.exists() and len(written.read_text().splitlines()) > 1,
            "the first steps of the job",
        )
        os.kill(max(processes_of(str(workdir))), signal.SIGTERM)

    warning = threading.Thread(target=warn, daemon=True)
    warning.start()
    changes = {"steps": 200, "eval.every": 0, "checkpoint.every": 150}
    assert slurm(cluster, *command(workdir, tmp_path / "cache", **changes)) == [75, 0]
    summary = json.loads((workdir / "summary.json").read_text())
    assert (summary["steps"], summary["processes"]) == (200, 2)
    steps = [row["step"] for row in read_metrics(workdir / "metrics.jsonl")]
    assert steps == list(range(1, 201))


def processes_of(word):
    """Those whose command is Python's and has this in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            text = path.read_text()
            if word in text and "kdrl_jax.train" in text and "python" in text.split("\0")[0]:
                found.append(int(path.parent.name))
    return found


def test_jax_finds_the_processes_of_slurm(tmp_path):
    """By its own detection, from the variables that srun sets in each task."""
    cluster = Cluster(tmp_path)
    probe = tmp_path / "trainer.py"
    probe.write_text(
        "import sys, jax\njax.config.update('jax_cpu_collectives_implementation', 'gloo')\n"
        "jax.distributed.initialize()\n"
        "from jax.experimental.multihost_utils import process_allgather\n"
        "import numpy as np\n"
        "print('sum', process_allgather(np.array([1 + jax.process_index()])).sum())\n"
        "sys.exit(75 if jax.process_count() == 2 else 1)\n"
    )
    code, output = cluster.run(
        "bash",
        "launch/slurm.sbatch",
        *TRAIN,
        SLURM_JOB_ID=new_job(),
        SLURM_SUBMIT_DIR=str(cluster.checkout),
    )
    assert code == 75, output
    assert output.count("sum 3") == 2


def test_dry_run_of_slurm(tmp_path):
    cluster = Cluster(tmp_path)
    code, output = cluster.run("bash", "launch/slurm.sbatch", "--dry-run", *TRAIN)
    assert code == 0
    assert not cluster.calls()
    printed = shlex.split(output.splitlines()[0])
    assert slurm(cluster, *TRAIN, KDRL_PLAN="0") == [0]
    called = cluster.calls()[0]
    assert [a for a in printed if "cpus-per" not in a] == [a for a in called if "cpus-per" not in a]


# --- SkyPilot ----------------------------------------------------------------------------------


def sky(cluster: Cluster, rank: int, nodes: int, gpus: bool, **env: str) -> tuple[int, str]:
    """One node's run section, as SkyPilot gives it to bash."""
    if gpus:
        executable(cluster.bin / "nvidia-smi", "#!/bin/sh\n")
    told = {
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_IPS": "\n".join(f"10.0.0.{i + 1}" for i in range(nodes)),
        "RUN": "stage2",
        "ARGUMENTS": "--config=configs/demo.py '--config.data.filters=()'",
    }
    return cluster.run("bash", "-c", SKYPILOT["setup"] + SKYPILOT["run"], **told | env)


def test_skypilot_tells_jax_the_processes(tmp_path):
    cluster = Cluster(tmp_path)
    for rank in range(2):
        assert sky(cluster, rank, nodes=2, gpus=True, KDRL_PLAN="0")[0] == 0
    for rank, start in enumerate(cluster.starts()):
        assert start["env"]["JAX_COORDINATOR_ADDRESS"] == "10.0.0.1:8476"
        assert start["env"]["JAX_NUM_PROCESSES"] == "2"
        assert start["env"]["JAX_PROCESS_ID"] == str(rank)
        assert start["argv"] == [
            "--workdir=/runs/stage2",
            "--config=configs/demo.py",
            "--config.data.filters=()",
        ]


@pytest.mark.parametrize(("nodes", "gpus"), [(1, True), (4, False)])
def test_skypilot_leaves_jax_to_itself(tmp_path, nodes, gpus):
    """One node needs no variables, and a TPU's hosts know each other."""
    cluster = Cluster(tmp_path)
    assert sky(cluster, 0, nodes, gpus, KDRL_PLAN="0")[0] == 0
    assert set(cluster.starts()[0]["env"]) == {"JAX_PLATFORMS"}


def test_skypilot_recovers_what_was_saved(tmp_path):
    recovered = SKYPILOT["resources"]["job_recovery"]
    assert recovered == {"recover_on_exit_codes": [75]}
    cluster = Cluster(tmp_path)
    plan = {"KDRL_PLAN": "75 2 1 0 134"}
    ends = [sky(cluster, 0, 1, True, **plan)[0] for _ in range(4)]
    assert ends == [75, 2, 1, 0]
    assert sky(cluster, 0, 1, True, KDRL_CRASH_SECONDS="0", **plan)[0] == 75


def test_skypilot_of_the_program_itself_refuses(tmp_path):
    cluster = Cluster(tmp_path, real_trainer=True)
    arguments = "--config=configs/demo.py --config.stepz=1"
    code, output = sky(cluster, 0, 1, True, ARGUMENTS=arguments)
    assert code == 2
    assert "stepz" in output
