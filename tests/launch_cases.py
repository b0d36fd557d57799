"""Stand-ins for the commands that launch/ calls: they record their arguments and play a cluster.

`Cluster` puts gcloud, srun and scontrol on PATH. Trainings are real processes: the program itself,
or a stand-in that ends as it is told: each start takes the next word of KDRL_PLAN, an exit code,
or `term` (wait for SIGTERM, exit with 75), `lost` (the slice is preempted), or `blip` (it crashes
and gcloud cannot be reached for a while).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from commands import finish

ROOT = Path(__file__).resolve().parent.parent

# What a start finds is written to $FAKE/starts.
TRAINER = """
import json, os, pathlib, signal, sys, time
fake, home = pathlib.Path(os.environ["FAKE"]), pathlib.Path(os.environ["HOME"])
if sys.argv[1:3] == ["-m", "pip"]:
    with (fake / "calls").open("a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\\n")
    sys.exit()
assert sys.argv[1:3] == ["-m", "kdrl_jax.train"], sys.argv
rank = os.environ.get("SLURM_PROCID", os.environ.get("JAX_PROCESS_ID", home.name))
told = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "SLURM_"))}
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with (fake / f"plan{rank}").open("a") as done:
    turn = done.tell()
    done.write(".")
with (fake / "starts").open("a") as starts:
    start = {"rank": rank, "pid": os.getpid(), "argv": sys.argv[3:], "env": told}
    starts.write(json.dumps(start) + "\\n")
word = os.environ["KDRL_PLAN"].split()[turn]
print(f"{home.name} {word} step 1", flush=True)
if word == "term":
    time.sleep(3600)
if word == "lost":
    (fake / "tpu").write_text("PREEMPTED")
    (fake / "queue").write_text("SUSPENDED")
    word = "1"
if word == "blip":
    (fake / "blip").write_text("...")
    word = "1"
sys.exit(int(word))
"""

# A slice of two workers: `ssh` runs the command in a home folder for each.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys
fake, args = pathlib.Path(os.environ["FAKE"]), sys.argv[1:]
with (fake / "calls").open("a") as calls:
    calls.write(json.dumps(["gcloud", *args]) + "\\n")
verb, tpu, queue = args[2:4], fake / "tpu", fake / "queue"
homes = [fake / "worker0", fake / "worker1"]
if verb[1] == "describe":
    if (fake / "blip").exists() and (left := (fake / "blip").read_text()):
        (fake / "blip").write_text(left[1:])
        sys.exit("UNAVAILABLE")
    file = tpu if verb[0] == "tpu-vm" else queue
    sys.exit(print(file.read_text()) if file.exists() else "NOT_FOUND")
elif verb[1] == "create":
    assert not queue.exists(), "ALREADY_EXISTS"
    queue.write_text("ACTIVE")
    tpu.write_text("READY")
    for home in homes:
        home.mkdir()
elif verb[1] == "delete":
    for file in (tpu, queue):
        file.unlink(missing_ok=True)
    for home in homes:
        shutil.rmtree(home)
elif verb[1] == "scp":
    for home in homes:
        shutil.copy(args[4], home)
elif verb[1] == "ssh":
    command = next(a for a in args if a.startswith("--command=")).partition("=")[2]
    run = [
        subprocess.Popen(["bash", "-c", command], cwd=h, env={**os.environ, "HOME": str(h)})
        for h in homes
    ]
    sys.exit(next((code for code in [p.wait() for p in run] if code), 0))
"""

SRUN = """
import json, os, pathlib, signal, subprocess, sys, time
fake, args = pathlib.Path(os.environ["FAKE"]), sys.argv[1:]
with (fake / "calls").open("a") as calls:
    calls.write(json.dumps(["srun", *args]) + "\\n")
command = args[next(i for i, a in enumerate(args) if not a.startswith("-")) :]
step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2"}
tasks = [
    subprocess.Popen(
        command, env={**os.environ, **step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
    )
    for i in range(2)
]
if (fake / "signal").exists():  # what --signal=TERM@… does, once both tasks run
    (fake / "signal").unlink()
    while not (fake / "starts").exists() or len((fake / "starts").read_text().split("\\n")) < 3:
        time.sleep(0.05)
    for task in tasks:
        task.send_signal(signal.SIGTERM)
sys.exit(max(task.wait() % 256 for task in tasks))
"""

RECORD = """
import json, os, pathlib, sys
with (pathlib.Path(os.environ["FAKE"]) / "calls").open("a") as calls:
    calls.write(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
"""


class Cluster:
    """A checkout with an environment of its own, and the cluster's commands before PATH."""

    def __init__(self, folder: Path, *, real_trainer: bool = False):
        self.fake, self.bin = folder / "fake", folder / "bin"
        self.checkout, home = folder / "checkout", folder / "home"
        for path in (self.fake, self.bin, self.checkout, home):
            path.mkdir()
        for name in ("launch", "configs"):
            shutil.copytree(ROOT / name, self.checkout / name)
        self.venv = folder / "venv"
        (self.venv / "bin").mkdir(parents=True)
        (self.venv / "bin" / "activate").write_text(f'PATH="{self.venv}/bin:$PATH"\n')
        (folder / "trainer.py").write_text(TRAINER)
        trainer = "" if real_trainer else f"{folder}/trainer.py"
        asked = 'if [ "$1" = -I ]; then [ ! -e "$FAKE/bare" ]; exit; fi'  # is kdrl_jax installed?
        executable(
            self.venv / "bin" / "python",
            f'#!/bin/bash\n{asked}\nexec {sys.executable} {trainer} "$@"\n',
        )
        (self.checkout / ".venv").symlink_to(self.venv)
        for name, code in {"gcloud": GCLOUD, "srun": SRUN, "scontrol": RECORD}.items():
            executable(self.bin / name, f"#!{sys.executable}\n{code}")
        self.env = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(home),
            "FAKE": str(self.fake),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "KDRL_POLL_SECONDS": "0",
        }

    def popen(self, *command: str, **env: str) -> subprocess.Popen[str]:
        """Start a command in the checkout, its output piped, in a session of its own."""
        return subprocess.Popen(
            command,
            cwd=self.checkout,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, **env: str) -> tuple[int, str]:
        """Exit code and output of a command in the checkout."""
        process = self.popen(*command, **env)
        ((output,), _) = finish([process], shlex.join(map(str, command)))
        return process.returncode, output

    def calls(self) -> list[list[str]]:
        """What the stand-ins were called with, in order."""
        return _lines(self.fake / "calls")

    def starts(self) -> list[dict]:
        """What each start of the stand-in trainer found: rank, pid, argv and variables."""
        return _lines(self.fake / "starts")

    def without_python(self) -> None:
        """A machine whose Pythons are too old and that has uv, but no environment yet."""
        (self.checkout / ".venv").unlink()
        (self.fake / "bare").touch()
        for name in ("python3", "python3.11", "python3.12", "python3.13"):
            executable(self.bin / name, "#!/bin/sh\nexit 1\n")
        make = f"import os\nos.symlink({str(self.venv)!r}, '.venv')\n"
        executable(self.bin / "uv", f"#!{sys.executable}\n{RECORD}{make}")


def _lines(file: Path) -> list:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def executable(path: Path, text: str) -> None:
    """Write a program."""
    path.write_text(text)
    os.chmod(path, 0o755)
