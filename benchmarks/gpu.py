"""Everything that is wanted from one GPU, in one command and under ten minutes.

    python benchmarks/gpu.py --output=FILE.json [--tunix=ENV/bin/python] [--trl=ENV/bin/python] \
        [--minutes=9.5] [--tiny]

The other scripts at the sizes a GPU is for, the most wanted first: share of the roofline in
decoding 64 requests and MFU at rows of 4,096 tokens, for models of the shapes of Qwen2.5-1.5B and
SmolLM2-135M; W1 to W5 beside the libraries whose environments are given; what the teacher costs;
growth. Their bars are in their docstrings. FILE.json is rewritten after each script and holds what
it found and printed; scripts that the time is too short for are listed as missing. --tiny runs
all of it at toy sizes, on anything.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
BF16 = ["--dtype=bfloat16"]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tunix", help="python of its environment")
    parser.add_argument("--trl", help="python of its environment")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    result = {"devices": devices(), "done": {}, "missing": []}
    for name, command in jobs(args).items():
        begun = time.monotonic()
        if begun > until:
            result["missing"].append(name)
            continue
        done = run(command, until - begun)
        result["done"][name] = done | {"seconds": time.monotonic() - begun}
        print(f"## {name}\n\n{done['printed']}{done['error']}", flush=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print("Missing for want of time:", ", ".join(result["missing"]) or "nothing")
    args.output.write_text(json.dumps(result, indent=1) + "\n")


def jobs(args) -> dict[str, list[str]]:
    """Commands by name, the most wanted first."""

    def roofline(shape: str, rows: int) -> list[str]:
        sizes = ["--requests=64", "--new=256", f"--rows={rows}", "--length=4096"]
        if args.tiny:
            shape, sizes = "tiny", ["--requests=4", "--new=4", "--rows=2", "--length=64"]
        return ["roofline.py", f"--shape={shape}", *BF16, *sizes]

    # Of an option that is given twice the last counts.
    toy = ["--shape=tiny", "--repeats=1"] if args.tiny else []
    few = [*toy, "--rows=8", "--length=64"] if args.tiny else []
    given = [f"--{k}={v}" for k in ("tunix", "trl") if (v := getattr(args, k))]
    compare = ["peers/compare.py", *BF16, *given, "--rounds=1"]
    shape = ["--shape=smollm2-135m"]
    found = {
        "roofline, qwen1.5b": roofline("qwen1.5b", 4),
        "roofline, smollm2-135m": roofline("smollm2-135m", 16),
    }
    if given:
        found["W1 to W4"] = [*compare, *shape, *few]
        found["W5"] = [*compare, "--workloads=W5", "--shape=small152k", "--length=4096", *few]
    found["teacher's cost"] = ["step_cost.py", *BF16, *shape, "--length=1024", *few]
    sizes = ["--lengths=64,128", "--groups=1,2"] if args.tiny else []
    found["growth"] = ["growth.py", *BF16, *sizes, *toy]
    return found


def run(command: list[str], seconds: float) -> dict:
    """What a script printed and wrote, as far as it got in that time."""
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "found.json"
        full = [sys.executable, str(HERE / command[0]), *command[1:], f"--output={written}"]
        # A session of its own, so that its own processes end with it and let go of the GPU.
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(full, env=env, text=True, start_new_session=True, **pipes) as process:
            try:
                printed, error = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                printed, error = process.communicate()
        found = json.loads(written.read_text()) if written.exists() else None
    error = f"ended with {process.returncode}\n{error[-2000:]}" if process.returncode else ""
    return {"command": command, "found": found, "printed": printed, "error": error}


def devices() -> str:
    """What jax sees, asked in a process that then lets go of it."""
    code = "import jax; print(jax.devices())"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
