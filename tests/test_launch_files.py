"""The files of launch/ say what Slurm, SkyPilot, Kubernetes and Docker accept, and what exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib

import pytest
import yaml
from launch_cases import ROOT

from kdrl_jax.cli import parse_config_args
from kdrl_jax.config import read_config
from kdrl_jax.training.validation import validate

LAUNCH = ROOT / "launch"
SKYPILOT = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
JOBSET = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", sorted(p for p in LAUNCH.iterdir() if p.is_file()), ids=str)
def test_configs_and_keys_exist(file):
    text = file.read_text(encoding="utf-8")
    for config in re.findall(r"--config=(configs/[\w/]+\.py)", text):
        keys = re.findall(r"--config\.([\w.]+)=", text)
        _, problems = read_config(ROOT / config, [f"{key}=x" for key in keys])
        assert not [p for p in problems if "no such" in p or "unknown" in p], problems
    for key in re.findall(r"mind ([a-z]+\.[a-z]+)", text):
        _, problems = read_config(ROOT / "configs/base.py", [f"{key}=5"])
        assert not problems


# --- Slurm -------------------------------------------------------------------------------------

# What `man sbatch` allows, as far as it is used here.
SBATCH = {
    "job-name": r"\w+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\d+[KMGT]?",
    "time": r"(\d+-)?\d+(:\d+){1,2}",
    "output": r"[\w%./-]+",
    "open-mode": r"append|truncate",
    "requeue": None,
    "signal": r"([BR]:)?[A-Z]+\d?@\d{1,5}",
}


def test_slurm_directives():
    lines = (LAUNCH / "slurm.sbatch").read_text(encoding="utf-8").splitlines()
    directives = dict(
        re.fullmatch(r"#SBATCH --([\w-]+)(?:=(\S+))?", line).groups()
        for line in lines
        if line.startswith("#SBATCH")
    )
    for name, value in directives.items():
        pattern = SBATCH[name]
        assert value is None if pattern is None else re.fullmatch(pattern, value), name
    first_command = next(i for i, line in enumerate(lines) if line and line[0] != "#")
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])  # unread there
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]
    assert directives["signal"].startswith("TERM@")  # to the tasks, not to the script
    assert "requeue" in directives


# --- SkyPilot ----------------------------------------------------------------------------------


def test_skypilot_task():
    """SkyPilot's own reading where it is installed; the shape of the file in any case."""
    assert set(SKYPILOT) == {
        *("name", "workdir", "num_nodes", "envs", "resources", "file_mounts", "setup", "run")
    }
    assert SKYPILOT["file_mounts"]["/runs"]["store"] == "gcs"  # several nodes write one checkpoint
    assert all(
        re.fullmatch(r"[\w-]+:\d+", r["accelerators"]) for r in SKYPILOT["resources"]["any_of"]
    )
    sky = pytest.importorskip("sky", reason="needs skypilot")
    task = sky.Task.from_yaml_config(
        dict(SKYPILOT), env_overrides=[("BUCKET", "my-runs"), ("RUN", "a"), ("ARGUMENTS", "b")]
    )
    assert task.num_nodes == 2
    assert list(task.storage_mounts) == ["/runs"]


# --- Kubernetes --------------------------------------------------------------------------------

TEXT, LIST = {"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}
COUNT = {"type": "integer", "minimum": 1}


def exactly(required: str, **properties) -> dict:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


# The fields of jobset.x-k8s.io/v1alpha2 that are used; the Job within is Kubernetes' own.
JOBSET_SCHEMA = exactly(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=exactly("name", name={"pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}, annotations={}),
    spec=exactly(
        "replicatedJobs",
        failurePolicy=exactly(
            "maxRestarts",
            maxRestarts=COUNT,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
            rules={
                "type": "array",
                "items": exactly(
                    "name action",
                    name={"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={
                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                    },
                    onJobFailureReasons=LIST,
                ),
            },
        ),
        replicatedJobs={
            "type": "array",
            "items": exactly("name template", name=TEXT, replicas=COUNT, template={}),
        },
    ),
)


def the_job() -> dict:
    (replicated,) = JOBSET["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_jobset_schema():
    jsonschema = pytest.importorskip("jsonschema", reason="needs kubernetes-validate (test extra)")
    jsonschema.Draft202012Validator(JOBSET_SCHEMA).validate(JOBSET)
    broken = json.loads(json.dumps(JOBSET))
    broken["spec"]["failurePolicy"]["maxRestart"] = 3
    assert not jsonschema.Draft202012Validator(JOBSET_SCHEMA).is_valid(broken)


def test_job_within_is_valid():
    check = pytest.importorskip("kubernetes_validate", reason="needs the test extra")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "kdrl-slice-0"}}
    check.validate(job | {"spec": the_job()}, check.latest_version(), strict=True)
    broken = json.loads(json.dumps(job | {"spec": the_job()}))
    broken["spec"]["template"]["spec"]["restart"] = "Never"
    with pytest.raises(check.ValidationError):
        check.validate(broken, check.latest_version(), strict=True)


def test_jobset_restarts_all_but_the_users_mistake():
    job, policy = the_job(), JOBSET["spec"]["failurePolicy"]
    assert policy["rules"][0]["action"] == "FailJobSet"
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    (rule,) = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [2, 3],
    }
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert pod["terminationGracePeriodSeconds"] > 30  # the default


def test_jobset_fills_its_slice():
    job = the_job()
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert job["completions"] == job["parallelism"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    mounts = [m["mountPath"] for m in container["volumeMounts"]]
    (workdir,) = [a.partition("=")[2] for a in container["args"] if a.startswith("--workdir=")]
    assert any(workdir.startswith(f"{mount}/") for mount in mounts)
    assert container["command"] == ["python", "-m", "kdrl_jax.train"]


def test_jobset_arguments_are_a_run():
    (container,) = the_job()["template"]["spec"]["containers"]
    config, workdir = parse_config_args(container["args"], None)
    assert str(workdir).startswith("/runs/")  # where the bucket is mounted
    validate(config)
    # All hosts have one cache of the hub, on the bucket.
    assert {"name": "HF_HOME", "value": "/runs/huggingface"} in container["env"]


# --- Image -------------------------------------------------------------------------------------


def test_dockerfile():
    text = (LAUNCH / "Dockerfile").read_text(encoding="utf-8")
    allowed = (LAUNCH / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    copied = [name for line in re.findall(r"^COPY (.*)", text, re.M) for name in line.split()[:-1]]
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in allowed, name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"EXTRAS=([\w,]+)", text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    for needed in (project["readme"], *project["license-files"], "pyproject.toml", "kdrl_jax"):
        assert needed in copied
    (entry,) = re.findall(r"^ENTRYPOINT (.*)", text, re.M)
    assert json.loads(entry) == ["python", "-m", "kdrl_jax.train"]  # no shell before SIGTERM


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint")
def test_hadolint():
    command = ["hadolint", LAUNCH / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
